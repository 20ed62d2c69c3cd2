"""Waiting steps, in memory: ``poll``, ``sleep`` and ``wait_for``, with virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from temporal_async_task import (
    NonRetryableError,
    PollTimeoutError,
    ResultError,
    RetryableError,
    RetryPolicy,
    StepFailedError,
    StepState,
    StepUsageError,
    TaskCancelledError,
    TaskTimeoutError,
    WaitTimeoutError,
    WorkerLostError,
    async_task,
    current_step,
    poll,
    sleep,
    step,
    wait_for,
)
from temporal_async_task.engine.outcome import Completed, Failed, Parked, Superseded
from temporal_async_task.testing import TaskRun

STEADY = RetryPolicy(max_retries=3, initial_delay=10, max_delay=60, jitter=0)


async def render() -> str | None:
    """What is polled; tests script its answers."""
    return "rendered"


async def one() -> int:
    return 1


class NotYet:
    """Answers None so many times, and then the result."""

    def __init__(self, times: int, result: Any = "rendered") -> None:
        self._left = times
        self._result = result

    def __call__(self) -> Any:
        self._left -= 1
        return None if self._left >= 0 else self._result


def outcomes(run: TaskRun[Any]) -> list[type]:
    return [type(attempt.outcome) for attempt in run.attempts]


def times_of(run: TaskRun[Any], key: str) -> list[float]:
    return [call.at for call in run.calls if call.key == key]


def polling(**options: Any) -> Any:
    """A task that polls ``render``."""

    @async_task(retry_policy=STEADY)
    async def task() -> Any:
        return await poll("render", render, **options)

    return task


class TestPollEvery:
    @pytest.mark.parametrize("every", [10, 10.0, timedelta(seconds=10)])
    def test_it_asks_again_after_the_same_pause_until_the_answer_is_there(self, every: Any):
        run = TaskRun(polling(every=every))
        run.on("render").returns(NotYet(3))
        assert run.execute() == "rendered"
        assert times_of(run, "render") == [0, 10, 20, 30]

    def test_a_retry_policys_backoff_is_the_pause(self):
        backoff = RetryPolicy(initial_delay=2, backoff_multiplier=3, max_delay=50, jitter=0)
        run = TaskRun(polling(every=backoff))
        run.on("render").returns(NotYet(5))
        assert run.execute() == "rendered"
        pauses = [2, 6, 18, 50, 50]
        assert times_of(run, "render") == [sum(pauses[:n]) for n in range(6)]

    def test_a_ready_answer_is_returned_at_once(self):
        run = TaskRun(polling(every=10))
        assert run.execute() == "rendered"
        assert outcomes(run) == [Completed]
        assert run.elapsed == 0

    def test_the_worker_is_free_between_two_polls(self):
        run = TaskRun(polling(every=3600))
        run.on("render").returns(NotYet(2))
        run.execute()
        assert outcomes(run) == [Parked, Parked, Completed]
        assert all(attempt.ended == attempt.began for attempt in run.attempts)

    def test_a_pause_under_a_second_is_spent_in_place(self):
        run = TaskRun(polling(every=0.5))
        run.on("render").returns(NotYet(3))
        run.execute()
        assert times_of(run, "render") == [0, 0.5, 1.0, 1.5]
        assert outcomes(run) == [Completed]

    def test_the_pause_begins_when_the_answer_has_come(self):
        run = TaskRun(polling(every=10))
        run.on("render").takes(4).returns(NotYet(1))
        run.execute()
        assert times_of(run, "render") == [0, 14]

    def test_it_waits_with_the_arguments_that_it_was_given(self):
        def check(job: str, size: int) -> str | None:
            return f"{job} in {size}"

        @async_task
        async def task() -> str:
            return await poll("render", check, "job-7", 640, every=10)

        assert TaskRun(task).execute() == "job-7 in 640"

    @pytest.mark.parametrize("every", [-1, float("nan"), float("inf"), timedelta(seconds=-1)])
    def test_an_impossible_pause_is_refused_before_anything_is_called(self, every: Any):
        run = TaskRun(polling(every=every))
        with pytest.raises(StepUsageError, match=r"poll\('render'\)'s every must be 0 seconds or more"):
            run.execute()
        assert run.calls == []


class TestPollAnswers:
    @pytest.mark.parametrize("answer", [0, False, "", [], {}])
    def test_whatever_is_not_none_is_an_answer(self, answer: Any):
        def check() -> Any:
            return answer

        @async_task
        async def task() -> Any:
            return await poll("render", check, every=10)

        run = TaskRun(task)
        assert run.execute() == answer
        assert run.calls_of("render") == 1

    def test_the_answer_is_decoded_as_the_annotation_of_check_says(self):
        @dataclass
        class Video:
            url: str

        def check() -> Video | None:
            return Video("u")

        @async_task
        async def task() -> list[str]:
            video = await poll("render", check, every=10)
            return [type(video).__name__, video.url]

        assert TaskRun(task).execute() == ["Video", "u"]

    def test_an_answer_that_does_not_fit_the_annotation_is_told(self):
        def check() -> int | None:
            return "soon"  # type: ignore[return-value]

        @async_task
        async def task() -> int:
            return await poll("render", check, every=10)

        run = TaskRun(task)
        with pytest.raises(ResultError, match="Step 'render'"):
            run.execute()
        assert run.calls_of("render") == 1

    def test_a_finished_poll_is_never_polled_again(self):
        @async_task(retry_policy=STEADY)
        async def task() -> Any:
            video = await poll("render", render, every=10)
            await step("upload", one)
            return video

        run = TaskRun(task)
        run.on("render").returns(NotYet(2))
        run.on("upload").loses_worker(3)
        assert run.execute() == "rendered"
        assert run.calls_of("render") == 3

    def test_a_poll_shows_its_calls_and_its_state_between_two_of_them(self):
        run = TaskRun(polling(every=10))
        run.on("render").returns(NotYet(9))
        with pytest.raises(RuntimeError, match="has not ended after 2"):
            run.execute(max_attempts=2)
        record = run.journal.get("render")
        assert record is not None
        assert (record.state, record.calls, record.started, record.due) == (StepState.WAITING, 2, 0, 20)

    def test_an_idempotency_key_is_the_same_in_every_poll(self):
        keys: set[str] = set()
        not_yet = NotYet(3)

        def check() -> str | None:
            keys.add(current_step().idempotency_key)
            return not_yet()

        @async_task
        async def task() -> str:
            return await poll("render", check, every=10)

        TaskRun(task).execute()
        assert len(keys) == 1

    def test_two_polls_wait_side_by_side(self):
        @async_task
        async def task() -> list[Any]:
            return list(await asyncio.gather(poll("a", render, every=10), poll("b", render, every=15)))

        run = TaskRun(task)
        run.on("a").returns(NotYet(3, "a"))
        run.on("b").returns(NotYet(2, "b"))
        assert run.execute() == ["a", "b"]
        assert times_of(run, "a") == [0, 10, 20, 30]
        assert times_of(run, "b") == [0, 15, 30]


class TestPollErrors:
    def test_an_error_of_check_is_not_the_jobs(self):
        run = TaskRun(polling(every=10))
        run.on("render").raises(OSError("down"), times=2)
        assert run.execute() == "rendered"
        assert run.calls_of("render") == 3

    def test_the_pause_after_an_error_is_the_longer_one_of_both(self):
        @async_task(retry_policy=STEADY)
        async def task(every: float) -> Any:
            return await poll("render", render, every=every)

        for every, expected in [(2, [0, 10, 30]), (25, [0, 25, 50])]:
            run = TaskRun(task, every)
            run.on("render").raises(OSError("down"), times=2)
            run.execute()
            assert times_of(run, "render") == expected

    def test_without_a_timeout_it_gives_up_when_the_policy_does(self):
        run = TaskRun(polling(every=10))
        run.on("render").raises(OSError("down"), times=99)
        with pytest.raises(StepFailedError, match="'render' failed after 4 attempts: OSError: down"):
            run.execute()
        assert run.calls_of("render") == 4

    def test_a_good_answer_between_errors_begins_their_count_anew(self):
        answers: list[Any] = [*[OSError("down")] * 3, None] * 4

        def check() -> str | None:
            answer = answers.pop(0) if answers else "rendered"
            if isinstance(answer, OSError):
                raise answer
            return answer

        @async_task(retry_policy=STEADY)
        async def task() -> str:
            return await poll("render", check, every=10)

        run = TaskRun(task)
        assert run.execute() == "rendered"
        assert run.calls_of("render") == 17

    def test_with_a_timeout_it_is_patient_until_then(self):
        run = TaskRun(polling(every=10, timeout=3600))
        run.on("render").raises(OSError("down"), times=30)
        assert run.execute() == "rendered"
        assert run.calls_of("render") == 31

    @pytest.mark.parametrize("timeout", [None, 3600])
    def test_with_a_policy_of_no_retries_it_is_patient_if_it_has_a_timeout(self, timeout: float | None):
        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> Any:
            return await poll("render", render, every=10, timeout=timeout)

        run = TaskRun(task)
        run.on("render").raises(OSError("down"), times=9).returns("rendered")
        if timeout:
            assert run.execute() == "rendered"
            return
        with pytest.raises(StepFailedError, match="down"):
            run.execute()
        assert run.calls_of("render") == 1

    @pytest.mark.parametrize("timeout", [None, 3600])
    def test_an_error_that_cannot_get_better_ends_it(self, timeout: float | None):
        run = TaskRun(polling(every=10, timeout=timeout))
        run.on("render").returns(NotYet(9)).raises(NonRetryableError("the job failed"))
        with pytest.raises(StepFailedError, match="the job failed"):
            run.execute()
        assert run.calls_of("render") == 1

    def test_a_failed_poll_stays_failed_in_later_attempts(self):
        @async_task
        async def task() -> str:
            try:
                await poll("render", render, every=10)
            except StepFailedError as error:
                return await step("refund", str, f"refunded {error.error_type}")
            return "rendered"

        run = TaskRun(task)
        run.on("render").raises(NonRetryableError("the job failed"))  # a second call would succeed
        run.on("refund").loses_worker()
        assert run.execute() == "refunded NonRetryableError"
        assert run.calls_of("render") == 1

    @pytest.mark.parametrize("timeout", [None, 3600])
    def test_a_delay_that_check_asks_for_is_kept(self, timeout: float | None):
        run = TaskRun(polling(every=10, timeout=timeout))
        run.on("render").raises(RetryableError("too many requests", retry_after=600))
        assert run.execute() == "rendered"
        assert times_of(run, "render") == [0, 600]

    def test_a_call_that_takes_too_long_is_asked_again(self):
        @async_task(retry_policy=STEADY, step_timeout=30)
        async def task() -> Any:
            return await poll("render", render, every=10)

        run = TaskRun(task)
        run.on("render").takes(31)
        with pytest.raises(StepFailedError, match=r"no answer within the step's timeout of 30\.0 s"):
            run.execute()
        assert times_of(run, "render") == [0, 40, 90, 160]  # 30 s each, and 10, 20 and 40 s between


class TestPollTimeout:
    def test_an_answer_that_does_not_come_in_time_can_be_caught(self):
        @async_task
        async def task() -> str:
            try:
                return str(await poll("render", render, every=10, timeout=35))
            except PollTimeoutError as error:
                return f"{error.key} after {error.attempts}"

        run = TaskRun(task)
        run.on("render").returns(NotYet(99))
        assert run.execute() == "render after 5"

    def test_an_uncaught_one_fails_the_task_and_says_how_long_it_asked(self):
        run = TaskRun(polling(every=10, timeout=35))
        run.on("render").returns(NotYet(99))
        with pytest.raises(PollTimeoutError, match=r"not ready within 35\.0 s, after 5 polls"):
            run.execute()
        assert outcomes(run)[-1] is Failed

    def test_it_is_a_timeout_error_to_the_body(self):
        assert issubclass(PollTimeoutError, TimeoutError)

    def test_the_last_poll_is_at_the_deadline(self):
        run = TaskRun(polling(every=10, timeout=35))
        run.on("render").returns(NotYet(99))
        with pytest.raises(PollTimeoutError):
            run.execute()
        assert times_of(run, "render") == [0, 10, 20, 30, 35]

    def test_an_answer_at_the_deadline_still_counts(self):
        run = TaskRun(polling(every=10, timeout=35))
        run.on("render").returns(NotYet(4))
        assert run.execute() == "rendered"
        assert run.elapsed == 35

    @pytest.mark.parametrize("timeout", [35, timedelta(seconds=35)])
    def test_lost_workers_do_not_move_the_deadline(self, timeout: Any):
        run = TaskRun(polling(every=10, timeout=timeout), lost_after=4)
        script = run.on("render").returns(NotYet(99))
        run._timeline.append((5, script.loses_worker))  # at the second call
        with pytest.raises(PollTimeoutError):
            run.execute()
        assert Superseded in outcomes(run)
        assert times_of(run, "render") == [0, 10, 14, 24, 34, 35]

    def test_a_worker_lost_over_the_deadline_leaves_one_last_poll(self):
        run = TaskRun(polling(every=10, timeout=12), lost_after=500)
        script = run.on("render").returns(NotYet(1))
        run._timeline.append((5, script.loses_worker))
        assert run.execute() == "rendered"
        assert times_of(run, "render") == [0, 10, 510]

    def test_errors_until_the_deadline_end_in_a_timeout(self):
        run = TaskRun(polling(every=10, timeout=35))
        run.on("render").raises(OSError("down"), times=99)
        with pytest.raises(PollTimeoutError):
            run.execute()
        assert times_of(run, "render") == [0, 10, 30, 35]

    def test_a_timeout_of_zero_asks_once(self):
        run = TaskRun(polling(every=10, timeout=0))
        run.on("render").returns(NotYet(99))
        with pytest.raises(PollTimeoutError):
            run.execute()
        assert run.calls_of("render") == 1

    @pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
    def test_an_impossible_timeout_is_refused_before_anything_is_called(self, timeout: float):
        run = TaskRun(polling(every=10, timeout=timeout))
        with pytest.raises(StepUsageError, match="timeout must be 0 seconds or more"):
            run.execute()
        assert run.calls == []


class TestPollLostWorkers:
    def test_a_poll_whose_call_was_lost_is_asked_again(self):
        run = TaskRun(polling(every=10))
        run.on("render").returns(NotYet(1)).loses_worker(when="after")
        assert run.execute() == "rendered"
        assert times_of(run, "render") == [0, 15]

    def test_a_poll_that_takes_its_worker_down_fails_in_the_end(self):
        run = TaskRun(polling(every=10))
        run.on("render").takes(5).loses_worker(99)
        with pytest.raises(WorkerLostError):
            run.execute(max_attempts=100)
        assert run.calls_of("render") == 10

    def test_a_worker_that_drains_between_two_polls_does_not_hasten_the_next(self):
        run = TaskRun(polling(every=10))
        run.on("render").takes(2).returns(NotYet(2))
        run.drain(at=1)
        assert run.execute() == "rendered"
        assert times_of(run, "render") == [0, 12, 24]

    def test_a_poll_that_was_interrupted_is_asked_again_at_once(self):
        run = TaskRun(polling(every=100))
        run.on("render").takes(2)
        run.interrupt(at=1)
        assert run.execute() == "rendered"
        assert times_of(run, "render") == [0, 1]


class TestSleepBesideSteps:
    def test_a_sleep_and_a_step_overlap(self):
        @async_task
        async def task() -> list[Any]:
            return list(await asyncio.gather(sleep("nap", 100), step("a", one)))

        run = TaskRun(task)
        run.on("a").takes(30)
        assert run.execute() == [None, 1]
        assert run.elapsed == 100
        assert run.calls_of("a") == 1

    def test_the_attempt_goes_on_while_a_step_is_in_flight_and_ends_with_it(self):
        @async_task
        async def task() -> None:
            await asyncio.gather(sleep("nap", 100), step("a", one))

        run = TaskRun(task)
        run.on("a").takes(30)
        run.execute()
        assert [(attempt.began, attempt.ended) for attempt in run.attempts] == [(0, 30), (100, 100)]

    def test_a_sleep_that_is_over_while_a_step_is_in_flight_goes_on_in_place(self):
        @async_task
        async def task() -> None:
            async def later() -> int:
                await sleep("nap", 10)
                return await step("b", one)

            await asyncio.gather(later(), step("a", one))

        run = TaskRun(task)
        run.on("a").takes(30)
        run.execute()
        assert times_of(run, "b") == [10]
        assert outcomes(run) == [Completed]

    def test_an_attempt_goes_on_while_a_result_is_on_its_way_through_the_body(self):
        async def through_layers(key: str, layers: int) -> int:
            if layers == 0:
                return await step(key, one)
            async with asyncio.TaskGroup() as group:
                inner = group.create_task(through_layers(key, layers - 1))
            return inner.result()

        async def chain() -> int:
            return sum([await through_layers(f"s{n}", 5) for n in range(3)])

        @async_task
        async def task() -> list[Any]:
            return list(await asyncio.gather(sleep("nap", 100), chain()))

        run = TaskRun(task)
        assert run.execute() == [None, 3]
        assert [call.attempt for call in run.calls] == [1, 1, 1]

    def test_of_several_sleeps_the_first_to_end_wakes_the_run(self):
        @async_task
        async def task() -> None:
            async def nap(length: int) -> None:
                await sleep(f"nap-{length}", length)
                await step(f"after-{length}", one)

            await asyncio.gather(nap(300), nap(100), nap(200))

        run = TaskRun(task)
        run.execute()
        assert [call.at for call in run.calls] == [100, 200, 300]
        assert [attempt.began for attempt in run.attempts] == [0, 100, 200, 300]

    def test_sleeps_one_after_the_other_add_up(self):
        @async_task
        async def task() -> None:
            await sleep("first", 100)
            await sleep("second", timedelta(seconds=50))

        run = TaskRun(task)
        run.execute()
        assert run.elapsed == 150

    def test_a_sleep_of_no_length_is_a_checkpoint_and_no_wait(self):
        @async_task
        async def task() -> None:
            await sleep("moment", 0)

        run = TaskRun(task)
        run.execute()
        assert run.elapsed == 0
        assert outcomes(run) == [Completed]

    def test_a_sleep_shows_when_it_will_end(self):
        @async_task
        async def task() -> None:
            await sleep("nap", 100)

        run = TaskRun(task)
        with pytest.raises(RuntimeError, match="has not ended"):
            run.execute(max_attempts=1)
        record = run.journal.get("nap")
        assert record is not None
        assert (record.state, record.due) == (StepState.WAITING, 100)

    def test_asyncios_own_timeout_around_steps_still_works(self):
        @async_task
        async def task() -> str:
            try:
                async with asyncio.timeout(5):
                    await step("slow", one)
            except TimeoutError:
                return "gave up waiting"
            return "done"

        run = TaskRun(task)
        run.on("slow").takes(100)
        assert run.execute() == "gave up waiting"
        assert run.elapsed == 5


class TestWaitFor:
    @staticmethod
    def approval(**options: Any) -> Any:
        @async_task(retry_policy=STEADY)
        async def task() -> Any:
            await step("ask", one)
            return await wait_for("approval", **options)

        return task

    def test_an_event_that_was_sent_before_it_is_waited_for_is_not_lost(self):
        run = TaskRun(self.approval())
        run.on("ask").takes(50)
        run.send("approval", "yes", at=10)
        assert run.execute() == "yes"
        assert run.elapsed == 50

    def test_an_event_wakes_the_run_when_it_comes(self):
        run = TaskRun(self.approval())
        run.send("approval", "yes", at=86_400)
        assert run.execute() == "yes"
        assert run.elapsed == 86_400
        assert outcomes(run) == [Parked, Completed]

    def test_no_step_is_called_again_when_it_comes(self):
        run = TaskRun(self.approval())
        run.send("approval", "yes", at=86_400)
        run.execute()
        assert run.calls_of("ask") == 1

    def test_the_first_of_several_counts(self):
        run = TaskRun(self.approval())
        run.send("approval", "yes", at=10)
        run.send("approval", "no", at=10.5)
        assert run.execute() == "yes"

    def test_an_event_with_another_key_does_not_end_the_wait(self):
        run = TaskRun(self.approval())
        run.send("something else", "no", at=10)
        run.send("approval", "yes", at=20)
        assert run.execute() == "yes"
        assert run.elapsed == 20

    @pytest.mark.parametrize("value", [None, False, 0, ""])
    def test_an_event_may_have_any_value(self, value: Any):
        run = TaskRun(self.approval())
        run.send("approval", value, at=10)
        assert run.execute() == value
        assert run.elapsed == 10

    def test_the_value_is_decoded_as_its_result_type_says(self):
        @dataclass
        class Approval:
            by: str

        @async_task
        async def task() -> list[str]:
            approval = await wait_for("approval", result_type=Approval)
            return [type(approval).__name__, approval.by]

        run = TaskRun(task)
        run.send("approval", {"by": "Ada"}, at=10)
        assert run.execute() == ["Approval", "Ada"]

    def test_a_value_that_does_not_fit_is_told(self):
        run = TaskRun(self.approval(result_type=int))
        run.send("approval", "perhaps", at=10)
        with pytest.raises(ResultError, match="'approval'"):
            run.execute()

    def test_what_has_come_is_kept_over_lost_workers(self):
        @async_task(retry_policy=STEADY)
        async def task() -> Any:
            answer = await wait_for("approval", timeout=100)
            await step("act", one)
            return answer

        run = TaskRun(task)
        run.on("act").loses_worker(9)
        run.send("approval", "yes", at=10)
        assert run.execute() == "yes"

    def test_without_an_event_it_times_out(self):
        run = TaskRun(self.approval(timeout=100))
        with pytest.raises(WaitTimeoutError, match=r"no event within 100\.0 s"):
            run.execute()
        assert run.elapsed == 100

    def test_a_timeout_can_be_caught_and_an_event_after_it_changes_nothing(self):
        @async_task
        async def task() -> str:
            try:
                answer = await wait_for("approval", timeout=timedelta(seconds=100))
            except WaitTimeoutError as error:
                answer = f"no {error.key}"
            await sleep("nap", 100)
            return str(answer)

        run = TaskRun(task)
        run.send("approval", "yes", at=150)
        assert run.execute() == "no approval"
        assert run.elapsed == 200

    def test_it_is_a_timeout_error_to_the_body(self):
        assert issubclass(WaitTimeoutError, TimeoutError)

    def test_lost_workers_do_not_prolong_the_wait(self):
        @async_task
        async def task() -> None:
            await asyncio.gather(wait_for("approval", timeout=100), step("a", one))

        run = TaskRun(task, lost_after=30)
        run.on("a").takes(20).loses_worker()
        with pytest.raises(WaitTimeoutError):
            run.execute()
        assert run.calls_of("a") == 2
        assert run.elapsed == 100

    def test_an_event_that_comes_while_a_sibling_is_in_flight_is_received(self):
        @async_task
        async def task() -> list[Any]:
            return list(await asyncio.gather(wait_for("approval"), step("a", one)))

        run = TaskRun(task)
        run.on("a").takes(50)
        run.send("approval", "yes", at=10)
        assert run.execute() == ["yes", 1]
        assert run.calls_of("a") == 1
        assert run.elapsed == 50

    @staticmethod
    def approval_beside_a_worker_that_is_lost_until_after_the_timeout() -> TaskRun[list[Any]]:
        @async_task
        async def task() -> list[Any]:
            return list(await asyncio.gather(wait_for("approval", timeout=60), step("a", one)))

        run = TaskRun(task, lost_after=30)
        run.on("a").takes(45).loses_worker(when="after")
        return run

    def test_an_event_that_came_in_time_counts_though_the_next_attempt_begins_after_the_timeout(self):
        run = self.approval_beside_a_worker_that_is_lost_until_after_the_timeout()
        run.send("approval", "yes", at=30)
        assert run.execute() == ["yes", 1]
        assert [attempt.began for attempt in run.attempts] == [0, 75]

    def test_an_event_that_came_after_the_timeout_does_not_count_though_no_attempt_has_noticed_that(self):
        run = self.approval_beside_a_worker_that_is_lost_until_after_the_timeout()
        run.send("approval", "yes", at=65)
        with pytest.raises(WaitTimeoutError):
            run.execute()

    @pytest.mark.parametrize("comes_at", [50, 500])
    def test_beside_a_parked_step_both_wake_the_run(self, comes_at: float):
        @async_task(retry_policy=STEADY)
        async def task() -> list[Any]:
            return list(await asyncio.gather(wait_for("approval"), step("a", one)))

        run = TaskRun(task)
        run.on("a").raises(RetryableError("busy", retry_after=200))
        run.send("approval", "yes", at=comes_at)
        assert run.execute() == ["yes", 1]
        [_, retried] = times_of(run, "a")
        assert retried == 200
        assert sorted(attempt.began for attempt in run.attempts) == sorted([0, 200, comes_at])

    def test_two_events_are_waited_for_at_once(self):
        @async_task
        async def task() -> list[Any]:
            return list(await asyncio.gather(wait_for("a"), wait_for("b")))

        run = TaskRun(task)
        run.send("b", 2, at=10)
        run.send("a", 1, at=20)
        assert run.execute() == [1, 2]
        assert run.elapsed == 20

    def test_a_draining_worker_leaves_the_wait_to_the_next(self):
        run = TaskRun(self.approval())
        run.on("ask").takes(10)
        run.drain(at=5)
        run.send("approval", "yes", at=100)
        assert run.execute() == "yes"
        assert run.calls_of("ask") == 1
        assert run.elapsed == 100

    @pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
    def test_an_impossible_timeout_is_refused(self, timeout: float):
        with pytest.raises(StepUsageError, match="timeout must be 0 seconds or more"):
            TaskRun(self.approval(timeout=timeout)).execute()


async def wait_by_polling() -> None:
    await poll("wait", render, every=1_000)


async def wait_by_sleeping() -> None:
    await sleep("wait", 1_000)


async def wait_for_an_event() -> None:
    await wait_for("wait")


waits = pytest.mark.parametrize(
    "wait", [wait_by_polling, wait_by_sleeping, wait_for_an_event], ids=["poll", "sleep", "wait_for"]
)


class TestTaskTimeout:
    @waits
    def test_a_wait_past_the_deadline_fails_the_task_and_names_the_step(self, wait: Any):
        run = TaskRun(async_task(name="bounded", timeout=100)(wait))
        run.on("wait").returns(NotYet(99))
        with pytest.raises(TaskTimeoutError, match=r"within its timeout of 100\.0 s; it was in step 'wait'"):
            run.execute()
        assert run.elapsed <= 100

    def test_an_event_may_come_until_the_deadline(self):
        run = TaskRun(async_task(name="bounded", timeout=100)(wait_for_an_event))
        run.send("wait", "yes", at=99)
        run.execute()
        assert run.elapsed == 99

    def test_without_an_event_the_task_fails_at_the_deadline(self):
        run = TaskRun(async_task(name="bounded", timeout=100)(wait_for_an_event))
        with pytest.raises(TaskTimeoutError):
            run.execute()
        assert run.elapsed == 100

    def test_polls_go_on_until_the_deadline(self):
        @async_task(timeout=100)
        async def task() -> Any:
            return await poll("render", render, every=30)

        run = TaskRun(task)
        run.on("render").returns(NotYet(99))
        with pytest.raises(TaskTimeoutError):
            run.execute()
        assert times_of(run, "render") == [0, 30, 60, 90]

    def test_a_wait_that_ends_in_time_is_no_timeout(self):
        @async_task(timeout=100)
        async def task() -> str:
            await sleep("nap", 99)
            return "rested"

        assert TaskRun(task).execute() == "rested"


class TestCancelledWaits:
    @staticmethod
    def with_cleanup(wait: Any) -> Any:
        @async_task(retry_policy=STEADY)
        async def task() -> str:
            await step("reserve", one)
            try:
                await wait()
            except asyncio.CancelledError:
                await step("release", one)
                raise
            return "done"

        return task

    @waits
    def test_the_body_gets_its_cancellation_where_it_waits_and_cleans_up(self, wait: Any):
        run = TaskRun(self.with_cleanup(wait))
        run.on("wait").returns(NotYet(99))
        run.cancel(at=10, reason="the customer left")
        with pytest.raises(TaskCancelledError, match="the customer left"):
            run.execute()
        assert times_of(run, "release") == [10]
        assert run.calls_of("reserve") == 1
        assert run.elapsed == 10

    def test_a_poll_whose_call_is_being_made_is_left(self):
        run = TaskRun(self.with_cleanup(wait_by_polling))
        run.on("wait").takes(50)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["reserve", "wait", "release"]
        assert run.elapsed == 10

    def test_a_sleep_in_process_is_left(self):
        @async_task
        async def task() -> None:
            await step("reserve", one)
            await sleep("moment", 0.9)

        run = TaskRun(task)
        run.cancel(at=0.5)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.elapsed == 0.5

    @waits
    def test_cleanup_may_wait_too(self, wait: Any):
        @async_task
        async def task() -> None:
            try:
                await step("render", one)
            except asyncio.CancelledError:
                await wait()
                await step("release", one)
                raise

        run = TaskRun(task)
        run.on("render").takes(100)
        run.on("wait").returns(NotYet(1))
        run.send("wait", "go on", at=500)
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.calls_of("release") == 1
        assert run.calls_of("render") == 1

    def test_parallel_waits_are_all_cancelled_and_none_is_called(self):
        @async_task
        async def task() -> None:
            await asyncio.gather(*(poll(f"p{n}", render, every=100) for n in range(3)))

        run = TaskRun(task)
        for n in range(3):
            run.on(f"p{n}").returns(NotYet(99))
        run.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.at for call in run.calls] == [0, 0, 0]

    def test_a_run_that_was_cancelled_while_no_worker_had_it_makes_no_further_call(self):
        @async_task
        async def task() -> None:
            await asyncio.gather(*(step(key, one) for key in "abc"))

        run = TaskRun(task)
        run.on("a").takes(5).loses_worker()
        run.on("b").takes(50)
        run.on("c").takes(50)
        run.cancel(at=10)  # the loss is noticed at 20
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.at for call in run.calls] == [0, 0, 0]


class TestCancelledInTheBodysBackoff:
    """The body itself has failed, outside of steps, and is to be run again."""

    @pytest.mark.parametrize("delay", [0.5, 5], ids=["in place", "outside of the worker"])
    def test_it_is_run_once_more_to_clean_up(self, delay: float):
        failures = [OSError("between steps")]

        @async_task(retry_policy=RetryPolicy(initial_delay=delay, max_delay=delay, jitter=0))
        async def task() -> None:
            await step("reserve", one)
            if failures:
                raise failures.pop()
            try:
                await step("render", one)
            except asyncio.CancelledError:
                await step("release", one)
                raise

        run = TaskRun(task)
        run.cancel(at=0.2)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert [call.key for call in run.calls] == ["reserve", "release"]

    @pytest.mark.parametrize("delay", [0.5, 5], ids=["in place", "outside of the worker"])
    def test_a_body_that_fails_again_is_not_run_for_ever(self, delay: float):
        @async_task(retry_policy=RetryPolicy(max_retries=50, initial_delay=delay, max_delay=delay, jitter=0))
        async def task() -> None:
            await step("reserve", one)
            raise OSError("between steps")

        run = TaskRun(task)
        run.cancel(at=0.2)
        with pytest.raises(TaskCancelledError):
            run.execute()
        assert run.elapsed <= delay


class TestChildrenInMemory:
    def test_a_child_that_is_not_scripted_backs_off_in_the_time_of_its_parent(self):
        failures = [ConnectionError("not yet")] * 2

        async def shoot() -> str:
            if failures:
                raise failures.pop()
            return "reel"

        @async_task(retry_policy=RetryPolicy(initial_delay=600, max_delay=600, jitter=0))
        async def child() -> str:
            await sleep("first", 600)
            return await step("shoot", shoot)

        @async_task
        async def parent() -> str:
            return await step.with_options(timeout=3600)("child", child.run)

        run = TaskRun(parent)
        assert run.execute() == "reel"
        assert 1800 <= run.elapsed < 1801
