"""Runs that somebody has started, or sent something to, with Temporal's own means."""

from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import Client

from support import App, ended, on_both, status_when
from temporal_async_task import TaskConflictError, TaskStatus, WaitTimeoutError, async_task, wait_for
from temporal_async_task.cli.lookup import find_task
from temporal_async_task.cli.reference import Application
from temporal_async_task.engine import wire

ODD: list[list[Any]] = [[], ["text"], [{"a": 1}], [None], [7], [b"\xff"], [{"origin": "x", "heartbeat_timeout": 5}]]


@on_both
@pytest.mark.parametrize("given", ODD, ids=repr)
async def test_a_run_that_was_started_by_hand_is_told_and_not_resumed(app: App, given: list[Any]):
    @async_task
    async def shoot(n: int) -> int:
        return n

    await app.start(shoot)
    client = await Client.connect(app.address)
    start: Any = client.start_activity if app.execution == "activity" else client.start_workflow
    options: dict[str, Any] = {"start_to_close_timeout": timedelta(hours=1)} if app.execution == "activity" else {}
    task_id = f"by-hand-{app.queue}"
    await start("asyncTask_shoot", args=given, id=task_id, task_queue=app.queue, **options)
    run = await status_when(shoot, task_id, ended, timeout=60)
    assert run.status is TaskStatus.FAILED
    with pytest.raises(TaskConflictError, match="was not started by temporal-async-task"):
        await shoot.resume(task_id)
    unknown = Application("", await app.connect())
    assert (await find_task(unknown, task_id)).name == "shoot"


async def test_an_odd_event_that_was_sent_by_hand_holds_up_neither_the_end_of_a_wait_nor_a_resume(app: App):
    @async_task
    async def ask() -> str:
        try:
            return await wait_for("approval", timeout=1.5)
        except WaitTimeoutError:
            raise TypeError("not approved") from None

    component = await app.start(ask)
    task_id = await ask.submit()
    await component.client.get_workflow_handle(task_id).signal(wire.SIGNAL_EVENT, "odd")
    await status_when(ask, task_id, ended, timeout=60)
    assert await ask.resume(task_id) == task_id
