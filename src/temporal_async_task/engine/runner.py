"""The runner: drives a task's body against its journal, for one attempt. It knows nothing of Temporal.

How an attempt ends, by what is true first:

================================  ==========================  ===================================================
what happens                      outcome                     what the carrier does with it
================================  ==========================  ===================================================
the body returns                  ``Completed``               completes the run with the result
the body raises, for good         ``Failed``                  fails the run, the journal in the failure
the body raises, may be retried   ``Parked`` (its backoff)    gives the attempt back until then
all steps wait, none in flight    ``Parked`` (earliest due)   gives the attempt back until then
... later than the deadline       ``Failed``                  fails the run
the deadline passes               ``Failed``                  fails the run
the worker drains, none in flight ``Parked`` (now)            gives the attempt back at once
its grace is over                 ``Parked`` (now)            the same; a call in flight is abandoned
cancelled, the body has left      ``Cancelled``               ends the run as cancelled
cancelled, its bound is over      ``Cancelled``               the same; the body is abandoned
another attempt has begun         ``Superseded``              nothing: it may not write any more
================================  ==========================  ===================================================

Whenever the attempt ends before its body, the body is unwound (``unwind.py``), and ``step()`` gives it nothing more.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from temporal_async_task.engine.journal import ErrorInfo, Journal, Snapshot, StepRecord
from temporal_async_task.engine.unwind import Unwind, scope
from temporal_async_task.errors import (
    AsyncTaskError,
    DuplicateStepError,
    PayloadTooLargeError,
    PollTimeoutError,
    ResultError,
    RetryableError,
    StepFailedError,
    StepOutcomeUnknownError,
    StepUsageError,
    TaskTimeoutError,
    WaitTimeoutError,
    WorkerLostError,
)
from temporal_async_task.retry import RetryPolicy, decide
from temporal_async_task.status import StepState
from temporal_async_task.steps import (
    RunInfo,
    StepCall,
    StepInfo,
    check_text,
    idempotency_key,
    runner_var,
    step_var,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
    from concurrent.futures import Executor

logger = logging.getLogger("temporal_async_task")

IN_PLACE = 1.0
"""Seconds. A shorter wait is spent in the attempt: the server's own timer has a floor of about a second."""
NOTE_INTERVAL = 1.0
"""Seconds between two writes of what is not awaited: running steps, progress."""
UNWIND_TIMEOUT = 3.0
"""Seconds that a body may take over its ``finally`` blocks when an attempt ends before it."""
CLEANUP_TIMEOUT = 60.0
"""Seconds that a cancelled body may take over its cleanup."""
_SETTLE_TICKS = 16
"""Turns of the event loop that a body gets to ask for its next step, before its attempt is given back. A result
passes a few layers on its way (``gather``, ``TaskGroup``, a queue), each of which takes a turn or two."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The body returned; ``result`` is encoded."""

    result: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The run is over, without a result."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Parked:
    """The attempt is given back until ``due`` (seconds since the epoch), or until one of ``events`` comes."""

    due: float
    reason: str
    events: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The body has left after its cancellation."""

    reason: str


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another attempt has begun."""


Outcome = Completed | Failed | Parked | Cancelled | Superseded


@dataclass(frozen=True, slots=True)
class _Wait:
    """What a step waits for."""

    due: float
    event: str | None = None
    """The key of an event that would end the wait before."""


_NEVER = float("inf")


class Values(Protocol):
    """Encodes and decodes what the user's code passes around."""

    async def encode(self, value: Any) -> bytes: ...

    async def decode(self, data: bytes, type_hint: Any) -> Any: ...


class Carrier(Protocol):
    """What keeps the journal, and tells the time."""

    def now(self) -> float:
        """Seconds since the epoch, by a clock that all attempts of the run share."""
        ...

    async def checkpoint(self, snapshot: Snapshot) -> None:
        """Make the journal durable; it is when this returns.

        Never raises: an attempt that may not write any more is told by ``Runner.supersede()``, and this does not
        return.
        """
        ...

    def note(self, snapshot: Snapshot) -> None:
        """Make the journal durable some time soon."""
        ...


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a runner has to know of its task and its run."""

    task_id: str
    task_name: str
    origin: str
    """A UUID made when the run was submitted; idempotency keys derive from it."""
    retry_policy: RetryPolicy
    step_timeout: float | None = None
    deadline: float | None = None
    timeout: float | None = None
    max_lost_attempts: int = 10
    in_place: float = IN_PLACE
    attempt: int = 1
    params: Any = None


class Runner:
    """One attempt at one run: the engine's side of ``steps.StepRunner``."""

    def __init__(
        self,
        settings: RunSettings,
        journal: Journal,
        values: Values,
        carrier: Carrier,
        *,
        threads: Executor | None = None,
        return_type: Callable[[Callable[..., Any]], Any] = lambda _: None,
        cancelled: bool = False,
        events: Mapping[str, bytes] | None = None,
    ) -> None:
        self.settings = settings
        self.journal = journal
        self.unwinding = False
        self.info = RunInfo(settings.task_id, settings.task_name, settings.attempt, settings.params)
        self._values = values
        self._carrier = carrier
        self._threads = threads
        self._return_type = return_type
        self._cancelled = cancelled  # requested; ...
        self._cancel_delivered = False  # ... and raised in the body
        self._cancel_arriving: asyncio.Task[None] | None = None
        self._draining = False
        self._moves = 0  # changes of the next, so far
        self._active = 0  # steps that are in flight: being answered, called or checkpointed
        self._waiting: dict[asyncio.Future[None], _Wait] = {}  # steps that wait, and for what
        self._events = events or {}
        self._asked: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._settling: asyncio.Task[None] | None = None
        self._body_was_first = False
        self._timers: list[asyncio.TimerHandle] = []
        self._note_timer: asyncio.TimerHandle | None = None

    # The attempt as a whole

    async def run(self, body: Callable[[], Awaitable[Any]]) -> Outcome:
        """Run the body until it, or the attempt, ends."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Outcome] = self._loop.create_future()
        if self.settings.deadline is not None:
            left = self.settings.deadline - self._carrier.now()
            self._timers.append(self._loop.call_later(max(left, 0), self._time_out))
        try:
            return await self._run(body)
        finally:
            for timer in self._timers:
                timer.cancel()
            if self._note_timer:
                self._note_timer.cancel()

    async def _run(self, body: Callable[[], Awaitable[Any]]) -> Outcome:
        if self._cancelled and not len(self.journal):
            # No step was begun, so there is nothing to clean up; in a task without steps, running the body once
            # more would make its call again.
            return Cancelled(self.journal.cancel_reason or "")
        if self.journal.body.lost >= self.settings.max_lost_attempts:
            return Failed(_recorded_failure(self._lost(self.journal.body)))
        while True:
            outcome = await self._run_body(body)
            await self._unwind()
            if not isinstance(outcome, Parked) or self._ended.done() or self._draining:
                return outcome
            # The body itself failed: what waits for a step has ended the attempt.
            wait = outcome.due - self._carrier.now()
            if wait >= self.settings.in_place:
                return outcome
            await asyncio.wait((self._ended,), timeout=max(wait, 0))
            if self._ended.done():
                return self._ended.result()
            if self._cancelled:
                return Cancelled(self.journal.cancel_reason or "")
            self.unwinding = False
            self._asked.clear()

    async def _run_body(self, body: Callable[[], Awaitable[Any]]) -> Outcome:
        record = self.journal.body
        if record.due is not None and not self._cancelled:
            wait = record.due - self._carrier.now()
            if wait >= self.settings.in_place:  # given back early: by a server that was restarted, say
                return self._parked(record.due, "backoff")
            await asyncio.sleep(max(wait, 0))
        self.body_step = self._step_info(self.settings.task_name, record)
        context = contextvars.copy_context()
        context.run(scope.set, self)
        context.run(runner_var.set, self)
        self._body = self._loop.create_task(_awaited(body), context=context, name=f"task {self.settings.task_name!r}")
        self._body.add_done_callback(self._note_body_done)
        self.adopt(self._body)
        both = (self._body, self._ended)
        timeout = self.settings.step_timeout
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=timeout)
        if not done and not self._asked:
            # A body without steps is itself the step.
            self._body.cancel()
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.done():
                return self._body_failed(TimeoutError(f"no result within the step's timeout of {timeout} s"))
        elif not done:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if self._ended.done() and (not self._body_was_first or isinstance(self._ended.result(), Superseded)):
            return self._ended.result()
        return await self._body_outcome(self._body)

    def _note_body_done(self, _: asyncio.Task[Any]) -> None:
        # What the body does once its attempt has ended is no outcome: it was told to leave.
        self._body_was_first = not self._ended.done()

    async def _body_outcome(self, body: asyncio.Task[Any]) -> Outcome:
        if body.cancelled():
            if self._cancel_delivered:
                return Cancelled(self.journal.cancel_reason or "")
            return self._body_failed(RuntimeError("The body was cancelled by its own code (CancelledError)."))
        error = body.exception()
        if error is None:
            try:
                return Completed(await self._values.encode(body.result()))
            except Exception as unfit:
                return Failed(unfit)
        if self._cancel_delivered:
            logger.warning("Task run %s: its cleanup failed", self.settings.task_id, exc_info=error)
            return Cancelled(self.journal.cancel_reason or "")
        return self._body_failed(error)

    def _body_failed(self, error: BaseException) -> Outcome:
        if not isinstance(error, Exception) or isinstance(error, StepFailedError):
            return Failed(error)
        record = self.journal.body
        record.calls += 1
        record.failures += 1
        record.error = ErrorInfo.of(error)
        decision = decide(error, self.settings.retry_policy, record.failures)
        if not decision.retry:
            return Failed(error)
        record.due = self._carrier.now() + decision.delay
        return self._parked(record.due, str(record.error))

    def _parked(self, due: float, reason: str, events: tuple[str, ...] = ()) -> Outcome:
        deadline = self.settings.deadline
        if deadline is not None and due >= deadline:
            if not events:
                return Failed(self._timeout_error())
            due = deadline  # the event may come before
        return Parked(due, reason, events)

    def _timeout_error(self) -> TaskTimeoutError:
        current = ", ".join(repr(record.key) for record in self.journal if record.result is None)
        return TaskTimeoutError(
            f"The task did not finish within its timeout of {self.settings.timeout} s"
            + (f"; it was in step {current}" if current else "")
        )

    # What is asked of the attempt from outside

    def cancel(self, reason: str) -> None:
        """Raise ``CancelledError`` in the body, once; it may clean up with further steps, for a while."""
        if self._cancelled:
            return
        self._cancelled = True
        self.journal.cancel_reason = reason
        self._deliver_cancel()

    def drain(self) -> None:
        """Begin nothing more; the attempt is given back as soon as no step is in flight."""
        self._draining = True
        self._consider_ending()

    def interrupt(self) -> None:
        """Give the attempt back now, whatever is in flight."""
        self._end(Parked(self._carrier.now(), "the worker shut down"))

    def supersede(self) -> None:
        """Another attempt has begun: stop, and write nothing more."""
        self._end(Superseded())

    def _time_out(self) -> None:
        self._end(Failed(self._timeout_error()))

    def _end(self, outcome: Outcome) -> None:
        if not self._ended.done():
            self._ended.set_result(outcome)

    def _deliver_cancel(self) -> None:
        self._cancel_delivered = True
        self._cancel_arriving = self._engine_task(self._settled())
        self._body.cancel()
        over = Cancelled(self.journal.cancel_reason or "")
        self._timers.append(self._loop.call_later(CLEANUP_TIMEOUT, self._end, over))

    # Asyncio tasks that belong to the attempt (unwind.TaskScope)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._disown)

    def _disown(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (self.unwinding or isinstance(task.exception(), Unwind)):
            task.exception()  # seen: asyncio is not to complain of an error that nobody awaits any more

    async def _unwind(self) -> None:
        """Leave what still runs of the attempt's code."""
        self.unwinding = True
        deadline = self._loop.time() + UNWIND_TIMEOUT
        while self._tasks and self._loop.time() < deadline:
            for task in self._tasks:
                task.cancel()
            # In slices: code that swallows the first request is asked again.
            await asyncio.wait(set(self._tasks), timeout=UNWIND_TIMEOUT / 6)
        if self._tasks:
            logger.error(
                "Task run %s: code of task %r goes on after its attempt has ended, and swallows every request to stop",
                self.settings.task_id,
                self.settings.task_name,
            )

    # Steps

    async def step(self, call: StepCall) -> Any:
        """Answer a step from the journal, or make its call. See ``steps.step``."""
        hint = call.options.result_type or self._return_type(call.call)  # refused before the call, if it must be
        with self._in_flight(call.key, "step"):
            record = self.journal.get(call.key) or self._opened(call.key)
            if record.state is StepState.COMPLETED:
                return await self._answer(record, hint)
            if record.state is StepState.FAILED:
                raise _recorded_failure(record)
            await self._drive(call, record)
            return await self._answer(record, hint)

    async def sleep(self, key: str, duration: float) -> None:
        """Wait until ``duration`` seconds after the first ask. See ``steps.sleep``."""
        with self._in_flight(key, "sleep"):
            record = self.journal.get(key) or self._opened(key)
            if record.state is StepState.COMPLETED:
                return
            if record.due is None:
                record.due = self._started(record) + duration
            record.state = StepState.WAITING
            await self._turn(record)
            await self._complete(record, b"")

    async def poll(self, call: StepCall, every: Callable[[int], float], timeout: float | None) -> Any:
        """Call until the answer is not None. See ``steps.poll``."""
        hint = call.options.result_type or self._return_type(call.call)
        with self._in_flight(call.key, "poll"):
            record = self.journal.get(call.key) or self._opened(call.key)
            if record.state is StepState.FAILED:
                raise _recorded_failure(record)
            if record.state is not StepState.COMPLETED:
                await self._poll(call, record, every, timeout)
            return await self._answer(record, hint)

    async def _poll(
        self, call: StepCall, record: StepRecord, every: Callable[[int], float], timeout: float | None
    ) -> None:
        policy = call.options.retry_policy or self.settings.retry_policy
        while True:
            value, pause = await self._poll_once(call, record, policy, patient=timeout is not None)
            if value is not None:
                await self._finish(record, value)
                return
            now = self._carrier.now()
            deadline = _NEVER if timeout is None else self._started(record) + timeout
            if now >= deadline:
                text = f"not ready within {timeout} s, after {record.calls} polls"
                await self._give_up(record, ErrorInfo.named("PollTimeoutError", text))
            record.state = StepState.WAITING
            record.due = min(now + max(every(record.calls), pause), deadline)  # the last poll is at the deadline

    async def _poll_once(
        self, call: StepCall, record: StepRecord, policy: RetryPolicy, *, patient: bool
    ) -> tuple[Any, float]:
        """One call. None if it says so, or if it failed in a way that does not matter to the job; then its backoff."""
        await self._begin(call, record)
        try:
            value = await self._call(call, record)
        except (Unwind, asyncio.CancelledError):
            record.state = StepState.RETRYING
            raise
        except Exception as error:
            record.calls += 1
            record.failures += 1
            record.error = ErrorInfo.of(error)
            # A poll that has a timeout is patient until then with what is worth another try at all.
            counted = min(record.failures, max(policy.max_retries, 1)) if patient else record.failures
            decision = decide(error, policy, counted)
            if not decision.retry:
                await self._give_up(record, record.error, error)
            return None, decision.delay
        record.failures, record.error = 0, None
        if value is None:
            record.calls += 1
        return value, 0.0

    async def wait_for(self, key: str, timeout: float | None, hint: Any) -> Any:
        """Wait for an event from outside. See ``steps.wait_for``."""
        with self._in_flight(key, "wait_for"):
            record = self.journal.get(key) or self._opened(key)
            if record.state is StepState.FAILED:
                raise _recorded_failure(record)
            while record.state is not StepState.COMPLETED:
                now = self._carrier.now()
                started = self._started(record)
                record.due = _NEVER if timeout is None else started + timeout
                record.state = StepState.WAITING
                await self._refuse_cancelled()
                if key in self._events:
                    record.calls = 1
                    await self._complete(record, self._events[key])
                elif now >= record.due:
                    await self._give_up(record, ErrorInfo.named("WaitTimeoutError", f"no event within {timeout} s"))
                else:
                    await self._park(_Wait(record.due, event=key))
            return await self._answer(record, hint)

    def progress(self, fraction: float | None, message: str) -> None:
        """See ``steps.progress``; may be called in any thread."""
        if fraction is not None:
            fraction = None if math.isnan(fraction) else min(max(float(fraction), 0.0), 1.0)
        text = message.encode("utf-8", "backslashreplace").decode()[:500]
        self._loop.call_soon_threadsafe(self._set_progress, fraction, text)

    def _set_progress(self, fraction: float | None, message: str) -> None:
        self.journal.progress = (fraction, message)
        self._note()

    @contextmanager
    def _in_flight(self, key: str, what: str) -> Generator[None]:
        """Count a step as in flight while it is; refuse what cannot be one."""
        if (outer := step_var.get()) is not None:
            raise StepUsageError(
                f"{what}({key!r}) was called inside of step {outer.key!r}. A step is one external call: call it "
                f"directly there, or ask for both steps in the task's body."
            )
        check_text(key, f"The key of a {what}")
        if key in self._asked:
            raise DuplicateStepError(
                f"{what}({key!r}) was asked for before in this run. Keys are unique in a run: number them, as in "
                f"f'{key}-{{n}}'."
            )
        self._refuse_if_ended()
        self._asked.add(key)
        with self.busy():
            yield

    def _opened(self, key: str) -> StepRecord:
        if self._cancelled and not self._cancel_delivered:
            return StepRecord(key)  # it will not begin: the cancellation is raised in its place
        return self.journal.open(key)

    async def _drive(self, call: StepCall, record: StepRecord) -> None:
        """Call until the result is in the journal, or there is no hope of one."""
        policy = call.options.retry_policy or self.settings.retry_policy
        if record.state is StepState.RUNNING and call.options.at_most_once:
            await self._give_up(
                record, ErrorInfo.named("StepOutcomeUnknownError", "its outcome was lost with its worker")
            )
        while True:
            await self._begin(call, record)
            try:
                value = await self._call(call, record)
            except (Unwind, asyncio.CancelledError):
                if not call.options.at_most_once:  # its outcome is unknown now, and stays so
                    record.state = StepState.RETRYING
                raise
            except Exception as error:
                await self._failed(call, record, policy, error)
            else:
                await self._finish(record, value)
                return

    async def _begin(self, call: StepCall, record: StepRecord) -> None:
        """Wait for the step's turn, and note that its call is being made."""
        if record.lost >= self.settings.max_lost_attempts:
            await self._give_up(record, self._lost(record).error)
        await self._turn(record)
        record.state, record.due = StepState.RUNNING, None
        self._started(record)
        if call.options.at_most_once:
            await self._checkpoint()
        else:
            self._note()

    def _started(self, record: StepRecord) -> float:
        """When the step was first begun, which may be now."""
        if record.started is None:
            record.started = self._carrier.now()
        return record.started

    async def _call(self, call: StepCall, record: StepRecord) -> Any:
        timeout = call.options.timeout or self.settings.step_timeout
        limit = asyncio.timeout(timeout)
        token = step_var.set(self._step_info(call.key, record))
        try:
            async with limit:
                return await self.make_call(call)
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"no answer within the step's timeout of {timeout} s") from error
            raise
        finally:
            step_var.reset(token)

    async def make_call(self, call: StepCall) -> Any:
        """Make a step's call. Overridden in tests, to script it."""
        return await self.invoke(call.call, *call.args, **call.kwargs)

    async def invoke(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the user's function: on the event loop if it is async, in a thread if not."""
        if is_async(call):
            return await call(*args, **kwargs)
        context = contextvars.copy_context()
        run = functools.partial(context.run, call, *args, **kwargs)
        result = await self._loop.run_in_executor(self._threads, _without_stop_iteration, run)
        return await result if inspect.isawaitable(result) else result

    async def _finish(self, record: StepRecord, value: Any) -> None:
        record.calls += 1
        try:
            await self._complete(record, await self._values.encode(value))
        except (PayloadTooLargeError, ResultError) as error:
            info = ErrorInfo.named(type(error).__name__, f"Step {record.key!r}: {error}")
            await self._give_up(record, info, error)

    async def _complete(self, record: StepRecord, result: bytes) -> None:
        self.journal.complete(record, result, self._carrier.now())
        await self._checkpoint()

    async def _answer(self, record: StepRecord, hint: Any) -> Any:
        try:
            return await self._values.decode(record.result or b"", hint)
        except ResultError as error:
            # The result itself is in the journal, and stays.
            raise ResultError(f"Step {record.key!r}: {error}") from error

    async def _failed(self, call: StepCall, record: StepRecord, policy: RetryPolicy, error: Exception) -> None:
        record.calls += 1
        record.failures += 1
        record.error = ErrorInfo.of(error)
        decision = decide(error, policy, record.failures)
        if not decision.retry or (call.options.at_most_once and not isinstance(error, RetryableError)):
            await self._give_up(record, record.error, error)
        record.state = StepState.RETRYING
        record.due = self._carrier.now() + decision.delay
        logger.info(
            "Task run %s: step %r failed (%s), to be called again in %.1f s",
            self.settings.task_id,
            record.key,
            record.error,
            decision.delay,
        )
        if self._active > 1:  # else the attempt ends with it, and carries the journal
            self._note(after=0.0)

    def _lost(self, record: StepRecord) -> StepRecord:
        record.error = ErrorInfo.named("WorkerLostError", f"its worker was lost with it {record.lost} times in a row")
        return record

    async def _give_up(self, record: StepRecord, info: ErrorInfo | None, error: Exception | None = None) -> NoReturn:
        """Note that a step has failed for good, durably, and raise it in the body.

        Durably, because the body may act on it: a refund and a later success must not both happen.
        """
        record.state, record.error, record.due = StepState.FAILED, info, None
        record.finished = self._carrier.now()
        await self._checkpoint()
        raise _recorded_failure(record) from error

    def _step_info(self, key: str, record: StepRecord) -> StepInfo:
        return StepInfo(key, record.failures + 1, idempotency_key(self.settings.origin, record.key))

    # Waiting

    async def _turn(self, record: StepRecord) -> None:
        """Wait until the step is due and may be called."""
        while True:
            await self._refuse_cancelled()
            if self._draining:
                await self._park(_Wait(record.due or 0.0))
            wait = (record.due or 0.0) - self._carrier.now()
            if wait <= 0:
                return
            if wait < self.settings.in_place:
                await asyncio.sleep(wait)
            else:
                await self._park(_Wait(record.due or 0.0))

    async def _refuse_cancelled(self) -> None:
        """Raise a cancellation that was asked for before this attempt, in the place of a step."""
        self._refuse_if_ended()
        if self._cancelled and not self._cancel_delivered:
            self._deliver_cancel()
            await self._loop.create_future()  # it is raised here, or where the body awaits this step
        if self._cancel_arriving is not None and not self._cancel_arriving.done():
            # From the body it goes on to its children, a turn of the loop for each level: this may be one of them.
            await asyncio.wait((self._cancel_arriving,))

    async def _park(self, wait: _Wait) -> None:
        """Wait outside of what is in flight: the attempt may end meanwhile, and mostly does."""
        woken: asyncio.Future[None] = self._loop.create_future()
        self._waiting[woken] = wait
        timer = None
        if not self._draining and wait.due != _NEVER:
            timer = self._loop.call_later(max(wait.due - self._carrier.now(), 0), _wake, woken)
        self._move(-1)
        try:
            await woken
        finally:
            self._move(+1)
            del self._waiting[woken]
            if timer:
                timer.cancel()

    def _consider_ending(self) -> None:
        """End the attempt if all of its steps wait and its body asks for no other."""
        if self._active == 0 and self._waiting and self._settling is None:
            self._settling = self._engine_task(self._settle())

    def _engine_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of the engine's own: it is not the body's, and is not unwound with it."""
        context = contextvars.copy_context()
        context.run(scope.set, None)
        return self._loop.create_task(work, context=context)

    async def _settled(self) -> None:
        """Give the body's code its turns of the loop."""
        for _ in range(_SETTLE_TICKS):
            await asyncio.sleep(0)

    async def _settle(self) -> None:
        try:
            moves = -1
            while moves != self._moves:  # not at rest before nothing has happened in all of those turns
                moves = self._moves
                await self._settled()
            if self._active or not self._waiting:
                return
            waits = self._waiting.values()
            due = min(wait.due for wait in waits)
            events = tuple(wait.event for wait in waits if wait.event is not None)
            if self._draining and not events:
                self._end(Parked(max(due, self._carrier.now()), "the worker shut down"))
            else:
                self._end(self._parked(due, self._waiting_reason(), events))
        finally:
            self._settling = None

    def _waiting_reason(self) -> str:
        waiting = [record for record in self.journal if record.due is not None and record.result is None]
        first = min(waiting, key=lambda record: record.due or 0.0, default=None)
        if first is None:
            return "waiting"
        return f"step {first.key!r}: {first.error}" if first.error else f"step {first.key!r} waits"

    def _refuse_if_ended(self) -> None:
        if self.unwinding or self._ended.done():
            raise Unwind

    @contextmanager
    def busy(self) -> Generator[None]:
        """Something is in flight: a step, or a body at work in a thread, where the event loop does not see it."""
        self._move(+1)
        try:
            yield
        finally:
            self._move(-1)

    def _move(self, change: int) -> None:
        self._active += change
        self._moves += 1
        self._consider_ending()

    # Writing

    async def _checkpoint(self) -> None:
        self._refuse_if_ended()
        if self._note_timer:
            self._note_timer.cancel()
            self._note_timer = None
        await self._carrier.checkpoint(self.journal.snapshot())

    def _note(self, *, after: float = NOTE_INTERVAL) -> None:
        """Have the journal written within a second, once, unless a checkpoint comes first."""
        if self._note_timer is None and not self.unwinding:
            self._note_timer = self._loop.call_later(after, self._write_note)

    def _write_note(self) -> None:
        self._note_timer = None
        if not self._ended.done():
            self._carrier.note(self.journal.snapshot())


def is_async(call: Callable[..., Any]) -> bool:
    """Whether a callable is to be called on the event loop."""
    while isinstance(call, functools.partial):
        call = call.func
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


def _recorded_failure(record: StepRecord) -> AsyncTaskError:
    info = record.error or ErrorInfo.named("Exception", "")
    match info.type:
        case "PayloadTooLargeError":
            return PayloadTooLargeError(info.message)
        case "ResultError":
            return ResultError(info.message)
        case "WorkerLostError":
            return WorkerLostError(record.key, record.calls, info.type, info.message)
        case "StepOutcomeUnknownError":
            return StepOutcomeUnknownError(record.key, record.calls, info.type, info.message)
        case "PollTimeoutError":
            return PollTimeoutError(record.key, record.calls, info.type, info.message)
        case "WaitTimeoutError":
            return WaitTimeoutError(record.key, record.calls, info.type, info.message)
        case _:
            return StepFailedError(record.key, record.calls, info.type, info.message)


def _without_stop_iteration(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except StopIteration as error:  # a future cannot carry it (PEP 479)
        raise RuntimeError("the call raised StopIteration") from error


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _awaited(body: Callable[[], Awaitable[Any]]) -> Any:
    return await body()
