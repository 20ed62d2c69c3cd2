"""A schedule starts runs by the clock, and its runs are like any others."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio.api.common.v1 import Payload
from temporalio.client import ScheduleOverlapPolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import PayloadCodec

from support import NEVER_AGAIN, App, Meter, backs_off, ended, status_when, utc_now, wait_until
from temporal_async_task import (
    ConfigError,
    InvalidKeyError,
    NotConnectedError,
    ParamsError,
    PayloadTooLargeError,
    TaskConflictError,
    TaskNotFoundError,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    current_step,
    sleep,
    step,
)
from temporal_async_task.engine import wire
from temporal_async_task.schedules import ScheduleHandle

NEW_YEAR = "0 0 1 1 *"
"""Not due while the tests run. In case they run at that very moment, the schedules that have it are paused, too."""

Make = Callable[..., Awaitable[ScheduleHandle]]


@pytest.fixture
async def schedule(app: App) -> AsyncIterator[Make]:
    """Makes schedules, and deletes them after the test. By default they start a run when triggered only."""
    made: list[ScheduleHandle] = []

    async def make(task: TemporalAsyncTask[Any, Any], params: Any = None, **options: Any) -> ScheduleHandle:
        if "every" not in options:
            options = {"cron": NEW_YEAR, "paused": True, **options}
        made.append(await task.schedule(f"{task.name}-{uuid.uuid4().hex[:8]}", params, **options))
        return made[-1]

    yield make
    for handle in made:
        with suppress(TaskNotFoundError):
            await handle.delete()


async def started(handle: ScheduleHandle, count: int = 1) -> tuple[str, ...]:
    """The ids of the schedule's runs, newest first, once there are so many."""

    async def enough() -> tuple[str, ...]:
        ids = (await handle.describe()).last_task_ids
        return ids if len(ids) >= count else ()

    ids: tuple[str, ...] = await wait_until(enough)
    return ids


async def triggered(handle: ScheduleHandle) -> str:
    """The id of a run that is started now."""
    await handle.trigger()
    return (await started(handle))[0]


# When runs begin ------------------------------------------------------------------------------------------


async def test_runs_begin_by_the_clock_each_with_an_id_of_its_own(app: App, schedule: Make):
    @async_task
    async def greet(name: str) -> str:
        return f"hello {name}"

    await app.start(greet)
    handle = await schedule(greet, "Ada", every=1)
    ids = await started(handle, 2)
    due = [datetime.strptime(i.removeprefix(f"{handle.id}-"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC) for i in ids]
    assert due[0] > due[1]
    assert [await greet.result(task_id, timeout=60) for task_id in ids[:2]] == ["hello Ada"] * 2


async def test_a_paused_schedule_starts_no_runs_until_it_goes_on(app: App, schedule: Make):
    @async_task
    async def tick() -> None: ...

    await app.start(tick)
    never_begun = await schedule(tick, every=1, paused=True)
    paused = await schedule(tick, every=1)
    await started(paused)
    await paused.pause("maintenance")
    view = await paused.describe()
    assert (view.paused, view.note) == (True, "maintenance")
    await started(await schedule(tick, every=1), 2)  # a second at least has passed
    assert (await paused.describe()).last_task_ids == view.last_task_ids
    assert (await never_begun.describe()).last_task_ids == ()
    await paused.unpause("done")
    await started(paused, len(view.last_task_ids) + 1)
    view = await paused.describe()
    assert (view.paused, view.note) == (False, "done")


async def test_a_trigger_starts_a_run_at_once(app: App, schedule: Make):
    @async_task
    async def double(number: int) -> int:
        return 2 * number

    await app.start(double)
    assert await double.result(await triggered(await schedule(double, 21)), timeout=60) == 42


async def test_a_run_that_falls_due_while_another_goes_on_is_left_out(app: App, schedule: Make):
    @async_task
    async def slow() -> None:
        await sleep("forever", 3600)

    component = await app.start(slow)
    handle = await schedule(slow, every=1)
    other = component.client.get_schedule_handle(handle.id)

    async def skipped() -> bool:
        return (await other.describe()).info.num_actions_skipped_overlap > 0

    await wait_until(skipped)
    [task_id] = (await handle.describe()).last_task_ids
    await slow.cancel(task_id)


async def test_a_run_that_gives_way_to_the_next_one_is_cancelled_and_cleans_up(app: App, schedule: Make):
    cleaned = []

    @async_task
    async def slow() -> None:
        try:
            await sleep("forever", 3600)
        finally:
            await step("clean up", cleaned.append, "done")

    await app.start(slow)
    handle = await schedule(slow, overlap="cancel_other")
    first = await triggered(handle)
    await status_when(slow, first, backs_off)
    await wait_until(lambda: f"{utc_now():%H:%M:%S}" not in first)  # else they have the same id
    await handle.trigger()
    run = await status_when(slow, first, ended)
    assert (run.status, run.error_type, cleaned) == (TaskStatus.FAILED, "TaskCancelledError", ["done"])
    [second, _] = await started(handle, 2)
    await slow.cancel(second)


async def test_options_reach_the_server(app: App, schedule: Make):
    @async_task
    async def tick() -> None: ...

    component = await app.connect(tick)
    options: dict[str, Any] = {"time_zone": "Asia/Tokyo", "jitter": timedelta(seconds=3), "note": "mind the gap"}
    handle = await schedule(tick, cron=["0 3 1 1 *", "@yearly"], overlap="buffer_one", **options)
    view = await handle.describe()
    assert view.cron == ("0 3 1 1 *", "@yearly")
    assert (view.every, view.time_zone, view.note, view.paused) == (None, "Asia/Tokyo", "mind the gap", True)
    assert {time.hour for time in view.next_runs} == {15, 18}  # midnight and 3 o'clock in Tokyo
    found = (await component.client.get_schedule_handle(handle.id).describe()).schedule
    assert found.policy.overlap is ScheduleOverlapPolicy.BUFFER_ONE
    assert found.spec.jitter == timedelta(seconds=3)


# Finding and deleting -------------------------------------------------------------------------------------


async def test_a_task_lists_its_own_schedules_only(app: App, schedule: Make):
    @async_task
    async def mine() -> None: ...

    @async_task
    async def other() -> None: ...

    await app.connect(mine, other)
    theirs = await schedule(other, every=timedelta(hours=1))
    await wait_until(lambda: listed(other, theirs))
    ours = await schedule(mine, every=timedelta(hours=1), note="each hour")
    await wait_until(lambda: listed(mine, ours))
    [view] = [view async for view in mine.schedules()]
    assert (view.id, view.task_name, view.every, view.note) == (ours.id, "mine", 3600, "each hour")
    assert view.cron == ()
    assert view.next_runs[1] - view.next_runs[0] == timedelta(hours=1)


async def listed(task: TemporalAsyncTask[Any, Any], handle: ScheduleHandle) -> bool:
    return handle.id in [view.id async for view in task.schedules()]


async def test_a_schedule_is_found_by_its_id(app: App, schedule: Make):
    @async_task
    async def tick() -> None: ...

    await app.start(tick)
    handle = await schedule(tick)
    again = await tick.get_schedule(handle.id)
    assert await again.describe() == await handle.describe()
    await again.trigger()
    await tick.result((await started(handle))[0], timeout=60)


async def test_the_schedule_of_another_task_is_not_found(app: App, schedule: Make):
    @async_task
    async def mine() -> None: ...

    @async_task
    async def other() -> None: ...

    await app.connect(mine, other)
    handle = await schedule(other)
    with pytest.raises(TaskNotFoundError, match=r"no schedule .* of task 'mine'"):
        await mine.get_schedule(handle.id)
    with pytest.raises(TaskNotFoundError):
        await mine.get_schedule("never-made")


async def test_a_deleted_schedule_is_gone_its_runs_go_on_and_its_id_is_free(app: App, schedule: Make):
    @async_task
    async def wait() -> str:
        await sleep("a moment", 1.05)
        return "done"

    await app.start(wait)
    handle = await schedule(wait)
    task_id = await triggered(handle)
    await handle.delete()
    for call in (handle.describe, handle.pause, handle.unpause, handle.trigger, handle.delete):
        with pytest.raises(TaskNotFoundError, match=handle.id):
            await call()
    assert await wait.result(task_id, timeout=60) == "done"
    again = await wait.schedule(handle.id, every=3600)
    await again.delete()


async def test_an_id_in_use_is_a_conflict(app: App, schedule: Make):
    @async_task
    async def tick() -> None: ...

    await app.connect(tick)
    handle = await schedule(tick)
    with pytest.raises(TaskConflictError, match=handle.id):
        await tick.schedule(handle.id, every=60)
    assert (await handle.describe()).cron == (NEW_YEAR,)


# What cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either cron .* or every"),
        ({"cron": []}, "either cron .* or every"),
        ({"cron": NEW_YEAR, "every": 60}, "not both"),
        ({"cron": "61 * * * *"}, "Minute is not in range"),
        ({"cron": [NEW_YEAR, "at noon"]}, "5-7 fields"),
        ({"cron": ""}, "5-7 fields"),
        ({"cron": 5}, "cron must be text"),
        ({"cron": [5]}, "cron must be text"),
        ({"cron": "0 3 * * 5#3"}, "'#'"),
        ({"cron": "@every 90s"}, "every="),
        ({"every": 0}, "whole seconds"),
        ({"every": -1}, "whole seconds"),
        ({"every": 1.5}, "whole seconds"),
        ({"every": timedelta(milliseconds=1)}, "whole seconds"),
        ({"every": float("nan")}, "whole seconds"),
        ({"every": float("inf")}, "whole seconds"),
        ({"every": 1e300}, "whole seconds"),
        ({"every": "1h"}, "seconds or a timedelta"),
        ({"every": 60, "jitter": -1}, "jitter"),
        ({"every": 60, "overlap": "queue"}, "buffer_one"),
        ({"cron": NEW_YEAR, "time_zone": "Mars/Olympus"}, "unknown time zone"),
    ],
    ids=str,
)
async def test_a_schedule_that_makes_no_sense_is_refused(app: App, options: dict[str, Any], message: str):
    @async_task
    async def tick() -> None: ...

    await app.connect(tick)
    schedule_id = uuid.uuid4().hex
    with pytest.raises(ConfigError, match=rf"Schedule '{schedule_id}' of task 'tick'.*{message}"):
        await tick.schedule(schedule_id, **options)
    with pytest.raises(TaskNotFoundError):
        await tick.get_schedule(schedule_id)


class Order(BaseModel):
    prompt: str


@pytest.mark.parametrize(
    ("params", "error"),
    [({"prompt": 5}, ParamsError), (object(), ParamsError), (Order(prompt="x" * 2_100_000), PayloadTooLargeError)],
    ids=["unfit", "unserialisable", "too large"],
)
async def test_params_are_checked_before_anything_is_sent(app: App, meter: Meter, params: Any, error: type[Exception]):
    @async_task
    async def shoot(order: Order) -> None: ...

    with meter.attached():
        await app.connect(shoot)
    meter.calls()
    with pytest.raises(error, match="The params of task 'shoot'"):
        await shoot.schedule("bad-params", params, every=60)
    assert meter.calls() == []


async def test_params_for_a_task_that_takes_none_are_refused(app: App):
    @async_task
    async def tick() -> None: ...

    await app.connect(tick)
    with pytest.raises(ParamsError, match="takes no params"):
        await tick.schedule("bad-params", 5, every=60)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule_id", ["", "a\nb", "x" * 233, 5])
async def test_an_id_that_cannot_be_one_is_refused(app: App, schedule_id: Any):
    @async_task
    async def tick() -> None: ...

    await app.connect(tick)
    with pytest.raises(InvalidKeyError):
        await tick.schedule(schedule_id, every=60)
    with pytest.raises(InvalidKeyError):
        await tick.get_schedule(schedule_id)


async def test_the_runs_of_the_longest_id_have_ids_that_can_be_asked_for(app: App):
    @async_task
    async def tick() -> None: ...

    await app.start(tick)
    handle = await tick.schedule(uuid.uuid4().hex.ljust(232, "x"), cron=NEW_YEAR, paused=True)
    await tick.result(await triggered(handle), timeout=60)
    await handle.delete()


async def test_without_a_connection_there_are_no_schedules():
    @async_task
    async def tick() -> None: ...

    with pytest.raises(NotConnectedError):
        await tick.schedule("nightly", cron=NEW_YEAR)
    with pytest.raises(NotConnectedError):
        await tick.get_schedule("nightly")
    with pytest.raises(NotConnectedError):
        tick.schedules()


# Its runs are like any others -----------------------------------------------------------------------------


async def test_a_scheduled_run_can_be_asked_about_cancelled_and_found_in_the_list(app: App, schedule: Make):
    @async_task
    async def slow(order: Order) -> None:
        await step("generate", str.upper, order.prompt)
        await sleep("forever", 3600)

    await app.start(slow)
    task_id = await triggered(await schedule(slow, Order(prompt="cat")))
    run = await status_when(slow, task_id, lambda run: run.current_step == "forever")
    assert (run.status, run.completed_steps) == (TaskStatus.PROCESSING, ("generate",))
    await slow.cancel(task_id, "enough")
    run = await status_when(slow, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "enough")

    async def in_the_list() -> bool:
        return task_id in [run.task_id async for run in slow.list(status="failed")]

    await wait_until(in_the_list)


async def test_a_submit_with_a_scheduled_runs_id_compares_params(app: App, schedule: Make):
    @async_task
    async def echo(word: str) -> str:
        return word

    await app.start(echo)
    task_id = await triggered(await schedule(echo, "cat"))
    assert await echo.submit("cat", task_id=task_id) == task_id
    with pytest.raises(TaskConflictError, match="other params"):
        await echo.submit("dog", task_id=task_id)


async def test_a_resumed_run_of_a_schedule_keeps_its_idempotency_keys(app: App, schedule: Make):
    keys: dict[str, list[str]] = {"charge": [], "deliver": []}
    broken = True

    def charge() -> None:
        keys["charge"].append(current_step().idempotency_key)

    def deliver() -> None:
        keys["deliver"].append(current_step().idempotency_key)
        if broken:
            raise ConnectionError("no road")

    @async_task(retry_policy=NEVER_AGAIN)
    async def order() -> str:
        await step("charge", charge)
        await step("deliver", deliver)
        return "delivered"

    await app.start(order)
    task_id = await triggered(await schedule(order))
    await status_when(order, task_id, ended)
    await order.resume(task_id, redo=["charge"])
    await wait_until(lambda: len(keys["deliver"]) == 2)
    await status_when(order, task_id, ended)
    broken = False
    await order.resume(task_id)
    assert await order.result(task_id, timeout=60) == "delivered"
    assert [len(keys["charge"]), len(keys["deliver"])] == [2, 3]
    assert len({*keys["charge"]}) == len({*keys["deliver"]}) == 1


async def test_a_cancelled_runs_cleanup_keeps_its_idempotency_keys(app: App, schedule: Make):
    keys: list[str] = []

    def pay() -> None:
        keys.append(current_step().idempotency_key)
        if len(keys) == 1:
            raise ConnectionError("no road")

    @async_task
    async def order() -> None:
        try:
            await sleep("forever", 3600)
        finally:
            await step("refund", pay)

    await app.start(order)
    task_id = await triggered(await schedule(order))
    await status_when(order, task_id, lambda run: run.current_step == "forever")
    await order.cancel(task_id)
    await status_when(order, task_id, ended)
    assert len(keys) == 2
    assert len({*keys}) == 1


async def test_the_runs_of_a_schedule_have_different_idempotency_keys(app: App, schedule: Make):
    keys: list[str] = []

    @async_task
    async def charge() -> None:
        keys.append(current_step().idempotency_key)

    await app.start(charge)
    handle = await schedule(charge, overlap="allow_all")
    await charge.result(await triggered(handle), timeout=60)
    await handle.trigger()  # within the same second they even have the same id
    await wait_until(lambda: len(keys) == 2)
    assert keys[0] != keys[1]


# With a codec ---------------------------------------------------------------------------------------------


class Hiding(PayloadCodec):
    """A toy: each payload as a whole, in hexadecimal. It refuses to decode what it has not encoded."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [
            Payload(metadata={"encoding": b"binary/hidden"}, data=one.SerializeToString().hex().encode())
            for one in payloads
        ]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        assert all(one.metadata["encoding"] == b"binary/hidden" for one in payloads)
        return [Payload.FromString(bytes.fromhex(one.data.decode())) for one in payloads]


async def test_a_codec_is_applied_once(app: App, schedule: Make):
    @async_task
    async def echo(word: str) -> str:
        return word

    component = await app.start(echo, data_converter=replace(pydantic_data_converter, payload_codec=Hiding()))
    handle = await schedule(echo, "canary")
    found = (await component.client.get_schedule_handle(handle.id).describe()).raw_description
    action = found.schedule.action.start_workflow
    assert b"canary" not in found.SerializeToString()
    [params] = await Hiding().decode([action.input.payloads[1]])
    assert (params.metadata["encoding"], params.data) == (b"json/plain", b'"canary"')
    assert wire.TaskInput.from_payload(action.input.payloads[0]).digest.startswith("asyncTaskSealed:")
    task_id = await triggered(handle)
    assert await echo.result(task_id, timeout=60) == "canary"
    assert await echo.submit("canary", task_id=task_id) == task_id
