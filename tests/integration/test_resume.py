"""Resuming: a run that failed, was cancelled or terminated goes on from its last finished step, as the same run."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import PayloadCodec

from support import (
    AT_ONCE,
    FOR_AN_HOUR,
    NEVER_AGAIN,
    App,
    Operator,
    backs_off,
    ended,
    on_both,
    status_when,
    wait_until,
)
from temporal_async_task import (
    NonRetryableError,
    StepState,
    TaskCancelledError,
    TaskConflictError,
    TaskFailedError,
    TaskNotFoundError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    WaitTimeoutError,
    async_task,
    current_step,
    poll,
    sleep,
    step,
    wait_for,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.engine.workflow_backend import WorkflowBackend
from temporal_async_task.task import Execution

HEARTBEAT = 3.0


class VendorError(Exception):
    pass


class Vendor:
    """An API that is broken until it is mended. It notes its calls, and the idempotency keys they came with."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.keys: list[str] = []
        self.is_broken = True

    async def call(self, what: str) -> str:
        self.calls.append(what)
        return what

    async def call_and_hold(self, what: str) -> None:
        self.calls.append(what)
        await asyncio.Event().wait()

    async def work(self) -> str:
        self._note_work()
        if self.is_broken:
            raise VendorError("503")
        return "work"

    async def hold(self) -> str:
        self._note_work()
        if self.is_broken:
            await asyncio.Event().wait()
        return "work"

    async def too_much(self) -> str:
        self._note_work()
        return "x" * 3_000_000 if self.is_broken else "work"

    async def ready(self) -> str | None:
        self._note_work()
        return None if self.is_broken else "work"

    async def untyped(self):
        self._note_work()
        return "work"

    def _note_work(self) -> None:
        self.calls.append("work")
        self.keys.append(current_step().idempotency_key)


# How a run may end ------------------------------------------------------------------------------------------


async def in_a_step(vendor: Vendor) -> str:
    return await step.with_options(retry_policy=NEVER_AGAIN)("work", vendor.work)


async def in_a_running_step(vendor: Vendor) -> str:
    return await step("work", vendor.hold)


async def in_a_backoff(vendor: Vendor) -> str:
    return await step.with_options(retry_policy=FOR_AN_HOUR)("work", vendor.work)


async def in_a_poll(vendor: Vendor) -> str:
    return await poll("work", vendor.ready, every=1.05, timeout=1.05)


async def in_a_wait_for(_: Vendor) -> str:
    return await wait_for("work")


async def in_the_body(vendor: Vendor) -> str:
    if vendor.is_broken:
        raise NonRetryableError("a case that was not thought of")
    return await step("work", vendor.work)


async def by_an_annotation(vendor: Vendor) -> str:
    wanted: Any = int if vendor.is_broken else str
    return await step.with_options(result_type=wanted)("work", vendor.untyped)


async def by_a_result_that_is_too_large(vendor: Vendor) -> str:
    return await step("work", vendor.too_much)


Task = TemporalAsyncTask[str, list[str]]
Ender = Callable[[Task, Operator, str], Awaitable[None]]


async def by_itself(_task: Task, _operator: Operator, _task_id: str) -> None:
    pass


async def cancelled(task: Task, _: Operator, task_id: str) -> None:
    await task.cancel(task_id, "not now")


async def terminated(_task: Task, operator: Operator, _task_id: str) -> None:
    await operator.terminate()


@dataclass(frozen=True)
class Ending:
    """Where and by what a run ends, and what is known of it then."""

    place: Callable[[Vendor], Awaitable[str]]
    by: Ender
    error_type: str
    calls: int
    """How often ``work`` is called in all: before the end, and after the resume."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    execution: Execution = "workflow"

    def __str__(self) -> str:
        return f"{self.execution} {self.error_type} {self.place.__name__} {self.by.__name__}".replace("_", " ")


SOON = {"timeout": 5.0}
_ENDINGS = (
    Ending(in_a_step, by_itself, "StepFailedError", 2),
    Ending(in_a_poll, by_itself, "PollTimeoutError", 3),
    Ending(in_the_body, by_itself, "NonRetryableError", 1),
    Ending(by_an_annotation, by_itself, "ResultError", 1),
    Ending(by_a_result_that_is_too_large, by_itself, "PayloadTooLargeError", 2),
    Ending(in_a_running_step, by_itself, "TaskTimeoutError", 2, SOON),
    Ending(in_a_backoff, by_itself, "TaskTimeoutError", 2, SOON),
    Ending(in_a_wait_for, by_itself, "TaskTimeoutError", 0, SOON),
    Ending(in_a_running_step, cancelled, "TaskCancelledError", 2),
    Ending(in_a_backoff, cancelled, "TaskCancelledError", 2),
    Ending(in_a_wait_for, cancelled, "TaskCancelledError", 0),
    Ending(in_a_running_step, terminated, "TerminatedError", 2),
    Ending(in_a_backoff, terminated, "TerminatedError", 2),
    Ending(in_a_wait_for, terminated, "TerminatedError", 0),
)
ENDINGS = (
    *_ENDINGS,
    *(replace(ending, execution="activity") for ending in _ENDINGS if ending.place is not in_a_wait_for),
)
after_any_end = pytest.mark.parametrize("ending", ENDINGS, ids=str)


@dataclass
class Story:
    """How a run ended, and how it went on."""

    vendor: Vendor
    failed: TaskResult[list[str]]
    resumed_as: str
    completed: TaskResult[list[str]]
    calls_before: list[str]


def task_of(ending: Ending, vendor: Vendor) -> Task:
    async def body(prompt: str) -> list[str]:
        first = await step("first", vendor.call, f"first {prompt}")
        both = [first, await ending.place(vendor)]
        return [*both, await step("last", vendor.call, f"last {prompt}")]

    options = {"retry_policy": AT_ONCE, "heartbeat_timeout": HEARTBEAT, "execution": ending.execution, **ending.options}
    return Task(str(ending), body, **options)


def waits(run: TaskResult[Any]) -> bool:
    """Whether no attempt is under way: something waits, and the server has been told so."""
    return any(one.state is StepState.WAITING for one in run.steps) or backs_off(run)


PATIENCE = 60.0
"""Seconds: all the ways to end are gone at the same time, perhaps on a busy machine."""


async def brought_to(ending: Ending, task: Task, vendor: Vendor) -> str:
    """The id of a run that has got to the place where it ends."""
    task_id = await task.submit("a cup")
    if ending.by is not by_itself:
        if ending.place is in_a_running_step:
            await wait_until(lambda: "work" in vendor.calls, timeout=PATIENCE)
        else:
            await status_when(task, task_id, waits, timeout=PATIENCE)
    return task_id


async def ended_and_resumed(ending: Ending, task: Task, vendor: Vendor, client: Client) -> Story:
    task_id = await brought_to(ending, task, vendor)
    await ending.by(task, Operator(client, ending.execution, task_id), task_id)
    failed = await status_when(task, task_id, ended, timeout=PATIENCE)
    calls_before = list(vendor.calls)
    vendor.is_broken = False
    resumed_as = await task.resume(task_id)
    if ending.place is in_a_wait_for:
        await task.send(task_id, "work", "work")
    completed = await status_when(task, task_id, ended, timeout=PATIENCE)
    return Story(vendor, failed, resumed_as, completed, calls_before)


@pytest.fixture(scope="module")
async def stories(server: DevServer) -> AsyncIterator[dict[Ending, asyncio.Task[Story]]]:
    """Every way to end, and a run that ended so and was resumed: all at the same time."""
    app = App(server.address, f"queue-{uuid.uuid4().hex[:8]}")
    vendors = {str(ending): Vendor() for ending in ENDINGS}
    tasks = {str(ending): task_of(ending, vendors[str(ending)]) for ending in ENDINGS}
    client = (await app.start(*tasks.values())).client
    stories = {
        name: asyncio.create_task(ended_and_resumed(ending, tasks[name], vendors[name], client))
        for ending in ENDINGS
        for name in [str(ending)]
    }
    await asyncio.wait(stories.values())
    yield stories
    await app.stop()


# After any end ----------------------------------------------------------------------------------------------


@after_any_end
async def test_a_run_that_has_ended_without_a_result_says_how(stories: Any, ending: Ending):
    run = (await stories[str(ending)]).failed
    assert (run.status, run.error_type) == (TaskStatus.FAILED, ending.error_type)


@after_any_end
async def test_a_resumed_run_goes_on_to_its_end_with_the_same_id_and_params(stories: Any, ending: Ending):
    story = await stories[str(ending)]
    assert story.resumed_as == story.completed.task_id == story.failed.task_id
    assert story.completed.status is TaskStatus.COMPLETED
    assert story.completed.result == ["first a cup", "work", "last a cup"]


@after_any_end
async def test_a_resumed_run_calls_no_finished_step_again(stories: Any, ending: Ending):
    calls = (await stories[str(ending)]).vendor.calls
    assert calls == ["first a cup", *["work"] * ending.calls, "last a cup"]


@after_any_end
async def test_a_resumed_run_was_created_when_it_was_first_submitted(stories: Any, ending: Ending):
    story = await stories[str(ending)]
    assert story.completed.created_at == story.failed.created_at
    assert story.completed.completed_at > story.failed.completed_at


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if ending.calls > 1], ids=str)
async def test_a_step_has_the_same_idempotency_key_before_and_after(stories: Any, ending: Ending):
    keys = (await stories[str(ending)]).vendor.keys
    assert keys == [keys[0]] * ending.calls


# Who may, and when ------------------------------------------------------------------------------------------


def failing(vendor: Vendor, name: str = "shoot") -> Task:
    """A task that fails in the second of its three steps until the vendor is mended."""

    async def body(prompt: str) -> list[str]:
        first = await step("first", vendor.call, f"first {prompt}")
        work = await step("work", vendor.work)
        return [first, work, await step("last", vendor.call, f"last {prompt}")]

    return Task(name, body, retry_policy=NEVER_AGAIN)


async def failed_run(task: Task, task_id: str | None = None) -> str:
    task_id = await task.submit("a cup", task_id=task_id)
    await status_when(task, task_id, lambda run: run.status is TaskStatus.FAILED)
    return task_id


@on_both
async def test_a_run_that_goes_on_cannot_be_resumed(app: App):
    vendor = Vendor()

    @async_task
    async def shoot() -> str:
        return await step("work", vendor.hold)

    await app.start(shoot)
    task_id = await shoot.submit()
    with pytest.raises(TaskConflictError, match=f"'{task_id}' of task 'shoot' is going on"):
        await shoot.resume(task_id)
    await wait_until(lambda: vendor.calls)
    with pytest.raises(TaskConflictError, match=f"'{task_id}' of task 'shoot' is going on"):
        await shoot.resume(task_id)
    assert vendor.calls == ["work"]


@on_both
async def test_a_run_that_has_completed_cannot_be_resumed(app: App):
    vendor = Vendor()
    vendor.is_broken = False
    task = failing(vendor)
    await app.start(task)
    task_id = await task.submit("a cup")
    await task.result(task_id)
    before = await task.get_status(task_id)
    with pytest.raises(TaskConflictError, match=f"'{task_id}' of task 'shoot' has completed"):
        await task.resume(task_id)
    assert await task.get_status(task_id) == before


async def test_a_run_that_is_unknown_cannot_be_resumed(app: App):
    task = failing(Vendor())
    await app.connect(task)
    with pytest.raises(TaskNotFoundError, match="'nobody-knows'"):
        await task.resume("nobody-knows")


async def test_a_run_of_another_task_cannot_be_resumed(app: App):
    vendor = Vendor()
    mine, yours = failing(vendor, "mine"), failing(vendor, "yours")
    await app.start(mine, yours)
    task_id = await failed_run(mine)
    with pytest.raises(TaskNotFoundError, match=f"'{task_id}' of task 'yours'"):
        await yours.resume(task_id)
    assert (await mine.get_status(task_id)).status is TaskStatus.FAILED


@on_both
async def test_of_two_resumes_at_once_one_wins_and_the_other_is_told(app: App):
    vendor = Vendor()
    task = failing(vendor)
    await app.start(task)
    task_id = await failed_run(task)
    vendor.is_broken = False
    both = await asyncio.gather(task.resume(task_id), task.resume(task_id), return_exceptions=True)
    assert sorted(type(one).__name__ for one in both) == ["TaskConflictError", "str"]
    assert await task.result(task_id) == ["first a cup", "work", "last a cup"]
    assert vendor.calls == ["first a cup", "work", "work", "last a cup"]


class Turnstile(PayloadCodec):
    """Changes nothing, but can hold up who encodes."""

    def __init__(self) -> None:
        self.is_open = True
        self.held_up = 0

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        self.held_up += not self.is_open
        await wait_until(lambda: self.is_open)
        return list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)


@on_both
async def test_a_resume_that_comes_late_does_not_take_a_run_back_to_where_it_was(app: App):
    vendor, turnstile = Vendor(), Turnstile()

    async def body(_: str) -> list[str]:
        first = await step("first", vendor.work)
        second = await step("second", vendor.call, "second")
        if vendor.calls.count("second") == 1 and not late.done():
            raise NonRetryableError("once more")
        return [first, second]

    task, same_task = Task("shoot", body, retry_policy=NEVER_AGAIN), Task("shoot", body)
    await app.start(task)
    converter = dataclasses.replace(pydantic_data_converter, payload_codec=turnstile)
    await app.connect(same_task, data_converter=converter)
    task_id = await failed_run(task)  # in "first"
    vendor.is_broken, turnstile.is_open = False, False
    late = asyncio.create_task(same_task.resume(task_id))
    await wait_until(lambda: turnstile.held_up)  # it has read the journal, and has started nothing yet
    await task.resume(task_id)
    await status_when(task, task_id, ended)  # after "second"
    turnstile.is_open = True
    with pytest.raises(TaskConflictError):
        await late
    await task.resume(task_id)
    assert await task.result(task_id) == ["work", "second"]
    assert vendor.calls == ["work", "work", "second"]


@on_both
@pytest.mark.parametrize("goes", ["well", "wrong"])
async def test_whoever_submitted_a_run_gets_the_result_of_what_another_has_resumed(
    app: App, monkeypatch: pytest.MonkeyPatch, goes: str
):
    vendor = Vendor()
    task, elsewhere = failing(vendor), failing(vendor)
    await app.start(task)
    task_id = await failed_run(task)
    operator = app.operator(await app.connect(elsewhere), task_id)
    vendor.is_broken = goes == "wrong"
    monkeypatch.setattr(vendor, "work", vendor.hold)
    await elsewhere.resume(task_id)
    if goes == "well":
        assert await task.result(task_id, timeout=60) == ["first a cup", "work", "last a cup"]
        return
    await status_when(task, task_id, lambda run: run.current_step == "work")
    waiting = asyncio.create_task(task.result(task_id, timeout=60))
    await asyncio.sleep(0.2)
    await operator.terminate()
    with pytest.raises(TaskFailedError) as failed:
        await waiting
    assert failed.value.error_type == "TerminatedError"


@on_both
async def test_submitting_a_resumed_run_again_finds_that_run(app: App):
    vendor = Vendor()
    task = failing(vendor)
    await app.start(task)
    task_id = await failed_run(task, f"run-{uuid.uuid4().hex}")
    vendor.is_broken = False
    await task.resume(task_id)
    assert await task.submit("a cup", task_id=task_id) == task_id
    assert await task.result(task_id) == ["first a cup", "work", "last a cup"]
    assert await task.submit("a cup", task_id=task_id) == task_id
    assert vendor.calls == ["first a cup", "work", "work", "last a cup"]


@on_both
async def test_submitting_a_resumed_run_with_other_params_is_a_conflict(app: App):
    vendor = Vendor()
    task = failing(vendor)
    await app.start(task)
    task_id = await failed_run(task, f"run-{uuid.uuid4().hex}")
    vendor.is_broken = False
    await task.resume(task_id)
    with pytest.raises(TaskConflictError, match="other params"):
        await task.submit("a mug", task_id=task_id)
    await task.result(task_id)
    with pytest.raises(TaskConflictError, match="other params"):
        await task.submit("a mug", task_id=task_id)


# What is counted, kept and done again -----------------------------------------------------------------------


async def test_the_attempts_of_the_failed_step_are_counted_anew(app: App):
    calls = []

    async def flaky() -> str:
        calls.append(current_step().attempt)
        if len(calls) < 8:
            raise ConnectionError("not now")
        return "done"

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> str:
        return await step("flaky", flaky)

    await app.start(shoot)
    with pytest.raises(TaskFailedError):
        await shoot.run(task_id=(task_id := f"run-{uuid.uuid4().hex}"))
    await shoot.resume(task_id)
    assert await shoot.result(task_id) == "done"
    assert calls == [1, 2, 3, 4] * 2
    [flaky_step] = (await shoot.get_status(task_id)).steps
    assert flaky_step.attempts == 4


@on_both
async def test_a_run_may_fail_and_be_resumed_more_than_once(app: App):
    calls, mended = [], set()

    async def call(what: str) -> str:
        calls.append(what)
        if what not in mended:
            raise VendorError(what)
        return what

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> list[str]:
        return [await step(what, call, what) for what in ("one", "two", "three")]

    await app.start(shoot)
    task_id = await shoot.submit()
    first = await status_when(shoot, task_id, ended)
    for what in ("one", "two"):
        mended.add(what)
        await shoot.resume(task_id)
        with pytest.raises(TaskFailedError):
            await shoot.result(task_id)
    mended.add("three")
    await shoot.resume(task_id)
    assert await shoot.result(task_id) == ["one", "two", "three"]
    assert calls == ["one", "one", "two", "two", "three", "three"]
    assert (await shoot.get_status(task_id)).created_at == first.created_at


@on_both
async def test_steps_that_are_to_be_done_again_are_and_others_are_not(app: App):
    calls = []

    async def call(what: str) -> int:
        calls.append(what)
        if what == "three" and calls.count("three") == 1:
            raise VendorError(what)
        return len(calls)

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> list[int]:
        return [await step(what, call, what) for what in ("one", "two", "three")]

    await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, ended)
    await shoot.resume(task_id, redo=["one"])
    assert await shoot.result(task_id) == [4, 2, 5]
    assert calls == ["one", "two", "three", "one", "three"]


@on_both
async def test_a_step_that_is_unknown_cannot_be_done_again(app: App):
    vendor = Vendor()
    task = failing(vendor)
    await app.start(task)
    task_id = await failed_run(task)
    with pytest.raises(TaskConflictError, match="'lst'"):
        await task.resume(task_id, redo=["first", "lst"])
    assert (await task.get_status(task_id)).status is TaskStatus.FAILED
    assert vendor.calls == ["first a cup", "work"]


@on_both
async def test_a_resumed_run_tells_what_is_finished_before_any_worker_came(app: App):
    vendor = Vendor()
    task = failing(vendor)
    worker = await app.start(task)
    task_id = await failed_run(task)
    await worker.stop()
    vendor.is_broken = False
    await task.resume(task_id)
    run = await task.get_status(task_id)
    assert (run.status, run.completed_steps, run.error) == (TaskStatus.PROCESSING, ("first",), None)
    await app.start(task)
    assert await task.result(task_id) == ["first a cup", "work", "last a cup"]


@on_both
async def test_a_run_that_was_cancelled_before_it_began_begins_when_it_is_resumed(app: App):
    vendor = Vendor()
    vendor.is_broken = False
    task = failing(vendor)
    await app.start(task)
    task_id = await task.submit("a cup", delay=3600)
    await task.cancel(task_id)
    with pytest.raises(TaskCancelledError):
        await task.result(task_id)
    await task.resume(task_id)
    assert await task.result(task_id, timeout=60) == ["first a cup", "work", "last a cup"]


@on_both
async def test_a_sleep_in_which_the_run_was_cancelled_is_not_begun_anew(app: App):
    @async_task(heartbeat_timeout=HEARTBEAT)
    async def nap() -> None:
        await sleep("nap", 2.5)

    await app.start(nap)
    before = time.monotonic()
    task_id = await nap.submit()
    await status_when(nap, task_id, waits)
    await asyncio.sleep(1)
    await nap.cancel(task_id)
    await status_when(nap, task_id, ended)
    resumed = time.monotonic()
    await nap.resume(task_id)
    await nap.result(task_id)
    assert time.monotonic() - before >= 2.5
    assert time.monotonic() - resumed < 2.5


async def test_an_event_that_was_sent_before_the_run_failed_is_not_lost(app: App):
    vendor = Vendor()

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> str:
        await step("work", vendor.work)
        try:
            return await wait_for("approval", timeout=2)
        except WaitTimeoutError:
            return "nobody has approved"

    await app.connect(shoot)
    task_id = await shoot.submit()
    await shoot.send(task_id, "approval", "approved")
    await app.start(shoot)
    await status_when(shoot, task_id, ended)
    vendor.is_broken = False
    await shoot.resume(task_id)
    assert await shoot.result(task_id, timeout=60) == "approved"


# After a cancellation that was not the end ------------------------------------------------------------------


def cleaning(vendor: Vendor, place: Callable[[Vendor], Awaitable[str]], clean_up: Any, name: str = "shoot") -> Task:
    async def body(prompt: str) -> list[str]:
        first = await step("first", vendor.call, f"first {prompt}")
        try:
            return [first, await place(vendor)]
        except asyncio.CancelledError:
            await step("cleanup", clean_up, "cleanup")
            raise

    return Task(name, body, heartbeat_timeout=HEARTBEAT)


@on_both
async def test_a_resumed_run_that_is_cancelled_before_a_worker_came_is_cleaned_up(app: App):
    vendor = Vendor()
    task = cleaning(vendor, in_a_step, vendor.call)
    worker = await app.start(task)
    task_id = await failed_run(task)
    await worker.stop()
    await task.resume(task_id)
    await task.cancel(task_id, "after all")
    await app.start(task)
    run = await status_when(task, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "after all")
    assert vendor.calls == ["first a cup", "work", "cleanup"]


@on_both
@pytest.mark.parametrize("place", [in_a_running_step, in_a_backoff], ids=lambda place: place.__name__)
async def test_a_run_that_is_terminated_in_its_cleanup_has_lost_no_finished_step(app: App, place: Any):
    async def terminated_in_its_cleanup(task: Task, vendor: Vendor) -> TaskResult[list[str]]:
        task_id = await brought_to(Ending(place, cancelled, "", 0), task, vendor)
        await task.cancel(task_id)
        await wait_until(lambda: "cleanup" in vendor.calls)
        await app.operator(worker, task_id).terminate()
        run = await status_when(task, task_id, ended)
        vendor.is_broken = False
        await task.resume(task_id)
        await task.result(task_id, timeout=60)
        return run

    # Several of them, for the server lists in any order what is pending.
    vendors = [Vendor() for _ in range(6)]
    tasks = [cleaning(vendor, place, vendor.call_and_hold, f"shoot-{n}") for n, vendor in enumerate(vendors)]
    worker = await app.start(*tasks)
    runs = await asyncio.gather(*map(terminated_in_its_cleanup, tasks, vendors))
    assert [run.completed_steps for run in runs] == [("first",)] * 6
    assert [vendor.calls for vendor in vendors] == [["first a cup", "work", "cleanup", "work"]] * 6


async def test_a_resumed_run_keeps_its_place_among_those_that_wait(app: App):
    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        raise TypeError("a slip")

    component = await app.start(shoot)
    task_id = await shoot.submit(priority=1, fairness_key="customer-7")
    await status_when(shoot, task_id, ended)
    await shoot.resume(task_id)
    await status_when(shoot, task_id, ended)
    description = await component.client.get_workflow_handle(task_id).describe()
    priority = description.raw_description.workflow_execution_info.priority
    assert (priority.priority_key, priority.fairness_key) == (1, "customer-7")


# With more unread events than a workflow can be started with -------------------------------------------------

MANY = [f"event {number}" for number in range(70)]
"""Events of 30 KB each: 2 MB in all, and more."""


def reading(vendor: Vendor) -> TemporalAsyncTask[None, list[str]]:
    """A task that fails until its vendor is mended, and then reads some of its events."""

    async def body() -> list[str]:
        await step("first", vendor.call, "first")
        await wait_for("go")
        if vendor.is_broken:
            raise NonRetryableError("a case that was not thought of")
        return [(await wait_for(key))[: len(key)] for key in (MANY[0], MANY[35], MANY[-1])]

    return TemporalAsyncTask[None, list[str]]("reading", body)


async def failed_with_many_events(task: TemporalAsyncTask[None, list[str]]) -> str:
    task_id = await task.submit()
    for key in MANY:
        await task.send(task_id, key, key + "x" * 30_000)
    await task.send(task_id, "go")
    await status_when(task, task_id, ended)
    return task_id


async def test_a_run_with_more_unread_events_than_fit_is_resumed_with_all_of_them(app: App):
    vendor = Vendor()
    task = reading(vendor)
    await app.start(task)
    task_id = await failed_with_many_events(task)
    vendor.is_broken = False
    await task.resume(task_id)
    assert await task.result(task_id, timeout=60) == [MANY[0], MANY[35], MANY[-1]]
    assert vendor.calls == ["first"]


async def test_no_event_is_lost_though_a_resumed_run_fails_again_before_it_was_told_of_all(app: App):
    vendor = Vendor()
    task = reading(vendor)
    await app.start(task)
    task_id = await failed_with_many_events(task)
    for _ in range(2):
        await task.resume(task_id)
        await status_when(task, task_id, ended)
    vendor.is_broken = False
    await task.resume(task_id)
    assert await task.result(task_id, timeout=60) == [MANY[0], MANY[35], MANY[-1]]


async def test_no_event_is_lost_with_a_process_that_dies_as_it_resumes_a_run(app: App, monkeypatch: pytest.MonkeyPatch):
    vendor = Vendor()
    task = reading(vendor)
    component = await app.start(task)
    task_id = await failed_with_many_events(task)
    vendor.is_broken = False
    with monkeypatch.context() as patch:
        patch.setattr(WorkflowBackend, "_signal_run", dies)
        with pytest.raises(ConnectionAbortedError):
            await task.resume(task_id)
    await status_when(task, task_id, waits)  # for an event that it was to be sent
    await app.operator(component, task_id).terminate()
    await task.resume(task_id)
    assert await task.result(task_id, timeout=60) == [MANY[0], MANY[35], MANY[-1]]


async def dies(*_: Any) -> bool:
    raise ConnectionAbortedError
