"""Workers that are killed: what was done is kept, and what was not is done by another."""

import asyncio
import os
import time
from pathlib import Path

from support import NEVER_AGAIN, App, CallLog, WorkerProcess, on_both, status_when, wait_until, work
from temporal_async_task import (
    StepOutcomeUnknownError,
    StepState,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    current_step,
    step,
)

LOG = CallLog(Path(os.environ.get("CALL_LOG", os.devnull)))
"""In a worker process: what it called."""


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
        await status_when(task, task_id, lambda run: run.current_step == key, timeout=60)
        await wait_until(lambda: key in [line[0] for line in log.lines()])
        worker.kill()
    return task_id


@on_both
async def test_a_run_whose_worker_was_killed_tells_all_with_every_worker_dead(app: App, tmp_path: Path):
    held = held_task()
    task_id = await killed_in_a_step(app, CallLog(tmp_path / "calls"), held, "upload")
    run = await status_when(held, task_id, lambda run: run.last_error)
    assert run.status is TaskStatus.PROCESSING
    assert (run.current_step, run.completed_steps) == ("upload", ("generate",))
    assert [one.state for one in run.steps] == [StepState.COMPLETED, StepState.RUNNING]
    assert "worker" in str(run.last_error)
    assert run.error is None


@on_both
async def test_a_run_whose_worker_was_killed_goes_on_with_another_and_no_retry_is_used_up(app: App, tmp_path: Path):
    held, log = held_task(), CallLog(tmp_path / "calls")
    task_id = await killed_in_a_step(app, log, held, "upload")
    killed = time.monotonic()
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path)):
        assert await held.result(task_id, timeout=60) == "url of image"
    assert time.monotonic() - killed < 8
    generated, first, second = log.lines()
    assert generated == ["generate"]
    assert first == second == ["upload", "1", first[2]], "the same attempt, under the same idempotency key"


async def test_a_step_that_may_be_called_once_is_not_called_again_after_its_worker_was_killed(app: App, tmp_path: Path):
    paid, log = paid_task(), CallLog(tmp_path / "calls")
    task_id = await killed_in_a_step(app, log, paid, "pay")
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path)):
        assert await paid.result(task_id, timeout=60) == "asked the bank about pay"
    assert log.lines() == [["pay"]]


if __name__ == "__main__":
    work([held_task(), paid_task()])
