"""What ``async-task list`` asks of the server. The command as it is typed is tested in tests/acceptance."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from support import NEVER_AGAIN, App, Meter, ended, status_when, wait_until
from temporal_async_task import TaskStatus, TemporalAsyncTask, async_task
from temporal_async_task.cli.output import Output
from temporal_async_task.cli.reference import Application
from temporal_async_task.cli.runs import list_runs
from temporal_async_task.devserver import DevServer

STATUS = "DescribeWorkflowExecution"


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[DevServer]:
    """A server of these tests' own: all runs are theirs, so that calls can be counted."""
    async with DevServer() as server:
        yield server


class Listed(Output):
    """Output that keeps the answer."""

    def __init__(self) -> None:  # and leaves this process its stdout
        self.as_json = True
        self.runs: list[tuple[str, str]] = []
        self.said: list[str] = []

    def document(self, value: Any) -> None:
        self.runs = [(run["task"], run["task_id"]) for run in value]

    def say(self, message: str) -> None:
        self.said.append(message)


async def listing(app: App, name: str | None, only: TaskStatus | None, limit: int = 20) -> Listed:
    output = Listed()
    await list_runs(Application("", await app.connect()), output, name, only=only, limit=limit)
    return output


async def counted(meter: Meter, app: App, name: str | None, only: TaskStatus) -> tuple[list[tuple[str, str]], int]:
    """What is listed, and how many runs were asked about for it."""
    meter.calls()
    with meter.attached():
        found = await listing(app, name, only)
    return found.runs, Counter(meter.calls())[STATUS]


async def is_known(task: TemporalAsyncTask[Any, Any], status: TaskStatus, count: int) -> bool:
    """Whether the server's visibility store has as many runs of the task."""
    return len([run async for run in task.list(status=status)]) == count


async def test_of_many_runs_only_those_are_asked_about_that_may_have_the_status(app: App, meter: Meter):
    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot(what: str) -> str:
        if what == "fail":
            raise TypeError(what)
        return what

    @async_task(task_queue="nobody")
    async def waits() -> None: ...

    @async_task
    async def holds() -> None:
        await asyncio.sleep(3600)

    await app.start(shoot, holds)
    await app.connect(waits)
    done = [await shoot.submit(f"cup {number}") for number in range(5)]
    failed = await shoot.submit("fail")
    waiting, held = await waits.submit(), await holds.submit()
    for task_id in (*done, failed):
        await status_when(shoot, task_id, ended)
    await status_when(holds, held, lambda run: run.status is TaskStatus.PROCESSING)
    for task, status, count in (
        (shoot, TaskStatus.COMPLETED, 5),
        (shoot, TaskStatus.FAILED, 1),
        (waits, TaskStatus.PENDING, 1),
        (holds, TaskStatus.PROCESSING, 1),
    ):
        await wait_until(lambda task=task, status=status, count=count: is_known(task, status, count))

    assert await counted(meter, app, "shoot", TaskStatus.FAILED) == ([("shoot", failed)], 1)
    assert await counted(meter, app, None, TaskStatus.FAILED) == ([("shoot", failed)], 1)
    # Whether a run that goes on has begun, only a look at it tells.
    assert await counted(meter, app, None, TaskStatus.PENDING) == ([("waits", waiting)], 2)
    assert await counted(meter, app, None, TaskStatus.PROCESSING) == ([("holds", held)], 2)
    assert await counted(meter, app, "waits", TaskStatus.PROCESSING) == ([], 1)

    every = await listing(app, None, None, limit=8)
    assert {task_id for _, task_id in every.runs} == {*done, failed, waiting, held}
    assert every.said == []
    some = await listing(app, "shoot", TaskStatus.COMPLETED, limit=4)
    assert [task_id for _, task_id in some.runs] == done[:0:-1]
    assert some.said == ["There are more: --limit 4 has cut the list."]
