"""Workers that are killed: what was done is kept, and what was not is done by another."""

import asyncio
import contextlib
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

from support import NEVER_AGAIN, App, CallLog, WorkerProcess, ended, status_when, wait_until, work
from temporal_async_task import (
    StepOutcomeUnknownError,
    StepState,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    current_run,
    current_step,
    step,
)

LOG = CallLog(Path(os.environ.get("CALL_LOG", os.devnull)))
"""In a worker process: what it called."""
STEPS = ("generate", "download", "upload")


def chaotic_task() -> TemporalAsyncTask[None, list[str]]:
    """Three steps of some tenths of a second, none of which may be retried."""

    async def work_a_while(name: str) -> str:
        LOG.note(current_run().task_id, name, os.getpid())
        await asyncio.sleep(random.uniform(0.1, 0.7))
        return name

    @async_task(name="chaotic", retry_policy=NEVER_AGAIN, heartbeat_timeout=1)
    async def chaotic() -> list[str]:
        return [await step(name, work_a_while, name) for name in STEPS]

    return chaotic


def held_task() -> TemporalAsyncTask[None, str]:
    """A finished step, and one that does not end in the first worker."""

    async def generate() -> str:
        LOG.note("generate")
        return "image"

    async def hold(image: str) -> str:
        LOG.note("upload", current_step().attempt, current_step().idempotency_key)
        if sum(line[0] == "upload" for line in LOG.lines()) == 1:
            await asyncio.sleep(600)
        return f"url of {image}"

    @async_task(name="held", retry_policy=NEVER_AGAIN, heartbeat_timeout=1)
    async def held() -> str:
        return await step("upload", hold, await step("generate", generate))

    return held


def paid_task() -> TemporalAsyncTask[None, str]:
    """A step that must not be called twice."""

    async def pay() -> str:
        LOG.note("pay")
        await asyncio.sleep(600)
        return "paid"

    @async_task(name="paid", heartbeat_timeout=1)
    async def paid() -> str:
        try:
            return await step.with_options(at_most_once=True)("pay", pay)
        except StepOutcomeUnknownError as error:
            return f"asked the bank about {error.key}"

    return paid


async def killed_in_a_step(app: App, log: CallLog, task: TemporalAsyncTask[None, str], key: str) -> str:
    """The id of a run whose worker was killed in a step that the server knew to be running."""
    await app.connect(task)
    task_id = await task.submit()
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path)) as worker:
        await status_when(task, task_id, lambda run: run.current_step == key, timeout=20)
        await wait_until(lambda: key in [line[0] for line in log.lines()])
        worker.kill()
    return task_id


async def test_a_run_whose_worker_was_killed_tells_all_with_every_worker_dead(app: App, tmp_path: Path):
    held = held_task()
    task_id = await killed_in_a_step(app, CallLog(tmp_path / "calls"), held, "upload")
    run = await status_when(held, task_id, lambda run: run.last_error)
    assert run.status is TaskStatus.PROCESSING
    assert (run.current_step, run.completed_steps) == ("upload", ("generate",))
    assert [one.state for one in run.steps] == [StepState.COMPLETED, StepState.RUNNING]
    assert "worker" in str(run.last_error)
    assert run.error is None


async def test_a_run_whose_worker_was_killed_goes_on_with_another_and_no_retry_is_used_up(app: App, tmp_path: Path):
    held, log = held_task(), CallLog(tmp_path / "calls")
    task_id = await killed_in_a_step(app, log, held, "upload")
    killed = time.monotonic()
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path)):
        assert await held.result(task_id, timeout=20) == "url of image"
    assert time.monotonic() - killed < 8
    generated, first, second = log.lines()
    assert generated == ["generate"]
    assert first == second == ["upload", "1", first[2]], "the same attempt, under the same idempotency key"


async def test_a_step_that_may_be_called_once_is_not_called_again_after_its_worker_was_killed(app: App, tmp_path: Path):
    paid, log = paid_task(), CallLog(tmp_path / "calls")
    task_id = await killed_in_a_step(app, log, paid, "pay")
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path)):
        assert await paid.result(task_id, timeout=20) == "asked the bank about pay"
    assert log.lines() == [["pay"]]


async def test_workers_that_are_killed_20_times_lose_nothing_and_repeat_no_finished_step(app: App, tmp_path: Path):
    seed = int(os.environ.get("SEED", random.randrange(1_000_000)))
    sys.stderr.write(f"SEED={seed}\n")
    chance = random.Random(seed)
    chaotic, log = chaotic_task(), CallLog(tmp_path / "calls")
    await app.connect(chaotic)
    ids = await asyncio.gather(*(chaotic.submit() for _ in range(50)))

    finished: dict[str, tuple[str, ...]] = {}  # what the server told to be finished, and so may not be called again
    calls_by_then: Counter[tuple[str, str]] = Counter()
    with contextlib.ExitStack() as processes:

        def new_worker() -> WorkerProcess:
            return processes.enter_context(WorkerProcess(__file__, app, CALL_LOG=str(log.path), SLOTS="3"))

        workers = [new_worker(), new_worker()]
        await wait_until(log.lines, timeout=20)
        for _ in range(20):
            await asyncio.sleep(chance.uniform(0.3, 1.2))
            victim = chance.randrange(2)
            workers[victim].kill()
            for run in await asyncio.gather(*(chaotic.get_status(task_id) for task_id in ids)):
                assert run.status is not TaskStatus.FAILED, run
                finished[run.task_id] = run.completed_steps
            calls_by_then = calls(log)
            workers[victim] = new_worker()
        assert any(len(keys) < 3 for keys in finished.values()), "the kills came too late to matter"
        runs = await asyncio.gather(*(status_when(chaotic, task_id, ended, timeout=40) for task_id in ids))
    assert [run.result for run in runs] == [list(STEPS)] * 50
    made = calls(log)
    for task_id, keys in finished.items():
        for key in keys:
            assert made[task_id, key] == calls_by_then[task_id, key], f"{key} of {task_id} was called again"
    assert_order(log)
    by_worker = Counter((task_id, key, pid) for task_id, key, pid in log.lines())
    assert set(by_worker.values()) == {1}, "a worker called a step twice that was lost with another"
    lost = sum(made.values()) - 150
    sys.stderr.write(f"{lost} calls were lost with their workers and made again\n")
    assert 0 < lost <= 20 * 3, "a kill costs at most one call of each task that was in a step there"


def calls(log: CallLog) -> Counter[tuple[str, str]]:
    return Counter((task_id, key) for task_id, key, _ in log.lines())


def assert_order(log: CallLog) -> None:
    """No step is called once a later one of its run has begun: it was finished by then."""
    furthest: dict[str, int] = {}
    for task_id, key, _ in log.lines():
        assert STEPS.index(key) >= furthest.get(task_id, 0), f"{key} of {task_id} was called again"
        furthest[task_id] = STEPS.index(key)


if __name__ == "__main__":
    work([chaotic_task(), held_task(), paid_task()])
