"""Starting runs and asking for their results: ids, duplicates, conflicts, delays, lists."""

import asyncio
import time
import uuid
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from support import App, ended, on_both, status_when, wait_until
from temporal_async_task import (
    AsyncTaskComponent,
    ConfigError,
    RetryPolicy,
    TaskConflictError,
    TaskFailedError,
    TaskNotFoundError,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    step,
)


class Order(BaseModel):
    prompt: str
    count: int = 1


def unique(prefix: str = "run") -> str:
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


class Gate:
    """Holds the calls that pass through it until it is open, and keeps what they were called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.is_open = False

    async def pass_through(self, value: Any) -> Any:
        self.calls.append(value)
        await wait_until(lambda: self.is_open, timeout=60)
        return value


@async_task
async def shoot(order: Order) -> str:
    return order.prompt


# submit ---------------------------------------------------------------------------------------------------


@on_both
async def test_submit_returns_while_there_is_no_worker_and_the_run_is_kept_for_one(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    await app.connect(echo)
    task_id = await echo.submit("kept")
    await app.start(echo)
    assert await echo.result(task_id) == "kept"


async def test_every_submit_without_an_id_is_a_run_of_its_own(app: App):
    calls = []

    @async_task
    async def echo(text: str) -> str:
        calls.append(text)
        return text

    await app.start(echo)
    ids = [await echo.submit("same"), await echo.submit("same")]
    assert [await echo.result(task_id) for task_id in ids] == ["same", "same"]
    assert len(set(ids)) == 2
    assert calls == ["same", "same"]


async def test_the_run_gets_the_id_that_was_asked_for(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    await app.start(echo)
    wanted = unique("ü 漢字 / order")
    assert await echo.submit("hello", task_id=wanted) == wanted
    assert await echo.result(wanted) == "hello"


@on_both
async def test_the_same_id_and_params_are_one_run_while_it_is_running(app: App):
    gate = Gate()

    @async_task
    async def hold(order: Order) -> Order:
        return await gate.pass_through(order)

    await app.start(hold)
    task_id = await hold.submit(Order(prompt="cup"), task_id=unique())
    await wait_until(lambda: gate.calls)
    assert await hold.submit(Order(prompt="cup"), task_id=task_id) == task_id
    gate.is_open = True
    assert await hold.result(task_id) == Order(prompt="cup")
    assert len(gate.calls) == 1


@on_both
async def test_the_same_id_and_params_are_one_run_after_its_end(app: App):
    calls = []

    @async_task
    async def count(order: Order) -> int:
        calls.append(order)
        return len(calls)

    await app.start(count)
    task_id = unique()
    assert await count.run(Order(prompt="cup"), task_id=task_id) == 1
    assert await count.run(Order(prompt="cup"), task_id=task_id) == 1
    assert len(calls) == 1


@on_both
async def test_the_same_id_and_params_are_one_run_after_its_failure(app: App):
    calls = []

    @async_task(retry_policy=RetryPolicy(max_retries=0))
    async def fail(order: Order) -> None:
        calls.append(order)
        raise ValueError("no")

    await app.start(fail)
    task_id = unique()
    for _ in range(2):
        with pytest.raises(TaskFailedError, match="no"):
            await fail.run(Order(prompt="cup"), task_id=task_id)
    assert len(calls) == 1


@on_both
async def test_many_submits_of_one_id_at_once_are_one_run(app: App):
    calls = []

    @async_task
    async def count(order: Order) -> int:
        calls.append(order)
        return len(calls)

    await app.start(count)
    task_id = unique()
    results = await asyncio.gather(*(count.run(Order(prompt="cup"), task_id=task_id) for _ in range(20)))
    assert results == [1] * 20


async def test_params_are_the_same_whatever_the_order_of_their_keys(app: App):
    @async_task
    async def echo(params: dict[str, int]) -> dict[str, int]:
        return params

    await app.start(echo)
    task_id = unique()
    await echo.submit({"a": 1, "b": 2}, task_id=task_id)
    assert await echo.submit({"b": 2, "a": 1}, task_id=task_id) == task_id


@on_both
async def test_other_params_for_an_id_in_use_are_a_conflict_while_it_runs_and_after(app: App):
    gate = Gate()

    @async_task
    async def hold(order: Order) -> Order:
        return await gate.pass_through(order)

    await app.start(hold)
    task_id = await hold.submit(Order(prompt="cup"), task_id=unique())
    with pytest.raises(TaskConflictError, match=rf"'{task_id}' was submitted before with other params"):
        await hold.submit(Order(prompt="plate"), task_id=task_id)
    gate.is_open = True
    assert await hold.result(task_id) == Order(prompt="cup")
    with pytest.raises(TaskConflictError, match="choose another id, or submit the same params"):
        await hold.submit(Order(prompt="plate"), task_id=task_id)
    assert gate.calls == [Order(prompt="cup")]


@on_both
async def test_an_id_of_another_task_is_a_conflict(app: App):
    @async_task
    async def other(order: Order) -> None: ...

    await app.connect(shoot, other)
    task_id = await shoot.submit(Order(prompt="cup"), task_id=unique())
    with pytest.raises(TaskConflictError, match=r"run of another task or workflow\. Choose another id"):
        await other.submit(Order(prompt="cup"), task_id=task_id)


async def something_else(app: App, component: AsyncTaskComponent) -> str:
    """The id of a workflow or activity that is not a task's."""
    task_id = unique()
    if app.execution == "workflow":
        await component.client.start_workflow("SomethingElse", id=task_id, task_queue=app.queue)
    else:
        limit = timedelta(seconds=60)
        await component.client.start_activity(
            "shoot", id=task_id, task_queue=app.queue, start_to_close_timeout=limit, schedule_to_close_timeout=limit
        )
    return task_id


@on_both
async def test_an_id_of_some_other_workflow_is_a_conflict(app: App):
    task_id = await something_else(app, await app.connect(shoot))
    with pytest.raises(TaskConflictError, match=r"run of another task or workflow\. Choose another id"):
        await shoot.submit(Order(prompt="cup"), task_id=task_id)


@on_both
@pytest.mark.parametrize("given", [[], ["cup"], [{"prompt": "cup"}]], ids=["nothing", "a text", "an object"])
async def test_an_id_of_a_run_that_was_started_by_hand_is_a_conflict(app: App, given: list[Any]):
    client = (await app.connect(shoot)).client
    task_id = f"by-hand-{uuid.uuid4()}"
    if app.execution == "workflow":
        await client.start_workflow(shoot.workflow_type, args=given, id=task_id, task_queue=app.queue)
    else:
        await client.start_activity(
            shoot.workflow_type, args=given, id=task_id, task_queue=app.queue, start_to_close_timeout=timedelta(hours=1)
        )
    with pytest.raises(TaskConflictError, match="submitted before with other params"):
        await shoot.submit(Order(prompt="cup"), task_id=task_id)


@on_both
async def test_a_delayed_run_begins_when_its_delay_is_over(app: App):
    begun = []

    @async_task
    async def note() -> None:
        begun.append(time.monotonic())

    await app.start(note)
    submitted = time.monotonic()
    task_id = await note.submit(delay=1.2)
    assert not begun, "it did not wait for the delay"
    assert (await note.get_status(task_id)).status is TaskStatus.PENDING
    await note.result(task_id)
    assert 1.15 <= begun[0] - submitted < 3


# Asking ---------------------------------------------------------------------------------------------------


@on_both
async def test_an_unknown_id_is_not_found(app: App):
    await app.connect(shoot)
    with pytest.raises(TaskNotFoundError, match="no task run 'never-submitted'"):
        await shoot.get_status("never-submitted")
    with pytest.raises(TaskNotFoundError, match="no task run 'never-submitted'"):
        await shoot.result("never-submitted")


@on_both
async def test_a_run_of_another_task_is_not_found(app: App):
    @async_task
    async def other(order: Order) -> str:
        return "a secret of the other task"

    await app.start(shoot, other)
    task_id = await other.submit(Order(prompt="cup"))
    await other.result(task_id)
    with pytest.raises(TaskNotFoundError, match=rf"no run '{task_id}' of task 'shoot'"):
        await shoot.get_status(task_id)
    with pytest.raises(TaskNotFoundError, match=rf"no run '{task_id}' of task 'shoot'"):
        await shoot.result(task_id)


@on_both
async def test_a_run_of_some_other_workflow_is_not_found(app: App):
    task_id = await something_else(app, await app.connect(shoot))
    with pytest.raises(TaskNotFoundError):
        await shoot.get_status(task_id)
    with pytest.raises(TaskNotFoundError):
        await shoot.result(task_id)


@on_both
async def test_a_wait_for_the_result_that_takes_too_long_is_over_and_the_run_goes_on(app: App):
    gate = Gate()

    @async_task
    async def hold(text: str) -> str:
        return await gate.pass_through(text)

    await app.start(hold)
    task_id = await hold.submit("patience")
    with pytest.raises(TimeoutError, match=rf"Run '{task_id}' of task 'hold' has not ended within 0.2 s; it goes on"):
        await hold.result(task_id, timeout=0.2)
    gate.is_open = True
    assert await hold.result(task_id, timeout=60) == "patience"
    assert gate.calls == ["patience"]


@on_both
async def test_the_result_of_a_failed_run_is_raised_with_the_error_that_ended_it(app: App):
    @async_task(retry_policy=RetryPolicy(max_retries=0))
    async def fail() -> None:
        raise ValueError("the vendor said no")

    await app.start(fail)
    task_id = await fail.submit()
    with pytest.raises(TaskFailedError) as raised:
        await fail.result(task_id)
    assert (raised.value.task_id, raised.value.error_type, raised.value.message) == (
        task_id,
        "ValueError",
        "the vendor said no",
    )
    assert str(raised.value) == f"Task run '{task_id}' failed: ValueError: the vendor said no"


@on_both
async def test_the_result_is_there_for_whoever_asks_however_often(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    worker = await app.start(echo)
    task_id = await echo.submit("again")
    assert await asyncio.gather(*(echo.result(task_id) for _ in range(3))) == ["again"] * 3
    await worker.stop()
    assert await echo.result(task_id) == "again"


@on_both
async def test_the_list_has_the_runs_of_its_task_alone_newest_first(app: App):
    name = unique("listed")

    async def take(seconds: float) -> float:
        await step("once", asyncio.sleep, seconds)
        return seconds

    listed, other = (TemporalAsyncTask(name + suffix, take) for suffix in ("", "-other"))
    await app.start(listed, other)
    ids = [await listed.submit(seconds) for seconds in (0.6, 0.3, 0.0)]  # the first to begin is the last to end
    await other.run(0)
    await asyncio.gather(*(listed.result(task_id) for task_id in ids))

    async def listing(**options: Any) -> list[Any]:
        return [run async for run in listed.list(**options)]

    runs = await wait_until(lambda: has_length(3, listing(status=TaskStatus.COMPLETED)))
    assert [run.task_id for run in runs] == ids[::-1]
    assert [run.result for run in runs] == [0.0, 0.3, 0.6]
    assert [run.completed_steps for run in runs] == [("once",)] * 3
    assert [run.task_id for run in await listing(limit=2)] == ids[:0:-1]
    assert await listing(limit=0) == []


@on_both
async def test_the_list_can_be_asked_for_the_runs_with_one_status(app: App):
    gate = Gate()

    async def act(what: str) -> str:
        if what == "fail":
            raise TypeError(what)
        return await gate.pass_through(what) if what == "hold" else what

    task = TemporalAsyncTask(unique("listed"), act)
    worker = await app.start(task)
    ids = {what: await task.submit(what) for what in ("complete", "fail", "hold")}
    await status_when(task, ids["complete"], ended)
    await status_when(task, ids["fail"], ended)
    await wait_until(lambda: gate.calls)

    async def listing(status: TaskStatus) -> list[str]:
        return [run.task_id async for run in task.list(status=status)]

    assert await wait_until(lambda: has_length(1, listing(TaskStatus.COMPLETED))) == [ids["complete"]]
    assert await wait_until(lambda: has_length(1, listing(TaskStatus.FAILED))) == [ids["fail"]]
    assert await wait_until(lambda: has_length(1, listing(TaskStatus.PROCESSING))) == [ids["hold"]]
    gate.is_open = True
    await task.result(ids["hold"])
    await worker.stop()
    waiting = await task.submit("complete")
    assert await wait_until(lambda: has_length(1, listing(TaskStatus.PENDING))) == [waiting]


async def test_a_status_that_there_is_not_is_told_with_those_that_there_are(app: App):
    @async_task
    async def listed() -> None: ...

    await app.connect(listed)
    with pytest.raises(ConfigError, match="'listed' must be one of pending, processing, completed, failed, not 'done'"):
        await anext(aiter(listed.list(status="done")))


async def has_length(length: int, listing: Any) -> Any:
    found = await listing
    return found if len(found) == length else None
