"""The runner: answers a body's steps from the journal, or makes their calls. It knows nothing of Temporal."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from temporal_async_task.checks import check_text, seconds
from temporal_async_task.engine.attempt import MAX_LOST_ATTEMPTS, Attempt, Wait
from temporal_async_task.engine.child import Child, Ready, pause_after
from temporal_async_task.engine.failures import recorded_failure, worker_lost
from temporal_async_task.engine.journal import ErrorInfo, StepRecord
from temporal_async_task.engine.landing import Landing
from temporal_async_task.engine.outcome import NEVER, UNREADABLE_DELAY
from temporal_async_task.engine.returning import returning_lines
from temporal_async_task.engine.signatures import is_async, return_type
from temporal_async_task.engine.timing import CallTimeout
from temporal_async_task.engine.unwind import Unwind, doing, scope
from temporal_async_task.errors import (
    AsyncTaskError,
    DuplicateStepError,
    PayloadTooLargeError,
    ResultError,
    RetryableError,
    StepFailedError,
    StepUsageError,
    TaskNotFoundError,
)
from temporal_async_task.retry import RetryDecision, RetryPolicy, decide
from temporal_async_task.status import StepState
from temporal_async_task.steps import (
    ChildTask,
    StepCall,
    StepOptions,
    child_of,
    idempotency_key,
    step_var,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import CodeType, FrameType

logger = logging.getLogger("temporal_async_task")

_READS = 6
"""Times that a worker tries to read a result, some nine seconds in all, before it leaves the run to another."""
_CHILD_CANCEL_TIMEOUT = 15.0
"""Seconds for one try to cancel a child: a few of them fit into what a cancelled body may take."""


def _landed(call: Callable[[], Any], land: Callable[[Any], None]) -> Any:
    """Make a sync call, and send its result on its way."""
    result = call()
    if not inspect.isawaitable(result):
        land(result)
    return result


def _cancels_raised(task: asyncio.Task[Any]) -> int:
    """How often a task was cancelled, but for a request that will be raised at its next ``await``."""
    return task.cancelling() - getattr(task, "_must_cancel", False)


class Runner(Attempt):
    """An attempt with its steps: the engine's side of ``steps.StepRunner``."""

    _returning: tuple[CodeType | None, frozenset[int]] = (None, frozenset())
    _unsaved = False

    def returns_after(self, function: Callable[..., Any]) -> None:
        """Look at a body for steps after which it returns at once: their results are saved with the run's."""
        code = getattr(function, "__code__", None)
        self._returning = code, returning_lines(function) if code else frozenset()

    async def step(self, call: StepCall) -> Any:
        """Answer a step from the journal, or make its call. See ``steps.step``."""
        caller = sys._getframe(1).f_back  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - behind `steps.step`
        if (task := child_of(call.call)) is not None:
            return await self._child(task, call)
        hint = call.options.result_type or return_type(call.call)  # refused before the call, if it must be
        with self._in_flight(call.key, "step"):
            record = await self._find(call.key)
            if record.state is not StepState.COMPLETED:
                await self._drive(call, record, last=self.is_last(call, caller))
            return await self._answer(record, hint)

    def is_last(self, call: StepCall, caller: FrameType | None) -> bool:
        """Whether the body itself asks for this step, with nothing else under way, and returns at once after it."""
        code, lines = self._returning
        alone = len(self._tasks) == 1 and not call.options.at_most_once
        return alone and caller is not None and caller.f_code is code and caller.f_lineno in lines

    async def _child(self, task: ChildTask, call: StepCall) -> Any:
        """A step that runs another task: submits it once, and looks at it until it has ended."""
        if self.settings.local:
            return await self.step(replace(call, call=task.__call__, kwargs={}))
        options = dict(call.kwargs)
        timeout, own_id = options.pop("timeout", None), options.pop("task_id", None)
        step_id = idempotency_key(self.settings.origin, call.key)
        child = Child(task, call.args, options, own_id, step_id)
        # It is submitted once in any case, by its id; and a look at it is no call.
        call = replace(call, options=replace(call.options, at_most_once=False))
        with self._in_flight(call.key, "step"):
            try:
                record = await self._find(call.key)
                if record.state is not StepState.COMPLETED:
                    looks = replace(call, call=child.look, args=(record,), kwargs={})
                    await self._poll(looks, record, pause_after, timeout and seconds(timeout), patient=True)
            except asyncio.CancelledError:
                begun = self.journal.get(call.key)
                if self._cancelled and begun is not None and begun.child is not None and begun.finished is None:
                    await self._cancel_child(task, call, begun)
                raise
            return await self._answer(record, call.options.result_type or task.result_type)

    async def _cancel_child(self, task: ChildTask, call: StepCall, record: StepRecord) -> None:
        """Cancel a child with its parent, however often that fails. Between two tries the attempt may end."""
        args = (record.child, self.journal.cancel_reason or "")
        cancel = StepCall(call.key, task.cancel, args, options=StepOptions(timeout=_CHILD_CANCEL_TIMEOUT))
        while True:
            record.state, record.due = StepState.RETRYING, None
            try:
                await self._call(cancel, record)
            except TaskNotFoundError:
                return
            except Exception as error:
                record.failures += 1
                record.error = ErrorInfo.of(error)
                record.due = self._carrier.now() + pause_after(record.failures)
                logger.warning(
                    "Task run %s: its child %s cannot be cancelled (%s); trying again",
                    self.settings.task_id,
                    record.child,
                    record.error if self.settings.log_errors else record.error.type,
                )
                await self._turn(record)
            else:
                return

    async def sleep(self, key: str, duration: float) -> None:
        """Wait until ``duration`` seconds after the first ask. See ``steps.sleep``."""
        with self._in_flight(key, "sleep"):
            record = await self._find(key)
            if record.state is StepState.COMPLETED:
                return
            if record.due is None:
                record.due = self._started(record) + duration
            record.state = StepState.WAITING
            await self._turn(record)
            await self._complete(record, b"")

    async def poll(self, call: StepCall, every: Callable[[int], float], timeout: float | None) -> Any:
        """Call until the answer is not None. See ``steps.poll``."""
        hint = call.options.result_type or return_type(call.call)
        with self._in_flight(call.key, "poll"):
            record = await self._find(call.key)
            if record.state is not StepState.COMPLETED:
                await self._poll(call, record, every, timeout, patient=timeout is not None)
            return await self._answer(record, hint)

    async def _poll(
        self,
        call: StepCall,
        record: StepRecord,
        every: Callable[[int], float],
        timeout: float | None,
        *,
        patient: bool,
    ) -> None:
        policy = call.options.retry_policy or self.settings.retry_policy
        while True:
            value, pause = await self._poll_once(call, record, policy, patient=patient)
            if value is not None:
                await self._finish(record, value.value if isinstance(value, Ready) else value)
                return
            now = self._carrier.now()
            deadline = NEVER if timeout is None else self._started(record) + timeout
            if now >= deadline:
                text = f"not ready within {timeout} s, after {record.calls} polls"
                await self._give_up(record, ErrorInfo.named("PollTimeoutError", text))
            record.state = StepState.WAITING
            record.due = min(now + max(every(record.calls), pause), deadline)  # the last poll is at the deadline

    async def _poll_once(
        self, call: StepCall, record: StepRecord, policy: RetryPolicy, *, patient: bool
    ) -> tuple[Any, float]:
        """Make one call. None and a pause if it is not ready, or failed in a way that does not concern the job."""
        await self._begin(call, record)
        try:
            value = await self._call(call, record)
        except (Unwind, asyncio.CancelledError):
            record.state = StepState.RETRYING
            raise
        except Exception as error:
            info = record.note_failure(error)
            counted = record.failures
            if patient:  # retryable errors go on until the timeout: asking again costs nothing
                if not policy.max_retries:
                    policy = replace(policy, max_retries=1)
                counted = min(counted, policy.max_retries)
            decision = decide(error, policy, counted)
            if not decision.retry:
                await self._give_up(record, info, error)
            return None, decision.delay
        record.failures, record.lost, record.error = 0, 0, None
        if value is None:
            record.calls += 1
        return value, 0.0

    async def wait_for(self, key: str, timeout: float | None, hint: Any) -> Any:
        """Wait for an event from outside. See ``steps.wait_for``."""
        if not self.settings.events and not self.settings.local:
            raise StepUsageError(
                f"wait_for({key!r}) waits for an event from outside, which cannot come to a task with "
                f"execution='activity'. Define the task with execution='workflow', or poll() for what you wait for."
            )
        if not self.settings.events:
            raise StepUsageError(
                f"wait_for({key!r}) waits for an event from outside, and there is no server to bring it. Submit the "
                f"task, or test it with testing.TaskRun and its send()."
            )
        with self._in_flight(key, "wait_for"):
            record = await self._find(key)
            while record.state is not StepState.COMPLETED:
                started = self._started(record)
                record.due = NEVER if timeout is None else started + timeout
                record.state = StepState.WAITING
                await self._refuse_cancelled()
                event = self._events.get(key)
                due = record.due <= self._carrier.now()
                if event is None and due:  # it may have come in time, while another step or a lost worker was at it
                    event = await self._carrier.find_event(key, record.due)
                if event is not None:
                    record.calls = 1
                    await self._complete(record, event)
                elif due:
                    await self._give_up(record, ErrorInfo.named("WaitTimeoutError", f"no event within {timeout} s"))
                else:
                    await self._park(Wait(record.due, event=key))
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

    async def _find(self, key: str) -> StepRecord:
        """The record of what is asked for: finished, or to go on with.

        Raises:
            AsyncTaskError: It has failed for good, in this attempt or an earlier one.
        """
        if key in (self.journal.cancelled_at or ()):  # raised in it before; it may have finished all the same
            await self._refuse_cancelled()
        if self._unsaved:  # the body did not return after all: it has failed, and is run again
            await self._checkpoint()
            self._unsaved = False
        record = self.journal.get(key) or self._opened(key)
        if record.state is StepState.FAILED:
            raise self._failure(record)
        return record

    def _failure(self, record: StepRecord) -> AsyncTaskError:
        error = recorded_failure(record)
        if isinstance(error, StepFailedError):
            error.idempotency_key = idempotency_key(self.settings.origin, record.key)
            error.once = record.once
        return error

    def _opened(self, key: str) -> StepRecord:
        if self._cancelled and not self._cancel_delivered:
            return StepRecord(key)  # it will not begin: the cancellation is raised in its place
        return self.journal.open(key)

    async def _drive(self, call: StepCall, record: StepRecord, *, last: bool) -> None:
        """Call until the result is in the journal, or there is no hope of one.

        Args:
            call: The call.
            record: Its step's.
            last: The run's outcome follows at once and carries the journal: no checkpoint of its own is needed.
        """
        save = not last
        policy = call.options.retry_policy or self.settings.retry_policy
        await self._refuse_cancelled()
        if record.state is StepState.RUNNING and call.options.at_most_once:
            record.once = True
            await self._give_up(
                record, ErrorInfo.named("StepOutcomeUnknownError", "its outcome was lost with its worker")
            )
        while True:
            await self._begin(call, record)
            landing = Landing()
            try:
                land = functools.partial(self._land, landing, record, save=save)
                value = await self._call(call, record, land)
            except (Unwind, asyncio.CancelledError):
                # Whatever becomes of the body: what was paid for goes into the journal.
                if (landed := landing.leave()) is not None:
                    self._results.follow(landed)
                elif not call.options.at_most_once:  # its outcome is unknown now, and stays so
                    record.state = StepState.RETRYING
                raise
            except Exception as error:
                # Its timeout may come while the event loop is blocked, and be seen after the result.
                if landing.leave() is None:
                    await self._failed(call, record, policy, error)
                    continue
                value = None
            await self._finish(record, value, landing.landed, save=save)
            return

    async def _begin(self, call: StepCall, record: StepRecord) -> None:
        """Wait for the step's turn, and note that its call is being made."""
        if record.lost >= MAX_LOST_ATTEMPTS:
            await self._give_up(record, worker_lost(record))
        await self._turn(record)
        record.state, record.due = StepState.RUNNING, None
        self._started(record)
        if call.options.at_most_once:
            record.once = True
            await self._checkpoint()
        else:
            self._note()

    def _started(self, record: StepRecord) -> float:
        """When the step was first begun, which may be now."""
        if record.started is None:
            record.started = self._carrier.now()
        return record.started

    async def _call(self, call: StepCall, record: StepRecord, land: Callable[[Any], None] | None = None) -> Any:
        timeout = call.options.timeout or self.settings.step_timeout
        limit = CallTimeout(timeout)
        token = step_var.set(self._step_info(call.key, record))
        # What the call begins is not the attempt's: a task that refreshes a token may serve other runs, too.
        own = scope.set(None)
        current = asyncio.current_task()
        cancels = 0
        if current is not None:
            doing[current] = f"{self._place}, step {call.key!r}"
            cancels = _cancels_raised(current)
        try:
            async with limit:
                return await self.make_call(call, land, limit)
        except TimeoutError as error:
            if limit.expired:
                raise TimeoutError(f"no answer within the step's timeout of {timeout} s") from error
            raise
        except Unwind:
            if not self.unwinding and not self._ended.done():  # it was another's, which this call has waited for
                raise RuntimeError("a task that was shared with another run was stopped with it") from None
            raise
        except asyncio.CancelledError as error:
            if current is not None and current.cancelling() > cancels:
                raise
            # It is the call's own, or of something that it has waited for: the body would take it for the run's.
            raise RuntimeError("the call was cancelled, though its run was not (CancelledError)") from error
        finally:
            scope.reset(own)
            step_var.reset(token)
            if current is not None:
                doing[current] = self._place

    async def make_call(self, call: StepCall, land: Callable[[Any], None] | None, limit: CallTimeout) -> Any:
        """Make a step's call. Overridden in tests, to script it.

        Args:
            call: The call.
            land: To be given a sync call's result, in its thread.
            limit: Around the call.
        """
        made = functools.partial(call.call, *call.args, **call.kwargs)
        if land is not None and not is_async(call.call):
            made = functools.partial(_landed, made, land)
        return await self.invoke(made, limit)

    def _land(self, landing: Landing, record: StepRecord, value: Any, *, save: bool) -> None:
        """Send a result on its way into the journal, in the thread of its call."""
        landing.begin(self._results.prepare(record, value, save=save))

    async def _finish(
        self, record: StepRecord, value: Any, landed: Future[None] | None = None, *, save: bool = True
    ) -> None:
        """See a call's result into the journal, if it is not ``landed`` or on its way there."""
        landed = landed or self._results.prepare(record, value, save=save)()
        self._drop_note()
        self._unsaved = not save
        try:
            if landed.done():
                landed.result()
            else:
                await asyncio.shield(self._results.follow(landed))
        except (PayloadTooLargeError, ResultError) as error:
            info = ErrorInfo.named(type(error).__name__, f"Step {record.key!r}: {error}")
            await self._give_up(record, info, error)
        await self._saved(record)

    async def _complete(self, record: StepRecord, result: bytes) -> None:
        self.journal.complete(record, result, self._carrier.now())
        await self._checkpoint()
        await self._saved(record)

    async def _saved(self, record: StepRecord) -> None:
        """A step is in the journal, and durable. Tests lose the worker here."""

    async def _answer(self, record: StepRecord, hint: Any) -> Any:
        self._answering += 1
        try:
            plain = await self._read(record)
            return self._values.convert(plain, hint)
        except ResultError as error:
            # The result itself is in the journal, and stays.
            raise type(error)(f"Step {record.key!r}: {error}") from error
        finally:
            self._answering -= 1

    async def _read(self, record: StepRecord) -> Any:
        while True:
            try:
                return await self._results.unseal(record.result or b"", _READS)
            except ResultError:
                raise
            except Exception as error:
                # A codec's key that this worker does not have, a store that it cannot reach. The attempt is given back,
                # to be begun by another; but not before the calls that are in flight beside this have ended.
                reason = f"{type(error).__name__}: the result of step {record.key!r} cannot be read: {error}"
                logger.warning("Task run %s: %s; it is tried again, perhaps elsewhere", self.settings.task_id, reason)
            await self._park(Wait(self._carrier.now() + UNREADABLE_DELAY, unreadable=reason))

    async def _failed(self, call: StepCall, record: StepRecord, policy: RetryPolicy, error: Exception) -> None:
        info = record.note_failure(error)
        decision = decide(error, policy, record.failures)
        if isinstance(error, RetryableError):
            record.once = False
        elif decision.retry and call.options.at_most_once:
            decision = RetryDecision(retry=False, delay=0.0, reason="at most once")
        self._log_failure(f"step {record.key!r}", info, decision)
        if not decision.retry:
            await self._give_up(record, info, error)
        record.state = StepState.RETRYING
        record.due = self._carrier.now() + decision.delay
        if self._active > 1:  # else the attempt ends with it, and carries the journal
            self._note(after=0.0)

    async def _give_up(self, record: StepRecord, info: ErrorInfo, error: Exception | None = None) -> NoReturn:
        """Note that a step has failed for good, durably, and raise it in the body.

        Durably, because the body may act on it: a refund and a later success must not both happen.
        """
        record.state, record.error, record.due = StepState.FAILED, info, None
        record.finished = self._carrier.now()
        await self._checkpoint()
        raise self._failure(record) from error

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
        self._asking.add(key)
        try:
            with self.busy():
                yield
        finally:
            self._asking.discard(key)
