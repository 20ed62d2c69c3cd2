"""Cancellations at random moments: in every place where a run may be, twice, and while the server is killed."""

import asyncio
import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable

import pytest

from faults.conftest import PATIENCE, Report, Scale, StartWorker, bring_back
from faults.vendor import Call, Vendor, expected, order
from support import App, ended, on_both, status_when, work
from temporal_async_task import (
    RetryPolicy,
    ServerUnavailableError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    WaitTimeoutError,
    current_step,
    sleep,
    step,
    wait_for,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.task import Execution

pytestmark = pytest.mark.case(12, "cancel")
PLACES: dict[Execution, tuple[str, ...]] = {
    "workflow": ("step", "backoff", "sleep", "event", "end"),
    "activity": ("step", "backoff", "sleep", "end"),
}
Cancellable = TemporalAsyncTask[str, list[str]]
LENGTH = 2.5
"""Seconds that a run takes if it is not cancelled, or somewhat more."""


async def fail_at_first() -> str:
    answer = await order()
    if current_step().attempt == 1:
        raise ConnectionError("not now")
    return answer


async def in_step() -> None:
    await step("work", order, 1.5)


async def in_backoff() -> None:
    await step("work", fail_at_first)


async def in_sleep() -> None:
    await sleep("nap", 1.5)
    await step("work", order)


async def in_event() -> None:
    with contextlib.suppress(WaitTimeoutError):
        await wait_for("news", timeout=1.5)
    await step("work", order)


async def at_end() -> None:
    await step("work", order, 0.1)


async def cancellable(place: str) -> list[str]:
    places: dict[str, Callable[[], Awaitable[None]]] = {
        "step": in_step, "backoff": in_backoff, "sleep": in_sleep, "event": in_event, "end": at_end,
    }  # fmt: skip
    try:
        await step("first", order)
        await places[place]()
        return [await step("last", order)]
    except asyncio.CancelledError:
        await step("cleanup", order)
        raise


def cancellable_task() -> Cancellable:
    retries = RetryPolicy(max_retries=3, initial_delay=1.5, max_delay=1.5, jitter=0)
    return TemporalAsyncTask("cancellable", cancellable, heartbeat_timeout=6, retry_policy=retries)


async def insist_on_cancel(task: Cancellable, task_id: str) -> int:
    """Cancel as an application would, which asks again if the server did not answer. Returns how often it asked."""
    for number in range(1, 100):
        try:
            await task.cancel(task_id, "the customer left")
        except ServerUnavailableError:
            await asyncio.sleep(0.5)
        else:
            return number
    raise AssertionError("the server never answered")


def judge(run: TaskResult[list[str]], calls: list[Call], *, outage: bool) -> str:
    """Completed with all of its results, or cancelled and cleaned up after: nothing between, and nothing after."""
    keys = [call.key for call in calls]
    if run.status is TaskStatus.COMPLETED:
        assert run.result == expected(run.task_id, "last")
        assert "cleanup" not in keys
    else:
        assert (run.status, run.error_type, run.error) == (
            TaskStatus.FAILED,
            "TaskCancelledError",
            "the customer left",
        ), run
        assert run.completed_at is not None
        assert not keys or keys[-1] == "cleanup", "it went on after the cleanup, or did not clean up"
    allowed = 2 if outage else 1
    for key, times in Counter(keys).items():
        assert times <= (2 if key == "work" else allowed), f"{key} of {run.task_id} was called {times} times"
    return run.status


@on_both
async def test_a_run_that_is_cancelled_at_a_random_moment_is_either_completed_or_cancelled_and_cleaned_up(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    task = cancellable_task()
    await app.connect(task)
    for _ in range(2):
        start_worker(__file__, app)
    outcomes: Counter[str] = Counter()
    twice = 0

    async def one(place: str, moment: float, again: float | None) -> None:
        task_id = await task.submit(place)
        await asyncio.sleep(moment)
        await insist_on_cancel(task, task_id)
        if again is not None:
            await asyncio.sleep(again)
            await insist_on_cancel(task, task_id)
        run = await status_when(task, task_id, ended, timeout=PATIENCE)
        outcomes[judge(run, vendor.calls(task_id), outage=False)] += 1

    await task.run("end", timeout=PATIENCE)  # the workers are up
    for _ in range(scale.pick(1, 10)):
        batch = []
        for place in PLACES[app.execution] * scale.pick(4, 8):
            again = chance.uniform(0, 0.5) if chance.random() < 0.5 else None
            twice += again is not None
            moment = chance.uniform(0, 0.6) if place == "end" else chance.uniform(0, LENGTH)
            batch.append(one(place, moment, again))
        await asyncio.gather(*batch)
    report(
        cancelled_at_random=outcomes.total(), twice=twice, completed=outcomes["completed"], cancelled=outcomes["failed"]
    )
    assert outcomes["completed"] > 0, "all were cancelled too early to race with the end"
    assert outcomes["failed"] > 0, "all were cancelled too late"


@on_both
async def test_a_cancellation_around_an_outage_of_the_server_is_kept(
    own_server: DevServer,
    vendor: Vendor,
    start_worker: StartWorker,
    scale: Scale,
    chance: random.Random,
    report: Report,
    execution: Execution,
):
    """The server is killed at a random moment around the cancellation, and comes back two seconds later."""
    app = App(own_server.address, "outage", execution)
    task = cancellable_task()
    await app.connect(task)
    start_worker(__file__, app)
    await task.run("end", timeout=PATIENCE)
    outcomes: Counter[str] = Counter()
    asked: dict[str, int] = defaultdict(int)

    async def one(place: str, moment: float) -> None:
        task_id = await task.submit(place)
        await asyncio.sleep(moment)
        asked[task_id] = await insist_on_cancel(task, task_id)
        run = await told_at_last(task_id)
        outcomes[judge(run, vendor.calls(task_id), outage=True)] += 1

    async def told_at_last(task_id: str) -> TaskResult[list[str]]:
        while True:
            with contextlib.suppress(ServerUnavailableError):
                return await status_when(task, task_id, ended, timeout=PATIENCE)

    async def outage(moment: float) -> None:
        await asyncio.sleep(moment)
        own_server.kill()
        await asyncio.sleep(2)
        await bring_back(own_server)

    rounds = scale.pick(1, 8)
    for _ in range(rounds):
        runs = [one(place, chance.uniform(0.5, 1.5)) for place in PLACES[execution] * 2]
        await asyncio.gather(outage(chance.uniform(0.7, 1.7)), *runs)
    report(
        outages=rounds, runs=outcomes.total(), completed=outcomes["completed"], cancelled=outcomes["failed"],
        asked_again=sum(times > 1 for times in asked.values()),
    )  # fmt: skip
    await app.stop()


if __name__ == "__main__":
    work([cancellable_task()])
