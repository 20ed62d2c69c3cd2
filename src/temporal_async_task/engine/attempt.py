"""One attempt at a run: begins the body, waits with it, and ends it. It knows nothing of Temporal.

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
a result cannot be read here      ``Parked``, ``left``        gives the attempt back, to another worker perhaps
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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from temporal_async_task.engine.carrier import Carrier, RunSettings, Values
from temporal_async_task.engine.failures import only_leaf, worker_lost
from temporal_async_task.engine.journal import ErrorInfo, Journal, StepRecord
from temporal_async_task.engine.outcome import NEVER, Cancelled, Completed, Failed, Outcome, Parked, Superseded
from temporal_async_task.engine.results import Results, shielded
from temporal_async_task.engine.signatures import is_async
from temporal_async_task.engine.timing import CallTimeout
from temporal_async_task.engine.unwind import Unwind, apart, doing, scope
from temporal_async_task.errors import (
    PayloadTooLargeError,
    ResultError,
    StepFailedError,
    TaskTimeoutError,
    WorkerLostError,
)
from temporal_async_task.retry import RetryDecision, decide
from temporal_async_task.status import StepState
from temporal_async_task.steps import RunInfo, StepInfo, runner_var

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    from temporal_async_task.steps import StepRunner

logger = logging.getLogger("temporal_async_task")
T = TypeVar("T")

NOTE_INTERVAL = 1.0
"""Seconds, at least, between two writes of what is not awaited: running steps, progress."""
NOTE_DELAY = 0.2
"""Seconds before what is not awaited is written: a step that is quicker costs no more than its checkpoint."""
MAX_LOST_ATTEMPTS = 10
"""That a step, or the body, may lose with their workers, in a row: what kills its worker must not kill all of them."""
UNWIND_TIMEOUT = 3.0
"""Seconds that a body may take over its ``finally`` blocks when an attempt ends before it."""
CLEANUP_TIMEOUT = 60.0
"""Seconds that a cancelled body may take over its cleanup."""
CANCEL_PATIENCE = 10.0
"""Seconds that a cancelled body gets to reach the steps in which it is to be cancelled."""
_CANCEL_DELAY = 0.1  # seconds
_SETTLE_TICKS = 16
"""Turns of the event loop that a body gets to ask for its next step, before its attempt is given back. A result
passes a few layers on its way (``gather``, ``TaskGroup``, a queue), each of which takes a turn or two."""


@dataclass(frozen=True, slots=True)
class Wait:
    """What a step waits for."""

    due: float
    event: str | None = None
    """The key of an event that would end the wait before."""
    unreadable: str | None = None
    """Why this worker cannot read the step's result. Another may."""


class Attempt:
    """The half of ``runner.Runner`` that knows no steps; never made by itself. Used on the users' event loop."""

    def __init__(
        self,
        settings: RunSettings,
        journal: Journal,
        values: Values,
        carrier: Carrier,
        *,
        threads: Executor | None = None,
        events: Mapping[str, bytes] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Outcome] = self._loop.create_future()
        self._body: asyncio.Task[Any] | None = None
        self._body_begun = False
        self.settings = settings
        self.journal = journal
        self.unwinding = False
        self._place = f"task {settings.task_name!r}"
        self.info = RunInfo(settings.task_id, settings.task_name, settings.attempt, settings.params)
        self._values = values
        self._carrier = carrier
        self._results = Results(journal, values, carrier, settings.task_id)
        self._threads = threads
        self._cancelled = journal.cancel_reason is not None  # requested; ...
        self._cancel_delivered = False  # ... and raised in the body
        self._cancel_arriving: asyncio.Task[None] | None = None
        self._draining = False
        self._moves = 0  # how often the next has changed: while it does, the body has not come to rest
        self._active = 0  # steps that are in flight: being answered, called or checkpointed
        self._answering = 0  # of the steps, those whose result is being read, or is waited for because it cannot be
        self._waiting: dict[asyncio.Future[None], Wait] = {}  # steps that wait, and for what
        self._events = events or {}
        self._asked: set[str] = set()  # keys, so far
        self._asking: set[str] = set()  # those that have no answer yet
        self._tasks: set[asyncio.Task[Any]] = set()
        self._settling: asyncio.Task[None] | None = None
        self._patient_until = 0.0
        self._cancel_timer: asyncio.TimerHandle | None = None
        self._body_was_first = False
        self._timers: list[asyncio.TimerHandle] = []
        self._note_timer: asyncio.TimerHandle | None = None
        self._last_note = float("-inf")

    # The attempt as a whole

    async def run(self, body: Callable[[], Awaitable[Any]]) -> Outcome:
        """Run the body until it, or the attempt, ends."""
        if self._deadline is not None:
            left = self._deadline - self._carrier.now()
            self._timers.append(self._loop.call_later(max(left, 0), self._time_out))
        try:
            return await self._run(body)
        except asyncio.CancelledError:  # of whoever runs it: a call without a server, its loop that ends
            if self._body is not None:
                self._body.cancel()
                await asyncio.wait((self._body,), timeout=UNWIND_TIMEOUT)
            raise
        finally:
            for timer in (*self._timers, self._cancel_timer):
                if timer is not None:
                    timer.cancel()
            self._drop_note()

    async def _run(self, body: Callable[[], Awaitable[Any]]) -> Outcome:
        while True:
            outcome = await self._run_body(body)
            if self._asked or not isinstance(outcome, Completed):
                # A body without steps is one call; what it has begun (to refresh a token, say) may serve other runs.
                await self._unwind()
            if not isinstance(outcome, Parked) or self._ended.done() or self._draining:
                return outcome
            # The body itself failed: what waits for a step has ended the attempt.
            if outcome.due - self._carrier.now() >= self.settings.in_place or self._tasks:
                return outcome
            self.unwinding = self._body_was_first = self._body_begun = False
            self._body = None
            self._asked.clear()

    async def _run_body(self, body: Callable[[], Awaitable[Any]]) -> Outcome:
        record = self.journal.body
        if record.due is not None and not self._cancelled:
            wait = record.due - self._carrier.now()
            if wait >= self.settings.in_place:  # given back early: by a server that was restarted, say
                return self._parked(record.due, "backoff")
            await asyncio.wait((self._ended,), timeout=max(wait, 0))
        if (outcome := self._before_body()) is not None:
            return outcome
        self.body_step = self._step_info(self.settings.task_name, record)
        context = contextvars.copy_context()
        context.run(scope.set, self)
        context.run(runner_var.set, cast("StepRunner", self))  # which Runner makes it
        limit = self.body_limit = CallTimeout(self.settings.step_timeout)
        running = self._body = self._loop.create_task(self._enter(body), context=context)
        running.add_done_callback(self._note_body_done)
        self.adopt(running)
        both = (running, self._ended)
        if self._cancelled and not self._cancel_delivered:
            self._cancel_soon()
        while not any(future.done() for future in both):
            left = None if self._asked else limit.remaining  # a body without steps is itself the step
            if left is not None and left <= 0:
                running.cancel()
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not self._ended.done():
                    timeout = self.settings.step_timeout
                    return self._body_failed(TimeoutError(f"no result within the step's timeout of {timeout} s"))
                break
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=left)
        if self._ended.done() and (not self._body_was_first or isinstance(self._ended.result(), Superseded)):
            return self._ended.result()
        return await self._body_outcome(running)

    def _before_body(self) -> Outcome | None:
        """How the attempt ends, if it is over before its body has begun."""
        body = self.journal.body
        if self._ended.done():
            return self._ended.result()
        if self._cancelled and not len(self.journal):
            # No step was begun, so there is nothing to clean up; in a task without steps, running the body once
            # more would make its call again.
            return Cancelled(self.journal.cancel_reason or "")
        if body.lost >= MAX_LOST_ATTEMPTS:
            body.error = worker_lost(body)
            return Failed(WorkerLostError(self.settings.task_name, body.calls, *body.error))
        if self._deadline is not None and self._carrier.now() >= self._deadline:
            return Failed(self._timeout_error())
        if self._draining:
            return self._parked(self._carrier.now(), "the worker shut down")
        return None

    async def _enter(self, body: Callable[[], Awaitable[Any]]) -> Any:
        # A task that is cancelled before its first turn of the loop runs no line of the body: nobody could clean up.
        self._refuse_if_ended()
        self._body_begun = True
        return await body()

    def _note_body_done(self, body: asyncio.Task[Any]) -> None:
        # What the body does once its attempt has ended is no outcome: it was told to leave.
        self._body_was_first = not self._ended.done()
        if not body.cancelled():
            body.exception()  # seen, and no news to asyncio

    async def _body_outcome(self, body: asyncio.Task[Any]) -> Outcome:
        if body.cancelled():
            if self._cancel_delivered:
                return await self._cleaned_up()
            return self._body_failed(RuntimeError("The body was cancelled by its own code (CancelledError)."))
        error = body.exception()
        if error is None:
            try:
                plain = self._values.serialise(body.result())
                return Completed(await self._results.seal(plain))
            except (PayloadTooLargeError, ResultError) as unfit:
                return Failed(type(unfit)(f"The result of task {self.settings.task_name!r}: {unfit}"))
            except Exception as unfit:
                return Failed(unfit)
        if self._cancelled:
            logger.warning(
                "Task run %s: its cleanup failed (%s)",
                self.settings.task_id,
                type(error).__name__,
                exc_info=error if self.settings.log_errors else None,
            )
            return await self._cleaned_up()
        return self._body_failed(error)

    async def _cleaned_up(self) -> Outcome:
        """Wait for what else was told of the cancellation: ``gather`` leaves with the first of its branches."""
        while not self._ended.done() and (told := {task for task in self._tasks if task.cancelling()}):
            await asyncio.wait((*told, self._ended), return_when=asyncio.FIRST_COMPLETED)
        return self._ended.result() if self._ended.done() else Cancelled(self.journal.cancel_reason or "")

    def _body_failed(self, error: BaseException) -> Outcome:
        error = only_leaf(error)  # of a TaskGroup's: what failed is what is told
        if not isinstance(error, Exception) or isinstance(error, StepFailedError):
            return Failed(error)
        record = self.journal.body
        info = record.note_failure(error)
        decision = decide(error, self.settings.retry_policy, record.failures)
        self._log_failure(self._place, info, decision)
        if not decision.retry:
            return Failed(error)
        record.due = self._carrier.now() + decision.delay
        return self._parked(record.due, str(info))

    def _log_failure(self, place: str, error: ErrorInfo, decision: RetryDecision) -> None:
        logger.info(
            "Task run %s: %s failed (%s), %s",
            self.settings.task_id,
            place,
            f"{error}; {decision.reason}" if self.settings.log_errors else error.type,  # a reason may quote the error
            f"to be called again in {decision.delay:.1f} s" if decision.retry else "not to be called again",
        )

    def is_final(self, error: BaseException) -> bool:
        """Whether the run would end with this error, if the body raised it now."""
        error = only_leaf(error)
        if not isinstance(error, Exception) or isinstance(error, StepFailedError):
            return True
        return not decide(error, self.settings.retry_policy, self.journal.body.failures + 1).retry

    @property
    def is_cancelled(self) -> bool:
        """Whether the run's cancellation was asked for."""
        return self._cancelled

    @property
    def _deadline(self) -> float | None:
        """When the run must have ended. A cancelled one has none: it is its cleanup that has a bound."""
        return None if self._cancelled else self.settings.deadline

    def _parked(self, due: float, reason: str, events: tuple[str, ...] = (), *, left: bool = False) -> Outcome:
        if self._deadline is not None and due >= self._deadline:
            if not events:
                return Failed(self._timeout_error())
            due = self._deadline  # the event may come before
        return Parked(due, reason, events, left)

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
        self._note(after=0.0)
        # A turn of the loop later: a body that was about to begin has begun by then, and can clean up.
        self._loop.call_soon(self._cancel_body)

    def _cancel_body(self) -> None:
        if self._cancel_delivered or self._body is None or not self._body_begun or self._body.done():
            return  # it came before the body, which is told when it has come to rest
        if self._answering or self._more_to_cancel():
            self._cancel_soon()  # the body is still on its way to where it was
        else:
            self._deliver_cancel(self._body)

    def _cancel_soon(self) -> None:
        """Raise a cancellation in the body when that has come to where an earlier attempt has got to."""
        self._patient_until = self._loop.time() + CANCEL_PATIENCE
        self._cancel_timer = self._loop.call_later(_CANCEL_DELAY, self._cancel_at_rest, self._moves)

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
        if self._deadline is not None:
            self._end(Failed(self._timeout_error()))

    def _end(self, outcome: Outcome) -> None:
        if not self._ended.done():
            self._ended.set_result(outcome)

    def _deliver_cancel(self, body: asyncio.Task[Any]) -> None:
        self._cancel_delivered = True
        if not self.journal.cancelled_at:
            self.journal.cancelled_at = tuple(sorted(self._asking))
        self._note(after=0.0)
        self._cancel_arriving = self._engine_task(self._arrive(tuple(self._waiting)))
        body.cancel()
        over = Cancelled(self.journal.cancel_reason or "")
        self._timers.append(self._loop.call_later(CLEANUP_TIMEOUT, self._end, over))

    async def _arrive(self, waiting: Sequence[asyncio.Future[None]]) -> None:
        """Let a cancellation go from the body to its children, a turn of the loop for each level."""
        await self._settled()
        for woken in waiting:
            woken.cancel()  # of a task that the body does not pass it on to, as in asyncio.wait()

    def _cancel_at_rest(self, moves: int) -> None:
        """The same of a body that waits for something other than a step, or has had its time."""
        if self._cancel_delivered or self._body is None or self._body.done():
            return
        is_over = self._loop.time() >= self._patient_until
        is_there = self._active == 0 and moves == self._moves and not self._more_to_cancel()
        # Not while a result is read: it is the one of a finished step, which is not where the body was.
        if (is_there or is_over) and not self._answering:
            self._deliver_cancel(self._body)
        else:
            self._cancel_timer = self._loop.call_later(_CANCEL_DELAY, self._cancel_at_rest, self._moves)

    def _more_to_cancel(self) -> bool:
        """Whether the body has yet to reach a step in which a cancellation from before is to be raised."""
        keys: Iterable[str] | None = self.journal.cancelled_at
        if keys is None:
            is_open = {StepState.RUNNING, StepState.RETRYING, StepState.WAITING}
            keys = (record.key for record in self.journal if record.is_begun and record.state in is_open)
        return not self._asked.issuperset(keys)

    # Asyncio tasks that belong to the attempt (unwind.TaskScope)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        doing[task] = self._place
        task.add_done_callback(self._disown)

    def _disown(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if self.unwinding and not task.cancelled():
            task.exception()  # seen: asyncio is not to complain of an error that nobody awaits any more

    async def _unwind(self) -> None:
        """Leave what still runs of the attempt's code."""
        self.unwinding = True
        deadline = self._loop.time() + UNWIND_TIMEOUT
        await self._results.settle(UNWIND_TIMEOUT)
        while self._tasks and self._loop.time() < deadline:
            for task in self._tasks:
                task.cancel()
            # In slices: code that swallows the first request is asked again.
            await asyncio.wait(set(self._tasks), timeout=UNWIND_TIMEOUT / 6)
        await self._results.settle(deadline - self._loop.time())  # of calls that ended just before they were left
        if self._tasks:
            logger.error(
                "Task run %s: code of task %r goes on after its attempt has ended, and swallows every request to stop",
                self.settings.task_id,
                self.settings.task_name,
            )

    # Waiting

    async def _turn(self, record: StepRecord) -> None:
        """Wait until the step is due and may be called."""
        while True:
            await self._refuse_cancelled()
            if self._draining:
                await self._park(Wait(record.due or 0.0))
            wait = (record.due or 0.0) - self._carrier.now()
            if wait <= 0:
                return
            if wait < self.settings.in_place:
                await asyncio.sleep(wait)
            else:
                await self._park(Wait(record.due or 0.0))

    async def _refuse_cancelled(self) -> None:
        """Raise, in the place of a step, a cancellation that was asked for before this attempt."""
        self._refuse_if_ended()
        if self._cancelled and not self._cancel_delivered:
            # Parallel steps are all to be told, and some may not have been reached yet: until the body is at rest.
            await self._park(Wait(NEVER))
        if self._cancel_arriving is not None and not self._cancel_arriving.done():
            await asyncio.wait((self._cancel_arriving,))  # it may be on its way to this step

    async def _park(self, wait: Wait) -> None:
        """Wait without counting as in flight. The attempt may end meanwhile, and mostly does."""
        woken: asyncio.Future[None] = self._loop.create_future()
        self._waiting[woken] = wait
        timer = None
        if not self._draining and wait.due != NEVER:
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
        return self._loop.create_task(work, context=apart())

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
            unreadable = next(filter(None, (wait.unreadable for wait in waits)), None)
            if unreadable is not None:  # its waits for events are taken up again by the next attempt
                self._end(self._parked(due, unreadable, left=True))
            elif self._cancelled and not self._cancel_delivered and self._body is not None:
                if not self._more_to_cancel():  # else it is looked at again, by _cancel_at_rest
                    self._deliver_cancel(self._body)
            elif self._draining and not events:
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
        """Make durable what is known now."""
        self._refuse_if_ended()
        self._drop_note()
        await shielded(self._carrier.checkpoint())

    def _note(self, *, after: float = NOTE_DELAY) -> None:
        """Have the journal written soon, once, unless a checkpoint comes first."""
        if self._note_timer is None and not self.unwinding:
            delay = max(after, self._last_note + NOTE_INTERVAL - self._loop.time())
            self._note_timer = self._loop.call_later(delay, self._write_note)

    def _drop_note(self) -> None:
        """Leave what is not awaited to the write that comes before it."""
        if self._note_timer:
            self._note_timer.cancel()
            self._note_timer = None

    def _write_note(self) -> None:
        self._note_timer = None
        self._last_note = self._loop.time()
        if not self._ended.done():
            self._carrier.note()

    # Helpers

    async def invoke(self, call: Callable[[], Any], limit: CallTimeout) -> Any:
        """Call the user's function: on the event loop if it is async, in a thread if not."""
        if is_async(call):
            return await call()
        result = await self.in_thread(limit.counted_from_begin(call))
        return await result if inspect.isawaitable(result) else result

    def in_thread(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Call a sync function in a thread."""
        context = contextvars.copy_context()
        return self._loop.run_in_executor(self._threads, _without_stop_iteration, functools.partial(context.run, call))

    def _step_info(self, key: str, record: StepRecord) -> StepInfo:
        return StepInfo(key, record.failures + 1, self.settings.origin, record.key)


def _without_stop_iteration(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except StopIteration as error:  # a future cannot carry it (PEP 479)
        raise RuntimeError("the call raised StopIteration") from error


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
