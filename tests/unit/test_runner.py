"""The engine's rules, in memory: what is called, what is not, and how an attempt ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import PayloadCodec

from temporal_async_task import (
    DuplicateStepError,
    InvalidKeyError,
    NonRetryableError,
    PayloadTooLargeError,
    Result,
    ResultError,
    RetryableError,
    RetryPolicy,
    Step,
    StepFailedError,
    StepOutcomeUnknownError,
    StepState,
    StepUsageError,
    TaskCancelledError,
    TaskTimeoutError,
    Verdict,
    WorkerLostError,
    async_task,
    current_run,
    current_step,
    poll,
    sleep,
    step,
    testing,
    wait_for,
)
from temporal_async_task.encryption import AESGCMCodec, encrypted_data_converter, generate_key
from temporal_async_task.engine.attempt import Attempt
from temporal_async_task.engine.carrier import RunSettings
from temporal_async_task.engine.journal import Journal
from temporal_async_task.engine.local import Memory
from temporal_async_task.engine.outcome import Cancelled, Completed, Failed, Outcome, Parked, Superseded
from temporal_async_task.engine.runner import Runner
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.steps import StepCall
from temporal_async_task.testing import TaskRun

STEADY = RetryPolicy(max_retries=3, initial_delay=10, max_delay=60, jitter=0)


async def one() -> int:
    return 1


async def two() -> int:
    return 2


async def three() -> int:
    return 3


@async_task(retry_policy=STEADY)
async def three_steps() -> int:
    return await step("a", one) + await step("b", two) + await step("c", three)


def outcomes(run: TaskRun[Any]) -> list[type]:
    return [type(attempt.outcome) for attempt in run.attempts]


def times_of(run: TaskRun[Any], key: str) -> list[float]:
    return [call.at for call in run.calls if call.key == key]


class TestFinishedSteps:
    def test_a_body_runs_its_steps_in_order_and_returns(self):
        run = TaskRun(three_steps)
        assert run.execute() == 6
        assert [call.key for call in run.calls] == ["a", "b", "c"]
        assert outcomes(run) == [Completed]

    def test_a_checkpoint_is_written_after_every_step(self):
        run = TaskRun(three_steps)
        run.execute()
        assert run.writes == 3

    def test_a_task_without_steps_pays_for_no_checkpoint(self):
        @async_task
        async def single() -> int:
            return 5

        run = TaskRun(single)
        assert run.execute() == 5
        assert run.writes == 0

    def test_a_step_whose_result_was_saved_is_not_called_again_when_the_worker_is_lost(self):
        run = TaskRun(three_steps)
        run.on("b").loses_worker(when="saved")
        assert run.execute() == 6
        assert [call.key for call in run.calls] == ["a", "b", "c"]
        assert outcomes(run) == [Superseded, Completed]

    def test_a_step_whose_result_was_not_saved_is_called_once_more(self):
        run = TaskRun(three_steps)
        run.on("b").loses_worker(when="after")
        assert run.execute() == 6
        assert [call.key for call in run.calls] == ["a", "b", "b", "c"]

    def test_the_body_does_not_go_on_before_its_checkpoint_is_acknowledged(self):
        went_on: list[str] = []

        @async_task
        async def task() -> None:
            await step("a", one)
            went_on.append("past a")

        run = TaskRun(task)
        run.on("a").loses_worker(when="saved")
        run.execute()
        assert went_on == ["past a"]  # in the second attempt only

    def test_a_step_returns_on_the_first_run_what_it_returns_after_a_resume(self):
        @dataclass
        class Job:
            url: str

        def untyped():  # no annotation: what comes back is plain JSON, at once and not only after a crash
            return Job("u")

        def typed() -> Job:
            return Job("u")

        @async_task
        async def task() -> list[str]:
            return [type(await step("untyped", untyped)).__name__, type(await step("typed", typed)).__name__]

        assert TaskRun(task).execute() == ["dict", "Job"]

    def test_a_tuple_comes_back_as_its_annotation_says(self):
        def pair() -> tuple[int, str]:
            return 1, "x"

        @async_task
        async def task() -> bool:
            return await step("pair", pair) == (1, "x")

        assert TaskRun(task).execute() is True


class TestCodeThatChanges:
    """Steps are found by key, so code may change between two attempts."""

    @staticmethod
    def deployed(before: list[str], after: list[str], lost_at: str) -> TaskRun[Any]:
        plans = [before, after]

        @async_task
        async def task() -> dict[str, str]:
            plan = plans.pop(0) if len(plans) > 1 else plans[0]
            return {key: await step(key, str.upper, key) for key in plan}

        run = TaskRun(task)
        run.on(lost_at).loses_worker()
        return run

    def test_an_inserted_step_is_called_and_finished_ones_are_not(self):
        run = self.deployed(["a", "b", "c"], ["a", "new", "b", "c"], "c")
        assert run.execute() == {"a": "A", "new": "NEW", "b": "B", "c": "C"}
        assert [call.key for call in run.calls] == ["a", "b", "c", "new", "c"]

    def test_a_removed_step_is_left_alone(self):
        run = self.deployed(["a", "b", "c"], ["a", "c"], "c")
        assert run.execute() == {"a": "A", "c": "C"}
        assert run.calls_of("b") == 1

    def test_reordered_steps_keep_their_own_results(self):
        run = self.deployed(["a", "b", "c"], ["b", "a", "c"], "c")
        assert run.execute() == {"b": "B", "a": "A", "c": "C"}
        assert (run.calls_of("a"), run.calls_of("b")) == (1, 1)

    def test_a_renamed_step_is_a_new_one(self):
        run = self.deployed(["a", "b"], ["renamed", "b"], "b")
        assert run.execute() == {"renamed": "RENAMED", "b": "B"}


class TestRetries:
    def test_a_failing_step_is_called_as_often_as_its_policy_says(self):
        run = TaskRun(three_steps)
        run.on("b").raises(OSError("down"), times=99)
        with pytest.raises(StepFailedError, match="'b' failed after 4 attempts: OSError: down"):
            run.execute()
        assert run.calls_of("b") == 4
        assert run.calls_of("a") == 1

    def test_delays_are_the_policys_and_are_spent_outside_of_the_worker(self):
        run = TaskRun(three_steps)
        run.on("b").raises(OSError("down"), times=3)
        assert run.execute() == 6
        assert [call.at for call in run.calls if call.key == "b"] == [0, 10, 30, 70]
        assert all(attempt.ended == attempt.began for attempt in run.attempts)

    def test_a_steps_own_policy_overrides_the_tasks(self):
        @async_task(retry_policy=STEADY)
        async def task() -> int:
            return await step.with_options(retry_policy=RetryPolicy(max_retries=0))("a", one)

        run = TaskRun(task)
        run.on("a").raises(OSError("down"), times=9)
        with pytest.raises(StepFailedError):
            run.execute()
        assert run.calls_of("a") == 1

    def test_retry_after_is_the_delay(self):
        run = TaskRun(three_steps)
        run.on("a").raises(RetryableError("busy", retry_after=timedelta(minutes=10)))
        run.execute()
        waited = [call.at for call in run.calls if call.key == "a"][1]
        assert 600 <= waited <= 660

    def test_an_error_that_cannot_get_better_is_not_retried(self):
        run = TaskRun(three_steps)
        run.on("a").raises(NonRetryableError("no such model"), times=9)
        with pytest.raises(StepFailedError, match="no such model"):
            run.execute()
        assert run.calls_of("a") == 1

    def test_a_programming_error_is_not_retried(self):
        run = TaskRun(three_steps)
        run.on("a").raises(AttributeError("'NoneType' has no attribute 'url'"), times=9)
        with pytest.raises(StepFailedError, match="AttributeError"):
            run.execute()
        assert run.calls_of("a") == 1

    def test_lost_workers_do_not_use_up_a_steps_retries(self):
        run = TaskRun(three_steps)
        run.on("b").loses_worker(6).raises(OSError("down"), times=3)
        assert run.execute() == 6
        assert run.calls_of("b") == 6 + 3 + 1

    def test_the_count_of_failures_survives_lost_workers(self):
        run = TaskRun(three_steps)
        script = run.on("b").raises(OSError("down"), times=99)
        script.loses_worker(2)
        with pytest.raises(StepFailedError, match="after 4 attempts"):
            run.execute()
        assert run.calls_of("b") == 2 + 4

    def test_a_short_backoff_is_spent_in_place(self):
        @async_task(retry_policy=RetryPolicy(initial_delay=0.2, jitter=0))
        async def task() -> int:
            return await step("a", one)

        run = TaskRun(task)
        run.on("a").raises(OSError("down"), times=2)
        assert run.execute() == 1
        assert outcomes(run) == [Completed]

    def test_a_step_times_out_and_is_retried(self):
        @async_task(retry_policy=STEADY, step_timeout=30)
        async def task() -> int:
            return await step("a", one)

        run = TaskRun(task)
        run.on("a").takes(31)
        with pytest.raises(StepFailedError, match="no answer within the step's timeout of 30"):
            run.execute()
        assert run.calls_of("a") == 4

    def test_the_body_gets_the_original_error_as_the_cause(self):
        seen: list[BaseException | None] = []

        @async_task
        async def task() -> str:
            try:
                await step.with_options(retry_policy=RetryPolicy(max_retries=0))("charge", one)
            except StepFailedError as error:
                seen.append(error.__cause__)
                return await step("refund", str, "refunded")
            return "charged"

        run = TaskRun(task)
        failure = OSError("declined")
        run.on("charge").raises(failure)
        assert run.execute() == "refunded"
        assert seen == [failure]

    def test_a_failed_step_stays_failed_in_later_attempts(self):
        @async_task
        async def task() -> str:
            try:
                await step.with_options(retry_policy=RetryPolicy(max_retries=0))("charge", one)
            except StepFailedError as error:
                return await step("refund", str, f"refunded {error.error_type}")
            return "charged"

        run = TaskRun(task)
        run.on("charge").raises(OSError("declined"))  # a second call would succeed
        run.on("refund").loses_worker()
        assert run.execute() == "refunded OSError"
        assert run.calls_of("charge") == 1

    def test_an_error_of_the_body_is_retried_like_a_step_and_runs_no_finished_step_again(self):
        failures = [OSError("between steps"), OSError("between steps")]

        @async_task(retry_policy=STEADY)
        async def task() -> int:
            value = await step("a", one)
            if failures:
                raise failures.pop()
            return value

        run = TaskRun(task)
        assert run.execute() == 1
        assert run.calls_of("a") == 1
        assert run.elapsed == 30

    def test_a_body_that_was_run_again_in_place_may_be_parked(self):
        failures = [RetryableError("between steps", retry_after=0.2)]
        left: list[int] = []

        @async_task(retry_policy=STEADY)
        async def task() -> int:
            await step("a", one)
            if failures:
                raise failures.pop()
            try:
                await sleep("nap", 600)
            finally:
                left.append(1)
            return await step("b", two)

        run = TaskRun(task)
        assert run.execute() == 2
        assert outcomes(run) == [Parked, Completed]
        assert len(left) == 2  # unwound, and then left by itself

    def test_a_body_that_was_run_again_in_place_may_be_interrupted(self):
        failures = [RetryableError("between steps", retry_after=0.2)]

        @async_task(retry_policy=STEADY)
        async def task() -> int:
            if failures:
                raise failures.pop()
            return await step("a", one)

        run = TaskRun(task)
        run.on("a").takes(10)
        run.interrupt(at=5)
        assert run.execute() == 1
        assert outcomes(run) == [Parked, Completed]

    def test_a_body_out_of_retries_fails_with_its_own_error(self):
        @async_task(retry_policy=STEADY)
        async def task() -> None:
            raise OSError("always")

        run = TaskRun(task)
        with pytest.raises(OSError, match="always"):
            run.execute()
        assert len(run.attempts) == 4


class TestLog:
    @pytest.fixture(autouse=True)
    def log(self, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
        caplog.set_level(logging.INFO, "temporal_async_task")
        return caplog

    @staticmethod
    def by_text(error: BaseException) -> Verdict:
        if "maintenance" in str(error):
            return Verdict(retry=True, delay=600, reason="the vendor's maintenance")
        return Verdict(retry=False, reason=f"the vendor's last word: {error}")

    def test_it_tells_of_a_call_that_failed_what_comes_of_it_and_why(self, log: pytest.LogCaptureFixture):
        @async_task(retry_policy=RetryPolicy(jitter=0, classify=self.by_text))
        async def task() -> int:
            return await step("order", one)

        run = TaskRun(task)
        run.on("order").raises(ValueError("down for maintenance")).raises(ValueError("refused"))
        with pytest.raises(StepFailedError, match="refused"):
            run.execute()
        assert log.messages == [
            (
                "Task run test-run: step 'order' failed (ValueError: down for maintenance; the vendor's maintenance), "
                "to be called again in 600.0 s"
            ),
            (
                "Task run test-run: step 'order' failed (ValueError: refused; the vendor's last word: refused), "
                "not to be called again"
            ),
        ]

    def test_it_tells_of_a_body_that_failed_the_same(self, log: pytest.LogCaptureFixture):
        @async_task(retry_policy=RetryPolicy(max_retries=1, initial_delay=10, jitter=0))
        async def task() -> None:
            raise OSError("down")

        with pytest.raises(OSError, match="down"):
            TaskRun(task).execute()
        assert log.messages == [
            "Task run test-run: task 'task' failed (OSError: down; may be temporary), to be called again in 10.0 s",
            "Task run test-run: task 'task' failed (OSError: down; out of retries), not to be called again",
        ]

    def test_it_tells_that_a_call_is_made_at_most_once(self, log: pytest.LogCaptureFixture):
        @async_task
        async def task() -> int:
            return await step.with_options(at_most_once=True)("charge", one)

        run = TaskRun(task)
        run.on("charge").raises(OSError("down"))
        with pytest.raises(StepFailedError, match="down"):
            run.execute()
        assert log.messages == [
            "Task run test-run: step 'charge' failed (OSError: down; at most once), not to be called again"
        ]

    def test_it_does_not_tell_what_errors_and_verdicts_say_where_values_are_encrypted(
        self, log: pytest.LogCaptureFixture
    ):
        @async_task(retry_policy=RetryPolicy(jitter=0, classify=self.by_text))
        async def task() -> int:
            return await step("order", one)

        run = TaskRun(task, data_converter=encrypted_data_converter(AESGCMCodec({"key": generate_key()})))
        run.on("order").raises(ValueError("no credit for Ada"))
        with pytest.raises(StepFailedError, match="Ada"):
            run.execute()
        assert log.messages == ["Task run test-run: step 'order' failed (ValueError), not to be called again"]


class TestLostWorkers:
    def test_a_step_that_takes_its_worker_down_fails_in_the_end(self):
        @async_task
        async def task() -> str:
            try:
                return str(await step("segfault", one))
            except WorkerLostError as error:
                return f"gave up on {error.key}"

        run = TaskRun(task)
        run.on("segfault").takes(5).loses_worker(99)
        assert run.execute() == "gave up on segfault"
        assert run.calls_of("segfault") == 10

    def test_a_body_that_takes_its_worker_down_at_once_fails_in_the_end(self):
        run = TaskRun(three_steps)
        run.on("b").loses_worker(99)  # before anything tells which step it was
        with pytest.raises(WorkerLostError, match="Step 'three_steps' failed: WorkerLostError: its worker was lost"):
            run.execute()
        assert run.calls_of("b") == 10
        assert run.calls_of("a") == 1

    def test_progress_between_losses_keeps_a_run_alive(self):
        @async_task
        async def task() -> int:
            return sum([await step(f"s{n}", one) for n in range(30)])

        run = TaskRun(task)
        for n in range(30):
            run.on(f"s{n}").loses_worker()
        assert run.execute() == 30


class TestParallelSteps:
    def test_gathered_steps_overlap(self):
        @async_task
        async def task() -> list[int]:
            return list(await asyncio.gather(step("a", one), step("b", two)))

        run = TaskRun(task)
        run.on("a").takes(100)
        run.on("b").takes(100)
        assert run.execute() == [1, 2]
        assert run.elapsed == 100

    def test_a_step_in_flight_finishes_before_the_attempt_of_its_failed_sibling_ends(self):
        @async_task(retry_policy=STEADY)
        async def task() -> list[int]:
            return list(await asyncio.gather(step("a", one), step("b", two)))

        run = TaskRun(task)
        run.on("a").raises(RetryableError("busy", retry_after=1000))
        run.on("b").takes(50)
        assert run.execute() == [1, 2]
        assert run.calls_of("b") == 1
        assert outcomes(run) == [Parked, Completed]
        assert run.attempts[0].ended == 50

    def test_a_parked_step_that_falls_due_while_its_sibling_runs_is_retried_in_place(self):
        @async_task(retry_policy=STEADY)
        async def task() -> list[int]:
            return list(await asyncio.gather(step("a", one), step("b", two)))

        run = TaskRun(task)
        run.on("a").raises(OSError("down"), times=2)
        run.on("b").takes(100)
        assert run.execute() == [1, 2]
        assert outcomes(run) == [Completed]
        assert [call.at for call in run.calls if call.key == "a"] == [0, 10, 30]

    def test_a_sibling_goes_on_to_further_steps_while_one_is_parked(self):
        async def chain() -> int:
            return sum([await step(f"chain-{n}", one) for n in range(5)])

        @async_task(retry_policy=STEADY)
        async def task() -> int:
            async with asyncio.TaskGroup() as group:
                slow = group.create_task(step("slow", two))
                chained = group.create_task(chain())
            return slow.result() + chained.result()

        run = TaskRun(task)
        run.on("slow").raises(RetryableError("busy", retry_after=1000))
        for n in range(5):
            run.on(f"chain-{n}").takes(10)
        assert run.execute() == 7
        assert outcomes(run) == [Parked, Completed]
        assert run.attempts[0].ended == 50
        assert all(run.calls_of(f"chain-{n}") == 1 for n in range(5))

    def test_as_completed_and_a_bounded_fan_out_of_500_steps(self):
        @async_task
        async def task() -> int:
            limit = asyncio.Semaphore(20)

            async def bounded(n: int) -> int:
                async with limit:
                    return await step(f"s{n}", one)

            total = 0
            for done in asyncio.as_completed([bounded(n) for n in range(500)]):
                total += await done
            return total

        run = TaskRun(task)
        for n in range(0, 500, 50):
            run.on(f"s{n}").raises(OSError("down"))
        assert run.execute() == 500
        assert len(run.calls) == 510

    def test_a_plain_await_in_the_body_does_not_keep_an_attempt_alive(self):
        @async_task(retry_policy=STEADY)
        async def task() -> int:
            async def dawdle() -> int:
                await asyncio.sleep(500)
                return 1

            return sum(await asyncio.gather(step("a", one), dawdle()))

        run = TaskRun(task)
        run.on("a").raises(OSError("down"))
        assert run.execute() == 2
        assert run.attempts[0].ended == 0

    def test_a_failure_of_one_step_for_good_leaves_its_siblings_result(self):
        @async_task
        async def task() -> list[Any]:
            return [
                str(result) if isinstance(result, BaseException) else result
                for result in await asyncio.gather(step("a", one), step("b", two), return_exceptions=True)
            ]

        run = TaskRun(task)
        run.on("a").raises(NonRetryableError("no"))
        assert run.execute() == ["Step 'a' failed after 1 attempt: NonRetryableError: no", 2]


class TestResultsBesideBlockingCode:
    async def test_a_call_that_ended_in_time_is_no_timeout_though_it_is_seen_late(self):
        calls = []

        def quick() -> str:
            calls.append("quick")
            time.sleep(0.1)
            return "paid"

        async def block() -> None:
            await asyncio.sleep(0.05)
            time.sleep(0.6)  # noqa: ASYNC251 - it is the point

        @async_task(retry_policy=RetryPolicy(max_retries=3, initial_delay=0))
        async def task() -> str:
            paid, _ = await asyncio.gather(
                step.with_options(timeout=0.3)("quick", quick),
                step("block", block),
            )
            return paid

        assert await task() == "paid"
        assert calls == ["quick"]

    async def test_a_result_that_does_not_serialise_fails_its_sync_step_for_good(self):
        calls = []

        def unfit() -> object:
            calls.append("unfit")
            return object()

        @async_task
        async def task() -> None:
            await step("unfit", unfit)

        with pytest.raises(ResultError, match="Step 'unfit'"):
            await task()
        assert calls == ["unfit"]


class TestUnwinding:
    def test_a_body_is_not_told_of_a_cancellation_when_its_attempt_ends(self):
        told: list[str] = []

        @async_task(retry_policy=STEADY)
        async def task() -> int:
            try:
                async with asyncio.TaskGroup() as group:
                    one_ = group.create_task(step("a", one))
                    group.create_task(asyncio.sleep(3))
                return one_.result()
            except asyncio.CancelledError:
                told.append("cancelled")
                raise
            except Exception:
                told.append("an exception")
                raise
            finally:
                told.append("finally")

        run = TaskRun(task)
        run.on("a").raises(OSError("down"))
        assert run.execute() == 1
        assert told == ["finally", "finally"]

    def test_a_body_that_swallows_everything_gets_no_further_step(self):
        asked: list[str] = []

        @async_task(retry_policy=STEADY)
        async def task() -> str:
            try:
                await step("a", one)
            except BaseException as error:
                asked.append(type(error).__name__)
                try:
                    await step("sneaky", two)
                except BaseException as again:
                    asked.append(type(again).__name__)
            return "done"

        run = TaskRun(task)
        run.on("a").raises(OSError("down"))
        assert run.execute() == "done"
        assert asked == ["Unwind", "Unwind"]
        assert run.calls_of("sneaky") == 0

    def test_code_that_never_stops_is_left_behind(self, caplog: pytest.LogCaptureFixture):
        @async_task(retry_policy=STEADY)
        async def task() -> int:
            async def cling() -> None:
                while asyncio.get_running_loop().time() < 100:
                    try:
                        await asyncio.sleep(1000)
                    except BaseException:  # noqa: S112
                        continue

            clinging = asyncio.create_task(cling())
            try:
                return await step("a", one)
            finally:
                del clinging

        run = TaskRun(task)
        run.on("a").raises(OSError("down"))
        with pytest.raises(RuntimeError, match="has not ended"):
            run.execute(max_attempts=1)
        assert "swallows every request to stop" in caplog.text

    def test_a_task_that_calls_sys_exit_does_not_end_its_worker(self):
        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> None:
            raise SystemExit(3)

        with pytest.raises(RuntimeError, match="SystemExit"):
            TaskRun(task).execute()


class TestShutdown:
    def test_a_draining_worker_finishes_the_step_in_flight_and_begins_no_other(self):
        run = TaskRun(three_steps)
        run.on("a").takes(10)
        run.drain(at=5)
        assert run.execute() == 6
        assert outcomes(run) == [Parked, Completed]
        assert run.attempts[0].ended == 10
        assert [call.key for call in run.calls] == ["a", "b", "c"]

    def test_a_worker_out_of_grace_gives_the_attempt_back_and_the_call_is_made_again(self):
        run = TaskRun(three_steps)
        run.on("a").takes(10)
        run.interrupt(at=5)
        assert run.execute() == 6
        assert run.attempts[0].ended == 5
        assert [call.key for call in run.calls] == ["a", "a", "b", "c"]

    def test_handovers_count_as_nothing(self):
        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> int:
            return await step("a", one)

        run = TaskRun(task)
        run.on("a").takes(10)
        for n in range(20):
            run.interrupt(at=5 + 5 * n)
        assert run.execute() == 1
        assert run.calls_of("a") == 21

    def test_a_body_without_steps_may_finish_within_the_grace(self):
        @async_task
        async def single() -> str:
            await asyncio.sleep(10)
            return "done"

        run = TaskRun(single)
        run.drain(at=5)
        assert run.execute() == "done"
        assert outcomes(run) == [Completed]

    def test_draining_does_not_shorten_a_backoff(self):
        run = TaskRun(three_steps)
        run.on("a").raises(RetryableError("busy", retry_after=500))
        run.drain(at=0)
        run.execute()
        assert [call.at for call in run.calls if call.key == "a"][1] >= 500


class TestDeadline:
    def test_a_backoff_past_the_deadline_fails_the_task_at_once_and_names_the_step(self):
        @async_task(retry_policy=STEADY, timeout=20)
        async def task() -> int:
            return await step("a", one) + await step("b", two)

        run = TaskRun(task)
        run.on("b").raises(RetryableError("busy", retry_after=30))
        with pytest.raises(TaskTimeoutError, match=r"within its timeout of 20\.0 s; it was in step 'b'"):
            run.execute()
        assert run.elapsed == 0
        assert [record.key for record in run.journal.done()] == ["a"]

    def test_a_call_that_runs_past_the_deadline_is_left(self):
        @async_task(timeout=20)
        async def task() -> int:
            return await step("a", one)

        run = TaskRun(task)
        run.on("a").takes(100)
        with pytest.raises(TaskTimeoutError, match="in step 'a'"):
            run.execute()
        assert run.elapsed == 20

    def test_an_attempt_that_begins_after_the_deadline_calls_nothing(self):
        @async_task(timeout=20)
        async def task() -> int:
            return await step("a", one) + await step("b", two)

        run = TaskRun(task, lost_after=30)
        run.on("a").loses_worker(when="saved")
        with pytest.raises(TaskTimeoutError):
            run.execute()
        assert run.elapsed == 30
        assert [call.key for call in run.calls] == ["a"]

    @pytest.mark.parametrize("waits", [True, False], ids=["waiting", "in a call"])
    def test_the_cleanup_of_a_cancelled_run_goes_on_after_the_deadline(self, waits: bool):
        @async_task(retry_policy=STEADY, timeout=100)
        async def task() -> None:
            try:
                await (sleep("nap", 99) if waits else step("render", one))
            except asyncio.CancelledError:
                await step("refund", two)
                raise

        run = TaskRun(task)
        run.on("render").takes(1000)
        run.on("refund").raises(RetryableError("busy", retry_after=10))
        run.cancel(at=95)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert times_of(run, "refund") == [95, 105]
        assert [record.key for record in run.journal.done()] == ["refund"]

    def test_a_run_that_was_cancelled_in_time_is_cleaned_up_by_a_worker_that_comes_after_the_deadline(self):
        @async_task(timeout=100)
        async def task() -> None:
            try:
                await step("render", one)
            except asyncio.CancelledError:
                await step("refund", two)
                raise

        run = TaskRun(task)
        run.on("render").takes(1000)
        run.on("refund").loses_worker()
        run.cancel(at=95)  # the loss is noticed at 110
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert times_of(run, "refund") == [95, 110]


class TestCancellation:
    def test_the_body_gets_a_cancelled_error_where_it_awaits_and_may_clean_up_with_steps(self):
        @async_task
        async def task() -> int:
            await step("reserve", one)
            try:
                return await step("render", two)
            except asyncio.CancelledError:
                await step("release", three)
                raise

        run = TaskRun(task)
        run.on("render").takes(100)
        run.cancel(at=10, reason="the customer left")
        with pytest.raises(TaskCancelledError, match="the customer left"):
            run.execute()
        assert [call.key for call in run.calls] == ["reserve", "render", "release"]
        assert run.elapsed == 10
        assert {record.key for record in run.journal.done()} == {"reserve", "release"}

    def test_a_cancellation_in_a_backoff_runs_the_cleanup_in_a_new_attempt_and_no_finished_step(self):
        @async_task(retry_policy=STEADY)
        async def task() -> int:
            await step("reserve", one)
            try:
                return await step("render", two)
            except asyncio.CancelledError:
                await step("release", three)
                raise

        run = TaskRun(task)
        run.on("render").raises(RetryableError("busy", retry_after=1000))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["reserve", "render", "release"]
        assert run.elapsed == 10

    def test_a_cleanup_step_that_fails_is_retried(self):
        @async_task(retry_policy=STEADY)
        async def task() -> int:
            try:
                return await step("render", two)
            except asyncio.CancelledError:
                await step("release", three)
                raise

        run = TaskRun(task)
        run.on("render").takes(100)
        run.on("release").raises(OSError("down"), times=2)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["render", "release", "release", "release"]

    def test_cleanup_survives_a_lost_worker(self):
        @async_task
        async def task() -> int:
            try:
                return await step("render", two)
            except asyncio.CancelledError:
                await step("release", three)
                await step("notify", one)
                raise

        run = TaskRun(task)
        run.on("render").takes(100)
        run.on("notify").loses_worker()
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["render", "release", "notify", "notify"]

    def test_a_cancellation_that_comes_just_before_the_body_begins_does_not_keep_it_from_its_cleanup(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        @async_task(retry_policy=STEADY)
        async def task() -> None:
            try:
                await step("a", one)
                await step("b", two)
            except asyncio.CancelledError:
                await step("cleanup", three)
                raise

        run_body = Attempt._run_body

        async def run_body_cancelled(self: Attempt, body: Any) -> Any:
            if self.settings.attempt == 2:
                asyncio.get_running_loop().call_soon(self.cancel, "enough")
            return await run_body(self, body)

        monkeypatch.setattr(Attempt, "_run_body", run_body_cancelled)
        run = TaskRun(task)
        run.on("b").raises(OSError("down"))
        with pytest.raises(TaskCancelledError, match="enough"):
            run.execute()
        assert [call.key for call in run.calls] == ["a", "b", "cleanup"]

    def test_gathered_steps_are_all_cancelled(self):
        @async_task
        async def task() -> None:
            await asyncio.gather(step("a", one), step("b", two))

        run = TaskRun(task)
        run.on("a").takes(100)
        run.on("b").raises(RetryableError("busy", retry_after=50))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.elapsed == 10

    @staticmethod
    async def scene(n: int) -> None:
        """Renders, and releases what a cancelled rendering has reserved."""
        try:
            await step(f"render-{n}", one)
        except asyncio.CancelledError:
            await step(f"release-{n}", two)
            raise

    @pytest.mark.parametrize("how", ["gather", "group", "nested groups", "wait", "as completed"])
    def test_every_parallel_branch_of_a_waiting_run_is_told_and_cleans_up(self, how: str):
        async def scenes() -> None:
            match how:
                case "gather":
                    await asyncio.gather(self.scene(1), self.scene(2))
                case "group":
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self.scene(1))
                        group.create_task(self.scene(2))
                case "nested groups":
                    async with asyncio.TaskGroup() as outer:
                        outer.create_task(self.scene(1))
                        async with asyncio.TaskGroup() as inner:
                            inner.create_task(self.scene(2))
                case "wait":
                    tasks = [asyncio.create_task(self.scene(n)) for n in (1, 2)]
                    try:
                        await asyncio.wait(tasks)
                    finally:
                        await asyncio.wait(tasks)
                case _:
                    tasks = [asyncio.create_task(self.scene(n)) for n in (1, 2)]
                    try:
                        for task in asyncio.as_completed(tasks):
                            await task
                    finally:
                        await asyncio.wait(tasks)

        run = TaskRun(async_task(retry_policy=STEADY)(scenes))
        for n in (1, 2):
            run.on(f"render-{n}").raises(RetryableError("busy", retry_after=1000))
            # The second attempt at the cleanup has to tell them anew.
            run.on(f"release-{n}").raises(RetryableError("busy", retry_after=120))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert sorted((call.at, call.key) for call in run.calls) == [
            (0, "render-1"),
            (0, "render-2"),
            (10, "release-1"),
            (10, "release-2"),
            (130, "release-1"),
            (130, "release-2"),
        ]
        assert outcomes(run) == [Parked, Parked, Cancelled]

    @pytest.mark.parametrize("waits", [True, False], ids=["waiting", "in a call"])
    def test_gather_leaves_with_the_first_branch_and_the_others_clean_up_all_the_same(self, waits: bool):
        @async_task(retry_policy=STEADY)
        async def task() -> None:
            await asyncio.gather(*(self.scene(n) for n in (1, 2, 3)))

        run = TaskRun(task)
        for n in (1, 2, 3):
            if waits:
                run.on(f"render-{n}").raises(RetryableError("busy", retry_after=1000))
            else:
                run.on(f"render-{n}").takes(1000)
        run.on("release-2").takes(5)
        run.on("release-3").raises(RetryableError("busy", retry_after=120))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls if call.at == 10] == ["release-1", "release-2", "release-3"]
        assert [(call.at, call.key) for call in run.calls if call.at > 10] == [(130, "release-3")]
        assert {"release-1", "release-2", "release-3"} == {record.key for record in run.journal.done()}

    def test_a_branch_whose_cleanup_fails_does_not_end_that_of_another(self):
        @async_task(retry_policy=STEADY)
        async def task() -> None:
            await asyncio.gather(self.scene(1), self.scene(2))

        run = TaskRun(task)
        run.on("render-1").takes(100)
        run.on("render-2").takes(100)
        run.on("release-1").raises(NonRetryableError("gone"))
        run.on("release-2").takes(5)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [record.key for record in run.journal.done()] == ["release-2"]

    def test_what_is_not_told_of_the_cancellation_is_not_waited_for(self):
        @async_task
        async def task() -> None:
            other = asyncio.create_task(asyncio.sleep(1000))
            await step("render", one)
            await other

        run = TaskRun(task)
        run.on("render").takes(100)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.elapsed == 10

    def test_a_finished_step_of_one_branch_does_not_keep_the_cancellation_from_another(self):
        @async_task(retry_policy=STEADY)
        async def task() -> None:
            await asyncio.gather(self.scene(1), longer())

        async def longer() -> None:
            for n in range(20):
                await step(f"part-{n}", one)
            await self.scene(2)

        run = TaskRun(task)
        for n in (1, 2):
            run.on(f"render-{n}").raises(RetryableError("busy", retry_after=1000))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls if call.at == 10] == ["release-1", "release-2"]

    @pytest.mark.parametrize("how", ["in turn", "gather"])
    def test_a_branch_that_is_slow_to_come_to_its_open_step_is_told_there(self, how: str):
        async def slow() -> None:
            await asyncio.sleep(0.5)  # looks something up in a database, say
            await self.scene(2)

        @async_task(retry_policy=STEADY)
        async def task() -> None:
            if how == "gather":
                await asyncio.gather(self.scene(1), slow(), step("long", one))
            else:
                await slow()

        run = TaskRun(task)
        run.on("long").takes(1).raises(RetryableError("busy", retry_after=1000))
        for n in (1, 2):
            run.on(f"render-{n}").raises(RetryableError("busy", retry_after=1000))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        scenes = {1, 2} if how == "gather" else {2}
        assert {record.key for record in run.journal.done()} == {f"release-{n}" for n in scenes}

    def test_a_step_that_the_code_no_longer_has_keeps_no_cancellation_from_the_others(self):
        @async_task(retry_policy=STEADY)
        async def task() -> None:
            if current_run().attempt == 1:
                await step("removed", one)
            await self.scene(1)

        run = TaskRun(task)
        run.on("removed").raises(RetryableError("busy", retry_after=1000))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["removed", "release-1"]
        assert run.elapsed < 21

    def test_a_branch_that_waits_for_something_else_does_not_keep_the_cancellation_from_a_step(self):
        told: list[str] = []

        @async_task(retry_policy=STEADY)
        async def task() -> None:
            await asyncio.gather(self.scene(1), forever())

        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                told.append("cancelled")
                raise

        run = TaskRun(task)
        run.on("render-1").raises(RetryableError("busy", retry_after=1000))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert told == ["cancelled"]
        assert [call.key for call in run.calls] == ["render-1", "release-1"]

    def test_a_task_without_steps_is_not_called_again_to_be_cancelled(self):
        calls: list[int] = []

        @async_task(retry_policy=STEADY)
        async def single() -> None:
            calls.append(1)
            raise RetryableError("busy", retry_after=1000)

        run = TaskRun(single)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert calls == [1]

    def test_a_body_that_swallows_its_cancellation_and_returns_has_completed(self):
        @async_task
        async def task() -> str:
            try:
                await step("render", two)
            except asyncio.CancelledError:
                return "kept"
            return "rendered"

        run = TaskRun(task)
        run.on("render").takes(100)
        run.cancel(at=10)
        assert run.execute() == "kept"

    def test_cleanup_that_takes_too_long_is_left(self):
        @async_task
        async def task() -> None:
            try:
                await step("render", two)
            except asyncio.CancelledError:
                await asyncio.sleep(100_000)

        run = TaskRun(task)
        run.on("render").takes(100)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.elapsed == pytest.approx(70)
        assert outcomes(run) == [Cancelled]

    def test_a_cancelled_error_of_the_bodys_own_making_is_a_failure_and_no_cancellation(self):
        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> None:
            raise asyncio.CancelledError

        with pytest.raises(RuntimeError, match="cancelled by its own code"):
            TaskRun(task).execute()


class TestCallsThatAreCancelledFromElsewhere:
    """A call ends in ``CancelledError`` of its own making, or of a task that it shares: its run was not cancelled."""

    @staticmethod
    def order(deliver: Callable[[], Any], **policy: Any) -> Any:
        @async_task(retry_policy=RetryPolicy(**{"max_retries": 3, "initial_delay": 10, "jitter": 0} | policy))
        async def task() -> int:
            try:
                return await step("deliver", deliver)
            except asyncio.CancelledError:
                await step("refund", one)
                raise

        return task

    def test_it_is_a_failed_call_like_any_other(self):
        run = TaskRun(self.order(two))
        run.on("deliver").raises(asyncio.CancelledError())
        assert run.execute() == 2
        assert [call.key for call in run.calls] == ["deliver", "deliver"]
        assert run.elapsed == 10

    def test_so_is_a_sync_call_that_raises_it(self):
        answers = [asyncio.CancelledError()]

        def deliver() -> int:
            if answers:
                raise answers.pop()
            return 2

        run = TaskRun(self.order(deliver))
        assert run.execute() == 2
        assert run.calls_of("refund") == 0

    def test_so_is_one_that_waits_for_a_task_which_somebody_else_cancels(self):
        async def deliver() -> int:
            if run.calls_of("deliver") > 1:
                return 2
            token = asyncio.create_task(asyncio.sleep(100))
            asyncio.get_running_loop().call_later(5, token.cancel)
            await token
            return 0

        run = TaskRun(self.order(deliver))
        assert run.execute() == 2
        assert run.calls_of("refund") == 0
        assert run.elapsed == 15

    def test_so_is_a_polls(self):
        @async_task(retry_policy=STEADY)
        async def task() -> int:
            try:
                return await poll("ready", one, every=10)
            except asyncio.CancelledError:
                return 0

        run = TaskRun(task)
        run.on("ready").raises(asyncio.CancelledError())
        assert run.execute() == 1
        assert run.calls_of("ready") == 2

    def test_out_of_retries_it_fails_its_step(self):
        run = TaskRun(self.order(two, max_retries=0))
        run.on("deliver").raises(asyncio.CancelledError())
        with pytest.raises(StepFailedError, match="cancelled, though its run was not") as raised:
            run.execute()
        assert isinstance(raised.value.__cause__, RuntimeError)
        assert run.calls_of("refund") == 0

    def test_in_a_cleanup_it_is_one_too(self):
        run = TaskRun(self.order(two))
        run.on("deliver").takes(100)
        run.on("refund").raises(asyncio.CancelledError())
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["deliver", "refund", "refund"]

    @pytest.mark.parametrize("first", ["the run", "the token"])
    def test_a_cancellation_of_the_run_at_the_same_moment_is_one(self, first: str):
        async def deliver() -> None:
            token = asyncio.create_task(asyncio.sleep(100))
            asyncio.get_running_loop().call_at(5 if first == "the run" else 4.9999999, token.cancel)
            await token

        run = TaskRun(self.order(deliver))
        run.cancel(at=5)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["deliver", "refund"]

    def test_a_timeout_around_the_step_is_none_of_these(self):
        @async_task
        async def task() -> str:
            try:
                async with asyncio.timeout(5):
                    await step("deliver", two)
            except TimeoutError:
                return "too slow"
            return "delivered"

        run = TaskRun(task)
        run.on("deliver").takes(100)
        assert run.execute() == "too slow"

    def test_the_steps_own_timeout_is_one_in_a_cleanup_too(self):
        run = TaskRun(self.order(two, max_retries=0))
        run.task.step_timeout = 50
        run.on("deliver").takes(20)
        run.on("refund").takes(51)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.calls_of("refund") == 1
        assert "no answer within the step's timeout of 50" in str(run.journal.get("refund"))

    def test_a_body_that_has_asked_to_be_cancelled_is_so_at_its_next_step(self):
        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> int:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()  # as a TaskGroup does from Python 3.13 on, if its errors came with a cancellation
            return await step("deliver", two)

        run = TaskRun(task)
        run.on("deliver").takes(1)
        with pytest.raises(RuntimeError, match="cancelled by its own code"):
            run.execute()


class TestAtMostOnce:
    def test_the_start_is_saved_before_the_call(self):
        @async_task
        async def task() -> int:
            return await step.with_options(at_most_once=True)("charge", one)

        run = TaskRun(task)
        run.execute()
        assert run.writes == 2

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_lost_outcome_is_told_to_the_body_and_the_call_is_not_made_again(self, when: Any):
        @async_task
        async def task() -> str:
            try:
                await step.with_options(at_most_once=True)("charge", one)
            except StepOutcomeUnknownError as error:
                return await step("ask", str, f"asked about {error.key}")
            return "charged"

        run = TaskRun(task)
        run.on("charge").loses_worker(when=when)
        run.on("ask").loses_worker()
        assert run.execute() == "asked about charge"
        assert run.calls_of("charge") == 1

    def test_a_failed_call_is_not_retried_but_for_a_retryable_error(self):
        @async_task(retry_policy=STEADY)
        async def task() -> int:
            return await step.with_options(at_most_once=True)("charge", one)

        run = TaskRun(task)
        run.on("charge").raises(RetryableError("nothing was done")).raises(OSError("who knows"), times=9)
        with pytest.raises(StepFailedError, match="who knows"):
            run.execute()
        assert run.calls_of("charge") == 2

    @pytest.mark.parametrize(
        ("error", "redo", "calls"),
        [
            (TimeoutError("no answer"), (), 0),
            (TimeoutError("no answer"), ("charge",), 1),
            (RetryableError("nothing was done"), (), 1),
        ],
        ids=["not by itself", "if it is named", "if nothing was done"],
    )
    def test_a_failed_call_is_made_again_in_a_resumed_run(self, error: Exception, redo: Sequence[str], calls: int):
        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> int:
            return await step.with_options(at_most_once=True)("charge", one)

        first = TaskRun(task)
        first.on("charge").raises(error)
        with pytest.raises(StepFailedError) as failed:
            first.execute()
        assert failed.value.once is not isinstance(error, RetryableError)
        resumed = TaskRun(task)
        resumed.saved = first.journal.reopen(redo).snapshot()
        if calls:
            assert resumed.execute() == 1
        else:
            with pytest.raises(StepFailedError, match="no answer"):
                resumed.execute()
        assert resumed.calls_of("charge") == calls

    def test_a_call_abandoned_at_shutdown_is_not_made_again(self):
        @async_task
        async def task() -> int:
            return await step.with_options(at_most_once=True)("charge", one)

        run = TaskRun(task)
        run.on("charge").takes(10)
        run.interrupt(at=5)
        with pytest.raises(StepOutcomeUnknownError):
            run.execute()
        assert run.calls_of("charge") == 1


class TestSleep:
    def test_a_long_sleep_is_spent_outside_of_the_worker_and_is_not_slept_again(self):
        @async_task
        async def task() -> int:
            await sleep("a year", timedelta(days=365))
            return await step("a", one)

        run = TaskRun(task)
        run.on("a").loses_worker()
        assert run.execute() == 1
        assert run.elapsed == 365 * 86400 + 15
        assert outcomes(run) == [Parked, Superseded, Completed]

    def test_a_short_sleep_is_spent_in_place(self):
        @async_task
        async def task() -> None:
            await sleep("moment", 0.25)

        run = TaskRun(task)
        run.execute()
        assert outcomes(run) == [Completed]
        assert run.elapsed == 0.25

    def test_a_lost_worker_does_not_prolong_a_sleep(self):
        @async_task
        async def task() -> None:
            await asyncio.gather(sleep("nap", 100), step("a", one))

        run = TaskRun(task, lost_after=30)
        run.on("a").takes(20).loses_worker()
        run.execute()
        assert run.elapsed == 100

    @pytest.mark.parametrize("duration", [-1, float("nan"), float("inf")])
    def test_an_impossible_duration_is_refused(self, duration: float):
        @async_task
        async def task() -> None:
            await sleep("nap", duration)

        with pytest.raises(StepUsageError, match="must be 0 seconds or more"):
            TaskRun(task).execute()


class TestGenerators:
    def test_a_generator_yields_steps_and_receives_their_results(self):
        @async_task
        def task(n: int):
            doubled = yield Step("double", lambda: n * 2)
            more = yield Step("add", lambda: doubled + 1)
            return more

        run = TaskRun(task, 5)
        run.on("add").loses_worker()
        assert run.execute() == 11
        assert run.calls_of("double") == 1

    def test_an_async_generator_ends_in_a_result(self):
        @async_task
        async def task(n: int):
            doubled = yield Step("double", lambda: n * 2)
            yield Result(doubled + 1)

        assert TaskRun(task, 5).execute() == 11

    def test_a_generator_may_catch_a_failed_step_and_go_on(self):
        @async_task
        def task():
            try:
                yield Step("charge", one)
            except StepFailedError as error:
                return (yield Step("refund", str, f"refunded {error.key}"))

        run = TaskRun(task)
        run.on("charge").raises(NonRetryableError("no"))
        assert run.execute() == "refunded charge"

    def test_an_async_generator_may_catch_a_failed_step_and_go_on(self):
        @async_task
        async def task():
            try:
                yield Step("charge", one)
            except StepFailedError as error:
                yield Result((yield Step("refund", str, f"refunded {error.key}")))

        run = TaskRun(task)
        run.on("charge").raises(NonRetryableError("no"))
        assert run.execute() == "refunded charge"

    def test_a_generators_steps_take_options(self):
        @async_task(retry_policy=STEADY)
        def task():
            return (yield Step("a", one).with_options(retry_policy=RetryPolicy(max_retries=0)))

        run = TaskRun(task)
        run.on("a").raises(OSError("down"), times=5)
        with pytest.raises(StepFailedError):
            run.execute()
        assert run.calls_of("a") == 1

    def test_an_async_generator_without_a_result_returns_none(self):
        @async_task
        async def task():
            yield Step("a", one)

        assert TaskRun(task).execute() is None

    @pytest.mark.parametrize("sync", [True, False])
    def test_a_generator_that_yields_something_else_is_told_what_to_yield(self, sync: bool):
        def plain():
            yield 5

        async def asynchronous():
            yield 5

        task = async_task(name="odd")(plain if sync else asynchronous)
        with pytest.raises(StepUsageError, match=r"yielded int. Yield Step"):
            TaskRun(task).execute()

    @pytest.mark.parametrize("sync", [True, False])
    def test_a_generators_finally_blocks_run_when_its_attempt_ends(self, sync: bool):
        left: list[str] = []

        def plain():
            try:
                return (yield Step("a", one))
            finally:
                left.append("left")

        async def asynchronous():
            try:
                yield Result((yield Step("a", one)))
            finally:
                left.append("left")

        task = async_task(name="tidy", retry_policy=STEADY)(plain if sync else asynchronous)
        run = TaskRun(task)
        run.on("a").raises(OSError("down"))
        assert run.execute() == 1
        assert left == ["left", "left"]

    def test_a_generator_gets_a_cancelled_error_at_its_yield(self):
        @async_task
        async def task():
            try:
                yield Step("render", two)
            except asyncio.CancelledError:
                yield Step("release", three)
                raise

        run = TaskRun(task)
        run.on("render").takes(100)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.calls_of("release") == 1


class SlowThreads(concurrent.futures.Executor):
    """Makes each call after so many virtual seconds; nothing stops it, as nothing stops a thread."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.left = 0
        """Calls that nobody waits for any more."""

    def _leave(self) -> bool:
        self.left += 1
        return False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        def make() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.cancel = self._leave  # type: ignore[method-assign]
        asyncio.get_running_loop().call_later(self.seconds, make)
        return future


class TestGeneratorsBetweenTwoSteps:
    """A generator's own code runs in a thread, where nothing can be raised: it is told at its next ``yield``."""

    @pytest.fixture(autouse=True)
    def threads(self, monkeypatch: pytest.MonkeyPatch) -> SlowThreads:
        threads = SlowThreads(5)
        monkeypatch.setattr(testing, "_Inline", lambda: threads)
        return threads

    @staticmethod
    def render(then: Callable[[], object]) -> TaskRun[int]:
        @async_task
        def task():
            yield Step("start", one)
            try:
                then()
                return (yield Step("render", two))
            except asyncio.CancelledError:
                yield Step("stop", three)
                raise

        return TaskRun(task)

    def test_a_cancellation_that_comes_there_is_told_at_the_next_step_which_is_not_called(self):
        run = self.render(lambda: None)
        run.cancel(at=7)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["start", "stop"]
        assert outcomes(run) == [Cancelled]
        assert run.elapsed == 20  # four stretches, the one that it came in to its end

    def test_code_that_fails_there_has_failed_in_its_cleanup(self, caplog: pytest.LogCaptureFixture):
        def fails() -> None:
            raise OSError("disk full")

        run = self.render(fails)
        run.cancel(at=7)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert "its cleanup failed (OSError)" in caplog.text
        assert run.elapsed == 10

    def test_code_that_ends_there_is_cancelled(self):
        @async_task
        def task():
            return (yield Step("start", one))

        run = TaskRun(task)
        run.cancel(at=7)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.elapsed == 15

    def test_code_that_takes_too_long_is_left(self, threads: SlowThreads):
        threads.seconds = 100
        run = self.render(lambda: None)
        run.cancel(at=107)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["start"]
        assert run.elapsed == pytest.approx(167)
        assert threads.left == 1

    def test_a_worker_that_shuts_down_meanwhile_cancels_nothing(self, threads: SlowThreads):
        run = self.render(lambda: None)
        run.interrupt(at=7)
        assert run.execute() == 2
        assert threads.left == 1
        assert [call.key for call in run.calls] == ["start", "render"]
        assert outcomes(run) == [Parked, Completed]

    def test_an_error_of_the_code_itself_is_its_own(self):
        def cancels() -> None:
            raise asyncio.CancelledError

        run = self.render(cancels)
        with pytest.raises(RuntimeError, match="cancelled by its own code"):
            run.execute(max_attempts=10)


class TestMisuse:
    def test_the_same_key_twice_is_refused_and_not_retried(self):
        @async_task
        async def task() -> None:
            await step("a", one)
            await step("a", one)

        run = TaskRun(task)
        with pytest.raises(DuplicateStepError, match="'a'"):
            run.execute()
        assert len(run.attempts) == 1

    def test_a_step_inside_of_a_step_is_refused(self):
        async def nested() -> int:
            return await step("inner", one)

        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> int:
            return await step("outer", nested)

        with pytest.raises(StepFailedError, match="inside of step 'outer'"):
            TaskRun(task).execute()

    async def test_a_step_outside_of_a_task_is_refused(self):
        with pytest.raises(StepUsageError, match="outside of a task"):
            await step("a", one)

    @pytest.mark.parametrize("key", ["", "  ", "a\0b", "line\nbreak", "\ud800", "x" * 256, "é" * 128, 5, None, b"a"])
    def test_what_cannot_be_a_key_is_refused_before_anything_is_called(self, key: Any):
        @async_task
        async def task() -> None:
            await step(key, one)

        run = TaskRun(task)
        with pytest.raises(InvalidKeyError):
            run.execute()
        assert run.calls == []

    @pytest.mark.parametrize("key", ["a", "Größe 🖼", "x" * 255, "a/b:c", "é" * 127])
    def test_any_other_text_is_taken_as_it_is(self, key: str):
        @async_task
        async def task() -> int:
            return await step(key, one)

        run = TaskRun(task)
        assert run.execute() == 1
        assert [record.key for record in run.journal.done()] == [key]

    def test_a_result_that_cannot_be_serialised_fails_the_step_by_name(self):
        @async_task
        async def task() -> None:
            await step("a", threading.Lock)

        run = TaskRun(task)
        with pytest.raises(ResultError, match="Step 'a': a value of type lock cannot be serialised"):
            run.execute()
        assert run.calls_of("a") == 1

    def test_a_result_that_does_not_fit_its_annotation_stays_in_the_journal(self):
        def wrong() -> int:
            return "not a number"  # type: ignore[return-value]

        @async_task
        async def task() -> None:
            await step("a", wrong)

        run = TaskRun(task)
        with pytest.raises(ResultError, match="Step 'a': the stored value does not fit int"):
            run.execute()
        assert [record.key for record in run.journal.done()] == ["a"]
        assert run.calls_of("a") == 1

    def test_an_annotation_that_is_not_there_at_run_time_is_refused_before_the_call(self):
        def unresolved():
            return 1

        unresolved.__annotations__["return"] = "NotImported"

        @async_task
        async def task() -> None:
            await step("a", unresolved)

        run = TaskRun(task)
        with pytest.raises(StepUsageError, match="NotImported"):
            run.execute()
        assert run.calls == []

    def test_a_result_over_the_limit_is_refused_and_what_was_finished_stays(self):
        @async_task
        async def task() -> None:
            await step("small", one)
            await step("large", lambda: "x" * 2_200_000)

        run = TaskRun(task)
        with pytest.raises(PayloadTooLargeError, match="'large'"):
            run.execute()
        assert [record.key for record in run.journal.done()] == ["small"]
        assert run.calls_of("large") == 1

    def test_a_journal_that_would_grow_past_the_limit_is_refused_at_the_step_that_would(self):
        @async_task
        async def task() -> None:
            for n in range(10):
                await step(f"s{n}", lambda: "x" * 500_000)

        run = TaskRun(task)
        with pytest.raises(PayloadTooLargeError, match="'s4'"):
            run.execute()
        assert [record.key for record in run.journal.done()] == ["s0", "s1", "s2", "s3"]


class TestWhatTheCodeSees:
    def test_the_run_and_the_step_are_known_in_calls_in_threads_and_in_the_body(self):
        seen: dict[str, Any] = {}

        def in_a_call() -> None:
            seen["call"] = (current_run().task_id, current_step().key, current_step().attempt)

        @async_task(retry_policy=STEADY)
        async def task(params: str) -> None:
            seen["body"] = (current_run().params, current_run().attempt, current_step().key)
            await step("a", in_a_call)

        run = TaskRun(task, "params", task_id="run-7")
        run.on("a").raises(OSError("down"))
        run.execute()
        assert seen == {"body": ("params", 2, "task"), "call": ("run-7", "a", 2)}

    def test_an_idempotency_key_is_stable_over_retries_and_lost_workers_and_differs_between_steps_and_runs(self):
        keys: dict[str, set[str]] = {"a": set(), "b": set()}
        failures = [OSError("down")]

        def note() -> None:
            keys[current_step().key].add(current_step().idempotency_key)
            if failures:
                raise failures.pop()

        @async_task(retry_policy=STEADY)
        async def task() -> None:
            await step("a", note)
            await step("b", note)

        run = TaskRun(task, task_id="first")
        run.on("a").loses_worker(when="after")
        run.execute()
        assert len(keys["a"]) == len(keys["b"]) == 1
        TaskRun(task, task_id="second").execute()
        assert len(keys["a"] | keys["b"]) == 4

    def test_context_variables_reach_the_calls(self):
        tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")

        @async_task
        async def task() -> str:
            tenant.set("acme")
            return await step("a", tenant.get)

        assert TaskRun(task).execute() == "acme"

    def test_finished_steps_tell_their_calls_and_times(self):
        run = TaskRun(three_steps)
        run.on("b").raises(OSError("down"), times=2)
        run.execute()
        b = run.journal.get("b")
        assert b is not None
        assert (b.state, b.calls, b.started, b.finished) == (StepState.COMPLETED, 3, 0, 30)


class TestOutcomes:
    def test_every_failure_carries_the_journal(self):
        run = TaskRun(three_steps)
        run.on("c").raises(NonRetryableError("no"))
        with pytest.raises(StepFailedError):
            run.execute()
        assert outcomes(run) == [Failed]
        assert [record.key for record in run.journal.done()] == ["a", "b"]
        assert run.journal.get("c").state is StepState.FAILED  # type: ignore[union-attr]

    def test_a_result_that_cannot_be_serialised_fails_the_task(self):
        @async_task
        async def task() -> Any:
            return object()

        with pytest.raises(ResultError, match="object cannot be serialised"):
            TaskRun(task).execute()


class Outage(PayloadCodec):
    """A codec that cannot decode for a while, as with a key service that is away; and takes its time for it."""

    def __init__(self, begins: float, ends: float, *, takes: float = 0.0) -> None:
        self.begins, self.ends, self.takes = begins, ends, takes

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        if self.begins <= asyncio.get_running_loop().time() < self.ends:
            raise ConnectionError("no key")
        await asyncio.sleep(self.takes)
        return list(payloads)


class TestResultsThatCannotBeRead:
    @staticmethod
    def run(until: float, **options: Any) -> TaskRun[int]:
        """A run whose second attempt begins at 20, with a result to be read and a call to be made side by side."""

        async def after_a_nap() -> int:
            await sleep("nap", 20)
            return await step.with_options(**options)("paid", three)

        @async_task
        async def task() -> int:
            return sum(await asyncio.gather(step("first", one), after_a_nap()))

        run = TaskRun(task, data_converter=replace(pydantic_data_converter, payload_codec=Outage(15, until)))
        run.on("paid").takes(50)
        return run

    @pytest.mark.parametrize("at_most_once", [False, True])
    def test_a_call_beside_it_goes_on_and_is_made_once(self, at_most_once: bool):
        run = self.run(600, at_most_once=at_most_once)
        assert run.execute() == 4
        assert times_of(run, "paid") == [20]

    def test_the_attempt_is_left_to_another_worker_once_no_call_is_in_flight(self):
        run = self.run(600)
        run.execute()
        _, second, *_ = run.attempts
        assert second.began == 20
        assert 70 < second.ended < 100  # the new result cannot be read, either
        assert isinstance(second.outcome, Parked)
        assert second.outcome.left
        assert second.outcome.reason == "ConnectionError: the result of step 'paid' cannot be read: no key"

    def test_a_result_that_can_be_read_after_all_is_while_the_attempt_goes_on(self):
        run = self.run(50)
        assert run.execute() == 4
        assert outcomes(run) == [Parked, Completed]
        assert run.elapsed == 70

    def test_the_events_that_are_waited_for_beside_it_do_not_hold_the_run(self):
        @async_task
        async def task() -> Any:
            return await asyncio.gather(step("first", one), sleep("nap", 20), wait_for("approval"))

        run = TaskRun(task, data_converter=replace(pydantic_data_converter, payload_codec=Outage(15, 600)))
        run.send("approval", "yes", at=100)
        assert run.execute() == [1, None, "yes"]
        second = run.attempts[1].outcome
        assert isinstance(second, Parked)
        assert (second.left, second.events) == (True, ())

    @pytest.mark.parametrize(
        ("codec", "cancelled_at"),
        [
            pytest.param(Outage(15, 600), 30, id="while it waits, and cannot be read"),
            pytest.param(Outage(15, 600), 22, id="while it cannot be read"),
            pytest.param(Outage(0, 0, takes=5), 27, id="while it is read"),
        ],
    )
    def test_a_cancellation_waits_until_the_body_is_back_where_it_was(self, codec: Outage, cancelled_at: float):
        @async_task(retry_policy=RetryPolicy(initial_delay=20, max_delay=20, max_retries=100, jitter=0))
        async def task() -> None:
            await step("pay", one)
            try:
                await step("ship", two)
            except asyncio.CancelledError:
                await step("refund", three)
                raise

        run = TaskRun(task, data_converter=replace(pydantic_data_converter, payload_codec=codec))
        run.on("ship").raises(ConnectionError("down"), times=100)
        run.on("refund").raises(ConnectionError("down"))
        run.cancel(at=cancelled_at)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.calls_of("pay") == 1
        assert run.calls_of("refund") == 2
        assert run.journal.get("refund").state is StepState.COMPLETED

    def test_a_cancellation_in_a_backoff_of_the_body_itself_waits_as_well(self):
        cleaned: list[int] = []

        async def fail() -> None:
            raise ConnectionError("down")

        @async_task(retry_policy=RetryPolicy(initial_delay=20, jitter=0))
        async def task() -> None:
            await step("pay", one)
            try:
                await fail()
                await asyncio.sleep(100)
            finally:
                cleaned.append(len(run.attempts))

        run = TaskRun(task, data_converter=replace(pydantic_data_converter, payload_codec=Outage(5, 600)))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert len(cleaned) == 2  # in the first attempt, and in the first that could read what was paid for
        assert run.elapsed > 600


class TestAttemptsThatAreOverBeforeTheirBody:
    """What is asked of an attempt while it reads its params, or waits out a short backoff."""

    @staticmethod
    async def outcome_of(body: Callable[[Runner], Any], *asked: Callable[[Runner], None], steps: int = 0) -> Outcome:
        """How an attempt ends of which something is asked before it runs."""
        journal = Journal(started=time.time())
        for number in range(steps):
            journal.complete(journal.open(f"s{number}"), b"", 1.0)
        settings = RunSettings("run", "task", "origin", STEADY, step_timeout=60.0)
        runner = Runner(settings, journal, PayloadValues(pydantic_data_converter), Memory())
        for ask in asked:
            ask(runner)
        return await runner.run(functools.partial(body, runner))

    @pytest.mark.parametrize(
        ("ask", "end"),
        [
            (Runner.drain, Parked),
            (Runner.interrupt, Parked),
            (Runner.supersede, Superseded),
            (lambda runner: runner.cancel("too late"), Cancelled),
        ],
    )
    async def test_a_body_without_steps_is_not_called(self, ask: Callable[[Runner], None], end: type):
        called: list[str] = []

        async def body(_: Runner) -> None:
            called.append("body")

        assert isinstance(await self.outcome_of(body, ask), end)
        assert called == []

    async def test_a_cancellation_that_comes_before_the_body_of_a_begun_run_lets_it_clean_up(self):
        cleaned: list[str] = []

        async def body(runner: Runner) -> None:
            try:
                await runner.sleep("nap", 1000)
            except asyncio.CancelledError:
                await runner.step(StepCall("clean", lambda: cleaned.append("up")))
                raise

        cancel = functools.partial(Runner.cancel, reason="changed my mind")
        assert await self.outcome_of(body, cancel, steps=1) == Cancelled("changed my mind")
        assert cleaned == ["up"]

    @pytest.mark.parametrize("ask", ["drain", "cancel"])
    def test_a_short_backoff_of_a_body_without_steps_ends_without_another_call(self, ask: str):
        calls: list[float] = []

        @async_task(retry_policy=RetryPolicy(initial_delay=0.5, jitter=0))
        async def task() -> int:
            calls.append(run.now())
            if len(calls) == 1:
                raise ConnectionError("down")
            return 5

        run = TaskRun(task)
        getattr(run, ask)(at=0.2)
        if ask == "cancel":
            with pytest.raises(TaskCancelledError):
                run.execute()
            assert len(calls) == 1
        else:
            assert run.execute() == 5
            assert outcomes(run) == [Parked, Completed]


class OneThread(concurrent.futures.Executor):
    """Makes one call after the other, each in so many virtual seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.busy_until = 0.0
        self.begun: list[float] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        def make() -> None:
            # What it does is done at once, and its result comes when its time is over.
            self.begun.append(loop.time())
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                loop.call_later(self.seconds, future.set_exception, error)
            else:
                loop.call_later(self.seconds, set_result, result)

        def set_result(result: Any) -> None:
            if not future.cancelled():
                future.set_result(result)

        loop = asyncio.get_running_loop()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        begins = max(self.busy_until, loop.time())
        self.busy_until = begins + self.seconds
        loop.call_at(begins, make)
        return future


class TestTimeoutsOfSyncCalls:
    """A call's time begins with it: not while it waits for a thread that is free."""

    @pytest.fixture
    def threads(self, monkeypatch: pytest.MonkeyPatch) -> OneThread:
        threads = OneThread(30)
        monkeypatch.setattr(testing, "_Inline", lambda: threads)
        return threads

    @pytest.mark.usefixtures("threads")
    @pytest.mark.parametrize("at_most_once", [False, True])
    def test_steps_that_wait_for_a_thread_are_called_once_each(self, at_most_once: bool):
        render = step.with_options(timeout=40, at_most_once=at_most_once)

        @async_task
        async def task() -> list[int]:
            return await asyncio.gather(*(render(f"s{number}", int, number) for number in range(4)))

        run = TaskRun(task)
        assert run.execute() == [0, 1, 2, 3]
        assert run.elapsed == 120

    def test_a_call_that_takes_too_long_in_its_thread_fails(self):
        has_begun, may_end = threading.Event(), threading.Event()

        def hang() -> None:
            has_begun.set()
            may_end.wait(20)

        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> None:
            before = asyncio.create_task(step("before", time.sleep, 0.3))
            await asyncio.sleep(0)
            with pytest.raises(StepFailedError, match=r"no answer within the step's timeout of 0\.1 s"):
                await step.with_options(timeout=0.1)("hang", hang)
            await before

        async def run() -> None:
            asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
            await task()
            assert has_begun.is_set()
            may_end.set()

        asyncio.run(run())

    @pytest.mark.parametrize("yields", [False, True])
    def test_a_sync_task_without_steps_waits_for_a_thread_as_well(self, threads: OneThread, yields: bool):
        def plain() -> int:
            return 5

        def generator() -> Any:
            if not yields:
                yield
            return 5

        threads.busy_until = 100
        run = TaskRun(async_task(step_timeout=40)(generator if yields else plain))
        assert run.execute() == 5
        assert threads.begun == [100]
