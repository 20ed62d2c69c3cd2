"""Runs whose history grows long: they go on in a new one, as often as it takes, and nobody notices."""

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import Client, WorkflowHistory
from temporalio.worker import Replayer

from support import NEVER_AGAIN, App, ended, status_when, utc_now
from temporal_async_task import (
    NonRetryableError,
    StepState,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    devserver,
    step,
    wait_for,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.engine import wire
from temporal_async_task.engine.workflow import TaskWorkflow

pytestmark = pytest.mark.slow  # they need a server of their own

SHORT = 40
"""Events in a history after which a new one is suggested: some four rounds of waiting."""


@pytest.fixture(scope="module")
async def thrifty() -> AsyncIterator[DevServer]:
    """A server that soon finds a history long."""
    config = f"limit.historyCount.suggestContinueAsNew={SHORT}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devserver, "_ONE_SHARD", (*devserver._ONE_SHARD, config))
        async with DevServer() as server:
            yield server


@pytest.fixture
async def frugal(thrifty: DevServer) -> AsyncIterator[App]:
    app = App(thrifty.address, f"queue-{uuid.uuid4().hex[:8]}")
    yield app
    await app.stop()


def waits_for(key: str) -> Any:
    return lambda run: any(one.key == key and one.state is StepState.WAITING for one in run.steps)


async def histories(client: Client, task_id: str) -> list[WorkflowHistory]:
    """All that a run has had, the last one first."""
    found: list[WorkflowHistory] = []
    run_id: str | None = None
    while run_id != "":
        found.append(await client.get_workflow_handle(task_id, run_id=run_id).fetch_history())
        run_id = found[-1].events[0].workflow_execution_started_event_attributes.continued_execution_run_id
    return found


async def test_a_run_whose_journal_alone_makes_its_history_long_gets_its_events(app: App):
    calls = []

    def render() -> str:
        calls.append("render")
        return "x" * 1_500_000

    @async_task
    async def ask() -> list[Any]:
        film = await step("render", render)
        return [len(film), *[await wait_for(key) for key in "abc"]]

    await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, waits_for("a"))
    for key in "abc":
        await ask.send(task_id, key, f"event {key}")
    assert await ask.result(task_id, timeout=60) == [1_500_000, "event a", "event b", "event c"]
    assert calls == ["render"]


# In histories that are short ----------------------------------------------------------------------------------


class Rounds:
    """A task that waits for one event after the other, each followed by a step, and fails at the end until mended."""

    def __init__(self, count: int) -> None:
        self.keys = [f"round {n}" for n in range(count)]
        self.calls: list[str] = []
        self.is_broken = False
        self.task = TemporalAsyncTask[None, list[str]]("rounds", self.body, retry_policy=NEVER_AGAIN)

    async def call(self, what: str) -> str:
        self.calls.append(what)
        return what

    async def body(self) -> list[str]:
        try:
            answers = [await step("first", self.call, "first")]
            for key in self.keys:
                answers += [await wait_for(key), await step(f"after {key}", self.call, f"after {key}")]
        except asyncio.CancelledError:
            await step("cleanup", self.call, "cleanup")
            raise
        if self.is_broken:
            raise NonRetryableError("a case that was not thought of")
        return [*answers, await wait_for("early")]

    @property
    def answers(self) -> list[str]:
        return ["first", *[what for key in self.keys for what in (f"event of {key}", f"after {key}")], "bird"]

    async def brought_to_its_end(self) -> str:
        """The id of a run that has got all of its events but for the last, and one that it reads late."""
        task_id = await self.task.submit()
        await self.task.send(task_id, "early", "bird")
        for key in self.keys[:-1]:
            await status_when(self.task, task_id, waits_for(key))
            await self.task.send(task_id, key, f"event of {key}")
        await status_when(self.task, task_id, waits_for(self.keys[-1]))
        return task_id

    async def send_last(self, task_id: str) -> None:
        await self.task.send(task_id, self.keys[-1], f"event of {self.keys[-1]}")


async def test_a_run_that_goes_on_in_several_histories_keeps_its_journal_and_its_unread_events(frugal: App):
    rounds = Rounds(20)
    client = (await frugal.start(rounds.task)).client
    task_id = await rounds.brought_to_its_end()
    await rounds.send_last(task_id)
    assert await rounds.task.result(task_id, timeout=60) == rounds.answers
    assert rounds.calls == ["first", *[f"after {key}" for key in rounds.keys]]
    assert len(await histories(client, task_id)) > 3


async def test_the_status_is_right_while_a_run_goes_on_from_history_to_history(frugal: App):
    rounds, seen = Rounds(15), list[TaskResult[list[str]]]()

    async def watch(task_id: str) -> None:
        while not (seen and ended(seen[-1])):
            seen.append(await rounds.task.get_status(task_id))

    web = frugal.component(rounds.task)
    await web.connect()
    before = utc_now()
    task_id = await rounds.task.submit(task_id=f"run-{uuid.uuid4().hex}")
    await asyncio.sleep(1)  # that nobody works on it at first does not make it younger
    await frugal.start(rounds.task)
    watching = asyncio.create_task(watch(task_id))
    for key in rounds.keys:
        await status_when(rounds.task, task_id, waits_for(key))
        await rounds.task.send(task_id, key, f"event of {key}")
    await rounds.task.send(task_id, "early", "bird")
    await watching
    expected = ["first", *[what for key in rounds.keys for what in (key, f"after {key}")], "early"]
    assert seen[-1].completed_steps == tuple(expected)
    assert {run.created_at for run in seen} == {seen[0].created_at}
    assert abs(seen[0].created_at - before) < timedelta(seconds=0.9)
    for earlier, later in itertools.pairwise(seen):
        assert later.completed_steps[: len(earlier.completed_steps)] == earlier.completed_steps
    assert TaskStatus.FAILED not in {run.status for run in seen}
    assert {(run.error, run.last_error) for run in seen} == {(None, None)}


async def test_a_run_that_fails_after_several_histories_is_resumed_with_its_journal_and_its_unread_events(frugal: App):
    rounds = Rounds(10)
    rounds.is_broken = True
    client = (await frugal.start(rounds.task)).client
    task_id = await rounds.brought_to_its_end()
    assert len(await histories(client, task_id)) > 1
    await rounds.send_last(task_id)
    failed = await status_when(rounds.task, task_id, ended)
    assert (failed.error_type, len(failed.completed_steps)) == ("NonRetryableError", 21)
    rounds.is_broken = False
    await rounds.task.resume(task_id)
    assert await rounds.task.result(task_id, timeout=60) == rounds.answers
    assert len(rounds.calls) == len(set(rounds.calls)) == 11
    assert (await rounds.task.get_status(task_id)).created_at == failed.created_at


async def test_a_run_that_is_cancelled_after_several_histories_is_cleaned_up(frugal: App):
    rounds = Rounds(10)
    client = (await frugal.start(rounds.task)).client
    task_id = await rounds.brought_to_its_end()
    assert len(await histories(client, task_id)) > 1
    await rounds.task.cancel(task_id, "not wanted any more")
    run = await status_when(rounds.task, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "not wanted any more")
    assert rounds.calls == ["first", *[f"after {key}" for key in rounds.keys[:-1]], "cleanup"]


async def test_a_history_replays_whether_or_not_the_one_before_could_hand_over_an_event(frugal: App):
    rounds = Rounds(10)
    client = (await frugal.start(rounds.task)).client
    task_id = await rounds.brought_to_its_end()
    await rounds.send_last(task_id)
    await rounds.task.result(task_id, timeout=60)
    found = await histories(client, task_id)
    handed_over = 0
    replayer = Replayer(workflows=[TaskWorkflow], data_converter=wire.RAW)
    for history in found:
        await replayer.replay_workflow(history)
        first = history.events[0].workflow_execution_started_event_attributes.input.payloads[0]
        fields = json.loads(first.data)
        handed_over += len(fields.pop("given"))
        first.data = json.dumps(fields).encode()
        await replayer.replay_workflow(history)
    assert handed_over == len(found) - 1 > 0


async def test_a_run_with_more_unread_events_than_fit_into_a_new_history_goes_on_in_its_old_one(frugal: App):
    rounds = Rounds(8)
    client = (await frugal.start(rounds.task)).client
    task_id = await rounds.task.submit(task_id=f"run-{uuid.uuid4().hex}")
    for number in range(70):
        await rounds.task.send(task_id, f"unread {number}", "x" * 30_000)
    await rounds.task.send(task_id, "early", "bird")
    for key in rounds.keys:
        await rounds.task.send(task_id, key, f"event of {key}")
    assert await rounds.task.result(task_id, timeout=60) == rounds.answers
    [history] = await histories(client, task_id)
    assert len(history.events) > 2 * SHORT
