"""Steps that are called at most once: never a second time, whatever becomes of the worker in the midst of the call."""

import asyncio
import os
import signal
import threading
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import (
    AT_ONCE,
    NEVER_AGAIN,
    App,
    CallLog,
    WorkerProcess,
    ended,
    on_both,
    status_when,
    wait_until,
    work,
)
from temporal_async_task import (
    RetryableError,
    RetryPolicy,
    StepFailedError,
    StepOutcomeUnknownError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    current_step,
    step,
)
from temporal_async_task.devserver import DevServer

HEARTBEAT = 2.0
once = step.with_options(at_most_once=True)


# With workers that are killed -------------------------------------------------------------------------------


def buying(log: CallLog, *, dies_in: str = "") -> TemporalAsyncTask[None, str]:
    """A task that prepares, pays at most once, and ships. Its worker is killed in one of these calls."""

    async def call(what: str) -> str:
        log.note(what)
        if what == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return what

    async def pay(key: str) -> str:
        log.note("pay", key, current_step().idempotency_key)
        if dies_in == "pay":
            os.kill(os.getpid(), signal.SIGKILL)
        return "paid"

    async def was_paid(key: str) -> str:
        log.note("asked", key)
        return "paid, as the vendor says" if any(line[:2] == ["pay", key] for line in log.lines()) else "not paid"

    async def new_key() -> str:
        return str(uuid.uuid4())

    async def buy() -> str:
        key = await step("key", new_key)
        await step("prepare", call, "prepare")
        try:
            outcome = await once("pay", pay, key)
        except StepOutcomeUnknownError as error:
            log.note("unknown", getattr(error, "idempotency_key", "-"))
            outcome = await step("ask", was_paid, key)
        await step("ship", call, "ship")
        return outcome

    return TemporalAsyncTask[None, str]("buy", buy, heartbeat_timeout=HEARTBEAT)


@dataclass
class Story:
    """What was called, and how the run ended."""

    calls: list[list[str]]
    run: TaskResult[str]

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.calls]


async def killed_in(what: str, app: App, log: CallLog) -> Story:
    task = buying(log)
    await app.connect(task)
    with WorkerProcess(__file__, app, CALLS=str(log.path), DIES_IN=what) as worker:
        task_id = await task.submit()
        assert await worker.exit_status(timeout=30) == -signal.SIGKILL
    await app.start(task)
    run = await status_when(task, task_id, ended, timeout=90)
    return Story([list(words) for words in log.lines()], run)


@pytest.fixture(scope="module", autouse=True)
async def stories(
    server: DevServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, asyncio.Task[Story]]]:
    """A run whose worker is killed in each of the calls. It takes a while, and goes on while the other tests run."""
    apps = {what: App(server.address, f"queue-{uuid.uuid4().hex[:8]}") for what in ("prepare", "pay", "ship")}
    stories = {
        what: asyncio.create_task(killed_in(what, app, CallLog(tmp_path_factory.mktemp(what) / "log")))
        for what, app in apps.items()
    }
    yield stories
    for story in stories.values():
        story.cancel()
    await asyncio.wait(stories.values())
    await asyncio.gather(*(app.stop() for app in apps.values()))


# While the worker lives -------------------------------------------------------------------------------------


class Vendor:
    """Its calls; it fails until its failures are used up."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls: list[str] = []
        self.let_go = threading.Event()

    async def call(self, what: str) -> str:
        self.calls.append(what)
        if self.failures:
            raise self.failures.pop(0)
        return what

    async def hold(self, what: str) -> str:
        self.calls.append(what)
        await asyncio.Event().wait()
        return what


async def test_a_step_that_succeeds_is_called_once_and_its_result_kept(app: App):
    vendor, flaky = Vendor(), Vendor(ConnectionError("not now"))

    @async_task(retry_policy=RetryPolicy(max_retries=1, initial_delay=1.05, max_delay=1.05, jitter=0))
    async def buy() -> str:
        paid = await once("pay", vendor.call, "paid")
        await step("flaky", flaky.call, "flaky")
        return paid

    await app.start(buy)
    assert await buy.run(timeout=60) == "paid"
    assert vendor.calls == ["paid"]


async def test_an_error_is_not_retried_whatever_the_policy_says(app: App):
    vendor = Vendor(ConnectionError("reset by peer"))

    @async_task(retry_policy=AT_ONCE)
    async def buy() -> str:
        try:
            return await once("pay", vendor.call, "pay")
        except StepFailedError as error:
            return f"{type(error).__name__}: {error.error_type}: {error.message}"

    await app.start(buy)
    assert await buy.run(timeout=60) == "StepFailedError: ConnectionError: reset by peer"
    assert vendor.calls == ["pay"]


async def test_an_error_that_says_that_nothing_was_done_is_retried(app: App):
    vendor = Vendor(RetryableError("too many requests", retry_after=0.01), RetryableError("again", retry_after=1.05))

    @async_task(retry_policy=AT_ONCE)
    async def buy() -> str:
        return await once("pay", vendor.call, "pay")

    await app.start(buy)
    assert await buy.run(timeout=60) == "pay"
    assert vendor.calls == ["pay"] * 3


async def test_a_call_that_is_given_up_when_its_worker_stops_is_not_made_again(app: App):
    vendor = Vendor()

    @async_task
    async def buy() -> str:
        try:
            return await once("pay", vendor.hold, "pay")
        except StepOutcomeUnknownError:
            return "unknown"

    worker = await app.start(buy)
    task_id = await buy.submit()
    await wait_until(lambda: vendor.calls)
    await worker.stop()
    await app.start(buy)
    assert await buy.result(task_id, timeout=60) == "unknown"
    assert vendor.calls == ["pay"]


async def test_a_call_in_which_the_run_was_cancelled_is_not_made_again_when_it_is_resumed(app: App):
    vendor = Vendor()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def buy() -> str:
        try:
            return await once("pay", vendor.hold, "pay")
        except StepOutcomeUnknownError:
            return "unknown"

    await app.start(buy)
    task_id = await buy.submit()
    await wait_until(lambda: vendor.calls)
    await buy.cancel(task_id)
    await status_when(buy, task_id, ended)
    await buy.resume(task_id)
    assert await buy.result(task_id, timeout=60) == "unknown"
    assert vendor.calls == ["pay"]


@on_both
async def test_a_call_in_which_the_run_was_terminated_is_not_made_again_when_it_is_resumed(app: App):
    vendor = Vendor()

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def buy() -> str:
        try:
            return await once("pay", vendor.hold, "pay")
        except StepOutcomeUnknownError:
            return "unknown"

    worker = await app.start(buy)
    task_id = await buy.submit()
    await wait_until(lambda: vendor.calls)
    await app.operator(worker, task_id).terminate()
    await status_when(buy, task_id, ended)
    await buy.resume(task_id)
    assert await buy.result(task_id, timeout=60) == "unknown"
    assert vendor.calls == ["pay"]


async def test_a_call_whose_outcome_is_unknown_is_not_made_again_though_the_run_failed_of_it_and_is_resumed(app: App):
    vendor = Vendor()

    @async_task(retry_policy=NEVER_AGAIN)
    async def buy() -> str:
        return await once("pay", vendor.hold, "pay")

    worker = await app.start(buy)
    task_id = await buy.submit()
    await wait_until(lambda: vendor.calls)
    await worker.stop()
    await app.start(buy)
    for _ in range(2):
        run = await status_when(buy, task_id, ended)
        assert (run.status, run.error_type) == (TaskStatus.FAILED, "StepOutcomeUnknownError")
        await buy.resume(task_id)
    await status_when(buy, task_id, ended)
    assert vendor.calls == ["pay"]


async def test_a_call_whose_outcome_is_unknown_is_made_again_if_it_is_to_be_done_again(app: App):
    vendor = Vendor()

    @async_task(retry_policy=NEVER_AGAIN)
    async def buy() -> str:
        return await once("pay", vendor.call if vendor.calls else vendor.hold, "pay")

    worker = await app.start(buy)
    task_id = await buy.submit()
    await wait_until(lambda: vendor.calls)
    await worker.stop()
    await app.start(buy)
    await status_when(buy, task_id, ended)
    await buy.resume(task_id, redo=["pay"])
    assert await buy.result(task_id, timeout=60) == "pay"
    assert vendor.calls == ["pay", "pay"]


async def test_a_cleanup_that_is_retried_is_told_of_the_cancellation_again_and_not_of_an_unknown_outcome(app: App):
    vendor, flaky = Vendor(), Vendor(ConnectionError("not now"))

    @async_task(heartbeat_timeout=HEARTBEAT)
    async def buy() -> str:
        try:
            return await once("pay", vendor.hold, "pay")
        except asyncio.CancelledError:
            policy = RetryPolicy(max_retries=1, initial_delay=1.05, max_delay=1.05, jitter=0)
            await step.with_options(retry_policy=policy)("refund", flaky.call, "refund")
            raise

    await app.start(buy)
    task_id = await buy.submit()
    await wait_until(lambda: vendor.calls)
    await buy.cancel(task_id, "why")
    run = await status_when(buy, task_id, ended)
    assert (run.error_type, run.error) == ("TaskCancelledError", "why")
    assert flaky.calls == ["refund", "refund"]
    assert vendor.calls == ["pay"]


# When the worker is killed ----------------------------------------------------------------------------------


async def test_a_worker_that_is_killed_in_the_call_leaves_an_unknown_outcome_and_no_second_call(stories: Any):
    story = await stories["pay"]
    assert story.names == ["prepare", "pay", "unknown", "asked", "ship"]


async def test_the_body_may_ask_the_vendor_what_became_of_the_call(stories: Any):
    story = await stories["pay"]
    assert (story.run.status, story.run.result) == (TaskStatus.COMPLETED, "paid, as the vendor says")


async def test_the_error_tells_the_idempotency_key_of_the_lost_call(stories: Any):
    calls = {words[0]: words for words in (await stories["pay"]).calls}
    assert calls["unknown"][-1] == calls["pay"][-1]


async def test_a_worker_that_is_killed_before_the_call_does_not_prevent_it(stories: Any):
    story = await stories["prepare"]
    assert story.names == ["prepare", "prepare", "pay", "ship"]
    assert story.run.result == "paid"


async def test_a_worker_that_is_killed_after_the_call_does_not_lose_its_result(stories: Any):
    story = await stories["ship"]
    assert story.names == ["prepare", "pay", "ship", "ship"]
    assert story.run.result == "paid"


if __name__ == "__main__":
    work([buying(CallLog(Path(os.environ["CALLS"])), dies_in=os.environ["DIES_IN"])])
