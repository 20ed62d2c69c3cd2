"""What is particular to a task that an activity carries alone: what it cannot do, and what its server must have."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client

from support import FOR_AN_HOUR, App, backs_off, ended, on_an_activity, status_when, wait_until
from temporal_async_task import (
    AsyncTaskError,
    ConfigError,
    StepUsageError,
    TaskCancelledError,
    TaskFailedError,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    devserver,
    sleep,
    step,
    wait_for,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.engine.standalone import StandaloneBackend


async def echo(text: str) -> str:
    return text


@asynccontextmanager
async def server_without(feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DevServer]:
    """A server on which something is switched off that an older one does not have."""
    binary = tmp_path / "temporal"
    switches = " ".join(f"--dynamic-config-value {name}=false" for name in feature.split())
    real = devserver._find_binary()
    binary.write_text(f'#!/bin/sh\n[ "$2" = start-dev ] && set -- "$@" {switches}\nexec "{real}" "$@"\n')
    binary.chmod(0o700)
    monkeypatch.setattr(devserver, "_find_binary", lambda: str(binary))
    async with DevServer() as server:
        yield server


@on_an_activity
async def test_a_run_that_begins_while_it_is_cancelled_is_cleaned_up(app: App, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    async def work() -> None:
        calls.append("work")
        raise ConnectionError("the vendor is down")

    async def release() -> None:
        calls.append("release")

    @async_task(retry_policy=FOR_AN_HOUR)
    async def order() -> None:
        try:
            await step("work", work)
        except asyncio.CancelledError:
            await step("release", release)
            raise

    await app.connect(order)
    task_id = await order.submit()
    ask = StandaloneBackend._found

    async def ask_and_be_slow(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(StandaloneBackend, "_found", ask)
        found = await ask(*args, **options)
        await app.start(order)
        await status_when(order, task_id, backs_off)
        return found

    monkeypatch.setattr(StandaloneBackend, "_found", ask_and_be_slow)
    await order.cancel(task_id, "the customer left")
    with pytest.raises(TaskCancelledError, match="the customer left"):
        await order.result(task_id, timeout=60)
    assert calls == ["work", "release"]


@on_an_activity
async def test_a_run_that_has_not_begun_is_cancelled_with_no_worker_up(app: App):
    task = TemporalAsyncTask("echo", echo)
    await app.connect(task)
    task_id = await task.submit("cup")
    await task.cancel(task_id, "the customer left")
    run = await status_when(task, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "the customer left")


# What it cannot do ------------------------------------------------------------------------------------------


@on_an_activity
async def test_a_wait_for_that_the_definition_does_not_show_fails_the_run_at_once(app: App):
    waiting: list[Callable[[str], Awaitable[Any]]] = [wait_for]

    @async_task
    async def approved() -> None:
        await waiting[0]("approval")

    await app.start(approved)
    with pytest.raises(TaskFailedError, match=r"wait_for\('approval'\).*execution='workflow'") as failed:
        await approved.run(timeout=60)
    assert failed.value.error_type == StepUsageError.__name__


@on_an_activity
async def test_an_event_is_refused_when_it_is_sent(app: App):
    @async_task
    async def nap() -> None:
        await sleep("nap", 3600)

    await app.connect(nap)
    task_id = await nap.submit()
    with pytest.raises(ConfigError, match=r"'nap' has execution='activity'.*execution='workflow'"):
        await nap.send(task_id, "approval")


@on_an_activity
async def test_a_schedule_is_refused_when_it_is_made_or_asked_for(app: App):
    task = TemporalAsyncTask[str, str]("echo", echo)
    await app.connect(task)
    refused = pytest.raises(ConfigError, match=r"'echo' has execution='activity'.*can only start workflows")
    with refused:
        await task.schedule(f"schedule-{uuid.uuid4().hex[:8]}", "hello", every=3600)
    with refused:
        await task.get_schedule("nightly")
    with refused:
        task.schedules()


@on_an_activity
async def test_a_task_may_be_carried_otherwise_than_the_others_of_its_component(app: App):
    def carried(name: str, **options: Any) -> TemporalAsyncTask[str, str]:
        return TemporalAsyncTask[str, str](name, echo, **options)

    alone, in_workflow = carried("alone"), carried("in_workflow", execution="workflow")
    client = (await app.start(alone, in_workflow)).client
    task_id = f"run-{uuid.uuid4().hex}"
    for task in (alone, in_workflow):
        await task.submit(task.name, task_id=task_id)
        assert await task.result(task_id, timeout=60) == task.name
    assert (await client.get_workflow_handle(task_id).describe()).workflow_type == "asyncTask_in_workflow"
    assert (await client.get_activity_handle(task_id).describe()).activity_type == "asyncTask_alone"


@on_an_activity
async def test_an_activity_that_is_not_a_tasks_is_failed_with_what_to_do(app: App):
    task = TemporalAsyncTask[str, str]("echo", echo)
    client = (await app.start(task)).client
    found = await _started_by_hand(client, "echo", app.queue)
    assert "run other activities on a queue of their own" in found
    found = await _started_by_hand(client, "asyncTask_echo", app.queue)
    assert "Use task.submit()" in found


async def _started_by_hand(client: Client, name: str, queue: str) -> str:
    handle = await client.start_activity(
        name, "hello", id=f"hand-{uuid.uuid4().hex}", task_queue=queue, start_to_close_timeout=timedelta(seconds=60)
    )
    try:
        await asyncio.wait_for(handle.result(), 10)
    except Exception as error:
        return str(error.__cause__)
    return ""


# What its server must have ----------------------------------------------------------------------------------


async def test_a_server_without_standalone_activities_is_told_of_at_the_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with server_without("activity.enableStandalone", tmp_path, monkeypatch) as server:
        app = App(server.address, "queue", "activity")
        says = r"no standalone activities.*server 1\.32.*execution='workflow'"
        with pytest.raises(ConfigError, match=says):
            await app.connect(TemporalAsyncTask[str, str]("echo", echo))
        task = TemporalAsyncTask[str, str]("echo", echo, execution="activity")
        task.set_client(await Client.connect(server.address))
        with pytest.raises(ConfigError, match=says):
            await task.submit("hello")
        with pytest.raises(ConfigError, match=says):
            await task.get_status("run")
        app.execution = "workflow"
        await app.start(in_workflow := TemporalAsyncTask[str, str]("echo", echo))
        assert await in_workflow.run("hello", timeout=60) == "hello"
        await app.stop()


async def test_a_server_that_cannot_delay_or_reset_refuses_delays_and_cancels_by_its_own_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    @async_task(retry_policy=FOR_AN_HOUR, heartbeat_timeout=3)
    async def shoot(place: str) -> None:
        await step(f"first {place}", echo, place)
        try:
            await step("work", hold if place == "in a step" else fail)
        except asyncio.CancelledError:
            await step("cleanup", echo, place)
            calls.append(f"cleaned up {place}")
            raise

    async def hold() -> None:
        calls.append("hold")
        await asyncio.Event().wait()

    async def fail() -> None:
        raise ConnectionError("not now")

    switches = "activity.startDelayEnabled history.enableStandaloneActivityOperatorCommands"
    async with server_without(switches, tmp_path, monkeypatch) as server:
        app = App(server.address, "queue", "activity")
        await app.start(shoot)
        with pytest.raises(AsyncTaskError, match=r"delay"):
            await shoot.submit("later", delay=1)
        in_a_step, in_a_backoff = await shoot.submit("in a step"), await shoot.submit("in a backoff")
        await wait_until(lambda: calls)
        await status_when(shoot, in_a_backoff, backs_off)
        for task_id in (in_a_step, in_a_backoff):
            await shoot.cancel(task_id, "why")
            run = await status_when(shoot, task_id, ended)
            assert (run.status, run.error_type, run.error) == (TaskStatus.FAILED, "TaskCancelledError", "why")
            with pytest.raises(TaskCancelledError, match="why"):
                await shoot.result(task_id)
        assert calls == ["hold", "cleaned up in a step"]
        assert (await shoot.get_status(in_a_backoff)).completed_steps == ("first in a backoff",)
        await app.stop()
