"""A task as a step of another."""

from __future__ import annotations

import asyncio

import pytest

from support import App, on_both, status_when, wait_until
from temporal_async_task import (
    AsyncTaskError,
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
    assert await parent.result(task_id, timeout=60) == 11
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
    results = await asyncio.gather(*(parent.run(n, timeout=90) for n in range(4)))
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
    message = await parent.run(timeout=60)
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
        await parent.result(task_id, timeout=60)
    with pytest.raises(TaskCancelledError, match="changed my mind"):
        await child.result(child_id, timeout=60)


@on_both
async def test_cancelling_a_parent_cancels_all_of_its_children(app: App):
    @async_task
    async def child(n: int) -> None:
        await sleep("long", 600)

    @async_task
    async def parent() -> None:
        await asyncio.gather(*(step(f"child-{n}", child.run, n) for n in range(3)))

    await app.start(child, parent)
    task_id = await parent.submit()

    async def children_wait() -> list[str] | None:
        steps = (await parent.get_status(task_id)).steps
        waiting = [found.child_task_id or "" for found in steps if found.state is StepState.WAITING]
        return waiting if len(waiting) == 3 else None

    child_ids = await wait_until(children_wait)
    await parent.cancel(task_id, "changed my mind")
    with pytest.raises(TaskCancelledError):
        await parent.result(task_id, timeout=60)
    for child_id in child_ids:
        with pytest.raises(TaskCancelledError, match="changed my mind"):
            await child.result(child_id, timeout=60)


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
        await parent.result(task_id, timeout=60)
    broken = False
    await parent.resume(task_id)
    assert await parent.result(task_id, timeout=60) == "picture"
    assert calls == ["pay", "render", "render"]
    assert (await parent.get_status(task_id)).status is TaskStatus.COMPLETED


@on_both
async def test_resuming_a_parent_that_was_cancelled_while_it_waited_resumes_its_child(app: App):
    @async_task
    async def child() -> None:
        await sleep("long", 600)

    @async_task
    async def parent() -> None:
        await step("child", child.run)

    await app.start(child, parent)
    task_id = await parent.submit()
    [waiting] = (await status_when(parent, task_id, lambda run: run.steps and run.steps[0].state == "waiting")).steps
    await parent.cancel(task_id)
    for task, its_id in (parent, task_id), (child, waiting.child_task_id):
        with pytest.raises(TaskCancelledError):
            await task.result(its_id or "", timeout=60)
    await parent.resume(task_id)
    await status_when(child, waiting.child_task_id or "", lambda run: run.status is TaskStatus.PROCESSING)


@on_both
async def test_a_child_that_cannot_be_cancelled_at_first_is_cancelled_in_the_end(
    app: App, monkeypatch: pytest.MonkeyPatch
):
    tries: list[str] = []

    @async_task
    async def child() -> None:
        await sleep("long", 600)

    @async_task
    async def parent() -> None:
        await step("child", child.run)

    async def limited(task_id: str, reason: str = "") -> None:
        tries.append(task_id)
        if len(tries) < 4:
            raise AsyncTaskError("The Temporal server refused the call: RESOURCE_EXHAUSTED")
        await cancel(task_id, reason)

    cancel = child.cancel
    await app.start(child, parent)
    task_id = await parent.submit()
    [waiting] = (await status_when(parent, task_id, lambda run: run.steps and run.steps[0].state == "waiting")).steps
    monkeypatch.setattr(child, "cancel", limited)
    await parent.cancel(task_id, "changed my mind")
    for task, its_id in (parent, task_id), (child, waiting.child_task_id):
        with pytest.raises(TaskCancelledError, match="changed my mind"):
            await task.result(its_id or "", timeout=60)
    assert tries == [waiting.child_task_id] * 4


async def test_an_id_that_stands_for_a_run_of_another_task_fails_the_step(app: App):
    @async_task
    async def child() -> None: ...

    @async_task
    async def other() -> None: ...

    @async_task
    async def parent() -> None:
        await step("child", child.run, task_id=other_id)

    await app.start(child, other, parent)
    other_id = await other.submit()
    with pytest.raises(TaskFailedError, match="TaskConflictError"):
        await parent.run(timeout=60)
