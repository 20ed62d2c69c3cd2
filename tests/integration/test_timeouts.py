"""The time that a whole run may take."""

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest

from support import FOR_AN_HOUR, App, ended, on_both, status_when
from temporal_async_task import (
    TaskFailedError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    sleep,
    step,
)


async def generate() -> str:
    return "image"


async def hang() -> None:
    await asyncio.Event().wait()


async def busy() -> None:
    raise ConnectionError("busy")


async def outcome(app: App, task: TemporalAsyncTask[None, Any]) -> TaskResult[Any]:
    """Run a task on a worker of its own, to its end."""
    await app.start(task)
    task_id = await task.submit()
    return await status_when(task, task_id, ended, timeout=60)


@on_both
async def test_a_run_that_takes_too_long_fails_names_its_step_and_keeps_what_was_done(app: App):
    @async_task(timeout=timedelta(seconds=1))
    async def shoot() -> None:
        await step("generate", generate)
        await step("upload", hang)

    begun = time.monotonic()
    run = await outcome(app, shoot)
    assert 1 <= time.monotonic() - begun < 3
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "TaskTimeoutError")
    assert run.error == "The task did not finish within its timeout of 1.0 s; it was in step 'upload'"
    assert run.completed_steps == ("generate",)
    with pytest.raises(TaskFailedError, match="in step 'upload'"):
        await shoot.result(run.task_id)


@on_both
async def test_a_run_whose_next_retry_would_come_too_late_fails_at_once(app: App):
    @async_task(timeout=600, retry_policy=FOR_AN_HOUR)
    async def shoot() -> None:
        await step("generate", generate)
        await step("upload", busy)

    run = await outcome(app, shoot)
    assert run.error_type == "TaskTimeoutError"
    assert run.error == "The task did not finish within its timeout of 600.0 s; it was in step 'upload'"
    assert run.completed_steps == ("generate",)
    assert run.steps[1].last_error == "ConnectionError: busy"


async def test_a_run_that_would_sleep_past_its_timeout_fails(app: App):
    @async_task(timeout=600)
    async def shoot() -> None:
        await sleep("a long pause", 3600)

    run = await outcome(app, shoot)
    assert run.error == "The task did not finish within its timeout of 600.0 s; it was in step 'a long pause'"


async def test_a_body_that_hangs_outside_of_steps_fails_with_the_timeout(app: App):
    @async_task(timeout=0.5)
    async def shoot() -> None:
        await hang()

    run = await outcome(app, shoot)
    assert run.error == "The task did not finish within its timeout of 0.5 s"


@on_both
async def test_a_delayed_run_has_all_of_its_time(app: App):
    @async_task(timeout=1)
    async def shoot() -> str:
        return await step("generate", generate)

    await app.start(shoot)
    assert await shoot.run(delay=1.3) == "image"
