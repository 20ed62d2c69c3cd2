"""What a task's code may do wrong: touch the engine's heartbeats, or hold its event loop."""

import asyncio
import itertools
import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from temporalio import activity

from faults.conftest import PATIENCE, Report, StartWorker
from faults.vendor import Vendor, expected, order, order_blocking
from support import BY_TIMER, NEVER_AGAIN, App, ended, on_both, status_when, undisturbed, wait_until, work
from temporal_async_task import TaskStatus, TemporalAsyncTask, async_task, current_step, step

HEARTBEAT = 2.0
BLOCKED = 3 * HEARTBEAT
MOST_DELAY = 0.5
"""Seconds by which code that blocks may delay the steps of other tasks."""
TICK = 0.1
MANY = 10_000
"""Ticks: more than there are until the ticker is stopped."""

# 6. Heartbeats of the user's own ---------------------------------------------------------------------------


def heartbeat() -> str:
    try:
        activity.heartbeat("not a journal")
    except Exception as error:
        return type(error).__name__
    return "sent"


@pytest.mark.case(6, "heartbeats")
@on_both
@pytest.mark.parametrize("where", ["async_step", "sync_step", "body", "thread"])
async def test_a_heartbeat_by_the_users_code_is_refused_and_does_no_harm(app: App, report: Report, where: str):
    calls: list[str] = []

    async def count(key: str) -> str:
        calls.append(key)
        return key

    async def in_async_step() -> str:
        return heartbeat()

    def in_thread() -> str:
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(heartbeat()))
        thread.start()
        thread.join()
        return answers[0]

    async def fail_once() -> str:
        calls.append("fail once")
        if current_step().attempt == 1:
            raise ConnectionError("not now")
        return "at last"

    @async_task(retry_policy=BY_TIMER)
    async def meddler() -> list[str]:
        first = await step("first", count, "first")
        answers = [heartbeat() for _ in range(20) if where == "body"]
        if where != "body":
            call = {"async_step": in_async_step, "sync_step": heartbeat, "thread": in_thread}[where]
            answers = [await step(f"meddle-{number}", call) for number in range(20)]
        await asyncio.sleep(0.3)  # core's heartbeats, were there any, go out a little later
        last = await step("last", fail_once)
        return [first, *set(answers), last]

    await app.start(meddler)
    task_id = await meddler.submit()
    assert await meddler.result(task_id, timeout=PATIENCE) == ["first", "RuntimeError", "at last"]
    assert calls == ["first", "fail once", "fail once"]
    assert (await meddler.get_status(task_id)).completed_steps[0] == "first"
    report(heartbeats_refused=20, steps_repeated=0)


# 7. Code that blocks ---------------------------------------------------------------------------------------


async def sleep_in_async() -> str:
    time.sleep(BLOCKED)  # noqa: ASYNC251 # blocking line
    return "sleep_in_async"


async def loop_in_async() -> str:
    until = time.monotonic() + BLOCKED
    while time.monotonic() < until:  # blocking line
        sum(range(1000))  # blocking line
    return "loop_in_async"


async def request_in_async() -> str:
    return order_blocking(BLOCKED)


def sleep_in_sync() -> str:
    time.sleep(BLOCKED)
    return "sleep_in_sync"


def loop_in_sync() -> str:
    until = time.monotonic() + BLOCKED
    while time.monotonic() < until:
        sum(range(1000))
    return "loop_in_sync"


def request_in_sync() -> str:
    return order_blocking(BLOCKED)


CALLS: dict[str, Callable[[], Any]] = {
    call.__name__: call
    for call in (sleep_in_async, loop_in_async, request_in_async, sleep_in_sync, loop_in_sync, request_in_sync)
}


async def blocker(name: str) -> list[str]:
    return [await step("before", order), await step(name, CALLS[name]), await step("after", order)]


async def ticker_async(_: None) -> None:
    for number in range(MANY):
        await step(f"tick-{number}", order, TICK)


async def ticker_sync(_: None) -> None:
    for number in range(MANY):
        await step(f"tick-{number}", order_blocking, TICK)


async def quick(_: None) -> str:
    return await step("quick", order)


def plain_call(_: None) -> str:
    return order_blocking(BLOCKED / 3)


def task_of(body: Callable[[Any], Any]) -> TemporalAsyncTask[Any, Any]:
    return TemporalAsyncTask(body.__name__, body, heartbeat_timeout=HEARTBEAT, retry_policy=NEVER_AGAIN)


@pytest.mark.case(7, "blocking")
@on_both
@pytest.mark.parametrize("shape", ["async", "sync"])
async def test_code_that_blocks_for_three_heartbeat_timeouts_is_called_once_and_delays_nobody(
    app: App, vendor: Vendor, start_worker: StartWorker, report: Report, shape: str
):
    """The other tasks are under way already when the code begins to block. Each run has an event loop of its own."""
    blocking, tickers = task_of(blocker), [task_of(ticker_async), task_of(ticker_sync)]
    await app.connect(blocking, *tickers)
    worker = start_worker(__file__, app, LOOP_PER_RUN="1")
    names = [name for name in CALLS if name.endswith(f"_in_{shape}")]
    blockers = []

    async def block(name: str) -> None:
        task_id = await blocking.submit(name)
        blockers.append(task_id)
        result = await blocking.result(task_id, timeout=PATIENCE)
        called = f"{task_id}/{name}" if name.startswith("request") else name
        assert result == [*expected(task_id, "before"), called, *expected(task_id, "after")]

    async def measure() -> dict[str, float]:
        ticking = [await ticker.submit(None) for ticker in tickers]
        for task_id in ticking:
            await vendor.called(task_id, "tick-10")
        if shape == "sync":
            await asyncio.gather(*map(block, names))
        else:
            for name in names:  # one after the other: each by itself must be harmless
                await block(name)
        over = time.time()
        delays = {}
        for ticker, task_id in zip(tickers, ticking, strict=True):
            # What is measured ends with a tick after the last block.
            await wait_until(lambda task_id=task_id: vendor.calls(task_id)[-1].begun > over, timeout=PATIENCE)
            await ticker.cancel(task_id)
            await status_when(ticker, task_id, ended, timeout=PATIENCE)
            begun = [call.begun for call in vendor.calls(task_id)]
            assert len(begun) == len({call.key for call in vendor.calls(task_id)})
            gaps = [after - before for before, after in itertools.pairwise(begun)]
            delays[f"{ticker.name}_delayed"] = max(gaps) - statistics.median(gaps)
        return delays

    delays = await undisturbed(measure, lambda delays: max(delays.values()) < MOST_DELAY, tries=3)
    said = worker.errors()
    report(blocked=f"{len(names)} x {BLOCKED:g} s", **{name: f"{delay:.2f} s" for name, delay in delays.items()})
    for task_id in blockers:
        assert set(vendor.count(task_id).values()) == {1}
        run = await blocking.get_status(task_id)
        assert (run.status, run.attempt) == (TaskStatus.COMPLETED, 1)
    if shape == "async":
        assert_told_of_each(said, names)
    assert max(delays.values()) < MOST_DELAY


@pytest.mark.case(7, "blocking")
async def test_code_that_blocks_on_a_shared_event_loop_delays_neither_sync_steps_nor_what_begins_meanwhile(
    app: App, vendor: Vendor, start_worker: StartWorker, report: Report
):
    """By default all async code shares a loop. What has begun there goes on only when the loop answers again."""
    blocking, after, plain = task_of(blocker), task_of(quick), task_of(plain_call)
    await app.connect(blocking, after, plain)
    start_worker(__file__, app)
    plain_id = await plain.submit(None)
    await vendor.called(plain_id, plain.name)
    blocking_id = await blocking.submit("sleep_in_async")
    await vendor.called(blocking_id, "before")
    over = asyncio.create_task(blocking.result(blocking_id, timeout=PATIENCE))
    ids = []
    while len(ids) < 8 and not over.done():
        ids.append(await after.submit(None))
        await asyncio.sleep(0.05)
    await plain.result(plain_id, timeout=PATIENCE)
    assert not over.done(), "one sync call, under way since before, waited for the block"
    begun_after = ids[4:]  # the first may have begun just before
    await asyncio.gather(*(after.result(task_id, timeout=PATIENCE) for task_id in begun_after))
    assert not over.done(), "runs that began while the loop was blocked waited for it"
    await over
    await asyncio.gather(*(after.result(task_id, timeout=PATIENCE) for task_id in ids))
    report(blocked=f"{BLOCKED:g} s", begun_meanwhile=len(begun_after))
    assert set(vendor.count(blocking_id).values()) == {1}


def assert_told_of_each(said: str, names: list[str]) -> None:
    """There is a warning for each call that blocked, with task, step and the innermost line of the user's own."""
    found = re.findall(r"Blocking code in async code of task 'blocker', step '(.+)': (.+):(\d+) in \w+\.", said)
    lines = {step: Path(file).read_text().splitlines()[int(number) - 1] for step, file, number in found}
    assert sorted(lines) == sorted(names), said
    for line in lines.values():
        assert line.endswith("# blocking line"), line


if __name__ == "__main__":
    work([task_of(body) for body in (blocker, ticker_async, ticker_sync, quick, plain_call)])
