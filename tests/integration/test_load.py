"""What one task may not do to the others of its worker: wait, block, or hold on."""

import asyncio
import logging
import time
from pathlib import Path

import pytest

from support import NEVER_AGAIN, App, status_when, wait_until
from temporal_async_task import TaskStatus, async_task, step

BLOCKING_LINE = 1 + Path(__file__).read_text().splitlines().index(
    "        time.sleep(2.5)  # noqa: ASYNC251 - this line is to be reported"
)


async def test_blocking_code_in_an_async_step_is_not_called_again_and_is_reported_with_task_and_line(
    app: App, caplog: pytest.LogCaptureFixture
):
    calls = []

    async def block() -> int:
        calls.append(1)
        time.sleep(2.5)  # noqa: ASYNC251 - this line is to be reported
        return len(calls)

    @async_task(heartbeat_timeout=1, retry_policy=NEVER_AGAIN)
    async def slow_thumbnails() -> int:
        return await step("resize", block)

    await app.start(slow_thumbnails)
    assert await slow_thumbnails.run() == 1
    assert len(calls) == 1
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "task 'slow_thumbnails', step 'resize'" in warning
    assert f"{__file__}:{BLOCKING_LINE} in block" in warning


async def test_blocking_code_holds_up_neither_status_nor_tasks_that_come_after_it_was_reported(
    app: App, caplog: pytest.LogCaptureFixture
):
    blocked = []

    @async_task(heartbeat_timeout=1)
    async def block() -> None:
        blocked.append("begun")
        time.sleep(3)  # noqa: ASYNC251 - it is the point
        blocked.append("over")

    @async_task
    def sync() -> str:
        return "sync"

    @async_task
    async def with_steps() -> int:
        return await step("second", abs, await step("first", abs, -1))

    await app.start(block, sync, with_steps)
    task_id = await block.submit()
    await wait_until(lambda: "Blocking code" in caplog.text)
    assert await asyncio.gather(sync.run(), with_steps.run()) == ["sync", 1]
    assert (await block.get_status(task_id)).status is TaskStatus.PROCESSING
    assert blocked == ["begun"]
    await block.result(task_id)


async def test_blocking_code_does_not_hold_up_the_checkpoints_of_tasks_beside_it(app: App):
    order = []

    def in_a_thread() -> None:
        order.append("step begun")
        time.sleep(0.5)
        order.append("step done")

    @async_task
    async def beside() -> None:
        await step("first", in_a_thread)
        await step("second", abs, 1)

    @async_task
    async def block() -> None:
        time.sleep(3)  # noqa: ASYNC251 - it is the point
        order.append("block over")

    await app.start(block, beside)
    task_id = await beside.submit()
    await wait_until(lambda: order)
    blocking_id = await block.submit()
    await status_when(beside, task_id, lambda run: "first" in run.completed_steps)
    assert order == ["step begun", "step done"]
    await asyncio.gather(beside.result(task_id), block.result(blocking_id))


async def test_blocking_code_does_not_hold_up_a_task_that_is_one_sync_call(app: App):
    order = []

    @async_task
    def beside() -> str:
        order.append("call begun")
        time.sleep(0.5)
        return "result"

    @async_task
    async def block() -> None:
        order.append("block begun")
        time.sleep(3)  # noqa: ASYNC251 - it is the point
        order.append("block over")

    await app.start(block, beside)
    task_id = await beside.submit()
    await wait_until(lambda: order)
    blocking_id = await block.submit()
    assert await beside.result(task_id) == "result"
    assert order == ["call begun", "block begun"]
    await block.result(blocking_id)


async def test_a_run_that_begins_before_blocking_code_was_noticed_does_not_wait_for_it(app: App):
    order = []

    @async_task
    async def block() -> None:
        order.append("block begun")
        time.sleep(5)  # noqa: ASYNC251 - it is the point
        order.append("block over")

    @async_task
    async def quick(number: int) -> int:
        return await step("double", abs, -number)

    await app.start(block, quick)
    blocking_id = await block.submit()
    await wait_until(lambda: order, interval=0.001)
    assert await asyncio.gather(*(quick.run(number) for number in range(5))) == list(range(5))
    assert order == ["block begun"]
    await block.result(blocking_id)


@pytest.mark.slow
async def test_a_step_that_takes_many_heartbeat_timeouts_is_called_once(app: App):
    calls = []

    async def slow() -> str:
        # Longer than the heartbeat timeout and the 5 s after which the SDK's core believes the attempt to be lost.
        calls.append(1)
        await asyncio.sleep(7)
        return "async"

    def slow_sync() -> str:
        calls.append(1)
        time.sleep(7)
        return "sync"

    @async_task(heartbeat_timeout=1, retry_policy=NEVER_AGAIN)
    async def render() -> list[str]:
        return await asyncio.gather(step("async", slow), step("sync", slow_sync))

    await app.start(render)
    task_id = await render.submit()
    assert await render.result(task_id) == ["async", "sync"]
    assert len(calls) == 2
    assert (await render.get_status(task_id)).attempt == 1


async def test_many_tasks_at_once_are_all_done(app: App):
    @async_task
    async def add(number: int) -> int:
        first = await step("first", abs, number)
        return await step("second", abs, first + 1)

    await app.start(add, max_concurrent_tasks=20)
    assert await asyncio.gather(*(add.run(number) for number in range(100))) == list(range(1, 101))


async def test_no_more_tasks_than_configured_run_at_once(app: App):
    running, most = [], []

    async def work() -> None:
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.1)
        running.pop()

    @async_task
    async def busy() -> None:
        await step("work", work)

    await app.start(busy, max_concurrent_tasks=3)
    await asyncio.gather(*(busy.run() for _ in range(12)))
    assert max(most) == 3
