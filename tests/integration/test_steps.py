"""Steps: made once, found by their key, round-tripped, and what the code in them may ask."""

import asyncio
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from support import AT_ONCE, BY_TIMER, FOR_AN_HOUR, NEVER_AGAIN, App, backs_off, ended, on_both, status_when
from temporal_async_task import (
    DuplicateStepError,
    StepUsageError,
    TaskFailedError,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    current_run,
    current_step,
    poll,
    progress,
    sleep,
    step,
    wait_for,
)


@dataclass
class Image:
    url: str
    size: tuple[int, int]


class Calls(list[Any]):
    """Notes what is called, and calls it."""

    async def echo(self, value: Any) -> Any:
        self.append(value)
        return value

    async def fail(self, value: Any) -> Any:
        self.append(value)
        raise ConnectionError("not now")

    async def fail_once(self, value: Any) -> Any:
        self.append(value)
        if self.count(value) == 1:
            raise ConnectionError("not now")
        return value


# Made once ------------------------------------------------------------------------------------------------


async def test_a_finished_step_is_not_called_again_in_later_attempts(app: App):
    calls = Calls()

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> list[str]:
        first = await step("generate", calls.echo, "generate")
        second = await step("download", calls.fail_once, "download")
        return [first, second, await step("upload", calls.fail_once, "upload")]

    await app.start(shoot)
    task_id = await shoot.submit()
    assert await shoot.result(task_id) == ["generate", "download", "upload"]
    assert calls == ["generate", "download", "download", "upload", "upload"]
    assert (await shoot.get_status(task_id)).attempt == 3


@on_both
async def test_a_run_goes_on_with_the_code_of_a_new_deploy(app: App):
    calls = Calls()

    async def before() -> list[str]:
        return [
            await step("generate", calls.echo, "generate"),
            await step("polish", calls.echo, "polish"),
            await step("upload", calls.fail, "upload"),
        ]

    async def after() -> list[str]:
        # "polish" is gone, "watermark" is new, "upload" comes first and "generate" last.
        return [
            await step("upload", calls.echo, "upload"),
            await step("watermark", calls.echo, "watermark"),
            await step("generate", calls.echo, "generated anew"),
        ]

    old = TemporalAsyncTask("shoot", before, retry_policy=BY_TIMER)
    worker = await app.start(old)
    task_id = await old.submit()
    await status_when(old, task_id, backs_off)
    await worker.stop()
    new = TemporalAsyncTask("shoot", after, retry_policy=BY_TIMER)
    await app.start(new)
    assert await new.result(task_id) == ["upload", "watermark", "generate"]
    assert calls == ["generate", "polish", "upload", "upload", "watermark"]


async def test_many_steps_in_parallel_are_each_made_once(app: App):
    calls = Calls()

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> list[int]:
        numbers = await asyncio.gather(*(step(f"page-{number}", calls.echo, number) for number in range(50)))
        await step("flaky", calls.fail_once, "flaky")
        return numbers

    await app.start(shoot)
    assert await shoot.run() == list(range(50))
    assert sorted(call for call in calls if call != "flaky") == list(range(50))


@on_both
async def test_a_durable_sleep_is_not_begun_anew_by_a_later_attempt(app: App):
    calls = Calls()

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> None:
        await asyncio.gather(sleep("pause", 1.5), step("flaky", calls.fail_once, "flaky"))
        await sleep("short", timedelta(seconds=0.1))

    await app.start(shoot)
    begun = time.monotonic()
    task_id = await shoot.submit()
    run = await status_when(shoot, task_id, ended)
    assert 1.5 <= time.monotonic() - begun < 4
    assert set(run.completed_steps) == {"pause", "flaky", "short"}
    assert calls == ["flaky", "flaky"]


# Round trips ----------------------------------------------------------------------------------------------


async def image_untyped():
    return Image("https://example.org", (1, 2))


async def image_typed() -> Image:
    return Image("https://example.org", (1, 2))


async def numbered() -> Any:
    return {1: ("one", {"a"})}


async def numbered_typed() -> dict[int, tuple[str, set[str]]]:
    return {1: ("one", {"a"})}


ROUND_TRIPS: list[tuple[Any, Any, Any]] = [
    # the call, what the step is told of its result's type, what the body gets
    (image_typed, None, Image("https://example.org", (1, 2))),
    (image_untyped, None, {"url": "https://example.org", "size": [1, 2]}),
    (image_untyped, Image, Image("https://example.org", (1, 2))),
    (numbered, None, {"1": ["one", ["a"]]}),
    (numbered_typed, None, {1: ("one", {"a"})}),
]


async def test_a_step_gives_the_body_on_the_first_run_what_it_gives_on_later_ones(app: App):
    seen, calls = [], Calls()

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> None:
        for number, (call, result_type, _) in enumerate(ROUND_TRIPS):
            seen.append(await step.with_options(result_type=result_type)(f"step-{number}", call))
        await step("flaky", calls.fail_once, "flaky")

    await app.start(shoot)
    await shoot.run()
    assert seen == [expected for _, _, expected in ROUND_TRIPS] * 2


async def test_what_the_body_does_to_a_result_does_not_change_what_is_kept(app: App):
    calls = Calls()

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> list[int]:
        numbers = await step("numbers", calls.echo, [1, 2])
        numbers.append(3)
        await step("flaky", calls.fail_once, "flaky")
        return numbers

    await app.start(shoot)
    assert await shoot.run() == [1, 2, 3]


# What is refused ------------------------------------------------------------------------------------------


async def test_a_key_that_is_asked_for_twice_is_refused(app: App):
    calls = Calls()

    @async_task
    async def shoot() -> None:
        await step("generate", calls.echo, 1)
        await step("generate", calls.echo, 2)

    await app.start(shoot)
    with pytest.raises(TaskFailedError) as raised:
        await shoot.run()
    assert raised.value.error_type == "DuplicateStepError"
    assert "step('generate') was asked for before in this run" in str(raised.value)
    assert "number them" in str(raised.value)
    assert calls == [1]


async def test_a_key_that_is_asked_for_twice_at_once_is_refused_where_it_is_the_second(app: App):
    calls = Calls()

    @async_task
    async def shoot() -> list[str]:
        both = await asyncio.gather(
            step("generate", calls.echo, 1), step("generate", calls.echo, 2), return_exceptions=True
        )
        return [type(one).__name__ for one in both]

    await app.start(shoot)
    assert await shoot.run() == ["int", "DuplicateStepError"]
    assert calls == [1]


async def test_a_key_is_unique_among_steps_and_sleeps_alike(app: App):
    @async_task
    async def shoot() -> str:
        await sleep("pause", 0)
        try:
            await step("pause", Calls().echo, 1)
        except DuplicateStepError as error:
            return str(error)
        return "not refused"

    await app.start(shoot)
    assert "step('pause') was asked for before in this run" in await shoot.run()


async def test_a_step_inside_of_a_step_is_refused(app: App):
    calls = Calls()

    async def outer() -> None:
        await step("inner", calls.echo, 1)

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        await step("outer", outer)

    await app.start(shoot)
    with pytest.raises(TaskFailedError, match=r"step\('inner'\) was called inside of step 'outer'"):
        await shoot.run()
    assert calls == []


async def test_steps_and_their_like_are_refused_outside_of_a_task():
    with pytest.raises(StepUsageError, match=r"step\(\) was called outside of a task"):
        await step("generate", Calls().echo, 1)
    with pytest.raises(StepUsageError, match=r"sleep\(\) was called outside of a task"):
        await sleep("pause", 1)
    for call in (current_run, current_step, lambda: progress(0.5)):
        with pytest.raises(StepUsageError, match="outside of a task"):
            call()


# What code in a step may ask ------------------------------------------------------------------------------


def where_am_i() -> dict[str, Any]:
    run, here = current_run(), current_step()
    return {
        "task_id": run.task_id,
        "task_name": run.task_name,
        "attempt": run.attempt,
        "params": run.params,
        "key": here.key,
        "call": here.attempt,
        "thread": threading.current_thread().name,
    }


async def where_am_i_async() -> dict[str, Any]:
    return where_am_i()


async def where_am_i_from_a_thread() -> dict[str, Any]:
    return await asyncio.to_thread(where_am_i)


@pytest.mark.parametrize("call", [where_am_i, where_am_i_async, where_am_i_from_a_thread])
async def test_a_step_knows_its_run_and_itself_in_threads_too(app: App, call: Any):
    @async_task
    async def shoot(prompt: str) -> dict[str, Any]:
        return await step("here", call)

    await app.start(shoot)
    task_id = await shoot.submit("a cup")
    told = await shoot.result(task_id)
    del told["thread"]
    assert told == {
        "task_id": task_id,
        "task_name": "shoot",
        "attempt": 1,
        "params": "a cup",
        "key": "here",
        "call": 1,
    }


async def test_a_body_without_steps_is_a_step_to_itself(app: App):
    @async_task(name="single")
    def single() -> tuple[str, int, str]:
        here = current_step()
        return here.key, here.attempt, here.idempotency_key

    await app.start(single)
    key, attempt, idempotency_key = await single.run()
    assert (key, attempt) == ("single", 1)
    assert uuid.UUID(idempotency_key)


async def test_sync_steps_run_in_threads_at_the_same_time(app: App):
    all_there = threading.Barrier(4, timeout=10)

    def meet() -> str:
        all_there.wait()
        return threading.current_thread().name

    @async_task
    async def shoot() -> list[str]:
        return await asyncio.gather(*(step(f"meet-{number}", meet) for number in range(4)))

    await app.start(shoot)
    assert len(set(await shoot.run())) == 4


async def test_a_sync_step_that_hangs_does_not_hold_up_other_tasks(app: App):
    let_go = threading.Event()

    @async_task
    def hang() -> None:
        let_go.wait(30)

    @async_task
    async def other() -> str:
        return await step("quick", Calls().echo, "done")

    await app.start(hang, other)
    try:
        task_id = await hang.submit()
        await status_when(hang, task_id, lambda run: run.status is TaskStatus.PROCESSING)
        assert await other.run(timeout=60) == "done"
    finally:
        let_go.set()


# Idempotency keys -----------------------------------------------------------------------------------------


@on_both
async def test_an_idempotency_key_is_stable_over_retries_attempts_and_workers(app: App):
    keys: list[str] = []

    def note_then(failures: int) -> str:
        keys.append(current_step().idempotency_key)
        if len(keys) <= failures:
            raise ConnectionError("not now")
        return "done"

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> None:
        await step.with_options(retry_policy=AT_ONCE)("pay", note_then, 2)
        await step.with_options(retry_policy=BY_TIMER)("ship", note_then, 4)

    worker = await app.start(shoot)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, backs_off)
    await worker.stop()
    await app.start(shoot)
    await shoot.result(task_id)
    assert keys[:3] == [keys[0]] * 3
    assert keys[3:] == [keys[3]] * 2
    assert keys[0] != keys[3]


async def test_idempotency_keys_differ_between_steps_and_runs(app: App):
    async def key() -> str:
        return current_step().idempotency_key

    @async_task
    async def shoot() -> list[str]:
        return [await step("one", key), await step("two", key)]

    await app.start(shoot)
    keys = [*await shoot.run(), *await shoot.run()]
    assert len(set(keys)) == 4


# Waiting --------------------------------------------------------------------------------------------------


@on_both
async def test_a_task_that_sleeps_polls_or_backs_off_holds_no_slot(app: App):
    calls = Calls()

    @async_task
    async def nap() -> str:
        await sleep("nap", 3600)
        return "rested"

    @async_task(retry_policy=FOR_AN_HOUR)
    async def stuck() -> None:
        await step("fail", calls.fail, 1)

    @async_task
    async def ask() -> None:
        await poll("ask", calls.echo, None, every=3600)

    @async_task
    async def quick() -> str:
        return "done"

    await app.start(nap, stuck, ask, quick, max_concurrent_tasks=1)
    ids = [await nap.submit(), await stuck.submit(), await ask.submit()]
    run = await status_when(nap, ids[0], backs_off)
    assert (run.current_step, run.last_error) == ("nap", None)
    await status_when(stuck, ids[1], backs_off)
    run = await status_when(ask, ids[2], backs_off)
    assert (run.current_step, run.last_error) == ("ask", None)
    assert await quick.run(timeout=60) == "done"
    assert calls.count(None) == 1


async def test_a_task_that_waits_for_an_event_holds_no_slot(app: App):
    @async_task
    async def ask() -> str:
        return await wait_for("approval")

    @async_task
    async def quick() -> str:
        return "done"

    await app.start(ask, quick, max_concurrent_tasks=1)
    ids = [await ask.submit() for _ in range(3)]
    for task_id in ids:
        await status_when(ask, task_id, lambda run: run.current_step == "approval")
    assert await quick.run(timeout=60) == "done"
    for task_id in ids:
        await ask.send(task_id, "approval", "approved")
        assert await ask.result(task_id, timeout=60) == "approved"
