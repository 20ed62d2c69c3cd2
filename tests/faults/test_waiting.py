"""Many tasks that wait take no slot from the others; and a worker's clock may be wrong by an hour."""

import asyncio
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from faults.clock import means, set_clock_off
from faults.conftest import PATIENCE, Report, Scale, StartWorker
from faults.vendor import Vendor, expected, order
from support import App, ended, on_both, status_when, undisturbed, utc_now, wait_until, work
from temporal_async_task import (
    RetryPolicy,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    current_step,
    sleep,
    step,
)

pytestmark = pytest.mark.case(13, "waiting")
TEN_MINUTES = RetryPolicy(initial_delay=600, max_delay=600, jitter=0)
BACKOFF = 3.0
RUNS = 4


@on_both
async def test_a_fresh_task_is_done_within_2_seconds_while_a_thousand_back_off_on_five_slots(
    app: App, scale: Scale, report: Report
):
    count = scale.pick(100, 1000)

    @async_task(retry_policy=TEN_MINUTES)
    async def stuck(number: int) -> None:
        raise ConnectionError("the vendor is down")

    @async_task
    async def fresh(number: int) -> int:
        return await step("double", double, number)

    async def double(number: int) -> int:
        return number * 2

    await app.start(stuck, fresh, max_concurrent_tasks=5)
    ids = await asyncio.gather(*(stuck.submit(number) for number in range(count)))

    async def in_backoff() -> int:
        runs = await asyncio.gather(*(stuck.get_status(task_id) for task_id in ids))
        return sum(run.next_retry_at is not None for run in runs)

    async def all_back_off() -> bool:
        return await in_backoff() == count

    await wait_until(all_back_off, timeout=PATIENCE + count, interval=1)

    async def slowest_of_five() -> float:
        times = []
        for number in range(5):
            begun = time.monotonic()
            assert await fresh.run(number) == number * 2
            times.append(time.monotonic() - begun)
        return max(times)

    slowest = await undisturbed(slowest_of_five, lambda seconds: seconds < 2, tries=3)
    report(backing_off=count, slots=5, slowest_of_5_fresh=f"{slowest:.2f} s")
    assert slowest < 2
    assert await in_backoff() == count


# A worker's clock ------------------------------------------------------------------------------------------


async def fail_once() -> str:
    answer = await order()
    if current_step().attempt == 1:
        raise ConnectionError("not now")
    return answer


async def retried(_: None) -> list[str]:
    first = await step("first", order)
    second = await step("second", fail_once)
    await sleep("pause", BACKOFF)
    return [first, second, await step("third", order)]


async def cancelled(_: None) -> str:
    try:
        return await step("work", order, 60)
    except asyncio.CancelledError:
        await step("cleanup", order, 3)
        raise


def clocked_tasks() -> tuple[TemporalAsyncTask[None, list[str]], TemporalAsyncTask[None, str]]:
    once = RetryPolicy(max_retries=1, initial_delay=BACKOFF, max_delay=BACKOFF, jitter=0)
    return (
        TemporalAsyncTask("retried", retried, retry_policy=once, timeout=600, heartbeat_timeout=6),
        TemporalAsyncTask("cancelled", cancelled, heartbeat_timeout=6),
    )


@on_both
async def test_an_hour_more_or_less_on_a_workers_clock_changes_nothing(
    app: App, vendor: Vendor, start_worker: StartWorker, report: Report
):
    """One worker whose clock is ahead, one whose clock is behind, and one of each kind at work on the same runs."""

    async def one(*hours: int) -> tuple[list[float], list[float]]:
        mine = App(app.address, f"{app.queue}-{hours}", app.execution)
        try:
            return await work_with_wrong_clocks(mine, vendor, start_worker, hours)
        finally:
            await mine.stop()

    kinds = [[1], [-1], [1, -1]]
    measured = await asyncio.gather(*(one(*hours) for hours in kinds))
    gaps = [gap for found, _ in measured for gap in found]
    ends = [end for _, found in measured for end in found]
    report(
        runs=2 * RUNS * len(kinds), backoff=f"{BACKOFF} s", shortest_wait=f"{min(gaps):.1f} s",
        longest_wait=f"{max(gaps):.1f} s", slowest_cancel=f"{max(ends):.1f} s", by=means(),
    )  # fmt: skip
    assert min(gaps) >= BACKOFF - 0.1
    assert max(gaps) < BACKOFF + 10


async def work_with_wrong_clocks(
    app: App, vendor: Vendor, start_worker: StartWorker, hours: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Seconds between the calls of runs that retry and sleep, and from call to cleanup of runs that are cancelled."""
    retrying, cancelling = clocked_tasks()
    await app.connect(retrying, cancelling)
    for offset in hours:
        start_worker(__file__, app, CLOCK_OFF=str(offset * 3600))
    ids = await asyncio.gather(*(retrying.submit(None) for _ in range(RUNS)))
    stopped = await asyncio.gather(*(cancelling.submit(None) for _ in range(RUNS)))
    for task_id in stopped:
        await vendor.called(task_id, "work")
        await cancelling.cancel(task_id, "enough")
    gaps, ends = [], []
    for task_id in ids:
        # A backoff that the server would wait an hour for, or not at all, is seen here.
        assert await retrying.result(task_id, timeout=PATIENCE) == expected(task_id, "first", "second", "third")
        first, failed, again, third = vendor.calls(task_id)
        assert [call.key for call in (first, failed, again, third)] == ["first", "second", "second", "third"]
        gaps += [again.begun - failed.begun, third.begun - again.begun]
        run = await retrying.get_status(task_id)
        assert run.attempt <= 3
        assert_true_times(run)
    for task_id in stopped:
        run = await status_when(cancelling, task_id, ended, timeout=PATIENCE)
        assert (run.status, run.error_type) == (TaskStatus.FAILED, "TaskCancelledError")
        assert vendor.count(task_id) == {"work": 1, "cleanup": 1}
        work_call, cleanup = vendor.calls(task_id)
        ends.append(cleanup.begun - work_call.begun)
        assert_true_times(run)
    return gaps, ends


def assert_true_times(run: TaskResult[object]) -> None:
    """What the status says is the server's time, not the worker's."""
    now = utc_now()
    for one in run.steps:
        for moment in (one.started_at, one.finished_at):
            assert moment is None or abs(moment - now) < timedelta(minutes=10), run


if __name__ == "__main__":
    set_clock_off(float(os.environ["CLOCK_OFF"]), Path(__file__))
    work(clocked_tasks())
