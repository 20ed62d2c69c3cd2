"""The client and the workers of one process: started and stopped together, and handed over."""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import PollerInfo, TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest

from support import (
    BY_TIMER,
    NEVER_AGAIN,
    App,
    CallLog,
    WorkerProcess,
    backs_off,
    on_both,
    status_when,
    undisturbed,
    wait_until,
    work,
)
from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    AsyncTaskError,
    ConfigError,
    DuplicateTaskError,
    NotConnectedError,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    current_step,
    sleep,
    step,
)
from temporal_async_task.engine import attempt_end

LOG = CallLog(Path(os.environ.get("CALL_LOG", os.devnull)))
"""In a worker process: what it called."""


async def echo(text: str) -> str:
    return text


@pytest.fixture
def greeting() -> TemporalAsyncTask[str, str]:
    return TemporalAsyncTask("greeting", echo)


# Starting and stopping ------------------------------------------------------------------------------------


async def test_a_connected_component_submits_and_asks_and_works_on_nothing(
    app: App, greeting: TemporalAsyncTask[str, str]
):
    component = await app.connect(greeting)
    task_id = await greeting.submit("hello")
    await asyncio.sleep(0.3)
    assert (await greeting.get_status(task_id)).status is TaskStatus.PENDING
    assert not component.is_started
    assert await component.client.service_client.check_health()


async def test_a_started_component_works_until_it_is_stopped(app: App, greeting: TemporalAsyncTask[str, str]):
    component = app.component(greeting)
    assert not component.is_started
    await component.start()
    assert component.is_started
    assert await greeting.run("hello") == "hello"
    await component.stop()
    assert not component.is_started
    task_id = await greeting.submit("too late")
    await asyncio.sleep(0.3)
    assert (await greeting.get_status(task_id)).status is TaskStatus.PENDING


async def test_a_component_is_started_and_stopped_by_async_with(app: App, greeting: TemporalAsyncTask[str, str]):
    component = app.component(greeting)
    async with component as entered:
        assert entered is component
        assert component.is_started
        assert await greeting.run("hello") == "hello"
    assert not component.is_started


async def test_a_component_is_stopped_when_its_block_is_left_by_an_error(
    app: App, greeting: TemporalAsyncTask[str, str]
):
    component = app.component(greeting)
    with pytest.raises(KeyError):
        async with component:
            raise KeyError
    assert not component.is_started


async def test_starting_stopping_and_connecting_again_does_nothing(app: App, greeting: TemporalAsyncTask[str, str]):
    component = app.component(greeting)
    await component.stop()
    await component.connect()
    client = component.client
    await component.start()
    await component.start()
    await component.connect()
    assert component.client is client
    assert await greeting.run("hello") == "hello"
    await component.stop()
    await component.stop()


async def test_a_stopped_component_can_be_started_again(app: App, greeting: TemporalAsyncTask[str, str]):
    component = await app.start(greeting)
    await component.stop()
    await component.start()
    assert await greeting.run("again") == "again"


async def test_a_component_can_be_started_after_it_was_connected(app: App, greeting: TemporalAsyncTask[str, str]):
    component = await app.connect(greeting)
    task_id = await greeting.submit("hello")
    await component.start()
    assert await greeting.result(task_id) == "hello"


async def test_there_is_no_client_before_the_component_is_connected(app: App):
    with pytest.raises(NotConnectedError, match=r"await connect\(\) or start\(\) first"):
        _ = app.component().client


async def test_a_component_without_tasks_is_not_started(app: App):
    with pytest.raises(ConfigError, match=r"No task is registered.*register\(task\)"):
        await app.component().start()


async def test_a_component_needs_no_config_to_be_made(greeting: TemporalAsyncTask[str, str]):
    component = AsyncTaskComponent()
    component.register(greeting)
    assert component.config == AsyncTaskComponentConfig()
    assert greeting.task_queue == "async-tasks"


async def test_slots_may_be_given_out_by_resource_use(app: App, greeting: TemporalAsyncTask[str, str]):
    await app.start(greeting, target_cpu=1.0, target_memory=0.95)
    assert await greeting.run("hello", timeout=60) == "hello"


# Registering ----------------------------------------------------------------------------------------------


async def test_many_tasks_are_registered_at_once(app: App):
    tasks = [TemporalAsyncTask[str, str](f"task-{number}", echo) for number in range(3)]
    component = app.component()
    component.register_all(tasks)
    await component.start()
    assert component.tasks == tuple(tasks)
    assert await asyncio.gather(*(task.run(task.name) for task in tasks)) == ["task-0", "task-1", "task-2"]


async def test_a_second_task_of_the_same_name_is_refused(app: App, greeting: TemporalAsyncTask[str, str]):
    @async_task(name="greeting")
    async def other(text: str) -> str:
        return "other"

    component = app.component(greeting)
    with pytest.raises(DuplicateTaskError, match=r"Two tasks are named 'greeting': .*echo and .*other.*rename one"):
        component.register(other)
    await component.start()
    assert await greeting.run("hello") == "hello"


async def test_the_same_task_may_be_registered_twice(app: App, greeting: TemporalAsyncTask[str, str]):
    component = app.component(greeting, greeting)
    assert component.tasks == (greeting,)


async def test_a_task_is_not_registered_after_the_start(app: App, greeting: TemporalAsyncTask[str, str]):
    component = await app.start(greeting)
    with pytest.raises(ConfigError, match=r"Register task 'late' before start\(\)"):
        component.register(TemporalAsyncTask("late", echo))


async def test_a_task_that_is_registered_after_the_connect_can_be_submitted(
    app: App, greeting: TemporalAsyncTask[str, str]
):
    component = await app.connect()
    component.register(greeting)
    assert await greeting.submit("hello")


# Queues ---------------------------------------------------------------------------------------------------


async def test_every_queue_among_the_tasks_is_worked_on(app: App, greeting: TemporalAsyncTask[str, str]):
    first, second, third = (
        TemporalAsyncTask[str, str](name, echo, task_queue=f"{app.queue}-{queue}")
        for name, queue in [("first", "a"), ("second", "b"), ("third", "b")]
    )
    await app.start(greeting, first, second, third)
    tasks = [greeting, first, second, third]
    assert [task.task_queue.removeprefix(app.queue) for task in tasks] == ["", "-a", "-b", "-b"]
    assert await asyncio.gather(*(task.run(task.name, timeout=60) for task in tasks)) == [task.name for task in tasks]


async def test_a_queue_without_tasks_is_not_polled(app: App):
    task = TemporalAsyncTask[str, str]("elsewhere", echo, task_queue=f"{app.queue}-a")
    component = await app.start(task)
    await task.run("hello")

    async def pollers(queue: str) -> Sequence[PollerInfo]:
        request = DescribeTaskQueueRequest(
            namespace="default",
            task_queue=TaskQueue(name=queue),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
        )
        return (await component.client.workflow_service.describe_task_queue(request)).pollers

    assert {poller.identity for poller in await pollers(f"{app.queue}-a")} == {component.client.identity}
    assert not await pollers(app.queue)


# Tasks that a worker does not know ------------------------------------------------------------------------


@on_both
async def test_a_task_that_a_worker_does_not_know_is_not_failed_and_goes_on_once_one_does(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, greeting: TemporalAsyncTask[str, str]
):
    monkeypatch.setattr(attempt_end, "UNREADABLE_DELAY", 1.0)
    unaware = TemporalAsyncTask[str, str]("unaware", echo)
    first = await app.start(unaware)
    await app.connect(greeting)
    task_id = await greeting.submit("patience")
    run = await status_when(greeting, task_id, backs_off)
    assert run.status is TaskStatus.PENDING
    assert run.last_error is not None
    assert run.last_error.startswith("TaskNotRegisteredError: task 'greeting' is not registered on worker '")
    assert await unaware.run("meanwhile") == "meanwhile"
    assert f"Task 'greeting' is not registered on this worker (task queue '{app.queue}')" in caplog.text
    assert "Register it with the component before start()" in caplog.text
    await first.stop()
    await app.start(greeting)
    assert await greeting.result(task_id, timeout=60) == "patience"


@on_both
async def test_steps_that_were_finished_are_kept_by_a_worker_that_does_not_know_the_task(
    app: App, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attempt_end, "UNREADABLE_DELAY", 1.0)
    calls = []

    async def count() -> int:
        calls.append(1)
        return len(calls)

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> int:
        first = await step("count", count)
        await sleep("pause", 1.1)
        return first

    @async_task
    async def unaware() -> None: ...

    aware = await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, backs_off)
    await aware.stop()
    stranger = await app.start(unaware)
    await status_when(shoot, task_id, lambda run: run.attempt >= 3)
    assert (await shoot.get_status(task_id)).completed_steps == ("count",)
    await stranger.stop()
    await app.start(shoot)
    assert await shoot.result(task_id, timeout=60) == 1
    assert calls == [1]


# Errors of the worker itself ------------------------------------------------------------------------------


async def test_run_raises_what_brings_a_worker_down(app: App, greeting: TemporalAsyncTask[str, str]):
    component = app.component(greeting, namespace="absent")
    with pytest.raises(Exception, match=r"[Nn]amespace '?absent'?"):
        await asyncio.wait_for(component.run(), 10)
    assert not component.is_started


async def test_a_namespace_that_is_not_there_is_an_error_that_says_what_to_do(
    app: App, greeting: TemporalAsyncTask[str, str]
):
    component = app.component(greeting, namespace="absent")
    with pytest.raises(AsyncTaskError, match=r"(?s)absent.*(create|TEMPORAL_NAMESPACE)"):
        await asyncio.wait_for(component.run(), 10)


# Handing over at a shutdown -------------------------------------------------------------------------------


@on_both
async def test_a_step_in_flight_may_finish_within_the_grace_period_and_nothing_new_begins(app: App):
    calls = []

    async def slow(name: str) -> str:
        calls.append(name)
        await asyncio.sleep(0.5)
        return name

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> list[str]:
        return [await step("first", slow, "first"), await step("second", slow, "second")]

    worker = await app.start(shoot, graceful_shutdown_timeout=10)
    task_id = await shoot.submit()
    await wait_until(lambda: calls)
    await worker.stop()
    assert calls == ["first"]
    assert (await shoot.get_status(task_id)).completed_steps == ("first",)
    await app.start(shoot)
    assert await shoot.result(task_id, timeout=60) == ["first", "second"]
    assert calls == ["first", "second"]


@pytest.mark.parametrize("blocks", [False, True], ids=["async", "sync"])
async def test_a_step_that_outlasts_the_grace_period_is_made_again_and_no_retry_is_used_up(app: App, blocks: bool):
    calls = []

    def slow_sync() -> int:
        calls.append(current_step().attempt)
        time.sleep(2.5 if len(calls) == 1 else 0)
        return len(calls)

    async def slow_async() -> int:
        calls.append(current_step().attempt)
        await asyncio.sleep(30 if len(calls) == 1 else 0)
        return len(calls)

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> int:
        return await step("slow", slow_sync if blocks else slow_async)

    worker = await app.start(shoot, graceful_shutdown_timeout=timedelta(seconds=0.3))
    task_id = await shoot.submit()
    await wait_until(lambda: calls)
    begun = time.monotonic()
    await worker.stop()
    assert time.monotonic() - begun < 0.3 + 2
    await app.start(shoot)
    assert await shoot.result(task_id, timeout=60) == 2
    assert calls == [1, 1]


async def test_a_stop_with_nothing_in_flight_is_quick(app: App, greeting: TemporalAsyncTask[str, str]):
    async def stopped() -> float:
        worker = await app.start(greeting, graceful_shutdown_timeout=30)
        await greeting.run("hello")
        begun = time.monotonic()
        await worker.stop()
        return time.monotonic() - begun

    assert await undisturbed(stopped, lambda took: took < 1) < 1


async def test_a_run_in_backoff_is_not_touched_by_a_shutdown(app: App):
    calls = []

    async def fail() -> None:
        calls.append(1)
        raise ConnectionError("not now")

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> None:
        await step("fail", fail)

    worker = await app.start(shoot)
    task_id = await shoot.submit()
    before = await status_when(shoot, task_id, backs_off)
    await worker.stop()
    assert await shoot.get_status(task_id) == before


# A worker process, and the signals it gets.


async def long_step() -> int:
    LOG.note("began", os.getpid(), current_step().attempt)
    if len(LOG.lines()) == 1:
        await asyncio.sleep(60)
    return len(LOG.lines())


def interrupted_task() -> TemporalAsyncTask[None, int]:
    """With a heartbeat timeout of a minute, only a hand-over brings the next attempt within seconds."""

    async def interrupted() -> int:
        return await step("long", long_step)

    return TemporalAsyncTask("interrupted", interrupted, retry_policy=NEVER_AGAIN, heartbeat_timeout=60)


@pytest.mark.parametrize(
    ("number", "loop"),
    [(signal.SIGTERM, "asyncio"), (signal.SIGINT, "asyncio"), (signal.SIGTERM, "uvloop")],
    ids=["SIGTERM", "SIGINT", "SIGTERM on uvloop"],
)
async def test_a_worker_that_gets_a_signal_in_a_step_exits_with_0_and_another_goes_on_within_5_seconds(
    app: App, tmp_path: Path, number: signal.Signals, loop: str
):
    log = CallLog(tmp_path / "calls")
    interrupted = interrupted_task()
    await app.connect(interrupted)
    task_id = await interrupted.submit()
    started = time.monotonic()
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path), GRACE="1", LOOP=loop) as first:
        await wait_until(log.lines, timeout=60)
        beginning = time.monotonic() - started
        os.kill(first.pid, number)
        assert await first.exit_status(timeout=1 + 4) == 0, first.errors()
    exited = time.monotonic()
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path), GRACE="1", LOOP=loop) as second:
        assert await interrupted.result(task_id, timeout=60) == 2
        # A process needs a second or so to begin. On a busy machine it needs more, as the first one has shown.
        assert time.monotonic() - exited < max(5, 3 * beginning)
        assert [(line[1], line[2]) for line in log.lines()] == [(str(first.pid), "1"), (str(second.pid), "1")]
        second.terminate()
        assert await second.exit_status(timeout=4) == 0, second.errors()


async def test_a_second_signal_gives_the_running_steps_no_more_time(app: App, tmp_path: Path):
    log = CallLog(tmp_path / "calls")
    interrupted = interrupted_task()
    await app.connect(interrupted)
    await interrupted.submit()
    with WorkerProcess(__file__, app, CALL_LOG=str(log.path), GRACE="60") as worker:
        await wait_until(log.lines, timeout=60)
        worker.terminate()
        await asyncio.sleep(0.5)
        worker.terminate()
        assert await worker.exit_status(timeout=5) == 0, worker.errors()


if __name__ == "__main__":
    work([interrupted_task()])
