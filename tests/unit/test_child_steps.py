"""A task as a step of another, in memory: what the parent asks of its child's task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from temporal_async_task import (
    RetryPolicy,
    ServerUnavailableError,
    StepFailedError,
    StepState,
    TaskCancelledError,
    TaskConflictError,
    TaskNotFoundError,
    TaskResult,
    TaskStatus,
    async_task,
    step,
    testing,
)
from temporal_async_task.engine.carrier import RunSettings
from temporal_async_task.engine.outcome import Cancelled, Parked
from temporal_async_task.testing import TaskRun

AWAY = ServerUnavailableError("The Temporal server at localhost:7233 does not answer.")


class Film:
    """A task whose runs are somewhere else. They go on until the test says that they are ready."""

    name = "film"
    result_type = str

    def __init__(self) -> None:
        self.runs: dict[str, TaskResult[str]] = {}
        self.asked: list[str] = []
        self.params: dict[str, Any] = {}
        self.on_cancel: list[Callable[[], Awaitable[None]]] = []
        self.on_resume: list[Callable[[], Awaitable[None]]] = []
        self.is_ready = False
        self.is_broken = False
        self.refuses_ids = False

    async def __call__(self, params: Any = None) -> str:
        raise AssertionError(f"run here, with {params}")

    async def run(self, params: Any = None, **options: Any) -> str:
        raise AssertionError(f"called, with {params} and {options}")

    async def submit(self, params: Any = None, *, task_id: str) -> str:
        self.asked.append("submit")
        if self.refuses_ids or self.params.setdefault(task_id, params) != params:
            raise TaskConflictError(f"The task id {task_id!r} is in use, by another run.")
        self.set(task_id, TaskStatus.PROCESSING)
        return task_id

    async def get_status(self, task_id: str) -> TaskResult[str]:
        if task_id not in self.runs:
            raise TaskNotFoundError(f"There is no run {task_id!r} of task 'film'.")
        if self.is_broken:
            self.set(task_id, TaskStatus.FAILED, error_type="OSError", error="503")
        if self.is_ready and self.runs[task_id].status is TaskStatus.PROCESSING:
            self.set(task_id, TaskStatus.COMPLETED, result="reel")
        return self.runs[task_id]

    async def cancel(self, task_id: str, reason: str = "") -> None:
        self.asked.append("cancel")
        if self.on_cancel:
            await self.on_cancel.pop(0)()
        self.set(task_id, TaskStatus.FAILED, error_type="TaskCancelledError", error=reason)

    async def resume(self, task_id: str) -> str:
        self.asked.append("resume")
        if self.on_resume:
            await self.on_resume.pop(0)()
        self.set(task_id, TaskStatus.PROCESSING)
        return task_id

    def set(self, task_id: str, status: TaskStatus, **fields: Any) -> None:
        self.runs[task_id] = TaskResult(task_id=task_id, status=status, **fields)


async def fails() -> None:
    raise AWAY


@pytest.fixture(autouse=True)
def _children_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """``TaskRun`` would run a child on the spot, as there is no server."""

    def settings(**options: Any) -> RunSettings:
        return replace(RunSettings(**options), local=False)

    monkeypatch.setattr(testing, "RunSettings", settings)


@pytest.fixture
def film() -> Film:
    return Film()


def parent_of(film: Film, **options: Any) -> Any:
    @async_task(retry_policy=RetryPolicy(max_retries=3, initial_delay=10, jitter=0))
    async def parent() -> str:
        try:
            return await step("film", film.run, "a cat", **options)
        except asyncio.CancelledError:
            await step("release", release)
            raise

    return parent


async def release() -> None:
    pass


class TestCancelling:
    def cancelled(self, run: TaskRun[str]) -> None:
        run.cancel(at=10, reason="changed my mind")
        with pytest.raises(TaskCancelledError, match="changed my mind"):
            run.execute(max_attempts=100)
        assert run.calls_of("release") == 1

    def test_a_child_is_cancelled_with_its_parent(self, film: Film):
        self.cancelled(TaskRun(parent_of(film)))
        [child] = film.runs.values()
        assert (child.error_type, child.error) == ("TaskCancelledError", "changed my mind")
        assert film.asked == ["submit", "cancel"]

    def test_it_is_asked_again_until_it_gets_through_and_the_parent_cleans_up_as_ever(self, film: Film):
        film.on_cancel = [fails] * 8
        run: TaskRun[str] = TaskRun(parent_of(film))
        self.cancelled(run)
        [child] = film.runs.values()
        assert child.error_type == "TaskCancelledError"
        assert film.asked == ["submit"] + ["cancel"] * 9

    def test_between_two_tries_no_worker_is_held(self, film: Film):
        film.on_cancel = [fails] * 8
        run: TaskRun[str] = TaskRun(parent_of(film))
        self.cancelled(run)
        assert run.elapsed > 60  # which is what an attempt may spend on its cleanup
        assert all(attempt.ended - attempt.began < 2 for attempt in run.attempts)
        assert isinstance(run.attempts[-1].outcome, Cancelled)

    def test_so_is_each_of_several(self, film: Film):
        @async_task
        async def parent() -> list[str]:
            try:
                return await asyncio.gather(*(step(name, film.run, name) for name in "abc"))
            except asyncio.CancelledError:
                await step("release", release)
                raise

        film.on_cancel = [fails] * 8
        self.cancelled(TaskRun(parent))
        assert [child.error_type for child in film.runs.values()] == ["TaskCancelledError"] * 3

    def test_a_call_that_hangs_is_left_and_made_again(self, film: Film):
        async def hangs() -> None:
            await asyncio.sleep(1_000)

        film.on_cancel = [hangs]
        run: TaskRun[str] = TaskRun(parent_of(film))
        self.cancelled(run)
        [child] = film.runs.values()
        assert child.error_type == "TaskCancelledError"
        assert run.elapsed < 30

    def test_it_is_cancelled_by_the_next_worker_if_the_first_is_gone_before_that(self, film: Film):
        async def hangs() -> None:
            await asyncio.sleep(50)
            await fails()

        film.on_cancel = [hangs]
        run: TaskRun[str] = TaskRun(parent_of(film))
        run.interrupt(at=15)
        self.cancelled(run)
        [child] = film.runs.values()
        assert child.error_type == "TaskCancelledError"

    def test_a_worker_that_drains_meanwhile_gives_the_attempt_back_once_the_call_has_ended(self, film: Film):
        async def takes_long() -> None:
            await asyncio.sleep(8)
            await fails()

        film.on_cancel = [takes_long]
        run: TaskRun[str] = TaskRun(parent_of(film))
        run.drain(at=15)
        self.cancelled(run)
        *_, handed_over, _ = run.attempts
        assert isinstance(handed_over.outcome, Parked)
        assert handed_over.ended == pytest.approx(18)

    def test_a_child_that_was_never_submitted_needs_no_cancelling(self, film: Film):
        async def is_unknown() -> None:
            raise TaskNotFoundError("There is no such run.")

        film.on_cancel = [is_unknown]
        run: TaskRun[str] = TaskRun(parent_of(film))
        self.cancelled(run)
        assert film.asked == ["submit", "cancel"]


class TestIdsInUse:
    def test_an_id_that_stands_for_another_run_fails_the_step_for_good(self, film: Film):
        film.params["in-use"] = "a dog"
        film.set("in-use", TaskStatus.PROCESSING)
        run: TaskRun[str] = TaskRun(parent_of(film, task_id="in-use"))
        with pytest.raises(StepFailedError, match="TaskConflictError"):
            run.execute(max_attempts=100)
        assert film.asked == ["submit"]
        [record] = run.journal
        assert record.child is None  # it is nobody's to cancel or to resume

    def test_a_child_of_the_steps_own_is_taken_as_an_attempt_that_was_lost_has_submitted_it(self, film: Film):
        takes = iter(range(1, 9))

        @async_task
        async def parent() -> str:
            return await step("film", film.run, f"take {next(takes)}")

        film.is_ready = True
        run = TaskRun(parent)
        run.on("film").loses_worker(when="after")  # before it was saved that there is a child
        assert run.execute() == "reel"
        assert list(film.params.values()) == ["take 1"]

    def test_so_it_is_not_if_the_step_runs_another_task_since(self, film: Film):
        run: TaskRun[str] = TaskRun(parent_of(film))
        film.refuses_ids = True
        with pytest.raises(StepFailedError, match="TaskConflictError"):
            run.execute(max_attempts=100)


class TestResuming:
    @pytest.fixture
    def resumed(self, film: Film) -> TaskRun[str]:
        """A parent that was cancelled, with its child, and goes on."""
        first: TaskRun[str] = TaskRun(parent_of(film))
        first.cancel(at=10)
        with pytest.raises(TaskCancelledError):
            first.execute()
        film.asked.clear()
        run: TaskRun[str] = TaskRun(first.task)
        run.saved = first.journal.reopen().snapshot()
        return run

    def test_a_child_that_was_cancelled_with_its_parent_is_resumed_with_it(self, film: Film, resumed: TaskRun[str]):
        film.is_ready = True
        assert resumed.execute() == "reel"
        assert film.asked == ["resume"]

    def test_a_child_that_has_failed_is_resumed_though_its_step_is_one_of_at_most_once(self, film: Film):
        @async_task
        async def parent() -> str:
            return await step.with_options(at_most_once=True)("film", film.run, "a cat")

        first: TaskRun[str] = TaskRun(parent)
        film.is_broken = True
        with pytest.raises(StepFailedError, match="TaskFailedError"):
            first.execute(max_attempts=100)
        film.is_broken, film.is_ready = False, True
        film.asked.clear()
        resumed: TaskRun[str] = TaskRun(parent)
        resumed.saved = first.journal.reopen().snapshot()
        assert resumed.execute() == "reel"
        assert film.asked == ["resume"]

    @pytest.mark.parametrize("redo", [(), ("film",)])
    def test_a_child_that_has_failed_while_its_parent_was_not_up_is_resumed_with_it(self, film: Film, redo: Any):
        first: TaskRun[str] = TaskRun(parent_of(film))
        with pytest.raises(RuntimeError, match="has not ended"):
            first.execute(max_attempts=3)  # and then it was terminated, while it waited for the child
        assert [record.state for record in first.journal] == [StepState.WAITING]
        [task_id] = film.runs
        film.set(task_id, TaskStatus.FAILED, error_type="OSError", error="503")
        film.is_ready = True
        film.asked.clear()
        resumed: TaskRun[str] = TaskRun(first.task)
        resumed.saved = first.journal.reopen(redo).snapshot()
        assert resumed.execute() == "reel"
        assert film.asked == ["resume"]

    def test_a_child_that_somebody_else_resumes_first_is_waited_for(self, film: Film, resumed: TaskRun[str]):
        async def resumed_elsewhere() -> None:
            [task_id] = film.runs
            film.set(task_id, TaskStatus.PROCESSING)
            film.is_ready = True
            raise TaskConflictError("It was resumed by somebody else.")

        film.on_resume = [resumed_elsewhere]
        assert resumed.execute() == "reel"
        assert film.asked == ["resume"]
