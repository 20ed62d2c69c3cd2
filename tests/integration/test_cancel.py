"""Cancelling: prompt wherever a run stands, told to its body, cleaned up after, and explained in the status."""

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from support import (
    FOR_AN_HOUR,
    NEVER_AGAIN,
    App,
    CallLog,
    Operator,
    WorkerProcess,
    backs_off,
    ended,
    on_an_activity,
    on_both,
    status_when,
    undisturbed,
    wait_until,
    work,
)
from temporal_async_task import (
    AsyncTaskComponent,
    RetryPolicy,
    StepState,
    TaskCancelledError,
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
from temporal_async_task.engine import attempt, stopping
from temporal_async_task.task import Execution

PROMPT = 3.0
"""Seconds in which a cancellation gets through, cleanup included, while many runs and other tests are at work."""
HEARTBEAT = 4.5
"""Seconds; a third of it is the keep-alive interval, in which a running step learns of its cancellation."""
PATIENCE = 60.0
"""Seconds; of what has to happen, perhaps on a busy machine, and is not measured."""


class Vendor:
    """Its calls, in the order in which they came; ``hold`` and what stands for it in a thread do not return."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.let_go = threading.Event()

    async def call(self, what: str) -> str:
        self.calls.append(what)
        return what

    async def hold(self) -> None:
        self.calls.append("work")
        await asyncio.Event().wait()

    def hold_thread(self) -> None:
        self.calls.append("work")
        self.let_go.wait(60)

    async def fail(self) -> None:
        self.calls.append("work")
        raise ConnectionError("not now")

    async def not_ready(self) -> None:
        self.calls.append("work")


# Where a run may stand --------------------------------------------------------------------------------------


async def in_an_async_step(vendor: Vendor) -> None:
    await step("work", vendor.hold)


async def in_a_sync_step(vendor: Vendor) -> None:
    await step("work", vendor.hold_thread)


async def in_an_await_outside_of_steps(vendor: Vendor) -> None:
    await vendor.hold()


async def in_a_backoff(vendor: Vendor) -> None:
    await step.with_options(retry_policy=FOR_AN_HOUR)("work", vendor.fail)


async def in_a_sleep(_: Vendor) -> None:
    await sleep("work", 3600)


async def in_a_poll(vendor: Vendor) -> None:
    await poll("work", vendor.not_ready, every=3600)


async def in_a_wait_for(_: Vendor) -> None:
    await wait_for("work")


async def in_a_backoff_and_a_wait_for(vendor: Vendor) -> None:
    await asyncio.gather(in_a_backoff(vendor), wait_for("approval"))


async def in_a_poll_and_a_sleep(vendor: Vendor) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(in_a_poll(vendor))
        group.create_task(sleep("pause", 3600))


async def in_a_step_and_a_wait_for(vendor: Vendor) -> None:
    await asyncio.gather(in_an_async_step(vendor), wait_for("approval"))


Place = Callable[[Vendor], Awaitable[None]]
RUNNING: tuple[Place, ...] = (
    in_an_async_step,
    in_a_sync_step,
    in_an_await_outside_of_steps,
    in_a_step_and_a_wait_for,
)
WAITING: tuple[Place, ...] = (
    in_a_backoff,
    in_a_sleep,
    in_a_poll,
    in_a_wait_for,
    in_a_backoff_and_a_wait_for,
    in_a_poll_and_a_sleep,
)
NEED_EVENTS = {in_a_step_and_a_wait_for, in_a_wait_for, in_a_backoff_and_a_wait_for}
Spot = tuple[Execution, Place]


def spots(places: Iterable[Place]) -> list[Spot]:
    """The places, on each of the two that can carry a run."""
    spots: list[Spot] = [("workflow", place) for place in places]
    return spots + [("activity", place) for place in places if place not in NEED_EVENTS]


def at(*places: Place) -> pytest.MarkDecorator:
    """A test of a run that stands at one of the places, whatever carries it."""
    found = spots(places)
    return pytest.mark.parametrize(
        ("execution", "place"), found, ids=[f"{execution}-{place.__name__}" for execution, place in found]
    )


anywhere = at(*RUNNING, *WAITING)
while_it_runs = at(*RUNNING)
while_it_waits = at(*WAITING)


def order(place: Place, vendor: Vendor, **options: Any) -> TemporalAsyncTask[None, str]:
    """A task that makes a step, gets to a place where it stays, and cleans up if it is cancelled there."""

    async def body() -> str:
        await step("first", vendor.call, "first")
        try:
            await place(vendor)
        except asyncio.CancelledError:
            vendor.calls.append("CancelledError")
            await step("cleanup", vendor.call, "cleanup")
            raise
        return "done"

    return TemporalAsyncTask[None, str](
        **{"name": place.__name__, "task": body, "heartbeat_timeout": HEARTBEAT, **options}
    )


CLEANUP_BACKOFF = 1.5


def order_with_a_flaky_cleanup(place: Place, vendor: Vendor, **options: Any) -> TemporalAsyncTask[None, str]:
    async def flaky() -> None:
        vendor.calls.append("cleanup")
        if vendor.calls.count("cleanup") == 1:
            raise ConnectionError("not now")

    async def body() -> str:
        await step("first", vendor.call, "first")
        try:
            await place(vendor)
        except asyncio.CancelledError:
            policy = RetryPolicy(max_retries=1, initial_delay=CLEANUP_BACKOFF, max_delay=CLEANUP_BACKOFF, jitter=0)
            await step("note", vendor.call, "note")
            await step.with_options(retry_policy=policy)("cleanup", flaky)
            raise
        return "done"

    return TemporalAsyncTask[None, str](**{"task": body, "heartbeat_timeout": HEARTBEAT, **options})


def waits(run: TaskResult[Any]) -> bool:
    """Whether no attempt is under way: something waits, and the server has been told so."""
    return any(one.state is StepState.WAITING for one in run.steps) or backs_off(run)


async def submitted(task: TemporalAsyncTask[None, str], place: Place, vendor: Vendor) -> str:
    """The id of a run that has got to its place."""
    task_id = await task.submit()
    if place in RUNNING:
        await wait_until(lambda: "work" in vendor.calls, timeout=PATIENCE)
    else:
        await status_when(task, task_id, waits, timeout=PATIENCE)
    return task_id


@dataclass
class Story:
    """How a run was cancelled."""

    calls: list[str]
    run: TaskResult[str]
    took: float


async def cancelled_at(place: Place, task: TemporalAsyncTask[None, str], vendor: Vendor) -> Story:
    return await cancelled_as(task, await submitted(task, place, vendor), vendor)


async def cancelled_as(task: TemporalAsyncTask[None, str], task_id: str, vendor: Vendor) -> Story:
    before = time.monotonic()
    await task.cancel(task_id, "the customer changed their mind")
    with pytest.raises(TaskCancelledError):
        await task.result(task_id, timeout=PATIENCE)
    took = time.monotonic() - before
    return Story(vendor.calls, await task.get_status(task_id), took)


Stories = dict[Spot, asyncio.Task[Story]]


@contextlib.asynccontextmanager
async def at_once(address: str, spots: Iterable[Spot], tell: Callable[..., Any], make: Any) -> AsyncIterator[Stories]:
    """For each spot a run that is cancelled there, all at the same time, and while other tests run."""
    app = App(address, f"queue-{uuid.uuid4().hex[:8]}")
    vendors = {spot: Vendor() for spot in spots}
    tasks = {
        (execution, place): make(place, vendor, name=f"{execution} {place.__name__}", execution=execution)
        for (execution, place), vendor in vendors.items()
    }
    await app.start(*tasks.values())
    stories = {spot: asyncio.create_task(tell(spot[1], tasks[spot], vendors[spot])) for spot in tasks}
    yield stories
    for story in stories.values():
        story.cancel()
    await asyncio.wait(stories.values())
    for vendor in vendors.values():
        vendor.let_go.set()
    await app.stop()


async def took_at_best(
    story: Story, bound: float, alone: Callable[[], contextlib.AbstractAsyncContextManager[Stories]]
):
    """How long a cancellation took: among many others, or (they may have been too many for the machine) by itself."""

    async def again() -> float:
        async with alone() as stories:
            [story] = stories.values()
            return (await story).took

    return story.took if story.took < bound else await undisturbed(again, lambda took: took < bound, tries=3)


async def cancelled_later(place: Place, task: TemporalAsyncTask[None, str], vendor: Vendor) -> Story:
    task_id = await submitted(task, place, vendor)
    # From now on nothing is written but to show that the attempt is alive.
    await status_when(task, task_id, lambda run: run.current_step == "work")
    await asyncio.sleep(0.3)
    return await cancelled_as(task, task_id, vendor)


by_default_order = functools.partial(order, heartbeat_timeout=15.0)
"""With the heartbeat timeout that a task has if it is not told another."""


@pytest.fixture(scope="module")
async def stories(server: DevServer) -> AsyncIterator[Stories]:
    async with at_once(server.address, spots(RUNNING + WAITING), cancelled_at, order) as stories:
        yield stories


@pytest.fixture(scope="module", autouse=True)
async def by_default(server: DevServer) -> AsyncIterator[Stories]:
    async with at_once(server.address, spots([in_an_async_step]), cancelled_later, by_default_order) as stories:
        yield stories


@pytest.fixture(scope="module", autouse=True)
async def retried(server: DevServer) -> AsyncIterator[Stories]:
    """With a cleanup that fails at first."""
    places = spots([in_an_async_step, in_a_backoff, in_an_await_outside_of_steps])
    async with at_once(server.address, places, cancelled_at, order_with_a_flaky_cleanup) as stories:
        yield stories


@pytest.fixture(scope="module", autouse=True)
async def killed(
    server: DevServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[Execution, asyncio.Task[Story]]]:
    """Runs whose worker is killed in their cleanup. It takes a while, and goes on while the other tests run."""
    apps = [App(server.address, f"queue-{uuid.uuid4().hex[:8]}", execution) for execution in get_args(Execution)]
    stories: dict[Execution, asyncio.Task[Story]] = {
        app.execution: asyncio.create_task(
            killed_in_its_cleanup(app, CallLog(tmp_path_factory.mktemp("calls") / "log"))
        )
        for app in apps
    }
    yield stories
    for story in stories.values():
        story.cancel()
    await asyncio.wait(stories.values())
    for app in apps:
        await app.stop()


# Wherever it stands -----------------------------------------------------------------------------------------


@anywhere
async def test_the_body_gets_a_cancelled_error_where_it_waits_and_may_clean_up_with_steps(
    stories: Any, execution: Execution, place: Place
):
    story = await stories[execution, place]
    calls = [call for call in story.calls if call != "work"]
    assert calls == ["first", "CancelledError", "cleanup"]


@anywhere
async def test_the_status_of_a_cancelled_run_says_why_and_what_was_done(
    stories: Any, execution: Execution, place: Place
):
    run = (await stories[execution, place]).run
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "TaskCancelledError")
    assert run.error == "the customer changed their mind"
    assert run.completed_steps == ("first", "cleanup")
    assert (run.current_step, run.next_retry_at) == (None, None)


@anywhere
async def test_a_cancelled_step_is_not_called_again(stories: Any, execution: Execution, place: Place):
    story = await stories[execution, place]
    assert story.calls.count("work") <= 1


@while_it_waits
async def test_a_run_that_waits_is_cancelled_within_a_second(server: DevServer, execution: Execution, place: Place):
    async def cancelled() -> float:
        async with at_once(server.address, [(execution, place)], cancelled_at, order) as stories:
            return (await stories[execution, place]).took

    assert await undisturbed(cancelled, lambda took: took < 1) < 1


@while_it_runs
async def test_a_run_that_is_at_work_is_cancelled_within_the_keep_alive_interval(
    server: DevServer, stories: Any, execution: Execution, place: Place
):
    spot, bound = (execution, place), HEARTBEAT / 3 + 2 * PROMPT
    alone = functools.partial(at_once, server.address, [spot], cancelled_at, order)
    assert await took_at_best(await stories[spot], bound, alone) < bound


@at(in_an_async_step)
async def test_a_running_step_learns_of_its_cancellation_within_five_seconds_by_default(
    server: DevServer, by_default: Any, execution: Execution, place: Place
):
    spot, bound = (execution, place), 5 + PROMPT
    alone = functools.partial(at_once, server.address, [spot], cancelled_later, by_default_order)
    assert await took_at_best(await by_default[spot], bound, alone) < bound


@on_both
async def test_a_cancellation_reaches_a_run_while_the_results_of_its_steps_are_saved(app: App):
    calls = []

    async def quick(what: str) -> None:
        calls.append(what)

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def busy(name: str) -> None:
        try:
            for number in range(2_000):
                await step(f"step-{number}", quick, f"{name} {number}")
        except asyncio.CancelledError:
            await step("cleanup", quick, f"{name} cleanup")
            raise

    async def cancelled(name: str) -> TaskResult[None]:
        task_id = await busy.submit(name)
        await wait_until(lambda: f"{name} 10" in calls)
        await busy.cancel(task_id)
        return await status_when(busy, task_id, ended)

    await app.start(busy)
    runs = await asyncio.gather(*map(cancelled, "abcdef"))
    assert [run.error_type for run in runs] == ["TaskCancelledError"] * 6
    assert [f"{name} cleanup" in calls for name in "abcdef"] == [True] * 6
    assert len(calls) == len(set(calls))


async def test_a_cancellation_is_prompt_though_the_worker_has_no_slot_left(app: App):
    vendor = Vendor()
    task = order(in_an_async_step, vendor)
    await app.start(task, max_concurrent_tasks=1)
    task_id = await submitted(task, in_an_async_step, vendor)
    await task.cancel(task_id)
    with pytest.raises(TaskCancelledError):
        await task.result(task_id, timeout=HEARTBEAT / 3 + 2 * PROMPT)


@pytest.mark.parametrize("was", ["held", "resumed"])
async def test_a_run_that_waits_for_a_slot_to_go_on_is_cleaned_up_when_it_is_cancelled_there(app: App, was: str):
    vendor, is_taken, release = Vendor(), asyncio.Event(), asyncio.Event()

    @async_task
    async def other() -> None:
        is_taken.set()
        await release.wait()

    async def body() -> str:
        await step("reserve", vendor.call, "reserve")
        try:
            return await wait_for("go", timeout=0.01 if was == "resumed" else None)
        except asyncio.CancelledError:
            await step("cleanup", vendor.call, "cleanup")
            raise

    task = TemporalAsyncTask[None, str]("held", body)

    async def activities() -> list[str]:
        found = await component.client.get_workflow_handle(task_id).describe()
        return [one.activity_id for one in found.raw_description.pending_activities]

    async def another_than(offered: list[str]) -> bool:
        return await activities() != offered

    component = await app.start(task, other, max_concurrent_tasks=1)
    task_id = await task.submit()
    await status_when(task, task_id, ended if was == "resumed" else waits)
    await other.submit()
    await is_taken.wait()
    if was == "resumed":
        await task.resume(task_id)
    else:
        await task.send(task_id, "go")
    offered = await wait_until(activities)
    await task.cancel(task_id, "not wanted any more")
    await wait_until(lambda: another_than(offered))
    release.set()
    run = await status_when(task, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "not wanted any more")
    assert run.completed_steps == ("reserve", "cleanup")
    assert vendor.calls == ["reserve", "cleanup"]


# Before it begins, and when it ends -------------------------------------------------------------------------


@on_both
async def test_a_run_that_is_cancelled_before_any_worker_came_never_begins(app: App):
    vendor = Vendor()
    task = order(in_a_sleep, vendor)
    await app.connect(task)
    task_id = await task.submit()
    await task.cancel(task_id, "not wanted any more")
    await app.start(task)
    run = await status_when(task, task_id, ended)
    assert (run.status, run.error_type, run.error) == (TaskStatus.FAILED, "TaskCancelledError", "not wanted any more")
    assert vendor.calls == []


@on_both
async def test_a_run_that_no_worker_knows_is_cancelled_before_it_begins(app: App):
    unknown, known = order(in_a_sleep, Vendor()), order(in_a_poll, Vendor())
    web = await app.connect(unknown)
    await app.start(known)
    task_id = await unknown.submit()
    operator = app.operator(web, task_id)

    async def is_left() -> bool:  # by the worker, at its first attempt
        return await operator.attempt() > 1

    await wait_until(is_left)
    await unknown.cancel(task_id, "not wanted any more")
    run = await status_when(unknown, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "not wanted any more")


@on_both
async def test_a_cancellation_that_no_worker_is_there_for_is_kept_for_one(app: App):
    vendor = Vendor()
    task = order(in_a_backoff, vendor)
    worker = await app.start(task)
    task_id = await submitted(task, in_a_backoff, vendor)
    await worker.stop()
    await task.cancel(task_id, "why")
    assert not ended(await task.get_status(task_id))
    await app.start(task)
    run = await status_when(task, task_id, ended)
    assert (run.error_type, run.error, run.completed_steps) == ("TaskCancelledError", "why", ("first", "cleanup"))
    assert vendor.calls == ["first", "work", "CancelledError", "cleanup"]


@on_both
async def test_a_run_that_is_cancelled_during_its_delay_never_begins(app: App):
    vendor = Vendor()
    task = order(in_a_sleep, vendor)
    await app.start(task)
    task_id = await task.submit(delay=3600)
    before = time.monotonic()
    await task.cancel(task_id, "not wanted any more")
    run = await status_when(task, task_id, ended)
    assert time.monotonic() - before < PROMPT
    assert (run.status, run.error_type, run.error) == (TaskStatus.FAILED, "TaskCancelledError", "not wanted any more")
    assert vendor.calls == []


@on_both
async def test_a_task_without_steps_is_not_called_again_to_be_cancelled(app: App):
    vendor = Vendor()
    task = TemporalAsyncTask[None, None]("single", vendor.fail, retry_policy=FOR_AN_HOUR)
    await app.start(task)
    task_id = await task.submit()
    await status_when(task, task_id, backs_off)
    await task.cancel(task_id)
    with pytest.raises(TaskCancelledError):
        await task.result(task_id, timeout=60)
    assert vendor.calls == ["work"]


@on_both
async def test_cancelling_a_completed_run_changes_nothing(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    await app.start(echo)
    task_id = await echo.submit("done")
    await echo.result(task_id)
    before = await echo.get_status(task_id)
    await echo.cancel(task_id, "too late")
    assert await echo.get_status(task_id) == before


async def last_step(_: int) -> None:
    await step("last", asyncio.sleep, 0.3)


async def last_sleep(_: int) -> None:
    await sleep("last", 1.0)


async def last_event(number: int) -> None:
    await wait_for("last")


@pytest.mark.parametrize(
    ("execution", "last"),
    [
        ("workflow", last_step),
        ("workflow", last_sleep),
        ("workflow", last_event),
        ("activity", last_step),
        ("activity", last_sleep),
    ],
)
async def test_a_run_that_is_cancelled_as_it_completes_is_either_completed_or_cancelled(app: App, last: Any):
    calls: dict[int, list[str]] = {number: [] for number in range(20)}

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def race(number: int) -> int:
        await step("first", asyncio.sleep, 0)
        calls[number].append("first")
        try:
            await last(number)
        except asyncio.CancelledError:
            await step("cleanup", asyncio.sleep, 0)
            calls[number].append("cleaned up")
            raise
        calls[number].append("returned")
        return number

    async def run(number: int) -> TaskResult[int]:
        task_id = await race.submit(number)
        if last is last_event:
            await status_when(race, task_id, waits)
            both = [race.send(task_id, "last"), race.cancel(task_id)]
            await asyncio.gather(*(both if number % 2 else reversed(both)))
        else:
            await wait_until(lambda: calls[number])
            await asyncio.sleep((0.2 if last is last_step else 0.9) + number * 0.01)
            await race.cancel(task_id)
        return await status_when(race, task_id, ended)

    await app.start(race)
    for number, one in enumerate(await asyncio.gather(*map(run, calls))):
        if one.status is TaskStatus.COMPLETED:
            assert one.result == number
            assert "cleaned up" not in calls[number]
            assert "returned" in calls[number]
        else:
            assert one.error_type == "TaskCancelledError"
            assert "cleaned up" in calls[number]
            assert "returned" not in calls[number]


# More than once, and by other means -------------------------------------------------------------------------


@at(in_an_async_step, in_a_backoff)
async def test_cancelling_twice_at_once_is_cancelling_once(app: App, place: Place):
    vendor = Vendor()
    task = order(place, vendor)
    await app.start(task)
    task_id = await submitted(task, place, vendor)
    await asyncio.gather(task.cancel(task_id, "why"), task.cancel(task_id, "why"))
    run = await status_when(task, task_id, ended)
    assert run.error_type == "TaskCancelledError"
    assert vendor.calls == ["first", "work", "CancelledError", "cleanup"]


@on_both
async def test_cancelling_again_does_not_interrupt_the_cleanup(app: App):
    calls = []

    async def clean_up() -> None:
        calls.append("cleanup")
        await wait_until(lambda: "again" in calls)
        calls.append("cleaned up")

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            await step("cleanup", clean_up)
            raise

    worker = await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id, "why")
    await wait_until(lambda: "cleanup" in calls)
    await shoot.cancel(task_id, "again")
    await app.operator(worker, task_id).cancel()
    await asyncio.sleep(HEARTBEAT / 3 + 0.2)  # in which the attempt would learn of it
    calls.append("again")
    run = await status_when(shoot, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")
    assert calls == ["cleanup", "again", "cleaned up"]


@pytest.mark.parametrize(
    ("execution", "place"),
    [
        ("workflow", in_an_async_step),
        ("workflow", in_a_backoff),
        ("workflow", in_a_wait_for),
        ("activity", in_an_async_step),
    ],
)
async def test_a_cancellation_by_temporals_own_means_lets_the_body_clean_up_too(app: App, place: Place):
    vendor = Vendor()
    task = order(place, vendor)
    worker = await app.start(task)
    task_id = await submitted(task, place, vendor)
    await app.operator(worker, task_id).cancel()
    run = await status_when(task, task_id, ended)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "TaskCancelledError")
    assert run.completed_steps == ("first", "cleanup")
    assert vendor.calls[-2:] == ["CancelledError", "cleanup"]


@on_an_activity
async def test_a_cancellation_by_temporals_own_means_ends_an_activity_that_waits_without_its_cleanup(app: App):
    vendor = Vendor()
    task = order(in_a_backoff, vendor)
    worker = await app.start(task)
    task_id = await submitted(task, in_a_backoff, vendor)
    await app.operator(worker, task_id).cancel()
    with pytest.raises(TaskCancelledError):
        await task.result(task_id, timeout=60)
    assert (await task.get_status(task_id)).completed_steps == ("first",)
    assert vendor.calls == ["first", "work"]
    await task.resume(task_id)
    await status_when(task, task_id, waits)
    assert vendor.calls == ["first", "work", "work"], "the journal was kept"


@on_an_activity
async def test_a_cancellation_by_temporals_own_means_bounds_an_activitys_cleanup_to_its_attempt(app: App):
    vendor = Vendor()
    task = order_with_a_flaky_cleanup(in_an_async_step, vendor, name="flaky")
    worker = await app.start(task)
    task_id = await submitted(task, in_an_async_step, vendor)
    await app.operator(worker, task_id).cancel()
    run = await status_when(task, task_id, ended)
    assert run.error_type == "TaskCancelledError"
    assert run.completed_steps == ("first", "note")
    assert vendor.calls == ["first", "work", "note", "cleanup"]


@on_an_activity
async def test_a_second_cancel_completes_one_that_was_cut_short(app: App, monkeypatch: pytest.MonkeyPatch):
    vendor = Vendor()
    task = order(in_a_backoff, vendor)
    component = await app.start(task)
    task_id = await submitted(task, in_a_backoff, vendor)
    with monkeypatch.context() as dying:
        dying.setattr(type(component.client.workflow_service), "reset_activity_execution", _dies)
        with pytest.raises(ConnectionAbortedError):
            await task.cancel(task_id, "why")
    assert backs_off(await task.get_status(task_id))
    await task.cancel(task_id, "another reason")
    run = await status_when(task, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")
    assert vendor.calls == ["first", "work", "CancelledError", "cleanup"]


async def _dies(*_: Any, **__: Any) -> None:
    raise ConnectionAbortedError("the process is gone")


@on_both
async def test_a_cancellation_by_temporals_own_means_on_top_of_ours_does_not_prevent_the_cleanup(app: App):
    vendor = Vendor()
    task = order(in_an_async_step, vendor)
    worker = await app.start(task)
    task_id = await submitted(task, in_an_async_step, vendor)
    await task.cancel(task_id, "why")
    if app.execution == "workflow":
        await wait_until(lambda: is_paused(worker, task_id))  # it has been asked for, and the step does not know
    await app.operator(worker, task_id).cancel()
    run = await status_when(task, task_id, ended)
    assert vendor.calls == ["first", "work", "CancelledError", "cleanup"]
    assert (run.error_type, run.error, run.completed_steps) == ("TaskCancelledError", "why", ("first", "cleanup"))


async def test_a_run_that_is_unknown_cannot_be_cancelled(app: App):
    task = order(in_a_sleep, Vendor())
    await app.connect(task)
    with pytest.raises(TaskNotFoundError, match="'nobody-knows'"):
        await task.cancel("nobody-knows")


@on_both
async def test_a_run_of_another_task_cannot_be_cancelled(app: App):
    mine, yours = order(in_a_sleep, Vendor()), order(in_a_poll, Vendor())
    await app.start(mine, yours)
    task_id = await mine.submit()
    with pytest.raises(TaskNotFoundError, match=f"'{task_id}' of task 'in_a_poll'"):
        await yours.cancel(task_id)
    assert not ended(await status_when(mine, task_id, waits))


# The cleanup ------------------------------------------------------------------------------------------------


@at(in_an_async_step, in_a_backoff)
async def test_the_status_shows_the_steps_of_the_cleanup_while_it_goes_on(app: App, place: Place):
    vendor, is_open = Vendor(), threading.Event()

    async def body() -> None:
        await step("first", vendor.call, "first")
        try:
            await place(vendor)
        except asyncio.CancelledError:
            await step("cleanup", is_open.wait, 30)
            raise

    task = TemporalAsyncTask[None, None]("shoot", body, heartbeat_timeout=HEARTBEAT)
    await app.start(task)
    try:
        task_id = await submitted(task, place, vendor)
        await task.cancel(task_id)
        run = await status_when(task, task_id, lambda run: len(run.steps) == 3)
    finally:
        is_open.set()
    assert run.status is TaskStatus.PROCESSING
    assert (run.steps[-1].key, run.steps[-1].state) == ("cleanup", StepState.RUNNING)
    assert run.current_step == "cleanup", "'work' was cancelled: it neither runs nor is it waited for"


@at(in_an_async_step, in_a_backoff, in_an_await_outside_of_steps)
async def test_a_step_of_the_cleanup_that_fails_is_retried_after_its_backoff(
    server: DevServer, retried: Any, execution: Execution, place: Place
):
    spot, bound = (execution, place), HEARTBEAT / 3 + CLEANUP_BACKOFF + 2 * PROMPT
    story = await retried[spot]
    assert (story.run.error_type, story.run.error) == ("TaskCancelledError", "the customer changed their mind")
    assert story.run.completed_steps == ("first", "note", "cleanup")
    calls = [call for call in story.calls if call != "work"]
    assert calls == ["first", "note", "cleanup", "cleanup"]
    assert story.took >= CLEANUP_BACKOFF
    alone = functools.partial(at_once, server.address, [spot], cancelled_at, order_with_a_flaky_cleanup)
    assert await took_at_best(story, bound, alone) < bound


@on_both
async def test_a_cleanup_whose_step_fails_for_good_does_not_make_the_run_fail_of_it(app: App):
    vendor = Vendor()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            await step.with_options(retry_policy=NEVER_AGAIN)("cleanup", vendor.fail)
            raise

    await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id, "why")
    run = await status_when(shoot, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")
    assert [(one.key, one.last_error) for one in run.steps if one.state is StepState.FAILED] == [
        ("cleanup", "ConnectionError: not now")
    ]


async def test_the_cleanup_may_wait_for_an_event(app: App):
    bodies, told = [], []

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        bodies.append(1)
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            try:
                told.append(await wait_for("confirmed", timeout=2))
            except WaitTimeoutError:
                told.append("WaitTimeoutError")
            raise

    await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id)
    await status_when(shoot, task_id, lambda run: any(one.key == "confirmed" for one in run.steps))
    await shoot.send(task_id, "confirmed", "by the customer")
    await status_when(shoot, task_id, ended)
    assert told == ["by the customer"]
    assert len(bodies) <= 4, "it waited, and did not ask again and again"


async def test_a_cleanup_that_does_not_end_is_left_at_its_bound(app: App, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempt, "CLEANUP_TIMEOUT", 1.0)
    vendor = Vendor()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await sleep("work", 3600)
        except asyncio.CancelledError:
            await step("cleanup", vendor.hold)
            raise

    await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, waits)
    await shoot.cancel(task_id, "why")
    run = await status_when(shoot, task_id, ended, timeout=1 + 2 * PROMPT)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")


# An operator's own means ------------------------------------------------------------------------------------


async def is_paused(component: AsyncTaskComponent, task_id: str) -> bool:
    """Of a run that a workflow carries."""
    found = await component.client.get_workflow_handle(task_id).describe()
    return any(one.paused for one in found.raw_description.pending_activities)


class Gated:
    """A task of three steps, of which the second waits until the gate is open."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.attempts = 0
        self.is_open = False
        self.task = TemporalAsyncTask[None, str]("gated", self._body, heartbeat_timeout=HEARTBEAT)

    async def _body(self) -> str:
        self.attempts += 1
        try:
            await step("first", self._call, "first")
            await step("work", self._wait)
            return await step("last", self._call, "last")
        except asyncio.CancelledError:
            self.calls.append("CancelledError")
            raise

    async def _call(self, what: str) -> str:
        self.calls.append(what)
        return what

    async def _wait(self) -> None:
        self.calls.append("work")
        await wait_until(lambda: self.is_open, timeout=90)


@pytest.fixture
async def gated(app: App) -> AsyncIterator[tuple[Gated, Operator, str]]:
    """A run in the second of its three steps, and somebody to handle it."""
    gated = Gated()
    worker = await app.start(gated.task)
    task_id = await gated.task.submit()
    await wait_until(lambda: "work" in gated.calls)
    yield gated, app.operator(worker, task_id), task_id
    gated.is_open = True


@on_both
async def test_a_run_that_an_operator_pauses_yields_after_its_step_and_goes_on_when_unpaused(gated: Any):
    run, operator, task_id = gated
    await operator.pause()
    await asyncio.sleep(HEARTBEAT / 3 + 0.3)  # in which the attempt learns of it
    run.is_open = True
    await status_when(run.task, task_id, lambda run: run.completed_steps == ("first", "work"))
    await asyncio.sleep(1.2)  # longer than the server's floor between two attempts
    assert run.calls == ["first", "work"]
    assert (await run.task.get_status(task_id)).status is TaskStatus.PROCESSING
    await operator.unpause()
    assert await run.task.result(task_id, timeout=60) == "last"
    assert run.calls == ["first", "work", "last"]
    assert run.attempts == 2


@on_both
async def test_a_run_that_an_operator_resets_goes_on_without_calling_a_finished_step_again(gated: Any):
    run, operator, task_id = gated
    await operator.reset()
    await asyncio.sleep(HEARTBEAT / 3 + 0.3)  # in which the attempt learns of it
    run.is_open = True
    assert await run.task.result(task_id, timeout=60) == "last"
    assert run.calls == ["first", "work", "last"]
    assert run.attempts == 2, "it did yield"


@on_both
async def test_a_running_step_that_an_operator_has_paused_can_be_cancelled(gated: Any):
    run, operator, task_id = gated
    await operator.pause()
    await asyncio.sleep(HEARTBEAT / 3 + 0.3)  # in which the attempt learns of it
    await run.task.cancel(task_id, "why")
    ended_run = await status_when(run.task, task_id, ended, timeout=HEARTBEAT / 3 + 2 * PROMPT)
    assert (ended_run.error_type, ended_run.error) == ("TaskCancelledError", "why")
    assert run.calls == ["first", "work", "CancelledError"]


# With a worker that goes ------------------------------------------------------------------------------------


@on_both
async def test_a_worker_stops_at_once_though_a_run_is_being_cancelled(app: App):
    vendor, is_open = Vendor(), threading.Event()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def shoot() -> None:
        try:
            await step("work", vendor.hold)
        except asyncio.CancelledError:
            vendor.calls.append("CancelledError")
            await step("cleanup", is_open.wait, 30)
            raise

    # The first worker has its only slot taken by the run, so it is the second that sees to the cancellation.
    await app.start(shoot, max_concurrent_tasks=1)
    task_id = await shoot.submit()
    await wait_until(lambda: vendor.calls)
    second = await app.start(shoot)
    await shoot.cancel(task_id)
    await wait_until(lambda: "CancelledError" in vendor.calls)
    before = time.monotonic()
    await second.stop()
    took = time.monotonic() - before
    is_open.set()
    run = await status_when(shoot, task_id, ended, timeout=60)
    assert run.error_type == "TaskCancelledError"
    assert took < 2


def mortal(
    log: CallLog, *, dies: bool, asks: bool = False, heartbeat: float = HEARTBEAT
) -> TemporalAsyncTask[None, None]:
    """A task whose cleanup kills its worker, or does not; it may wait for an event, too."""

    async def clean_up() -> None:
        log.note("cleanup")
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    async def hold() -> None:
        log.note("work")
        await asyncio.Event().wait()

    async def first() -> None:
        log.note("first")

    async def ask() -> None:  # not in the body itself: a task that an activity carries is refused for that
        await wait_for("go")

    async def body() -> None:
        await step("first", first)
        try:
            await step("work", hold)
        except asyncio.CancelledError:
            log.note("CancelledError")
            await step("cleanup", clean_up)
            if asks:
                await ask()
            raise

    return TemporalAsyncTask[None, None]("mortal", body, heartbeat_timeout=heartbeat)


async def killed_in_its_cleanup(app: App, log: CallLog) -> Story:
    task = mortal(log, dies=False)
    await app.connect(task)
    with WorkerProcess(__file__, app, CALLS=str(log.path)) as process:
        task_id = await task.submit()
        await wait_until(lambda: ["work"] in log.lines(), timeout=90)
        before = time.monotonic()
        await task.cancel(task_id, "why")
        assert await process.exit_status(timeout=20) == -signal.SIGKILL
    await app.start(task)
    run = await status_when(task, task_id, ended, timeout=90)
    return Story([line[0] for line in log.lines()], run, time.monotonic() - before)


@on_both
async def test_a_run_whose_worker_is_killed_in_the_cleanup_is_cleaned_up_by_another(killed: Any, execution: Execution):
    story = await killed[execution]
    assert story.calls == ["first", "work", "CancelledError", "cleanup", "CancelledError", "cleanup"]
    assert (story.run.error_type, story.run.error) == ("TaskCancelledError", "why")
    assert story.run.completed_steps == ("first", "cleanup")


async def test_a_run_knows_its_cleanup_though_the_worker_that_was_to_be_told_of_the_cancellation_is_lost(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stopping, "_LATE", timedelta(0))  # to be done sooner
    log = CallLog(tmp_path / "log")
    # A heartbeat timeout that is not over before the run is paused: so the server does not see that the worker is lost.
    task = mortal(log, dies=False, asks=True, heartbeat=6)
    await app.connect(task)
    with WorkerProcess(__file__, app, CALLS=str(log.path)) as process:
        task_id = await task.submit()
        await status_when(task, task_id, lambda run: run.current_step == "work", timeout=PATIENCE)
        component = await app.start(task)
        process.kill()
    await task.cancel(task_id, "why")
    run = await status_when(
        task, task_id, lambda run: "cleanup" in run.completed_steps and waits(run), timeout=PATIENCE
    )
    assert (run.status, run.completed_steps) == (TaskStatus.PROCESSING, ("first", "cleanup"))
    await task.send(task_id, "go")
    run = await status_when(task, task_id, ended)
    assert (run.error_type, run.completed_steps) == ("TaskCancelledError", ("first", "cleanup", "go"))
    found = await component.client.get_workflow_handle(task_id).describe()
    left = [one.activity_id for one in found.raw_description.pending_activities]
    assert left == ["task-1"], "the server keeps the one that was lost"
    await task.resume(task_id)
    run = await status_when(task, task_id, lambda run: run.current_step == "work")
    assert run.completed_steps == ("first", "cleanup", "go")
    await task.cancel(task_id, "why, once more")
    await status_when(task, task_id, ended, timeout=PATIENCE)
    calls = [line[0] for line in log.lines() if line != ["CancelledError"]]
    assert calls == ["first", "work", "cleanup", "work"], "what was cleaned up is not cleaned up again"


if __name__ == "__main__":
    work([mortal(CallLog(Path(os.environ["CALLS"])), dies=True)])
