"""Workers that are told to stop while they work: deploys, again and again."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from faults.conftest import PATIENCE, Report, StartWorker, polls
from faults.vendor import Vendor, expected, order
from support import App, on_both, work
from temporal_async_task import RetryPolicy, TaskStatus, TemporalAsyncTask, step

pytestmark = pytest.mark.case(3, "signals")
GRACE = 1.0
MARGIN = 8.0
"""Seconds beyond its grace period in which a process has to be gone: it reports its attempts, and Python exits."""
HANDOVER = 10.0
"""Seconds within which the next worker has the step: of the heartbeat timeout, a minute, it is none."""


async def patient(_: None) -> list[str]:
    return [await step("generate", order), await step("hold", order)]


async def swallow() -> str:
    """Does not let itself be cancelled."""
    answer = asyncio.ensure_future(order())
    while not answer.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(answer)
    return answer.result()


async def stubborn(_: None) -> list[str]:
    return [await step("generate", order), await step("hold", swallow)]


def task_of(body: Callable[[None], Awaitable[list[str]]]) -> TemporalAsyncTask[None, list[str]]:
    """With a heartbeat timeout of a minute, only a handover brings the next attempt within seconds."""
    twice = RetryPolicy(max_retries=2, initial_delay=1, jitter=0)
    return TemporalAsyncTask(body.__name__, body, retry_policy=twice, heartbeat_timeout=60)


@on_both
async def test_a_run_whose_worker_is_told_to_stop_five_times_in_a_row_completes_with_two_retries(
    app: App, vendor: Vendor, start_worker: StartWorker, chance: random.Random, report: Report
):
    task = task_of(patient)
    await app.connect(task)
    vendor.hold("hold")
    task_id = await task.submit(None)
    gone = 0.0
    exits, handovers = [], []
    worker = start_worker(__file__, app, GRACE=str(GRACE))
    for number in range(1, 6):
        call = await vendor.called(task_id, "hold", times=number)
        if number > 1:
            handovers.append(call.begun - gone)
        # The next stands by, as in a rolling deploy: what is measured is the handover, not how fast Python starts.
        successor = start_worker(__file__, app, GRACE=str(GRACE))
        await polls(app, task, successor)
        await asyncio.sleep(chance.uniform(0, 1))
        begun = time.time()
        worker.terminate()
        assert await worker.exit_status(timeout=GRACE + MARGIN) == 0, worker.errors()
        gone = time.time()
        exits.append(gone - begun)
        worker = successor
    await vendor.called(task_id, "hold", times=6)
    vendor.release("hold")
    assert await task.result(task_id, timeout=PATIENCE) == expected(task_id, "generate", "hold")
    run = await task.get_status(task_id)
    report(signals=5, slowest_exit=f"{max(exits):.1f} s", slowest_handover=f"{max(handovers):.1f} s")
    assert run.status is TaskStatus.COMPLETED
    assert vendor.count(task_id) == {"generate": 1, "hold": 6}
    assert [one.attempts for one in run.steps] == [1, 1], "no handover used up a try"
    assert len({call.idempotency_key for call in vendor.calls(task_id, "hold")}) == 1
    assert max(handovers) < HANDOVER


@on_both
@pytest.mark.parametrize("signals", [1, 2], ids=["one_signal", "two_signals"])
async def test_a_step_that_swallows_its_cancellation_does_not_hold_its_worker_past_the_deadline(
    app: App, vendor: Vendor, start_worker: StartWorker, report: Report, signals: int
):
    """The second signal takes away a grace period of ten minutes."""
    grace = GRACE if signals == 1 else 600.0
    task = task_of(stubborn)
    await app.connect(task)
    vendor.hold("hold")
    task_id = await task.submit(None)
    worker = start_worker(__file__, app, GRACE=str(grace))
    await vendor.called(task_id, "hold")
    await polls(app, task, start_worker(__file__, app, GRACE=str(GRACE)))
    begun = time.time()
    for number in range(signals):
        await asyncio.sleep(0.5 * number)
        worker.terminate()
    assert await worker.exit_status(timeout=GRACE + 0.5 + MARGIN) == 0, worker.errors()
    gone = time.time()
    again = await vendor.called(task_id, "hold", times=2)
    report(exit=f"{gone - begun:.1f} s", handover=f"{again.begun - gone:.1f} s")
    assert again.pid not in {worker.pid, os.getpid()}
    assert again.begun - gone < HANDOVER
    vendor.release("hold")
    assert await task.result(task_id, timeout=PATIENCE) == expected(task_id, "generate", "hold")
    assert vendor.count(task_id) == {"generate": 1, "hold": 2}


if __name__ == "__main__":
    work([task_of(patient), task_of(stubborn)])
