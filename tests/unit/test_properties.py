"""Whatever dies, and whenever: a checkpointed step is never called again, and the run ends as it would have anyway.

Bodies and their misfortunes are generated; what must come out of them is told by the generated plan alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from temporal_async_task import (
    RetryPolicy,
    StepFailedError,
    StepOutcomeUnknownError,
    StepState,
    TaskCancelledError,
    async_task,
    current_run,
    poll,
    sleep,
    step,
)
from temporal_async_task.engine.attempt import CANCEL_PATIENCE
from temporal_async_task.engine.journal import Journal, Snapshot
from temporal_async_task.engine.outcome import Superseded
from temporal_async_task.engine.runner import Runner
from temporal_async_task.testing import TaskRun, When

settings.register_profile(
    "engine",
    max_examples=200,
    deadline=None,  # the first example pays for imports
    print_blob=True,  # a failure on CI is repeated here with @reproduce_failure
    suppress_health_check=[HealthCheck.too_slow],
)
engine = settings(settings.get_profile("engine"))

MAX_RETRIES = 3

# What a body does ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A step."""

    duration: float = 0.0
    failures: int = 0
    """Calls that fail, before one would succeed."""
    sync: bool = False
    at_most_once: bool = False


@dataclass(frozen=True)
class Poll:
    """A poll; its last answer is the result."""

    answers: tuple[Literal["not yet", "fails"], ...] = ()
    duration: float = 0.0
    every: float = 5.0


@dataclass(frozen=True)
class Sleep:
    duration: float = 0.0


@dataclass(frozen=True)
class Think:
    """The body's own wait, no step."""

    duration: float = 0.0


@dataclass(frozen=True)
class Trip:
    """The body itself fails here, once."""


@dataclass(frozen=True)
class Many:
    """Some of these, one after the other or all at once."""

    how: Literal["in turn", "gather", "group"]
    parts: tuple[Part, ...]


Part = Call | Poll | Sleep | Think | Trip | Many

# Moments are few, so that things often happen at the same one.
moments = st.sampled_from([0.0, 0.25, 1.0, 2.0, 5.0, 10.0, 20.0])
failures = st.sampled_from([0, 0, 0, 1, MAX_RETRIES, 99])
answers = st.lists(st.sampled_from(["not yet", "not yet", "fails"]), max_size=4).map(tuple)
leaves = st.one_of(
    st.builds(Call, duration=moments, failures=failures, at_most_once=st.sampled_from([False, False, True])),
    st.builds(Call, failures=failures, sync=st.just(True), at_most_once=st.booleans()),  # sync code takes no time here
    st.builds(
        Poll,
        answers=answers.filter(lambda answers: answers.count("fails") <= MAX_RETRIES),
        duration=moments,
        every=st.sampled_from([0.5, 5.0]),
    ),
    st.builds(Sleep, duration=moments),
    st.builds(Think, duration=moments),
)
bodies = st.recursive(
    leaves,
    lambda parts: st.builds(
        Many,
        how=st.sampled_from(["in turn", "gather", "group"]),
        parts=st.lists(parts, min_size=1, max_size=4).map(tuple),
    ),
    max_leaves=8,
)
# Between steps, when none is in flight: so it is no reason for another call.
tripping = st.builds(
    Many,
    how=st.just("in turn"),
    parts=st.lists(bodies | st.just(Trip()), min_size=2, max_size=4)
    .filter(lambda parts: 0 < parts.count(Trip()) <= MAX_RETRIES)
    .map(tuple),
)
bodies |= tripping
policies = st.sampled_from([0.0, 0.5, 2.0, 10.0]).map(
    lambda delay: RetryPolicy(max_retries=MAX_RETRIES, initial_delay=delay, max_delay=60, jitter=0)
)


GAVE_UP, UNKNOWN = "gave up", "unknown"


def steps_of(part: Part, path: str = "s") -> dict[str, Call | Poll | Sleep]:
    """The steps of a body, by their keys."""
    match part:
        case Call() | Poll() | Sleep():
            return {path: part}
        case Many(_, parts):
            found: dict[str, Call | Poll | Sleep] = {}
            for n, inner in enumerate(parts):
                found |= steps_of(inner, f"{path}.{n}")
            return found
        case _:
            return {}


def calls_of(part: Part) -> dict[str, Call | Poll]:
    """The calls of a body, by their keys."""
    return {key: plan for key, plan in steps_of(part).items() if not isinstance(plan, Sleep)}


def thinks(part: Part) -> float:
    """Seconds that a body spends in awaits of its own, at most."""
    match part:
        case Think(duration):
            return duration
        case Many(_, parts):
            return sum(map(thinks, parts))
        case _:
            return 0.0


def released(key: str) -> str:
    """The key of the step by which a body cleans up after another."""
    return f"release {key}"


def result_of(part: Part, path: str = "s") -> Any:
    """What a body returns if nothing dies."""
    match part:
        case Call(failures=failures, at_most_once=at_most_once):
            return GAVE_UP if failures > (0 if at_most_once else MAX_RETRIES) else result_of_call(path)
        case Poll():
            return result_of_call(path)
        case Many(_, parts):
            return [result_of(inner, f"{path}.{n}") for n, inner in enumerate(parts)]
        case _:
            return None


def result_of_call(key: str) -> str:
    return f"result of {key}"


def needed(plan: Call | Poll) -> int:
    """The calls that a step needs if nothing dies."""
    if isinstance(plan, Poll):
        return len(plan.answers) + 1
    return 1 if plan.at_most_once else min(plan.failures, MAX_RETRIES) + 1


# What goes wrong -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Misfortunes:
    """When the worker is lost, drained or interrupted: at virtual times, or at the call of a step."""

    lost_at: tuple[float, ...] = ()
    drained_at: tuple[float, ...] = ()
    interrupted_at: tuple[float, ...] = ()
    lost_in: tuple[tuple[int, When], ...] = ()
    """Number of a step, and when in its call."""


some_times = st.lists(st.integers(0, 160).map(lambda quarters: quarters / 4) | moments, max_size=3).map(tuple)
misfortunes = st.builds(
    Misfortunes,
    lost_at=some_times,
    drained_at=some_times,
    interrupted_at=some_times,
    # With lost_at at most 6, which is under the limit of a step's lost workers.
    lost_in=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["before", "after", "saved"])), max_size=3).map(
        tuple
    ),
)

# The run ---------------------------------------------------------------------------------------------------

Answer = Literal["fails", "not yet", "done"]


@dataclass
class World:
    """The API that the steps call. It remembers what it answered, whether or not the engine ever heard of it."""

    plan: dict[str, Call | Poll]
    answers: list[tuple[str, int, Answer]] = field(default_factory=list[tuple[str, int, Answer]])
    """Key, attempt and answer of each call that came to its end."""
    tripped: set[str] = field(default_factory=set[str])
    """Where the body has failed."""

    def trip(self, path: str) -> None:
        """Fail, the first time."""
        if path not in self.tripped:
            self.tripped.add(path)
            raise OSError(f"the body trips at {path}")

    def call(self, key: str) -> Callable[[], Any]:
        """What the step ``key`` calls."""
        plan = self.plan[key]

        async def ask() -> str | None:
            await asyncio.sleep(plan.duration)
            return self.answer(key)

        def ask_at_once() -> str | None:
            return self.answer(key)

        return ask_at_once if isinstance(plan, Call) and plan.sync else ask

    def answer(self, key: str) -> str | None:
        plan = self.plan[key]
        script: tuple[Answer, ...] = ("fails",) * plan.failures if isinstance(plan, Call) else plan.answers
        number = sum(answered == key for answered, _, _ in self.answers)
        answer = script[number] if number < len(script) else "done"
        self.answers.append((key, current_run().attempt, answer))
        if answer == "fails":
            raise OSError(f"{key} is down")
        return result_of_call(key) if answer == "done" else None

    def answered(self, key: str, *answers: Answer, attempt: int | None = None) -> int:
        """How many calls of a step were answered so."""
        return sum(k == key and a in answers and attempt in {None, n} for k, n, a in self.answers)


class WatchedRun(TaskRun[Any]):
    """A run whose every stored journal is looked at, and whose worker can be lost at any time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls_when_finished: dict[str, int] = {}
        """Of each step that a stored journal has as completed: its calls until then."""
        self.forgotten: set[str] = set()
        """Steps that were completed in a stored journal, and not in a later one."""
        self.most_failures = 0
        """The highest count of failures in any stored journal."""
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "saved" and value is not None:
            self.look_at(value)

    def look_at(self, snapshot: Snapshot) -> None:
        journal = Journal.restore(snapshot)
        done = {record.key for record in journal.done()}
        self.forgotten |= self.calls_when_finished.keys() - done
        for key in done:
            self.calls_when_finished.setdefault(key, self.calls_of(key))
        self.most_failures = max([self.most_failures, *(record.failures for record in journal)])

    def is_at_work(self, at: float) -> bool:
        """Whether an attempt was under way, maybe."""
        return any(attempt.began <= at <= attempt.ended for attempt in self.attempts)

    def lose_worker(self, *, at: float) -> None:
        self._timeline.append((at, lambda: self._tell(Runner.supersede)))


def run_of(body: Part, policy: RetryPolicy, fate: Misfortunes, release: Call | None = None) -> tuple[WatchedRun, World]:
    """A run of a generated body, ready to be executed.

    Args:
        body: The body.
        policy: The task's.
        fate: What goes wrong.
        release: What it calls after each step that is cancelled.
    """
    world = World(calls_of(body) | ({released(key): release for key in steps_of(body)} if release else {}))

    async def perform(part: Part, path: str) -> Any:
        try:
            return await do(part, path)
        except asyncio.CancelledError:
            if released(path) in world.plan:
                await step(released(path), world.call(released(path)))
            raise

    async def do(part: Part, path: str) -> Any:
        match part:
            case Call(at_most_once=at_most_once):
                try:
                    return await step.with_options(at_most_once=at_most_once)(path, world.call(path))
                except StepOutcomeUnknownError:
                    return UNKNOWN
                except StepFailedError:
                    return GAVE_UP
            case Poll(every=every):
                return await poll(path, world.call(path), every=every)
            case Sleep(duration):
                return await sleep(path, duration)
            case Think(duration):
                return await asyncio.sleep(duration)
            case Trip():
                return world.trip(path)
            case Many("in turn", parts):
                return [await perform(inner, f"{path}.{n}") for n, inner in enumerate(parts)]
            case Many("gather", parts):
                return await asyncio.gather(*(perform(inner, f"{path}.{n}") for n, inner in enumerate(parts)))
            case Many(_, parts):
                async with asyncio.TaskGroup() as group:
                    made = [group.create_task(perform(inner, f"{path}.{n}")) for n, inner in enumerate(parts)]
                return [task.result() for task in made]

    @async_task(retry_policy=policy)
    async def task() -> Any:
        return await perform(body, "s")

    run = WatchedRun(task)
    for at in fate.lost_at:
        run.lose_worker(at=at)
    for at in fate.drained_at:
        run.drain(at=at)
    for at in fate.interrupted_at:
        run.interrupt(at=at)
    keys = list(world.plan)
    for number, when in fate.lost_in:
        if number < len(keys):
            run.on(keys[number]).loses_worker(when=when)
    return run, world


# What must hold --------------------------------------------------------------------------------------------


def fits(result: Any, expected: Any, part: Part) -> bool:
    """Whether a result is the expected one; of a step that is called at most once the outcome may be unknown."""
    if isinstance(part, Many):
        return len(result) == len(expected) and all(map(fits, result, expected, part.parts))
    may_be_unknown = isinstance(part, Call) and part.at_most_once
    return result == expected or (may_be_unknown and result == UNKNOWN)


def check_no_finished_step_was_called_again(run: WatchedRun) -> None:
    assert not run.forgotten
    assert {key: run.calls_of(key) for key in run.calls_when_finished} == run.calls_when_finished


def check_calls_were_repeated_for_a_reason(run: WatchedRun, world: World, fate: Misfortunes) -> None:
    """Another call follows a failure or a poll's "not yet"; or else an attempt that was cut short, once."""
    for key in world.plan:
        called_in = sorted({call.attempt for call in run.calls if call.key == key})
        for attempt in called_in:
            calls = sum(call.key == key and call.attempt == attempt for call in run.calls)
            without_reason = calls - world.answered(key, "fails", "not yet", attempt=attempt)
            assert without_reason <= 1, f"{key} was called again within attempt {attempt}"
            if without_reason and attempt != called_in[-1]:
                cut = run.attempts[attempt - 1]
                assert isinstance(cut.outcome, Superseded) or cut.ended in fate.interrupted_at, (
                    f"{key} was called again after attempt {attempt}, which nothing had cut short: {cut}"
                )


def check_calls_at_most_once(run: WatchedRun, world: World) -> None:
    for key, plan in world.plan.items():
        if isinstance(plan, Call) and plan.at_most_once:
            assert run.calls_of(key) <= 1


@engine
@given(bodies, policies, misfortunes)
def test_whatever_dies_the_run_ends_as_without_and_no_finished_step_is_called_again(
    body: Part, policy: RetryPolicy, fate: Misfortunes
):
    run, world = run_of(body, policy, fate)
    result = run.execute(max_attempts=1_000)
    event(f"attempts: {min(len(run.attempts), 10)}")
    assert fits(result, result_of(body), body)
    check_no_finished_step_was_called_again(run)
    check_calls_were_repeated_for_a_reason(run, world, fate)
    check_calls_at_most_once(run, world)
    assert run.most_failures <= MAX_RETRIES + 1
    for key, plan in world.plan.items():
        if isinstance(plan, Call) and plan.failures <= MAX_RETRIES and not plan.at_most_once:
            assert world.answered(key, "fails") == plan.failures


@engine
@given(bodies, policies, some_times)
def test_draining_workers_begin_no_call_and_cost_none(body: Part, policy: RetryPolicy, drained_at: tuple[float, ...]):
    run, world = run_of(body, policy, Misfortunes(drained_at=drained_at))
    assert run.execute(max_attempts=1_000) == result_of(body)
    for key, plan in world.plan.items():
        assert run.calls_of(key) == needed(plan)
    for attempt in run.attempts:
        for at in drained_at:
            if attempt.began < at:
                assert all(call.at <= at for call in run.calls if call.attempt == attempt.number)


@engine
@given(bodies, policies, some_times, some_times)
def test_what_is_handed_over_is_counted_exactly(
    body: Part, policy: RetryPolicy, drained_at: tuple[float, ...], interrupted_at: tuple[float, ...]
):
    run, world = run_of(body, policy, Misfortunes(drained_at=drained_at, interrupted_at=interrupted_at))
    run.execute(max_attempts=1_000)
    assert run.saved is not None or not len(world.plan)
    for key, plan in world.plan.items():
        record = run.journal.get(key)
        assert record is not None
        answered = world.answered(key, "fails", "not yet", "done")
        if isinstance(plan, Call) and plan.sync:  # it may answer in its thread when nobody listens any more
            assert record.calls <= answered
        else:
            assert record.calls == answered


@engine
@given(bodies, policies, misfortunes, some_times.filter(bool))
def test_after_a_cancellation_nothing_more_is_called(
    body: Part, policy: RetryPolicy, fate: Misfortunes, cancelled_at: tuple[float, ...]
):
    run, world = run_of(body, policy, fate)
    for at in cancelled_at:
        run.cancel(at=at)
    try:
        result = run.execute(max_attempts=1_000)
    except TaskCancelledError:
        event("cancelled")
    else:
        assert fits(result, result_of(body), body)
    assert all(call.at <= min(cancelled_at) for call in run.calls)
    check_no_finished_step_was_called_again(run)
    check_calls_at_most_once(run, world)


@engine
@given(
    bodies,
    policies,
    misfortunes,
    some_times.filter(bool),
    st.builds(Call, duration=st.sampled_from([0.0, 0.25, 5.0]), failures=st.sampled_from([0, 0, 1])),
)
def test_every_open_step_of_a_cancelled_run_is_told_and_may_clean_up(
    body: Part, policy: RetryPolicy, fate: Misfortunes, cancelled_at: tuple[float, ...], release: Call
):
    assume(thinks(body) < CANCEL_PATIENCE)
    run, _ = run_of(body, policy, fate, release)
    for at in cancelled_at:
        run.cancel(at=at)
    try:
        run.execute(max_attempts=1_000)
    except TaskCancelledError:
        is_open = {StepState.RUNNING, StepState.RETRYING, StepState.WAITING}
        left_open = {record.key for record in run.journal if record.is_begun and record.state in is_open}
        event(f"open: {min(len(left_open), 3)}")
        # At work, a body may be told in an await of its own, before it has come to its open step again.
        if not thinks(body) or not run.is_at_work(min(cancelled_at)):
            assert {released(key) for key in left_open} <= {record.key for record in run.journal.done()}
    releases = {released(key) for key in steps_of(body)}
    assert all(call.at <= min(cancelled_at) or call.key in releases for call in run.calls)
    check_no_finished_step_was_called_again(run)
