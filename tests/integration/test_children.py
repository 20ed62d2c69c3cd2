"""A task as a step of another."""

from __future__ import annotations

import asyncio

import pytest

from support import App, on_both, wait_until
from temporal_async_task import (
    NonRetryableError,
    StepFailedError,
    StepState,
    TaskCancelledError,
    TaskFailedError,
    TaskStatus,
    async_task,
    current_run,
    sleep,
    step,
)


@on_both
async def test_a_child_is_submitted_once_and_its_result_is_the_steps(app: App):
    runs: list[str] = []

    @async_task
    async def child(n: int) -> int:
        runs.append(current_run().task_id)
        await sleep("nap", 1.5)
        return n * 2

    @async_task
    async def parent(n: int) -> int:
        return await step("double", child.run, n) + 1

    await app.start(child, parent)
    task_id = await parent.submit(5)
    assert await parent.result(task_id, timeout=20) == 11
    [done] = (await parent.get_status(task_id)).steps
    assert set(runs) == {done.child_task_id}


async def test_a_parent_holds_no_slot_while_its_child_runs(app: App):
    @async_task
    async def child(n: int) -> int:
        await sleep("nap", 1)
        return n

    @async_task
    async def parent(n: int) -> int:
        return await step("child", child.run, n)

    await app.start(child, parent, max_concurrent_tasks=1)
    results = await asyncio.gather(*(parent.run(n, timeout=40) for n in range(4)))
    assert results == [0, 1, 2, 3]


async def test_a_child_that_fails_fails_its_step(app: App):
    @async_task
    async def child() -> None:
        raise NonRetryableError("no such model")

    @async_task
    async def parent() -> str:
        try:
            await step("child", child.run)
        except StepFailedError as error:
            return f"{error.error_type}: {error.message}"
        return "no error"

    await app.start(child, parent)
    message = await parent.run(timeout=20)
    assert message.startswith("TaskFailedError: ")
    assert message.endswith("NonRetryableError: no such model")


@on_both
async def test_cancelling_a_parent_cancels_its_child(app: App):
    @async_task
    async def child() -> None:
        await sleep("long", 600)

    @async_task
    async def parent() -> None:
        await step("child", child.run)

    await app.start(child, parent)
    task_id = await parent.submit()

    async def child_waits() -> str | None:
        steps = (await parent.get_status(task_id)).steps
        return steps[0].child_task_id if steps and steps[0].state is StepState.WAITING else None

    child_id = await wait_until(child_waits)
    await parent.cancel(task_id, "changed my mind")
    with pytest.raises(TaskCancelledError):
        await parent.result(task_id, timeout=10)
    with pytest.raises(TaskCancelledError, match="changed my mind"):
        await child.result(child_id, timeout=10)


@on_both
async def test_resuming_a_parent_resumes_the_child_that_failed_it(app: App):
    broken = True
    calls: list[str] = []

    def pay() -> None:
        calls.append("pay")

    def render() -> str:
        calls.append("render")
        if broken:
            raise NonRetryableError("out of credit")
        return "picture"

    @async_task
    async def child() -> str:
        await step("pay", pay)
        return await step("render", render)

    @async_task
    async def parent() -> str:
        return await step("child", child.run)

    await app.start(child, parent)
    task_id = await parent.submit()
    with pytest.raises(TaskFailedError, match="out of credit"):
        await parent.result(task_id, timeout=20)
    broken = False
    await parent.resume(task_id)
    assert await parent.result(task_id, timeout=20) == "picture"
    assert calls == ["pay", "render", "render"]
    assert (await parent.get_status(task_id)).status is TaskStatus.COMPLETED
