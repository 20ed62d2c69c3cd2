"""What a run in flight costs its worker, and that one that polls for a day costs no more at its end."""

import asyncio
import gc
import random
import tracemalloc
from datetime import timedelta

import pytest

from faults.conftest import PATIENCE, Report, Scale, StartWorker
from faults.test_load import batched, resident
from support import App, status_when, wait_until, work
from temporal_async_task import TaskStatus, TemporalAsyncTask, async_task, poll, step
from temporal_async_task.engine import activity
from temporal_async_task.testing import TaskRun

pytestmark = pytest.mark.case(15, "memory")


def held_task() -> TemporalAsyncTask[int, None]:
    async def held(_: int) -> None:
        await step("first", asyncio.sleep, 0)
        await step("hold", asyncio.sleep, 3600)

    return TemporalAsyncTask("held", held, heartbeat_timeout=300)


async def test_many_runs_in_flight_on_one_worker_take_little_memory_each(
    app: App, start_worker: StartWorker, scale: Scale, report: Report
):
    count = scale.pick(100, 5000)
    task = held_task()
    await app.connect(task)
    worker = start_worker(__file__, app, SLOTS=str(count + 10), GRACE="0.2")
    warm = await task.submit(0)
    await status_when(task, warm, lambda run: run.current_step == "hold", timeout=PATIENCE)
    ids: list[str] = []

    async def fill_up_to(size: int) -> float:
        """The worker's memory with so many runs in flight."""
        while len(ids) < size:
            more = range(len(ids), min(len(ids) + 100, size))
            ids.extend(await asyncio.gather(*map(task.submit, more)))
        waiting = set(ids)

        async def all_in_flight() -> bool:
            for some in batched(sorted(waiting), 200):
                runs = await asyncio.gather(*map(task.get_status, some))
                waiting.difference_update(run.task_id for run in runs if run.current_step == "hold")
            return not waiting

        await wait_until(all_in_flight, timeout=PATIENCE + count / 2, interval=1)
        return resident(worker.pid)

    # From a fifth on: what the first runs cost is imports, caches and threads, once.
    before, after = await fill_up_to(count // 5), await fill_up_to(count)
    each = (after - before) * 1e6 / (count - count // 5)
    await asyncio.sleep(scale.pick(0, 60))
    later = resident(worker.pid)
    report(
        in_flight=count,
        worker_MB_with_a_fifth=round(before),
        worker_MB_with_all=round(after),
        bytes_per_task=round(each),
        worker_MB_a_minute_later=round(later),
    )
    statuses = await asyncio.gather(*(task.get_status(task_id) for task_id in random.sample(ids, 50)))
    assert all((run.status, run.attempt) == (TaskStatus.PROCESSING, 1) for run in statuses), "one was lost meanwhile"
    assert each < scale.pick(400_000, 100_000), "a hundred runs are too few to be measured exactly"


def test_a_run_that_polls_for_24_hours_takes_no_more_memory_at_its_end(scale: Scale, report: Report):
    every = scale.pick(120, 10)
    early, late = 21_600 // every, 82_800 // every
    checks = 0
    sizes: dict[int, tuple[int, int]] = {}

    async def check() -> str | None:
        nonlocal checks
        checks += 1
        run.calls.clear()  # the test double's own records
        run.attempts.clear()
        if checks in {early, late}:
            gc.collect()
            snapshot = run.journal.snapshot()
            sizes[checks] = tracemalloc.get_traced_memory()[0], len(str(snapshot))
        return "ready" if run.now() > timedelta(hours=24).total_seconds() else None

    @async_task
    async def patient() -> str:
        return await poll("ready?", check, every=every, timeout=timedelta(hours=25))

    run: TaskRun[str] = TaskRun(patient)
    tracemalloc.start()
    try:
        assert run.execute() == "ready"
    finally:
        tracemalloc.stop()
    (memory_early, journal_early), (memory_late, journal_late) = sizes[early], sizes[late]
    report(
        checks=checks, hours=round(run.elapsed / 3600, 1), bytes_more=memory_late - memory_early,
        journal_bytes_more=journal_late - journal_early,
    )  # fmt: skip
    assert checks == pytest.approx(86_400 / every, rel=0.01)
    assert journal_late - journal_early < 50
    assert memory_late - memory_early < 50_000


if __name__ == "__main__":
    # A thousand heartbeats a second, as 5,000 runs would send, are too many for a dev server on two processors.
    activity.KEEP_ALIVE = 60.0
    work([held_task()])
