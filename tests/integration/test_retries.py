"""How failed calls are repeated: how often, when, after which errors; and what is kept meanwhile."""

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest

from support import (
    AT_ONCE,
    BY_TIMER,
    FOR_AN_HOUR,
    NEVER_AGAIN,
    App,
    backs_off,
    ended,
    on_both,
    status_when,
    undisturbed,
    wait_until,
)
from temporal_async_task import (
    NonRetryableError,
    RetryableError,
    RetryPolicy,
    StepFailedError,
    TaskFailedError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    Verdict,
    async_task,
    current_step,
    step,
)


class VendorError(Exception):
    pass


class QuotaError(VendorError):
    pass


class Vendor:
    """An API that fails as it is told to, and then answers. It notes when it was called."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.calls: list[float] = []

    async def generate(self) -> str:
        self.calls.append(time.monotonic())
        if self.failures:
            raise self.failures.pop(0)
        return "image"

    @property
    def pauses(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.calls, self.calls[1:], strict=False)]


async def outcome(app: App, task: TemporalAsyncTask[None, Any]) -> TaskResult[Any]:
    """Run a task on a worker of its own, to its end."""
    await app.start(task)
    task_id = await task.submit()
    return await status_when(task, task_id, ended, timeout=60)


def in_a_step(vendor: Vendor, policy: RetryPolicy | None = None) -> TemporalAsyncTask[None, str]:
    async def body() -> str:
        return await step("generate", vendor.generate)

    return TemporalAsyncTask[None, str]("shoot", body, retry_policy=policy)


# How often ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 4])
async def test_a_step_is_called_once_and_then_as_often_as_the_tasks_policy_says(app: App, retries: int):
    vendor = Vendor(*[VendorError("busy")] * 10)
    run = await outcome(app, in_a_step(vendor, RetryPolicy(max_retries=retries, initial_delay=0.01, jitter=0)))
    assert len(vendor.calls) == retries + 1
    calls = "1 attempt" if retries == 0 else f"{retries + 1} attempts"
    assert run.error == f"Step 'generate' failed after {calls}: VendorError: busy"
    assert run.steps[0].attempts == retries + 1


@pytest.mark.parametrize("retries", [0, 1, 4])
async def test_a_task_without_steps_is_called_once_and_then_as_often_as_its_policy_says(app: App, retries: int):
    vendor = Vendor(*[VendorError("busy")] * 10)
    policy = RetryPolicy(max_retries=retries, initial_delay=0.01, jitter=0)
    task = TemporalAsyncTask[None, str]("generate", vendor.generate, retry_policy=policy)
    run = await outcome(app, task)
    assert len(vendor.calls) == retries + 1
    assert (run.error_type, run.error) == ("VendorError", "busy")


async def test_a_step_may_have_a_policy_of_its_own(app: App):
    stubborn, given_up = Vendor(*[VendorError()] * 5), Vendor(*[VendorError()] * 5)

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> str:
        patient = step.with_options(retry_policy=RetryPolicy(max_retries=5, initial_delay=0.01, max_delay=0.01))
        image = await patient("stubborn", stubborn.generate)
        await step.with_options(retry_policy=NEVER_AGAIN)("given-up", given_up.generate)
        return image

    run = await outcome(app, shoot)
    assert (len(stubborn.calls), len(given_up.calls)) == (6, 1)
    assert run.completed_steps == ("stubborn",)


async def test_calls_are_counted_over_the_attempts_of_the_task(app: App):
    vendor = Vendor(*[VendorError("busy")] * 10)
    run = await outcome(
        app, in_a_step(vendor, RetryPolicy(max_retries=2, initial_delay=1.01, jitter=0, max_delay=1.01))
    )
    assert len(vendor.calls) == 3
    assert (run.steps[0].attempts, run.attempt) == (3, 3)


async def test_the_code_of_a_body_is_retried_like_a_step_and_its_steps_are_not_repeated(app: App):
    vendor = Vendor()
    failures = [VendorError("not an image"), VendorError("not an image")]

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> str:
        image = await step("generate", vendor.generate)
        if failures:
            raise failures.pop()
        return image

    run = await outcome(app, shoot)
    assert (run.status, run.result) == (TaskStatus.COMPLETED, "image")
    assert len(vendor.calls) == 1


# When -----------------------------------------------------------------------------------------------------


async def has_pauses(app: App, policy: RetryPolicy, errors: list[VendorError], expected: list[float]) -> None:
    """A task that fails so often makes these pauses, and then succeeds."""
    vendor = Vendor()
    task = in_a_step(vendor, policy)
    await app.start(task)

    async def pauses() -> list[float]:
        vendor.calls, vendor.failures = [], list(errors)
        assert await task.run(timeout=60) == "image"
        return vendor.pauses

    def late(found: list[float]) -> float:
        return max(pause - due for pause, due in zip(found, expected, strict=True))

    found = await undisturbed(pauses, lambda found: late(found) < 0.25)
    assert late(found) < 0.25
    assert all(pause > due - 0.01 for pause, due in zip(found, expected, strict=True))


async def test_pauses_grow_by_the_multiplier_up_to_the_longest(app: App):
    policy = RetryPolicy(max_retries=4, initial_delay=0.1, backoff_multiplier=3, max_delay=0.5, jitter=0)
    await has_pauses(app, policy, [VendorError()] * 4, [0.1, 0.3, 0.5, 0.5])


async def test_a_pause_that_the_server_keeps_is_as_long_as_the_policy_says(app: App):
    vendor = Vendor(VendorError())
    await outcome(app, in_a_step(vendor, RetryPolicy(initial_delay=timedelta(seconds=1.5), jitter=0)))
    assert 1.45 <= vendor.pauses[0] < 3


async def test_an_error_may_set_the_pause(app: App):
    errors = [RetryableError("busy", retry_after=0.4), RetryableError(retry_after=timedelta(seconds=0.2))]
    await has_pauses(app, RetryPolicy(initial_delay=30, jitter=0), errors, [0.4, 0.2])


async def test_the_retry_after_of_an_http_answer_sets_the_pause(app: App):
    calls = []

    def api(_: httpx.Request) -> httpx.Response:
        calls.append(time.monotonic())
        return httpx.Response(200) if len(calls) > 1 else httpx.Response(503, headers={"Retry-After": "1"})

    async def upload() -> int:
        async with httpx.AsyncClient(transport=httpx.MockTransport(api)) as client:
            return (await client.put("https://bucket.example/image")).raise_for_status().status_code

    @async_task(retry_policy=RetryPolicy(initial_delay=30, jitter=0))
    async def shoot() -> int:
        return await step("upload", upload)

    run = await outcome(app, shoot)
    assert run.result == 200
    assert 0.95 <= calls[1] - calls[0] < 3


async def test_a_run_in_backoff_goes_on_at_its_time_with_another_worker(app: App):
    vendor = Vendor(VendorError("busy"), VendorError("busy"))
    task = in_a_step(vendor, RetryPolicy(max_retries=2, initial_delay=1.2, max_delay=1.2, jitter=0))
    first = await app.start(task)
    task_id = await task.submit()
    await status_when(task, task_id, backs_off)
    await first.stop()
    await app.start(task)
    assert await task.result(task_id) == "image"
    assert all(1.15 <= pause < 3 for pause in vendor.pauses)
    assert len(vendor.calls) == 3


# After which errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["step", "body"])
@pytest.mark.parametrize(
    ("error", "policy"),
    [
        (NonRetryableError("the prompt is refused"), AT_ONCE),
        (QuotaError("by type"), RetryPolicy(initial_delay=0.01, non_retryable=(VendorError,))),
        (QuotaError("by name"), RetryPolicy(initial_delay=0.01, non_retryable=("VendorError",))),
        (QuotaError("by verdict"), RetryPolicy(initial_delay=0.01, classify=lambda _: Verdict(retry=False))),
        (TypeError("generate() got an unexpected keyword argument"), AT_ONCE),
        (AttributeError("'NoneType' object has no attribute 'url'"), AT_ONCE),
        (NameError("name 'promt' is not defined"), AT_ONCE),
        (ImportError("No module named 'vendor'"), AT_ONCE),
        (NotImplementedError("later"), AT_ONCE),
        (AssertionError("never"), AT_ONCE),
        (httpx.HTTPStatusError("404", request=httpx.Request("GET", "http://x"), response=httpx.Response(404)), AT_ONCE),
    ],
    ids=lambda value: type(value).__name__ + ("" if isinstance(value, RetryPolicy) else f" {value}"),
)
async def test_an_error_that_another_try_cannot_mend_is_final(
    app: App, error: BaseException, policy: RetryPolicy, where: str
):
    vendor = Vendor(error)
    task = in_a_step(vendor, policy)
    if where == "body":
        task = TemporalAsyncTask[None, str]("shoot", vendor.generate, retry_policy=policy)
    run = await outcome(app, task)
    assert run.status is TaskStatus.FAILED
    assert len(vendor.calls) == 1
    assert str(run.error).endswith(str(error))


@pytest.mark.parametrize(
    ("error", "policy"),
    [
        (VendorError("unknown kind"), AT_ONCE),
        (ConnectionResetError("network"), AT_ONCE),
        (TimeoutError("slow"), AT_ONCE),
        (ValueError("not JSON"), AT_ONCE),
        (RetryableError("asked for", retry_after=0.01), RetryPolicy(initial_delay=0.01, non_retryable=(VendorError,))),
        (httpx.HTTPStatusError("429", request=httpx.Request("GET", "http://x"), response=httpx.Response(429)), AT_ONCE),
        (TypeError("by verdict"), RetryPolicy(initial_delay=0.01, classify=lambda _: Verdict(retry=True, delay=0))),
    ],
    ids=lambda value: type(value).__name__ + ("" if isinstance(value, RetryPolicy) else f" {value}"),
)
async def test_an_error_that_another_try_may_mend_is_retried(app: App, error: BaseException, policy: RetryPolicy):
    vendor = Vendor(error)
    run = await outcome(app, in_a_step(vendor, policy))
    assert (run.result, len(vendor.calls)) == ("image", 2)


async def test_a_retryable_error_is_retried_as_often_as_the_policy_says_and_no_more(app: App):
    vendor = Vendor(*[RetryableError("busy", retry_after=0)] * 10)
    run = await outcome(app, in_a_step(vendor, AT_ONCE))
    assert run.status is TaskStatus.FAILED
    assert len(vendor.calls) == 4


async def test_a_step_that_takes_too_long_is_a_failed_call_and_is_retried(app: App):
    calls = []

    async def hang_once() -> str:
        calls.append(current_step().attempt)
        if len(calls) == 1:
            await asyncio.Event().wait()
        return "image"

    @async_task(step_timeout=0.2, retry_policy=AT_ONCE)
    async def shoot() -> str:
        return await step("generate", hang_once)

    run = await outcome(app, shoot)
    assert run.result == "image"
    assert calls == [1, 2]


async def test_a_step_that_always_takes_too_long_fails_with_its_timeout(app: App):
    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> None:
        await step.with_options(timeout=timedelta(seconds=0.1))("generate", asyncio.sleep, 60)

    run = await outcome(app, shoot)
    assert (
        run.error
        == "Step 'generate' failed after 1 attempt: TimeoutError: no answer within the step's timeout of 0.1 s"
    )


async def test_a_task_without_steps_that_takes_too_long_fails_with_its_timeout(app: App):
    @async_task(retry_policy=NEVER_AGAIN, step_timeout=0.1)
    async def shoot() -> None:
        await asyncio.sleep(60)

    run = await outcome(app, shoot)
    assert (run.error_type, run.error) == ("TimeoutError", "no result within the step's timeout of 0.1 s")


# The failure of a step, in the body -----------------------------------------------------------------------


async def test_the_failure_of_a_step_is_raised_in_the_body_which_may_compensate(app: App):
    raised: list[StepFailedError] = []
    refunds = []

    async def refund(order: str) -> str:
        refunds.append(order)
        return f"{order} refunded"

    vendor = Vendor(*[VendorError("sold out")] * 10)

    @async_task(retry_policy=AT_ONCE)
    async def buy() -> str:
        try:
            return await step("pay", vendor.generate)
        except StepFailedError as error:
            raised.append(error)
            return await step("refund", refund, "order-7")

    run = await outcome(app, buy)
    assert (run.status, run.result) == (TaskStatus.COMPLETED, "order-7 refunded")
    [error] = raised
    assert (error.key, error.attempts, error.error_type, error.message) == ("pay", 4, "VendorError", "sold out")
    assert isinstance(error.__cause__, VendorError)
    assert refunds == ["order-7"]


async def test_a_failed_step_stays_failed_in_later_attempts_and_is_not_called_again(app: App):
    vendor, flaky = Vendor(*[VendorError("sold out")] * 10), Vendor(VendorError("busy"))

    @async_task(retry_policy=NEVER_AGAIN)
    async def buy() -> str:
        try:
            await step("pay", vendor.generate)
        except StepFailedError as error:
            await step.with_options(retry_policy=BY_TIMER)("refund", flaky.generate)
            return f"{error.error_type}: {error.message}"
        return "paid"

    run = await outcome(app, buy)
    assert (run.result, run.attempt) == ("VendorError: sold out", 2)
    assert len(vendor.calls) == 1


async def test_the_failure_of_a_step_that_is_not_caught_fails_the_task_without_another_try_of_its_body(app: App):
    bodies = []
    vendor = Vendor(*[VendorError("sold out")] * 10)

    @async_task(retry_policy=AT_ONCE)
    async def buy() -> str:
        bodies.append(1)
        return await step("pay", vendor.generate)

    run = await outcome(app, buy)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "StepFailedError")
    assert (len(bodies), len(vendor.calls)) == (1, 4)
    with pytest.raises(
        TaskFailedError, match="StepFailedError: Step 'pay' failed after 4 attempts: VendorError: sold out"
    ):
        await buy.result(run.task_id)


# Siblings -------------------------------------------------------------------------------------------------


async def by_gather(*calls: Callable[[], Any]) -> list[Any]:
    return await asyncio.gather(*(step(f"step-{number}", call) for number, call in enumerate(calls)))


async def by_task_group(*calls: Callable[[], Any]) -> list[Any]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(step(f"step-{number}", call)) for number, call in enumerate(calls)]
    return [task.result() for task in tasks]


both_ways = pytest.mark.parametrize("together", [by_gather, by_task_group])


@both_ways
async def test_a_step_that_backs_off_does_not_lose_the_result_of_its_sibling(app: App, together: Any):
    flaky, sound = Vendor(VendorError("busy")), Vendor()

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> list[str]:
        return await together(flaky.generate, sound.generate)

    run = await outcome(app, shoot)
    assert run.result == ["image", "image"]
    assert (len(flaky.calls), len(sound.calls), run.attempt) == (2, 1, 2)


@both_ways
async def test_a_sibling_that_still_works_is_waited_for_while_another_step_backs_off(app: App, together: Any):
    calls = []

    async def slow() -> str:
        calls.append(1)
        await asyncio.sleep(0.5)
        return "slow"

    flaky = Vendor(VendorError("busy"))
    task = TemporalAsyncTask[None, Any]("shoot", lambda: together(flaky.generate, slow), retry_policy=FOR_AN_HOUR)
    await app.start(task)
    task_id = await task.submit()
    run = await status_when(task, task_id, backs_off)
    assert run.completed_steps == ("step-1",)
    assert len(calls) == 1


@both_ways
async def test_a_step_that_falls_due_while_its_sibling_works_is_retried_in_the_same_attempt(app: App, together: Any):
    async def slow() -> str:
        await asyncio.sleep(1.8)
        return "slow"

    flaky = Vendor(VendorError("busy"))
    task = TemporalAsyncTask[None, Any]("shoot", lambda: together(flaky.generate, slow), retry_policy=BY_TIMER)
    run = await outcome(app, task)
    assert (run.result, run.attempt) == (["image", "slow"], 1)
    assert 1.0 <= flaky.pauses[0] < 1.7


async def test_the_final_failure_of_one_step_leaves_its_gathered_siblings_at_work(app: App):
    async def slow() -> str:
        await asyncio.sleep(0.3)
        return "slow"

    broken = Vendor(VendorError("no"))

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> list[str]:
        both = await asyncio.gather(step("no", broken.generate), step("slow", slow), return_exceptions=True)
        return [str(one) for one in both]

    run = await outcome(app, shoot)
    assert run.result == ["Step 'no' failed after 1 attempt: VendorError: no", "slow"]


async def test_the_final_failure_of_a_step_in_a_task_group_fails_the_task_and_is_told(app: App):
    bodies = []
    broken = Vendor(VendorError("no"))

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> None:
        bodies.append(1)
        async with asyncio.TaskGroup() as group:
            group.create_task(step("no", broken.generate))
            group.create_task(step("slow", asyncio.sleep, 60))

    run = await outcome(app, shoot)
    assert run.status is TaskStatus.FAILED
    assert "Step 'no' failed after 1 attempt: VendorError: no" in str(run.error)
    assert len(bodies) == 1


# What the attempts have to do with the body ---------------------------------------------------------------


async def test_a_backoff_is_no_cancellation_to_the_body_and_runs_its_finally_blocks(app: App):
    seen = []
    flaky = Vendor(VendorError("busy"))

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> str:
        try:
            return await step("generate", flaky.generate)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        except Exception:
            seen.append("an error")
            raise
        finally:
            seen.append("finally")

    run = await outcome(app, shoot)
    assert run.result == "image"
    assert seen == ["finally", "finally"]


async def test_the_end_of_an_attempt_leaves_no_error_in_the_log(app: App, caplog: pytest.LogCaptureFixture):
    flaky, sound = Vendor(VendorError("busy")), Vendor()

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> list[str]:
        return await by_task_group(flaky.generate, sound.generate)

    run = await outcome(app, shoot)
    assert run.attempt == 2
    gc.collect()  # what asyncio has to say of tasks that were forgotten, it says now
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@on_both
async def test_a_run_that_fails_for_good_is_logged_once_with_what_failed(app: App, caplog: pytest.LogCaptureFixture):
    broken = Vendor(NonRetryableError("no such model"))

    @async_task
    async def shoot() -> str:
        return await step("generate", broken.generate)

    run = await outcome(app, shoot)
    [logged] = await wait_until(lambda: [record for record in caplog.records if record.levelno >= logging.WARNING])
    assert (logged.name, logged.levelname) == ("temporal_async_task", "ERROR")
    assert logged.getMessage() == f"Task run {run.task_id} of shoot has failed: StepFailedError: {run.error}"
    assert logged.exc_info is not None
