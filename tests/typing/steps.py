"""What the type checkers make of a task's code. mypy and pyright read it with the package; nothing runs it.

An error that is expected is ignored by name, and an ignore that is not needed is an error.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

import asyncio
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, assert_type

from temporal_async_task import (
    Result,
    RetryPolicy,
    RunInfo,
    Step,
    StepFailedError,
    StepInfo,
    current_run,
    current_step,
    poll,
    progress,
    sleep,
    step,
)


@dataclass
class Job:
    id: str


async def generate(prompt: str, *, size: int = 1) -> Job:
    return Job(f"{prompt} {size}")


def download(job: Job, retries: int) -> bytes:
    return job.id.encode() * retries


async def nothing() -> None: ...


async def check(job_id: str) -> Job | None:
    return Job(job_id)


def check_blocking(job_id: str) -> Job | None:
    return Job(job_id)


class Bucket:
    async def put(self, image: bytes) -> str:
        return str(len(image))


async def the_result_of_a_step_is_the_result_of_its_call() -> None:
    assert_type(await step("generate", generate, "a cup"), Job)
    assert_type(await step("generate", generate, "a cup", size=2), Job)
    assert_type(await step("generate", generate, prompt="a cup"), Job)
    assert_type(await step("download", download, Job("1"), 3), bytes)
    assert_type(await step("upload", Bucket().put, b""), str)
    assert_type(await step("job", Job, "1"), Job)
    assert_type(await step("partial", partial(download, retries=3), Job("1")), bytes)
    await step("nothing", nothing)


async def options_keep_the_type() -> None:
    careful = step.with_options(retry_policy=RetryPolicy(max_retries=0), timeout=timedelta(seconds=5))
    assert_type(await careful("generate", generate, "a cup"), Job)
    assert_type(await step.with_options(at_most_once=True)("download", download, Job("1"), 1), bytes)


async def steps_in_parallel_keep_their_types() -> None:
    job, image = await asyncio.gather(step("a", generate, "a cup"), step("b", download, Job("1"), 3))
    assert_type(job, Job)
    assert_type(image, bytes)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(step("c", generate, "a cup"))
    assert_type(task.result(), Job)


async def wrong_arguments_of_a_step_are_errors() -> None:
    await step("generate", generate, 7)  # type: ignore[call-overload]
    await step("generate", generate)  # type: ignore[call-overload]
    await step("generate", generate, "a", "b")  # type: ignore[call-overload]
    await step("generate", generate, "a", size="b")  # type: ignore[arg-type]
    await step("generate", generate, "a", colour=1)  # type: ignore[call-arg]
    await step("download", download, Job("1"))  # type: ignore[call-overload]
    await step("download", download, "1", 3)  # type: ignore[call-overload]
    await step(7, generate, "a cup")  # type: ignore[call-overload]
    await step("generate", "not callable")  # type: ignore[call-overload]
    await step(generate, "a cup")  # type: ignore[call-overload]
    await step("generate", generate("a cup"))  # type: ignore[call-overload]


async def wrong_options_of_a_step_are_errors() -> None:
    step.with_options(timeout="soon")  # type: ignore[arg-type]
    step.with_options(retries=3)  # type: ignore[call-arg]


async def a_poll_gives_what_is_left_without_none() -> None:
    assert_type(await poll("render", check, "1", every=10), Job)
    assert_type(await poll("render", check_blocking, "1", every=RetryPolicy(), timeout=timedelta(hours=1)), Job)
    await poll("render", check, "1")  # type: ignore[call-overload]


async def waiting_and_telling_take_numbers_and_durations() -> None:
    assert_type(await sleep("pause", 5), None)
    await sleep("pause", timedelta(days=3))
    await sleep(5)  # type: ignore[call-arg, arg-type]
    progress(0.5, "halfway")
    progress(None)
    progress("half")  # type: ignore[arg-type]


async def code_in_a_task_knows_where_it_is() -> None:
    assert_type(current_run(), RunInfo)
    assert_type(current_step(), StepInfo)
    assert_type(current_step().idempotency_key, str)
    assert_type(current_run().task_id, str)


async def the_failure_of_a_step_tells_which_and_why() -> None:
    try:
        await step("nothing", nothing)
    except StepFailedError as error:
        assert_type(error.key, str)
        assert_type(error.attempts, int)
        assert_type(error.error_type, str)


def the_steps_of_a_generator_are_checked() -> Generator[Step, Any, None]:
    yield Step("generate", generate, "a cup")
    yield Step("generate", generate, "a cup").with_options(timeout=5)
    yield Step("generate", generate, 7)  # type: ignore[arg-type]
    yield Step("download", download, Job("1"))  # type: ignore[call-arg]
    yield generate("a cup")  # type: ignore[misc]


async def the_result_of_an_async_generator_is_checked() -> AsyncGenerator[Step | Result[Job], Any]:
    yield Step("generate", generate, "a cup")
    yield Result("not a job")  # type: ignore[arg-type]
    yield Result(Job("1"))
