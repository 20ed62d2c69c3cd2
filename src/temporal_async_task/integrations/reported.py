"""A task whose runs tell the application what becomes of them.

What a run has to tell is told twice over. While the run goes on, a companion coroutine sends what is new, and tries
again until it is acknowledged; it holds nothing up and makes no step. When the body has ended, its outcome is made
durable, and then a step sends all of it, for as long as it takes. The run itself ends after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, cast

from temporal_async_task.checks import check_text
from temporal_async_task.engine.body import bind_body
from temporal_async_task.engine.failures import only_leaf
from temporal_async_task.errors import (
    NonRetryableError,
    ReportRefusedError,
    StepFailedError,
    StepUsageError,
    TaskCancelledError,
)
from temporal_async_task.integrations.lifecycle import NOT_AGAIN, RecordStatus
from temporal_async_task.integrations.reports import Report, ReportedEvent, as_json, storable, utc_now
from temporal_async_task.retry import RetryPolicy, Verdict, decide
from temporal_async_task.status import StepState
from temporal_async_task.steps import runner_var, step
from temporal_async_task.task import Execution, TemporalAsyncTask

if TYPE_CHECKING:
    from temporalio.client import Client

    from temporal_async_task.engine.journal import Journal
    from temporal_async_task.engine.runner import Runner
    from temporal_async_task.integrations.reports import Reporter

logger = logging.getLogger("temporal_async_task")

P = TypeVar("P")
R = TypeVar("R")

RESULT = "report: result"
"""The step that keeps the body's result until it is reported: a body that is a call must not be called again."""
COMPLETED = "report: completed"
UNTIL_ACKNOWLEDGED = RetryPolicy(
    max_retries=10_000_000, initial_delay=1.0, max_delay=60.0, classify=lambda _: Verdict(retry=True)
)
CANCELLED_PATIENCE = 10.0
"""Seconds for the one try of a cancelled run to tell so. If it fails, the dispatcher finds out by asking."""
_REMEMBERED = 10_000
"""Runs of which a process remembers what it has told."""


class _Failure(TypedDict):
    """How a run has failed, as its journal keeps it."""

    error: str
    error_type: str
    retryable: bool
    step: list[Any] | None
    """Of a failed step: its key, attempts, error type and message."""


def reported(task: TemporalAsyncTask[P, R], *, to: Reporter) -> ReportedTask[P, R]:
    """The same task, whose runs tell ``to`` what becomes of them: processing, completed or failed.

    Register the returned task instead of the given one, in the web process as in the workers; both submit and ask.
    """
    return ReportedTask(task, to)


def report_external_id(external_id: str) -> None:
    """Tell the application under which id the vendor knows the job. Call it in a task's body, once the id is known.

    It is sent in the background, and again until it is acknowledged. In a task that is not ``reported``, and in one
    that is called without a server, it does nothing.

    Raises:
        InvalidKeyError: The id cannot be one: empty, over 255 bytes, or not plain text.
        StepUsageError: Called outside of a task.
    """
    check_text(external_id, "An external id")
    reporting = _reporting.get()
    if reporting is not None:
        reporting.know(external_id)
    elif runner_var.get() is None:
        raise StepUsageError("report_external_id() was called outside of a task. Call it in a task's body.")


class ReportedTask(TemporalAsyncTask[P, R], Generic[P, R]):
    """What ``reported`` returns."""

    def __init__(self, task: TemporalAsyncTask[P, R], reporter: Reporter) -> None:
        super().__init__(
            task.name,
            cast("Any", self._body),
            task_queue=task.task_queue,
            retry_policy=task.retry_policy,
            step_timeout=task.step_timeout,
            timeout=task.timeout,
            heartbeat_timeout=task.heartbeat_timeout,
            execution=task.own_execution,
        )
        self.takes_params, self.params_type, self.result_type = task.takes_params, task.params_type, task.result_type
        functools.update_wrapper(self, task.task_function, updated=())
        self._task = task
        self._reporter = reporter
        self._told: OrderedDict[str, tuple[int, int]] = OrderedDict()  # task id: generation, events acknowledged

    @property
    def is_multi_step(self) -> bool:
        return self._task.is_multi_step

    def use_default_queue(self, task_queue: str) -> None:
        super().use_default_queue(task_queue)
        self._task.use_default_queue(task_queue)

    def use_default_execution(self, execution: Execution) -> None:
        super().use_default_execution(execution)
        self._task.use_default_execution(execution)

    def set_client(self, client: Client) -> None:
        super().set_client(client)
        self._task.set_client(client)

    async def _body(self, params: Any = None) -> Any:
        runner = cast("Runner", runner_var.get())
        body = bind_body(self._task.task_function, (params,) if self.takes_params else (), runner)
        if runner.settings.local:
            return await body()
        generation = _generation(runner.journal)
        if runner.is_cancelled and _is_done(runner.journal, _cancelled_key(generation - 1)):
            await asyncio.Event().wait()  # its cleanup is done; the cancellation is about to arrive here
        reporting = _Reporting(self, runner.settings.task_id, generation)
        context_token = _reporting.set(reporting)
        companion = asyncio.create_task(reporting.keep_telling())
        try:
            return await self._tell_outcome(runner, reporting, body)
        finally:
            _reporting.reset(context_token)
            companion.cancel()
            await asyncio.wait((companion,))

    async def _tell_outcome(self, runner: Runner, reporting: _Reporting, body: Any) -> Any:
        kept = step.with_options(retry_policy=UNTIL_ACKNOWLEDGED, result_type=self.result_type)
        error: BaseException | None = None
        failed = _failed_key(reporting.generation)
        await reporting.recall_external_id(runner.journal)
        if _is_done(runner.journal, failed):
            failure = await step(failed, _keep_failure, _NOTHING)
        else:
            try:
                result = None
                if not _is_done(runner.journal, RESULT):
                    result = await body()
                    await reporting.keep_external_id()
                result = await kept(RESULT, _keep, result)
            except asyncio.CancelledError:
                if runner.unwinding:
                    raise
                if runner.is_cancelled:
                    await reporting.tell_cancelled(runner.journal.cancel_reason or "")
                    raise
                # A body without steps is itself the step, and has taken too long.
                error = TimeoutError(f"no result within the step's timeout of {self.step_timeout} s")
                if not runner.is_final(error):
                    raise
                if (current := asyncio.current_task()) is not None:
                    current.uncancel()
            except Exception as raised:
                if not runner.is_final(raised):
                    raise
                error = raised
            else:
                payload = {"result": as_json(result)}
                await reporting.tell(runner.journal, RecordStatus.COMPLETED, payload, after=RESULT, key=COMPLETED)
                return result
            await reporting.keep_external_id()
            failure = await step(failed, _keep_failure, _failure_of(error, self.retry_policy))
        payload = {name: failure[name] for name in ("error", "error_type", "retryable")}
        key = _told_key(reporting.generation)
        await reporting.tell(runner.journal, RecordStatus.FAILED, payload, after=failed, key=key)
        raise error or _error_of(failure)

    async def deliver(self, report: Report) -> None:
        """Send a report once; a refusal is logged, and must not fail a run."""
        try:
            await self._reporter.send(report)
        except ReportRefusedError as refusal:
            logger.warning("The application refuses the report of task run %s: %s", report.task_id, refusal)
        self._told[report.task_id] = (report.generation, len(report.events))
        self._told.move_to_end(report.task_id)
        if len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)

    def told(self, task_id: str, generation: int) -> int:
        """How many events of a generation this process has told, as far as it remembers."""
        known, count = self._told.get(task_id, (0, 0))
        return count if known == generation else 0


class _Reporting:
    """What one run has to tell."""

    def __init__(self, task: ReportedTask[Any, Any], task_id: str, generation: int) -> None:
        self.generation = generation
        self._task = task
        self._task_id = task_id
        self._events: list[ReportedEvent] = []
        self._external_ids = 0
        """How many the journal has ..."""
        self._kept: str | None = None
        """... and the last of them."""
        self._external_id: str | None = None
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._add(RecordStatus.PROCESSING, {})

    def know(self, external_id: str) -> None:
        """Note the vendor's id; in any thread."""
        self._loop.call_soon_threadsafe(self._know, external_id)

    def _know(self, external_id: str) -> None:
        self._external_id = external_id
        if all(event.payload.get("external_id") != external_id for event in self._events):
            self._add(RecordStatus.PROCESSING, {"external_id": external_id})

    async def recall_external_id(self, journal: Journal) -> None:
        """Know what an earlier attempt has kept."""
        while _is_done(journal, _external_id_key(self._external_ids + 1)):
            self._external_ids += 1
        if self._external_ids:
            self._kept = await step(_external_id_key(self._external_ids), _keep_external_id, "")
            self._know(self._kept)

    async def keep_external_id(self) -> None:
        """Make the vendor's id durable, before the outcome: an attempt after it does not run the body again."""
        await asyncio.sleep(0)  # what another thread has told arrives before
        if self._external_id is not None and self._external_id != self._kept:
            await step(_external_id_key(self._external_ids + 1), _keep_external_id, self._external_id)

    def _add(self, kind: Any, payload: dict[str, Any], at: datetime | None = None) -> None:
        sequence = len(self._events) + 1
        at = at or utc_now()
        if self._events:
            at = max(at, self._events[-1].at)  # one is by this worker's clock, the other by the server's
        self._events.append(ReportedEvent(sequence=sequence, type=kind, at=at, payload=payload))
        self._news.set()

    def _end(self, kind: RecordStatus, payload: dict[str, Any], at: datetime | None = None) -> None:
        if self._external_id is not None:  # an earlier attempt may have told as many events, with another id
            payload = {"external_id": self._external_id} | payload
        self._add(kind, payload, at)

    def _report(self) -> Report:
        return Report(
            task=self._task.name, task_id=self._task_id, generation=self.generation, events=tuple(self._events)
        )

    async def keep_telling(self) -> None:
        """Send what is new, as long as the attempt lasts."""
        failures = 0
        while True:
            self._news.clear()
            if self._task.told(self._task_id, self.generation) < len(self._events):
                try:
                    await self._task.deliver(self._report())
                except Exception as error:
                    failures += 1
                    logger.info("Task run %s could not report yet: %s", self._task_id, error)
                    await asyncio.sleep(UNTIL_ACKNOWLEDGED.backoff(failures))
                    continue
            failures = 0
            await self._news.wait()

    async def tell(
        self, journal: Journal, kind: RecordStatus, payload: dict[str, Any], *, after: str, key: str
    ) -> None:
        """Send everything, the outcome last, in a step that does not end before it is acknowledged."""
        ended = journal.get(after)
        at = None if ended is None or ended.finished is None else datetime.fromtimestamp(ended.finished, UTC)
        self._end(kind, payload, at)
        await step.with_options(retry_policy=UNTIL_ACKNOWLEDGED)(key, self._task.deliver, self._report())

    async def tell_cancelled(self, reason: str) -> None:
        """Send everything, once: the cleanup of a cancelled run must not wait for a web process."""
        await step(_cancelled_key(self.generation), _keep, None)  # should it be resumed, it tells its events anew
        payload = {"error": reason, "error_type": TaskCancelledError.__name__, "retryable": False}
        self._end(RecordStatus.FAILED, payload)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CANCELLED_PATIENCE):
                await self._task.deliver(self._report())


_reporting: ContextVar[_Reporting | None] = ContextVar("reporting", default=None)


async def _keep(value: Any) -> Any:
    return value


async def _keep_external_id(external_id: str) -> str:
    return external_id


async def _keep_failure(failure: _Failure) -> _Failure:
    return failure


_NOTHING = _Failure(error="", error_type="", retryable=False, step=None)


def _external_id_key(number: int) -> str:
    return f"report: external id {number}"


def _failed_key(generation: int) -> str:
    return f"report: failure {generation}"


def _told_key(generation: int) -> str:
    return f"report: failed {generation}"


def _cancelled_key(generation: int) -> str:
    return f"report: cancelled {generation}"


def _generation(journal: Journal) -> int:
    """1, and one more after each failure that was told: a resumed run has its finished steps in its journal."""
    generation = 1
    while _is_done(journal, _told_key(generation)) or _is_done(journal, _cancelled_key(generation)):
        generation += 1
    return generation


def _is_done(journal: Journal, key: str) -> bool:
    record = journal.get(key)
    return record is not None and record.state is StepState.COMPLETED


def _failure_of(error: BaseException, policy: RetryPolicy) -> _Failure:
    leaf = only_leaf(error)
    about = None
    if isinstance(leaf, StepFailedError):
        about = [leaf.key, leaf.attempts, leaf.error_type, leaf.message]
    return _Failure(
        error=storable(str(leaf)),
        error_type=type(leaf).__name__,
        retryable=_is_retryable(leaf, policy),
        step=storable(about),
    )


def _is_retryable(error: BaseException, policy: RetryPolicy) -> bool:
    """Whether the whole run may be worth another try later: whether its last error was out of tries, not hopeless."""
    if isinstance(error, StepFailedError):
        if error.once or type(error).__name__ in NOT_AGAIN or error.error_type in NOT_AGAIN:
            return False
        if error.__cause__ is None:  # an attempt that comes later knows it by its name, and how often it was tried
            return error.attempts > policy.max_retries
        return _is_retryable(error.__cause__, policy)
    return isinstance(error, Exception) and decide(error, replace(policy, max_retries=1), 1).retry


def _error_of(failure: _Failure) -> Exception:
    """The error again, in an attempt after the one that raised it, under the name that the status shows."""
    if failure["step"] is not None:
        return StepFailedError(*failure["step"])
    error: type[Exception] = type(failure["error_type"], (NonRetryableError,), {})
    return error(failure["error"])
