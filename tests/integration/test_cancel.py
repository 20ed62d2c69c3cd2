"""Cancelling: prompt wherever a run stands, told to its body, cleaned up after, and explained in the status."""

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import PauseActivityRequest, ResetActivityRequest, UnpauseActivityRequest
from temporalio.client import Client

from support import (
    FOR_AN_HOUR,
    NEVER_AGAIN,
    App,
    CallLog,
    WorkerProcess,
    backs_off,
    ended,
    status_when,
    wait_until,
    work,
)
from temporal_async_task import (
    RetryPolicy,
    StepState,
    TaskCancelledError,
    TaskNotFoundError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    WaitTimeoutError,
    async_task,
    poll,
    sleep,
    step,
    wait_for,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.engine import attempt, wire

PROMPT = 3.0
"""Seconds in which a cancellation gets through, cleanup included, while many runs and other tests are at work."""
HEARTBEAT = 3.0
"""Seconds; a third of it is the keep-alive interval, in which a running step learns of its cancellation."""


class Vendor:
    """Its calls, in the order in which they came; ``hold`` and what stands for it in a thread do not return."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.let_go = threading.Event()

    async def call(self, what: str) -> str:
        self.calls.append(what)
        return what

    async def hold(self) -> None:
        self.calls.append("work")
        await asyncio.Event().wait()

    def hold_thread(self) -> None:
        self.calls.append("work")
        self.let_go.wait(60)

    async def fail(self) -> None:
        self.calls.append("work")
        raise ConnectionError("not now")

    async def not_ready(self) -> None:
        self.calls.append("work")


# Where a run may stand --------------------------------------------------------------------------------------


async def in_an_async_step(vendor: Vendor) -> None:
    await step("work", vendor.hold)


async def in_a_sync_step(vendor: Vendor) -> None:
    await step("work", vendor.hold_thread)


async def in_an_await_outside_of_steps(vendor: Vendor) -> None:
    await vendor.hold()


async def in_a_backoff(vendor: Vendor) -> None:
    await step.with_options(retry_policy=FOR_AN_HOUR)("work", vendor.fail)


async def in_a_sleep(_: Vendor) -> None:
    await sleep("work", 3600)


async def in_a_poll(vendor: Vendor) -> None:
    await poll("work", vendor.not_ready, every=3600)


async def in_a_wait_for(_: Vendor) -> None:
    await wait_for("work")


async def in_a_backoff_and_a_wait_for(vendor: Vendor) -> None:
    await asyncio.gather(in_a_backoff(vendor), wait_for("approval"))


async def in_a_poll_and_a_sleep(vendor: Vendor) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(in_a_poll(vendor))
        group.create_task(sleep("pause", 3600))


async def in_a_step_and_a_wait_for(vendor: Vendor) -> None:
    await asyncio.gather(in_an_async_step(vendor), wait_for("approval"))


Place = Callable[[Vendor], Awaitable[None]]
RUNNING: tuple[Place, ...] = (
    in_an_async_step,
    in_a_sync_step,
    in_an_await_outside_of_steps,
    in_a_step_and_a_wait_for,
)
WAITING: tuple[Place, ...] = (
    in_a_backoff,
    in_a_sleep,
    in_a_poll,
    in_a_wait_for,
    in_a_backoff_and_a_wait_for,
    in_a_poll_and_a_sleep,
)
anywhere = pytest.mark.parametrize("place", RUNNING + WAITING, ids=lambda place: place.__name__)
while_it_runs = pytest.mark.parametrize("place", RUNNING, ids=lambda place: place.__name__)
while_it_waits = pytest.mark.parametrize("place", WAITING, ids=lambda place: place.__name__)


def order(place: Place, vendor: Vendor, **options: Any) -> TemporalAsyncTask[None, str]:
    """A task that makes a step, gets to a place where it stays, and cleans up if it is cancelled there."""

    async def body() -> str:
        await step("first", vendor.call, "first")
        try:
            await place(vendor)
        except asyncio.CancelledError:
            vendor.calls.append("CancelledError")
            await step("cleanup", vendor.call, "cleanup")
            raise
        return "done"

    return TemporalAsyncTask[None, str](place.__name__, body, **{"heartbeat_timeout": HEARTBEAT, **options})


CLEANUP_BACKOFF = 1.5


def order_with_a_flaky_cleanup(place: Place, vendor: Vendor) -> TemporalAsyncTask[None, str]:
    async def flaky() -> None:
        vendor.calls.append("cleanup")
        if vendor.calls.count("cleanup") == 1:
            raise ConnectionError("not now")

    async def body() -> str:
        await step("first", vendor.call, "first")
        try:
            await place(vendor)
        except asyncio.CancelledError:
            policy = RetryPolicy(max_retries=1, initial_delay=CLEANUP_BACKOFF, max_delay=CLEANUP_BACKOFF, jitter=0)
            await step("note", vendor.call, "note")
            await step.with_options(retry_policy=policy)("cleanup", flaky)
            raise
        return "done"

    return TemporalAsyncTask[None, str](f"flaky {place.__name__}", body, heartbeat_timeout=HEARTBEAT)


def waits(run: TaskResult[Any]) -> bool:
    """Whether no attempt is under way: something waits, and the server has been told so."""
    return any(one.state is StepState.WAITING for one in run.steps) or backs_off(run)


async def submitted(task: TemporalAsyncTask[None, str], place: Place, vendor: Vendor) -> str:
    """The id of a run that has got to its place."""
    task_id = await task.submit()
    if place in RUNNING:
        await wait_until(lambda: "work" in vendor.calls)
    else:
        await status_when(task, task_id, waits)
    return task_id


@dataclass
class Story:
    """How a run was cancelled."""

    calls: list[str]
    run: TaskResult[str]
    took: float


async def cancelled_at(place: Place, task: TemporalAsyncTask[None, str], vendor: Vendor) -> Story:
    return await cancelled_as(task, await submitted(task, place, vendor), vendor)


async def cancelled_as(task: TemporalAsyncTask[None, str], task_id: str, vendor: Vendor) -> Story:
    before = time.monotonic()
    await task.cancel(task_id, "the customer changed their mind")
    with pytest.raises(TaskCancelledError):
        await task.result(task_id, timeout=15)
    took = time.monotonic() - before
    return Story(vendor.calls, await task.get_status(task_id), took)


Stories = dict[Place, asyncio.Task[Story]]


@contextlib.asynccontextmanager
async def at_once(address: str, places: Iterable[Place], tell: Callable[..., Any], make: Any) -> AsyncIterator[Stories]:
    """For each place a run that is cancelled there, all at the same time, and while other tests run."""
    app = App(address, f"queue-{uuid.uuid4().hex[:8]}")
    vendors = {place: Vendor() for place in places}
    tasks = {place: make(place, vendor) for place, vendor in vendors.items()}
    await app.start(*tasks.values())
    stories = {place: asyncio.create_task(tell(place, tasks[place], vendors[place])) for place in tasks}
    yield stories
    for story in stories.values():
        story.cancel()
    await asyncio.wait(stories.values())
    for vendor in vendors.values():
        vendor.let_go.set()
    await app.stop()


@pytest.fixture(scope="module")
async def stories(server: DevServer) -> AsyncIterator[Stories]:
    async with at_once(server.address, RUNNING + WAITING, cancelled_at, order) as stories:
        yield stories


@pytest.fixture(scope="module", autouse=True)
async def by_default(server: DevServer) -> AsyncIterator[Stories]:
    """With the heartbeat timeout that a task has if it is not told another."""

    async def cancelled_later(place: Place, task: Any, vendor: Vendor) -> Story:
        task_id = await submitted(task, place, vendor)
        # From now on nothing is written but to show that the attempt is alive.
        await status_when(task, task_id, lambda run: run.current_step == "work")
        await asyncio.sleep(0.3)
        return await cancelled_as(task, task_id, vendor)

    make = functools.partial(order, heartbeat_timeout=15.0)
    async with at_once(server.address, [in_an_async_step], cancelled_later, make) as stories:
        yield stories


@pytest.fixture(scope="module", autouse=True)
async def retried(server: DevServer) -> AsyncIterator[Stories]:
    """With a cleanup that fails at first."""
    places = [in_an_async_step, in_a_backoff, in_an_await_outside_of_steps]
    async with at_once(server.address, places, cancelled_at, order_with_a_flaky_cleanup) as stories:
        yield stories


@pytest.fixture(scope="module", autouse=True)
async def killed(server: DevServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[asyncio.Task[Story]]:
    """A run whose worker is killed in its cleanup. It takes a while, and goes on while the other tests run."""
    app = App(server.address, f"queue-{uuid.uuid4().hex[:8]}")
    story = asyncio.create_task(killed_in_its_cleanup(app, CallLog(tmp_path_factory.mktemp("calls") / "log")))
    yield story
    story.cancel()
    await asyncio.wait([story])
    await app.stop()


# Wherever it stands -----------------------------------------------------------------------------------------


@anywhere
async def test_the_body_gets_a_cancelled_error_where_it_waits_and_may_clean_up_with_steps(stories: Any, place: Place):
    story = await stories[place]
    calls = [call for call in story.calls if call != "work"]
    assert calls == ["first", "CancelledError", "cleanup"]


@anywhere
async def test_the_status_of_a_cancelled_run_says_why_and_what_was_done(stories: Any, place: Place):
    run = (await stories[place]).run
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "TaskCancelledError")
    assert run.error == "the customer changed their mind"
    assert run.completed_steps == ("first", "cleanup")
    assert (run.current_step, run.next_retry_at) == (None, None)


@anywhere
async def test_a_cancelled_step_is_not_called_again(stories: Any, place: Place):
    story = await stories[place]
    assert story.calls.count("work") <= 1


@while_it_waits
async def test_a_run_that_waits_is_cancelled_within_a_second(server: DevServer, place: Place):
    took = []
    for _ in range(3):  # and not slower because of the other tests that run meanwhile
        async with at_once(server.address, [place], cancelled_at, order) as stories:
            took.append((await stories[place]).took)
        if took[-1] < 1:
            break
    assert min(took) < 1


@while_it_runs
async def test_a_run_that_is_at_work_is_cancelled_within_the_keep_alive_interval(stories: Any, place: Place):
    assert (await stories[place]).took < HEARTBEAT / 3 + PROMPT


async def test_a_running_step_learns_of_its_cancellation_within_five_seconds_by_default(by_default: Any):
    assert (await by_default[in_an_async_step]).took < 5 + PROMPT


async def test_a_cancellation_reaches_a_run_while_the_results_of_its_steps_are_saved(app: App):
    calls = []

    async def quick(what: str) -> None:
        calls.append(what)

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def busy(name: str) -> None:
        try:
            for number in range(2_000):
                await step(f"step-{number}", quick, f"{name} {number}")
        except asyncio.CancelledError:
            await step("cleanup", quick, f"{name} cleanup")
            raise

    async def cancelled(name: str) -> TaskResult[None]:
        task_id = await busy.submit(name)
        await wait_until(lambda: f"{name} 10" in calls)
        await busy.cancel(task_id)
        return await status_when(busy, task_id, ended)

    await app.start(busy)
    runs = await asyncio.gather(*map(cancelled, "abcdef"))
    assert [run.error_type for run in runs] == ["TaskCancelledError"] * 6
    assert [f"{name} cleanup" in calls for name in "abcdef"] == [True] * 6
    assert len(calls) == len(set(calls))


async def test_a_cancellation_is_prompt_though_the_worker_has_no_slot_left(app: App):
    vendor = Vendor()
    task = order(in_an_async_step, vendor)
    await app.start(task, max_concurrent_tasks=1)
    task_id = await submitted(task, in_an_async_step, vendor)
    await task.cancel(task_id)
    with pytest.raises(TaskCancelledError):
        await task.result(task_id, timeout=HEARTBEAT / 3 + 2 * PROMPT)


# Before it begins, and when it ends -------------------------------------------------------------------------


async def test_a_run_that_is_cancelled_before_any_worker_came_never_begins(app: App):
    vendor = Vendor()
    task = order(in_a_sleep, vendor)
    await app.connect(task)
    task_id = await task.submit()
    await task.cancel(task_id, "not wanted any more")
    await app.start(task)
    run = await status_when(task, task_id, ended)
    assert (run.status, run.error_type, run.error) == (TaskStatus.FAILED, "TaskCancelledError", "not wanted any more")
    assert vendor.calls == []


async def test_a_run_that_no_worker_knows_is_cancelled_before_it_begins(app: App):
    unknown, known = order(in_a_sleep, Vendor()), order(in_a_poll, Vendor())
    client = (await app.connect(unknown)).client
    await app.start(known)
    task_id = await unknown.submit()
    await wait_until(lambda: is_left(client, task_id))
    await unknown.cancel(task_id, "not wanted any more")
    run = await status_when(unknown, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "not wanted any more")


async def test_a_cancellation_that_no_worker_is_there_for_is_kept_for_one(app: App):
    vendor = Vendor()
    task = order(in_a_backoff, vendor)
    worker = await app.start(task)
    task_id = await submitted(task, in_a_backoff, vendor)
    await worker.stop()
    await task.cancel(task_id, "why")
    assert not ended(await task.get_status(task_id))
    await app.start(task)
    run = await status_when(task, task_id, ended)
    assert (run.error_type, run.error, run.completed_steps) == ("TaskCancelledError", "why", ("first", "cleanup"))
    assert vendor.calls == ["first", "work", "CancelledError", "cleanup"]


async def test_a_run_that_is_cancelled_during_its_delay_never_begins(app: App):
    vendor = Vendor()
    task = order(in_a_sleep, vendor)
    await app.start(task)
    task_id = await task.submit(delay=3600)
    before = time.monotonic()
    await task.cancel(task_id, "not wanted any more")
    run = await status_when(task, task_id, ended)
    assert time.monotonic() - before < PROMPT
    assert (run.status, run.error_type, run.error) == (TaskStatus.FAILED, "TaskCancelledError", "not wanted any more")
    assert vendor.calls == []


async def test_a_task_without_steps_is_not_called_again_to_be_cancelled(app: App):
    vendor = Vendor()
    task = TemporalAsyncTask[None, None]("single", vendor.fail, retry_policy=FOR_AN_HOUR)
    await app.start(task)
    task_id = await task.submit()
    await status_when(task, task_id, backs_off)
    await task.cancel(task_id)
    with pytest.raises(TaskCancelledError):
        await task.result(task_id, timeout=10)
    assert vendor.calls == ["work"]


async def test_cancelling_a_completed_run_changes_nothing(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    await app.start(echo)
    task_id = await echo.submit("done")
    await echo.result(task_id)
    before = await echo.get_status(task_id)
    await echo.cancel(task_id, "too late")
    assert await echo.get_status(task_id) == before


async def last_step(_: int) -> None:
    await step("last", asyncio.sleep, 0.3)


async def last_sleep(_: int) -> None:
    await sleep("last", 1.0)


async def last_event(number: int) -> None:
    await wait_for("last")


@pytest.mark.parametrize("last", [last_step, last_sleep, last_event])
async def test_a_run_that_is_cancelled_as_it_completes_is_either_completed_or_cancelled(app: App, last: Any):
    calls: dict[int, list[str]] = {number: [] for number in range(20)}

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def race(number: int) -> int:
        await step("first", asyncio.sleep, 0)
        calls[number].append("first")
        try:
            await last(number)
        except asyncio.CancelledError:
            await step("cleanup", asyncio.sleep, 0)
            calls[number].append("cleaned up")
            raise
        calls[number].append("returned")
        return number

    async def run(number: int) -> TaskResult[int]:
        task_id = await race.submit(number)
        if last is last_event:
            await status_when(race, task_id, waits)
            both = [race.send(task_id, "last"), race.cancel(task_id)]
            await asyncio.gather(*(both if number % 2 else reversed(both)))
        else:
            await wait_until(lambda: calls[number])
            await asyncio.sleep((0.2 if last is last_step else 0.9) + number * 0.01)
            await race.cancel(task_id)
        return await status_when(race, task_id, ended)

    await app.start(race)
    for number, one in enumerate(await asyncio.gather(*map(run, calls))):
        if one.status is TaskStatus.COMPLETED:
            assert one.result == number
            assert "cleaned up" not in calls[number]
            assert "returned" in calls[number]
        else:
            assert one.error_type == "TaskCancelledError"
            assert "cleaned up" in calls[number]
            assert "returned" not in calls[number]


# More than once, and by other means -------------------------------------------------------------------------


@pytest.mark.parametrize("place", [in_an_async_step, in_a_backoff], ids=lambda place: place.__name__)
async def test_cancelling_twice_at_once_is_cancelling_once(app: App, place: Place):
    vendor = Vendor()
    task = order(place, vendor)
    await app.start(task)
    task_id = await submitted(task, place, vendor)
    await asyncio.gather(task.cancel(task_id, "why"), task.cancel(task_id, "why"))
    run = await status_when(task, task_id, ended)
    assert run.error_type == "TaskCancelledError"
    assert vendor.calls == ["first", "work", "CancelledError", "cleanup"]


async def test_cancelling_again_does_not_interrupt_the_cleanup(app: App):
    calls = []

    async def clean_up() -> None:
        calls.append("cleanup")
        await wait_until(lambda: "again" in calls)
        calls.append("cleaned up")

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            await step("cleanup", clean_up)
            raise

    worker = await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id, "why")
    await wait_until(lambda: "cleanup" in calls)
    await shoot.cancel(task_id, "again")
    await worker.client.get_workflow_handle(task_id).cancel()
    await asyncio.sleep(HEARTBEAT / 3 + 0.2)  # in which the attempt would learn of it
    calls.append("again")
    run = await status_when(shoot, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")
    assert calls == ["cleanup", "again", "cleaned up"]


@pytest.mark.parametrize("place", [in_an_async_step, in_a_backoff, in_a_wait_for], ids=lambda place: place.__name__)
async def test_a_cancellation_by_temporals_own_means_lets_the_body_clean_up_too(app: App, place: Place):
    vendor = Vendor()
    task = order(place, vendor)
    worker = await app.start(task)
    task_id = await submitted(task, place, vendor)
    await worker.client.get_workflow_handle(task_id).cancel()
    run = await status_when(task, task_id, ended)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "TaskCancelledError")
    assert run.completed_steps == ("first", "cleanup")
    assert vendor.calls[-2:] == ["CancelledError", "cleanup"]


async def test_a_cancellation_by_temporals_own_means_on_top_of_ours_does_not_prevent_the_cleanup(app: App):
    vendor = Vendor()
    task = order(in_an_async_step, vendor)
    worker = await app.start(task)
    task_id = await submitted(task, in_an_async_step, vendor)
    await task.cancel(task_id, "why")
    await wait_until(lambda: is_paused(worker.client, task_id))  # it has been asked for, and the step does not know
    await worker.client.get_workflow_handle(task_id).cancel()
    run = await status_when(task, task_id, ended)
    assert vendor.calls == ["first", "work", "CancelledError", "cleanup"]
    assert (run.error_type, run.error, run.completed_steps) == ("TaskCancelledError", "why", ("first", "cleanup"))


async def test_a_run_that_is_unknown_cannot_be_cancelled(app: App):
    task = order(in_a_sleep, Vendor())
    await app.connect(task)
    with pytest.raises(TaskNotFoundError, match="'nobody-knows'"):
        await task.cancel("nobody-knows")


async def test_a_run_of_another_task_cannot_be_cancelled(app: App):
    mine, yours = order(in_a_sleep, Vendor()), order(in_a_poll, Vendor())
    await app.start(mine, yours)
    task_id = await mine.submit()
    with pytest.raises(TaskNotFoundError, match=f"'{task_id}' of task 'in_a_poll'"):
        await yours.cancel(task_id)
    assert not ended(await status_when(mine, task_id, waits))


# The cleanup ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [in_an_async_step, in_a_backoff], ids=lambda place: place.__name__)
async def test_the_status_shows_the_steps_of_the_cleanup_while_it_goes_on(app: App, place: Place):
    vendor, is_open = Vendor(), threading.Event()

    async def body() -> None:
        await step("first", vendor.call, "first")
        try:
            await place(vendor)
        except asyncio.CancelledError:
            await step("cleanup", is_open.wait, 30)
            raise

    task = TemporalAsyncTask[None, None]("shoot", body, heartbeat_timeout=HEARTBEAT)
    await app.start(task)
    try:
        task_id = await submitted(task, place, vendor)
        await task.cancel(task_id)
        run = await status_when(task, task_id, lambda run: len(run.steps) == 3)
    finally:
        is_open.set()
    assert run.status is TaskStatus.PROCESSING
    assert (run.steps[-1].key, run.steps[-1].state) == ("cleanup", StepState.RUNNING)
    assert run.current_step == "cleanup", "'work' was cancelled: it neither runs nor is it waited for"


@pytest.mark.parametrize(
    "place", [in_an_async_step, in_a_backoff, in_an_await_outside_of_steps], ids=lambda place: place.__name__
)
async def test_a_step_of_the_cleanup_that_fails_is_retried_after_its_backoff(retried: Any, place: Place):
    story = await retried[place]
    assert (story.run.error_type, story.run.error) == ("TaskCancelledError", "the customer changed their mind")
    assert story.run.completed_steps == ("first", "note", "cleanup")
    calls = [call for call in story.calls if call != "work"]
    assert calls == ["first", "note", "cleanup", "cleanup"]
    assert CLEANUP_BACKOFF <= story.took < HEARTBEAT / 3 + CLEANUP_BACKOFF + 2 * PROMPT


async def test_a_cleanup_whose_step_fails_for_good_does_not_make_the_run_fail_of_it(app: App):
    vendor = Vendor()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            await step.with_options(retry_policy=NEVER_AGAIN)("cleanup", vendor.fail)
            raise

    await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id, "why")
    run = await status_when(shoot, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")
    assert [(one.key, one.last_error) for one in run.steps if one.state is StepState.FAILED] == [
        ("cleanup", "ConnectionError: not now")
    ]


async def test_the_cleanup_may_wait_for_an_event(app: App):
    bodies, told = [], []

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        bodies.append(1)
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            try:
                told.append(await wait_for("confirmed", timeout=2))
            except WaitTimeoutError:
                told.append("WaitTimeoutError")
            raise

    await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id)
    await status_when(shoot, task_id, lambda run: any(one.key == "confirmed" for one in run.steps))
    await shoot.send(task_id, "confirmed", "by the customer")
    await status_when(shoot, task_id, ended)
    assert told == ["by the customer"]
    assert len(bodies) <= 4, "it waited, and did not ask again and again"


async def test_a_cleanup_that_does_not_end_is_left_at_its_bound(app: App, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempt, "CLEANUP_TIMEOUT", 1.0)
    vendor = Vendor()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            await step("cleanup", vendor.hold)
            raise

    await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id, "why")
    run = await status_when(shoot, task_id, ended, timeout=1 + 2 * PROMPT)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")


# An operator's own means ------------------------------------------------------------------------------------


def operation(client: Client, task_id: str) -> dict[str, Any]:
    return {
        "namespace": client.namespace,
        "execution": WorkflowExecution(workflow_id=task_id),
        "identity": "an operator",
        "id": f"{wire.ACTIVITY_ID}1",
    }


async def is_paused(client: Client, task_id: str) -> bool:
    found = await client.get_workflow_handle(task_id).describe()
    return any(one.paused for one in found.raw_description.pending_activities)


async def is_left(client: Client, task_id: str) -> bool:
    """Whether a worker has given the first attempt back."""
    found = await client.get_workflow_handle(task_id).describe()
    return any(one.attempt > 1 for one in found.raw_description.pending_activities)


class Gated:
    """A task of three steps, of which the second waits until the gate is open."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.attempts = 0
        self.is_open = False
        self.task = TemporalAsyncTask[None, str]("gated", self._body, heartbeat_timeout=HEARTBEAT)

    async def _body(self) -> str:
        self.attempts += 1
        try:
            await step("first", self._call, "first")
            await step("work", self._wait)
            return await step("last", self._call, "last")
        except asyncio.CancelledError:
            self.calls.append("CancelledError")
            raise

    async def _call(self, what: str) -> str:
        self.calls.append(what)
        return what

    async def _wait(self) -> None:
        self.calls.append("work")
        await wait_until(lambda: self.is_open, timeout=30)


@pytest.fixture
async def gated(app: App) -> AsyncIterator[tuple[Gated, Client, str]]:
    """A run in the second of its three steps, and the worker's client."""
    gated = Gated()
    worker = await app.start(gated.task)
    task_id = await gated.task.submit()
    await wait_until(lambda: "work" in gated.calls)
    yield gated, worker.client, task_id
    gated.is_open = True


async def test_a_run_that_an_operator_pauses_yields_after_its_step_and_goes_on_when_unpaused(gated: Any):
    run, client, task_id = gated
    operator = operation(client, task_id)
    await client.workflow_service.pause_activity(PauseActivityRequest(**operator, reason="the vendor is down"))
    await asyncio.sleep(HEARTBEAT / 3 + 0.3)  # in which the attempt learns of it
    run.is_open = True
    await status_when(run.task, task_id, lambda run: run.completed_steps == ("first", "work"))
    await asyncio.sleep(1.2)  # longer than the server's floor between two attempts
    assert run.calls == ["first", "work"]
    assert (await run.task.get_status(task_id)).status is TaskStatus.PROCESSING
    await client.workflow_service.unpause_activity(UnpauseActivityRequest(**operator))
    assert await run.task.result(task_id, timeout=10) == "last"
    assert run.calls == ["first", "work", "last"]
    assert run.attempts == 2


async def test_a_run_that_an_operator_resets_goes_on_without_calling_a_finished_step_again(gated: Any):
    run, client, task_id = gated
    await client.workflow_service.reset_activity(ResetActivityRequest(**operation(client, task_id)))
    await asyncio.sleep(HEARTBEAT / 3 + 0.3)  # in which the attempt learns of it
    run.is_open = True
    assert await run.task.result(task_id, timeout=10) == "last"
    assert run.calls == ["first", "work", "last"]
    assert run.attempts == 2, "it did yield"


async def test_a_running_step_that_an_operator_has_paused_can_be_cancelled(gated: Any):
    run, client, task_id = gated
    operator = operation(client, task_id)
    await client.workflow_service.pause_activity(PauseActivityRequest(**operator, reason="the vendor is down"))
    await asyncio.sleep(HEARTBEAT / 3 + 0.3)  # in which the attempt learns of it
    await run.task.cancel(task_id, "why")
    ended_run = await status_when(run.task, task_id, ended, timeout=HEARTBEAT / 3 + 2 * PROMPT)
    assert (ended_run.error_type, ended_run.error) == ("TaskCancelledError", "why")
    assert run.calls == ["first", "work", "CancelledError"]


# With a worker that goes ------------------------------------------------------------------------------------


async def test_a_worker_stops_at_once_though_a_run_is_being_cancelled(app: App):
    vendor, is_open = Vendor(), threading.Event()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await step("work", vendor.hold)
        except asyncio.CancelledError:
            vendor.calls.append("CancelledError")
            await step("cleanup", is_open.wait, 30)
            raise

    # The first worker has its only slot taken by the run, so it is the second that sees to the cancellation.
    await app.start(shoot, max_concurrent_tasks=1)
    task_id = await shoot.submit()
    await wait_until(lambda: vendor.calls)
    second = await app.start(shoot)
    await shoot.cancel(task_id)
    await wait_until(lambda: "CancelledError" in vendor.calls)
    before = time.monotonic()
    await second.stop()
    took = time.monotonic() - before
    is_open.set()
    run = await status_when(shoot, task_id, ended, timeout=20)
    assert run.error_type == "TaskCancelledError"
    assert took < 2


def mortal(log: CallLog, *, dies: bool) -> TemporalAsyncTask[None, None]:
    """A task whose cleanup kills its worker, or does not."""

    async def clean_up() -> None:
        log.note("cleanup")
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    async def hold() -> None:
        log.note("work")
        await asyncio.Event().wait()

    async def first() -> None:
        log.note("first")

    async def body() -> None:
        await step("first", first)
        try:
            await step("work", hold)
        except asyncio.CancelledError:
            log.note("CancelledError")
            await step("cleanup", clean_up)
            raise

    return TemporalAsyncTask[None, None]("mortal", body, heartbeat_timeout=HEARTBEAT)


async def killed_in_its_cleanup(app: App, log: CallLog) -> Story:
    task = mortal(log, dies=False)
    await app.connect(task)
    with WorkerProcess(__file__, app, CALLS=str(log.path)) as process:
        task_id = await task.submit()
        await wait_until(lambda: ["work"] in log.lines(), timeout=30)
        before = time.monotonic()
        await task.cancel(task_id, "why")
        assert await process.exit_status(timeout=20) == -signal.SIGKILL
    await app.start(task)
    run = await status_when(task, task_id, ended, timeout=30)
    return Story([line[0] for line in log.lines()], run, time.monotonic() - before)


async def test_a_run_whose_worker_is_killed_in_the_cleanup_is_cleaned_up_by_another(killed: asyncio.Task[Story]):
    story = await killed
    assert story.calls == ["first", "work", "CancelledError", "cleanup", "CancelledError", "cleanup"]
    assert (story.run.error_type, story.run.error) == ("TaskCancelledError", "why")
    assert story.run.completed_steps == ("first", "cleanup")


if __name__ == "__main__":
    work([mortal(CallLog(Path(os.environ["CALLS"])), dies=True)])
