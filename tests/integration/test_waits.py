"""Waiting durably: polls, sleeps, events and delays, over attempts and killed workers, without holding a slot."""

import asyncio
import itertools
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio.client import Client
from temporalio.worker import Replayer

from support import (
    BY_TIMER,
    FOR_AN_HOUR,
    App,
    CallLog,
    WorkerProcess,
    backs_off,
    ended,
    on_both,
    status_when,
    wait_until,
    work,
)
from temporal_async_task import (
    NonRetryableError,
    RetryPolicy,
    StepState,
    TaskConflictError,
    TaskNotFoundError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    WaitTimeoutError,
    async_task,
    poll,
    sleep,
    step,
    wait_for,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.engine import wire
from temporal_async_task.engine.workflow import TaskWorkflow

HEARTBEAT = 2.0


class Approval(BaseModel):
    by: str
    amount: int


class Vendor:
    """Its calls, in the order in which they came."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def call(self, what: str) -> str:
        self.calls.append(what)
        return what

    async def fail(self, what: str) -> str:
        self.calls.append(what)
        raise ConnectionError("not now")

    async def fail_once(self, what: str) -> str:
        self.calls.append(what)
        if self.calls.count(what) == 1:
            raise ConnectionError("not now")
        return what


def is_held(run: TaskResult[Any]) -> bool:
    """Whether the run waits, and no attempt of it is under way."""
    return any(one.state is StepState.WAITING for one in run.steps)


# With workers that are killed -------------------------------------------------------------------------------


class Job:
    """A vendor's job, known by the log of the calls that it got: the start, then polls, some of which fail."""

    def __init__(self, log: CallLog) -> None:
        self.log = log

    async def start(self) -> str:
        self.log.note("start", os.getpid())
        return "job-7"

    async def check(self, job: str) -> str | None:
        number = self.polls
        self.log.note("poll", os.getpid())
        await asyncio.sleep(0.1)
        if number in {1, 4}:
            raise ConnectionError("503 from the vendor")
        return f"the video of {job}" if number >= 7 else None

    @property
    def polls(self) -> int:
        return sum(line[0] == "poll" for line in self.log.lines())


def filming(log: CallLog) -> TemporalAsyncTask[None, str]:
    job = Job(log)

    async def film() -> str:
        job_id = await step("start", job.start)
        return await poll("render", job.check, job_id, every=0.3, timeout=60)

    return TemporalAsyncTask[None, str]("film", film, heartbeat_timeout=HEARTBEAT)


def asking(log: CallLog) -> TemporalAsyncTask[None, str]:
    async def prepare() -> str:
        log.note("prepare")
        return "prepared"

    async def ask() -> str:
        return f"{await step('prepare', prepare)}, {await wait_for('approval')}"

    return TemporalAsyncTask[None, str]("ask", ask, heartbeat_timeout=HEARTBEAT)


async def polled_by_workers_that_die(app: App, log: CallLog) -> str:
    task = filming(log)
    await app.connect(task)
    workers = [WorkerProcess(__file__, app, CALLS=str(log.path)) for _ in range(3)]
    try:
        task_id = await task.submit()
        for polls in (3, 6):
            await wait_until(lambda polls=polls: Job(log).polls >= polls, timeout=90)
            os.kill(int(log.lines()[-1][1]), signal.SIGKILL)  # in the midst of the poll
        return await task.result(task_id, timeout=90)
    finally:
        for worker in workers:
            worker.__exit__()


async def held_by_a_worker_that_dies(app: App, log: CallLog) -> str:
    task = asking(log)
    await app.connect(task)
    with WorkerProcess(__file__, app, CALLS=str(log.path)) as worker:
        task_id = await task.submit()
        await status_when(task, task_id, is_held, timeout=90)
        worker.kill()
    await task.send(task_id, "approval", "approved")
    await app.start(task)
    return await task.result(task_id, timeout=90)


Story = tuple[str, list[Sequence[str]]]


@pytest.fixture(scope="module", autouse=True)
async def stories(
    server: DevServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[Callable[..., Any], asyncio.Task[Story]]]:
    """What takes a while, and goes on while the other tests run."""
    apps: list[App] = []

    async def tell(story: Callable[[App, CallLog], Awaitable[str]]) -> Story:
        apps.append(app := App(server.address, f"queue-{uuid.uuid4().hex[:8]}"))
        log = CallLog(tmp_path_factory.mktemp(story.__name__) / "log")
        result = await story(app, log)
        return result, log.lines()

    stories = {
        story: asyncio.create_task(tell(story)) for story in (polled_by_workers_that_die, held_by_a_worker_that_dies)
    }
    yield stories
    for story in stories.values():
        story.cancel()
    await asyncio.wait(stories.values())
    await asyncio.gather(*(app.stop() for app in apps))


# Polls ------------------------------------------------------------------------------------------------------


async def history_length(client: Client, task_id: str) -> int:
    return (await client.get_workflow_handle(task_id).describe()).history_length


async def test_polls_add_nothing_to_the_history(app: App):
    polls = {"quick": 0, "slow": 0}
    is_ready = threading.Event()

    async def check(which: str) -> str | None:
        polls[which] += 1
        return "ready" if is_ready.is_set() else None

    @async_task
    async def render(which: str) -> str:
        return await poll("render", check, which, every=0.001 if which == "quick" else 1.05)

    client = (await app.start(render)).client
    ids = [await render.submit("quick"), await render.submit("slow")]
    await wait_until(lambda: all(polls.values()))
    before = [await history_length(client, task_id) for task_id in ids]
    await wait_until(lambda: polls["quick"] >= 300 and polls["slow"] >= 3, timeout=60)
    assert [await history_length(client, task_id) for task_id in ids] == before
    is_ready.set()
    assert [await render.result(task_id) for task_id in ids] == ["ready", "ready"]


@on_both
async def test_a_poll_waits_between_two_asks_and_is_patient_with_errors(app: App):
    times: list[float] = []

    async def check(job: str) -> str | None:
        times.append(time.monotonic())
        if len(times) in {2, 4}:
            raise ConnectionError("503")
        return f"{job} is ready" if len(times) == 6 else None

    @async_task(retry_policy=RetryPolicy(max_retries=1, initial_delay=0.01, jitter=0))
    async def render() -> str:
        return await poll("render", check, "job-7", every=0.2, timeout=30)

    await app.start(render)
    assert await render.run(timeout=60) == "job-7 is ready"
    assert len(times) == 6
    assert all(later - earlier >= 0.2 for earlier, later in itertools.pairwise(times))


async def test_a_poll_whose_time_is_over_is_an_error_that_the_body_may_handle(app: App):
    vendor = Vendor()

    async def never() -> None:
        vendor.calls.append("poll")

    @async_task
    async def render() -> str:
        try:
            return await poll("render", never, every=0.1, timeout=0.5)
        except TimeoutError as error:
            await step("cancel the job", vendor.call, "cancel the job")
            return str(error)

    await app.start(render)
    assert "not ready within 0.5 s" in await render.run(timeout=60)
    assert vendor.calls[-1] == "cancel the job"
    assert vendor.calls.count("cancel the job") == 1


async def test_a_poll_outlives_its_workers_and_the_job_is_started_once(stories: Any):
    result, calls = await stories[polled_by_workers_that_die]
    assert result == "the video of job-7"
    assert [what for what, _ in calls].count("start") == 1
    assert len({process for what, process in calls if what == "poll"}) == 3


# Sleeps -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_fifty_tasks_that_sleep_leave_two_slots_to_others(app: App):
    @async_task
    async def nap() -> None:
        await sleep("nap", 3600)

    @async_task
    async def quick(text: str) -> str:
        return await step("echo", Vendor().call, text)

    def is_asleep(run: TaskResult[Any]) -> bool:
        return backs_off(run) and run.current_step == "nap"

    await app.start(nap, quick, max_concurrent_tasks=2)
    ids = await asyncio.gather(*(nap.submit() for _ in range(50)))
    # On a busy machine the server may take an attempt for lost before it comes to its step. That backs off, too.
    await asyncio.gather(*(status_when(nap, task_id, is_asleep, timeout=90) for task_id in ids))
    assert await quick.run("done", timeout=60) == "done"
    asleep = await asyncio.gather(*map(nap.get_status, ids))
    assert {(run.status, run.current_step) for run in asleep} == {(TaskStatus.PROCESSING, "nap")}


# Events -----------------------------------------------------------------------------------------------------


async def test_an_event_that_is_sent_while_the_run_waits_for_it_ends_the_wait(app: App):
    @async_task
    async def ask() -> str:
        return await wait_for("approval")

    await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, is_held)
    await ask.send(task_id, "approval", "approved")
    assert await ask.result(task_id, timeout=60) == "approved"


async def test_an_event_that_is_sent_before_any_worker_came_is_not_lost(app: App):
    @async_task
    async def ask() -> str:
        return await wait_for("approval")

    await app.connect(ask)
    task_id = await ask.submit()
    await ask.send(task_id, "approval", "approved")
    await app.start(ask)
    assert await ask.result(task_id, timeout=60) == "approved"


async def test_an_event_that_is_sent_before_it_is_waited_for_is_not_lost(app: App):
    vendor, is_sent = Vendor(), threading.Event()

    def prepare() -> None:
        vendor.calls.append("prepare")
        is_sent.wait(30)

    @async_task
    async def ask() -> str:
        await step("prepare", prepare)
        return await wait_for("approval")

    await app.start(ask)
    task_id = await ask.submit()
    await wait_until(lambda: vendor.calls)
    await ask.send(task_id, "approval", "approved")
    is_sent.set()
    assert await ask.result(task_id, timeout=60) == "approved"
    assert vendor.calls == ["prepare"]


@pytest.mark.parametrize("waits_already", [True, False])
async def test_of_two_events_with_one_key_the_first_counts(app: App, waits_already: bool):
    @async_task
    async def ask() -> list[str]:
        await wait_for("go")
        return [await wait_for("approval"), await wait_for("other")]

    await app.start(ask)
    task_id = await ask.submit()
    if waits_already:
        await ask.send(task_id, "go")
        await status_when(ask, task_id, lambda run: run.current_step == "approval")
    await ask.send(task_id, "approval", "first")
    await ask.send(task_id, "approval", "second")
    await ask.send(task_id, "go")
    await ask.send(task_id, "other", "another")
    assert await ask.result(task_id, timeout=60) == ["first", "another"]


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
async def test_two_events_are_waited_for_at_once_in_whichever_order_they_come(app: App, order: Any):
    @async_task
    async def ask() -> list[str]:
        return await asyncio.gather(wait_for("one"), wait_for("two"))

    await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, is_held)
    for key in order:
        await ask.send(task_id, key, f"event {key}")
    assert await ask.result(task_id, timeout=60) == ["event one", "event two"]


async def test_an_event_is_kept_for_a_branch_that_has_not_come_to_its_wait_when_the_attempt_ends(app: App):
    look_ups = 0

    async def approval() -> str:
        nonlocal look_ups
        look_ups += 1
        if look_ups == 2:
            await asyncio.Event().wait()  # a slow look-up in a database, say: no step, so the attempt ends before it
        return await wait_for("approval")

    @async_task
    async def ask() -> list[str]:
        return await asyncio.gather(wait_for("payment"), approval())

    await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, lambda run: len(run.steps) == 2)
    await ask.send(task_id, "approval", "approved")
    await wait_until(lambda: look_ups == 2)
    await ask.send(task_id, "payment", "paid")
    assert await ask.result(task_id, timeout=60) == ["paid", "approved"]


async def test_a_history_replays_whether_or_not_its_workers_told_which_events_they_had_taken(app: App):
    @async_task
    async def ask() -> list[str]:
        return await asyncio.gather(wait_for("one"), wait_for("two"))

    client = (await app.start(ask)).client
    task_id = await ask.submit()
    await status_when(ask, task_id, is_held)
    await ask.send(task_id, "two", "event two")
    await status_when(ask, task_id, lambda run: "two" in run.completed_steps)
    await ask.send(task_id, "one", "event one")
    await ask.result(task_id, timeout=60)
    history = await client.get_workflow_handle(task_id).fetch_history()
    replayer = Replayer(workflows=[TaskWorkflow], data_converter=wire.RAW)
    await replayer.replay_workflow(history)
    holds = []
    for event in history.events:
        for result in event.activity_task_completed_event_attributes.result.payloads:
            if (hold := wire.hold_of(result)) is None:
                continue
            holds.append((hold.events, hold.taken))
            older = {"due": hold.due, "events": hold.events}
            result.metadata["asyncTaskHold"] = json.dumps(older).encode()
    assert holds == [(["one", "two"], []), (["one"], ["two"])]
    await replayer.replay_workflow(history)


async def test_an_event_brings_a_model(app: App):
    seen, vendor = [], Vendor()

    @async_task(retry_policy=BY_TIMER)
    async def ask() -> str:
        seen.append(await wait_for("approval", result_type=Approval))
        await step("flaky", vendor.fail_once, "flaky")
        return seen[-1].by

    await app.start(ask)
    task_id = await ask.submit()
    await ask.send(task_id, "approval", Approval(by="Ada", amount=7))
    assert await ask.result(task_id, timeout=60) == "Ada"
    assert seen == [Approval(by="Ada", amount=7)] * 2, "once from the event, once from the journal"


async def test_an_event_without_a_value_is_none(app: App):
    @async_task
    async def ask() -> str:
        return repr(await wait_for("go"))

    await app.start(ask)
    task_id = await ask.submit()
    await ask.send(task_id, "go")
    assert await ask.result(task_id, timeout=60) == "None"


async def test_an_event_that_does_not_come_is_an_error_for_which_the_body_may_compensate(app: App):
    vendor = Vendor()

    @async_task
    async def ask() -> str:
        await step("reserve", vendor.call, "reserve")
        try:
            return await wait_for("approval", timeout=1.2)
        except WaitTimeoutError as error:
            await step("release", vendor.call, "release")
            return str(error)

    await app.start(ask)
    before = time.monotonic()
    message = await ask.run(timeout=60)
    assert 1.2 <= time.monotonic() - before < 3
    assert "'approval'" in message
    assert "no event within 1.2 s" in message
    assert vendor.calls == ["reserve", "release"]


async def test_an_event_that_comes_after_its_time_does_not_undo_the_compensation(app: App):
    vendor = Vendor()

    @async_task(retry_policy=BY_TIMER)
    async def ask() -> list[str]:
        try:
            await wait_for("approval", timeout=0.2)
        except WaitTimeoutError:
            answers = ["too late", await wait_for("go")]
            await step("flaky", vendor.fail_once, "flaky")
            return answers
        return ["approved"]

    await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, lambda run: run.current_step == "go")
    await ask.send(task_id, "approval", "approved")
    await ask.send(task_id, "go", "on")
    assert await ask.result(task_id, timeout=60) == ["too late", "on"]


async def event_first(wait: Any, flaky: Any) -> Any:
    return await asyncio.gather(wait, flaky)


async def event_last(wait: Any, flaky: Any) -> Any:
    return (await asyncio.gather(flaky, wait))[::-1]


either_order = pytest.mark.parametrize("together", [event_first, event_last])


@either_order
async def test_an_event_is_waited_for_beside_a_step_that_backs_off_and_comes_last(app: App, together: Any):
    vendor = Vendor()

    @async_task(retry_policy=BY_TIMER)
    async def ask() -> list[str]:
        return await together(wait_for("approval"), step("flaky", vendor.fail_once, "flaky"))

    await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, lambda run: run.completed_steps == ("flaky",))
    await ask.send(task_id, "approval", "approved")
    assert await ask.result(task_id, timeout=60) == ["approved", "flaky"]
    assert vendor.calls == ["flaky", "flaky"]


@either_order
async def test_an_event_is_waited_for_beside_a_step_that_backs_off_and_comes_first(app: App, together: Any):
    vendor = Vendor()

    @async_task(retry_policy=FOR_AN_HOUR)
    async def ask() -> None:
        await together(wait_for("approval"), step("flaky", vendor.fail, "flaky"))

    await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, is_held)
    await ask.send(task_id, "approval", "approved")
    run = await status_when(ask, task_id, lambda run: run.completed_steps == ("approval",))
    assert (run.current_step, run.last_error) == ("flaky", "ConnectionError: not now")
    assert vendor.calls == ["flaky"]


async def test_an_event_that_came_in_time_counts_though_another_step_was_at_work_then(app: App):
    is_open, calls = threading.Event(), []

    def slow() -> str:
        calls.append("slow")
        is_open.wait(30)
        return "slow"

    async def approval() -> str:
        try:
            return await wait_for("approval", timeout=1.0)
        except WaitTimeoutError:
            return "nobody has approved"
        finally:
            is_open.set()

    @async_task
    async def ask() -> list[str]:
        return await asyncio.gather(step("slow", slow), approval())

    await app.start(ask)
    try:
        task_id = await ask.submit()
        await wait_until(lambda: calls)
        await ask.send(task_id, "approval", "approved")
        assert await ask.result(task_id, timeout=60) == ["slow", "approved"]
    finally:
        is_open.set()


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
async def test_an_event_that_came_in_time_counts_though_no_worker_was_there_when_the_time_was_over(
    app: App, in_time: bool
):
    calls, release = [], asyncio.Event()

    async def slow() -> str:
        calls.append("slow")
        await release.wait()
        return "slow"

    async def approval() -> str:
        try:
            return await wait_for("approval", timeout=2.0)
        except WaitTimeoutError:
            return "nobody has approved"

    @async_task
    async def ask() -> list[str]:
        return await asyncio.gather(step("slow", slow), approval())

    worker = await app.start(ask)
    task_id = await ask.submit()
    await wait_until(lambda: calls)
    began = time.monotonic()
    if in_time:
        await ask.send(task_id, "approval", "approved")
    await worker.stop()  # out of grace: the next attempt is one of the same activity, and has the same arguments
    await wait_until(lambda: time.monotonic() - began > 2.5)
    await app.connect(ask)
    if not in_time:
        await ask.send(task_id, "approval", "approved")
    release.set()
    await app.start(ask)
    expected = "approved" if in_time else "nobody has approved"
    assert await ask.result(task_id, timeout=60) == ["slow", expected]


async def test_an_event_that_came_in_time_counts_though_its_run_failed_and_was_resumed_after_the_time(app: App):
    calls, release = [], asyncio.Event()

    async def charge() -> str:
        calls.append("charge")
        await release.wait()
        if len(calls) == 1:
            raise NonRetryableError("declined")
        return "charged"

    @async_task
    async def ask() -> list[str]:
        return await asyncio.gather(step("charge", charge), wait_for("approval", timeout=1.0))

    await app.start(ask)
    began = time.monotonic()
    task_id = await ask.submit()
    await wait_until(lambda: calls)
    await ask.send(task_id, "approval", "approved")
    release.set()
    await status_when(ask, task_id, ended)
    await wait_until(lambda: time.monotonic() - began > 1.5)
    await ask.resume(task_id)
    assert await ask.result(task_id, timeout=60) == ["charged", "approved"]


async def test_a_run_that_is_held_outlives_its_worker(stories: Any):
    result, calls = await stories[held_by_a_worker_that_dies]
    assert result == "prepared, approved"
    assert calls == [["prepare"]]


async def test_the_status_of_a_held_run_tells_what_it_waits_for_with_every_worker_down(app: App):
    @async_task
    async def ask() -> str:
        await step("prepare", Vendor().call, "prepare")
        return await wait_for("approval", timeout=3600)

    worker = await app.start(ask)
    task_id = await ask.submit()
    await status_when(ask, task_id, is_held)
    await worker.stop()
    run = await ask.get_status(task_id)
    assert (run.status, run.current_step, run.completed_steps) == (TaskStatus.PROCESSING, "approval", ("prepare",))
    assert [(one.key, one.state) for one in run.steps] == [
        ("prepare", StepState.COMPLETED),
        ("approval", StepState.WAITING),
    ]
    assert (run.error, run.last_error, run.attempt) == (None, None, 1)


async def test_a_run_that_has_ended_takes_no_event(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    await app.start(echo)
    task_id = await echo.submit("done")
    await echo.result(task_id)
    with pytest.raises(TaskConflictError, match=f"'{task_id}' of task 'echo' has ended"):
        await echo.send(task_id, "approval", "approved")


async def test_a_run_that_is_unknown_takes_no_event(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    await app.connect(echo)
    with pytest.raises(TaskNotFoundError, match="'nobody-knows'"):
        await echo.send("nobody-knows", "approval", "approved")


async def test_a_run_of_another_task_takes_no_event(app: App):
    async def body() -> str:
        return await wait_for("approval")

    mine, yours = TemporalAsyncTask[None, str]("mine", body), TemporalAsyncTask[None, str]("yours", body)
    await app.start(mine, yours)
    task_id = await mine.submit()
    with pytest.raises(TaskNotFoundError, match=f"'{task_id}' of task 'yours'"):
        await yours.send(task_id, "approval", "forged")
    await mine.send(task_id, "approval", "approved")
    assert await mine.result(task_id, timeout=60) == "approved"


# A delay ----------------------------------------------------------------------------------------------------


@on_both
async def test_a_run_with_a_delay_is_pending_until_then(app: App):
    calls = []

    @async_task
    async def late() -> str:
        calls.append(time.monotonic())
        return "done"

    await app.start(late)
    before = time.monotonic()
    task_id = await late.submit(delay=1.5)
    await asyncio.sleep(0.75)
    run = await late.get_status(task_id)
    assert (run.status, run.attempt, run.started_at, run.steps) == (TaskStatus.PENDING, 0, None, ())
    assert calls == []
    assert await late.result(task_id, timeout=60) == "done"
    assert 1.5 <= calls[0] - before < 3


if __name__ == "__main__":
    log = CallLog(Path(os.environ["CALLS"]))
    work([filming(log), asking(log)])
