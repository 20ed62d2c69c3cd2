"""How an attempt ends on the server: its outcome, by task token."""

from __future__ import annotations

import logging
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING

from temporalio.api.common.v1 import Payload, Payloads
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflowservice.v1 import (
    RespondActivityTaskCompletedRequest,
    RespondActivityTaskFailedRequest,
)
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from temporal_async_task.engine import wire
from temporal_async_task.engine.client import RPC_TIMEOUT, insist
from temporal_async_task.engine.journal import ErrorInfo, Journal
from temporal_async_task.engine.outcome import (
    NEVER,
    UNREADABLE_DELAY,
    Cancelled,
    Completed,
    Failed,
    Outcome,
    Parked,
    Superseded,
)
from temporal_async_task.engine.values import MAX_PAYLOAD

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from temporalio.client import Client

    from temporal_async_task.engine.execution import RunExecution
    from temporal_async_task.engine.stored_journal import StoredJournal
    from temporal_async_task.engine.values import PayloadValues

logger = logging.getLogger("temporal_async_task")

_MAX_FRAMES = 20
_SOON = timedelta(milliseconds=1)  # zero would be dropped, and the policy's delay taken


class AttemptEnd:
    """Reports the end of one attempt.

    Args:
        client: The connection.
        task_token: The attempt's.
        execution: What carries its run.
        values: Of the run.
        journal: As it is stored.
        now: Seconds since the epoch, by the server's clock.
    """

    def __init__(
        self,
        client: Client,
        task_token: bytes,
        execution: RunExecution,
        *,
        values: PayloadValues,
        journal: StoredJournal,
        now: Callable[[], float],
    ) -> None:
        self._client = client
        self._task_token = task_token
        self._execution = execution
        self._values = values
        self._journal = journal
        self._now = now
        self.has_outcome = False
        """Whether the attempt is over, and only has to be reported."""

    async def report(self, outcome: Outcome, journal: Journal) -> None:
        """Tell the server, however long that takes."""
        self.has_outcome = True
        match outcome:
            case Completed(result):
                payload = Payload.FromString(result)
                header = (await self._journal.insist_encode(journal))[0].SerializeToString()
                if payload.ByteSize() + len(header) <= MAX_PAYLOAD:
                    payload.metadata[wire.RESULT_JOURNAL] = header
                await self._complete(payload)
            case Failed(error):
                await self._fail_for_good(error, type(error).__name__, journal)
                in_clear = not self._values.encrypts
                logger.error(
                    "Task run %s of %s has failed: %s",
                    self._execution.task_id,
                    self._execution.task_name,
                    ErrorInfo.of(error) if in_clear else type(error).__name__,
                    exc_info=error if in_clear else None,
                )
            case Cancelled(reason):
                sealed = await insist(lambda: self._values.seal_text(reason), "encode why the run was cancelled")
                await self._execution.cancel_done(sealed)
                await self._fail_for_good(RuntimeError(reason), wire.CANCELLED, journal)
            case Parked(due, _, events) if events:
                names = tuple(map(self._values.event_name, events))
                hold = wire.Hold(None if due == NEVER else due, names, self._taken(journal))
                await self._complete(wire.hold_payload(hold, await self._journal.insist_encode(journal)))
            case Parked(due, reason, left=left):
                delay = timedelta(seconds=max(due - self._now(), 0.0))
                how = wire.ATTEMPT_LEFT if left else wire.ATTEMPT_ENDED
                if left:
                    reason += f" (worker {self._client.identity!r})"
                await self._give_back(reason, delay, await self._journal.insist_encode(journal, ended=True), how)
            case Superseded():
                pass

    def _taken(self, journal: Journal) -> tuple[str, ...]:
        """Which of the events that the attempt was given are in the journal."""
        keys = [record.key for record in journal.done()] if self._execution.input.events else []
        names = {*keys, *map(self._values.event_name, keys)}
        return tuple(name for name in self._execution.input.events if name in names)

    async def _fail_for_good(self, error: BaseException, error_type: str, journal: Journal) -> None:
        """Fail the run for good, and keep its journal: ``resume`` goes on from it."""
        final = _to_application_error(error, error_type)
        encoded = await self._journal.insist_encode(journal)
        apart = self._execution.keeps_heartbeats
        failure = await insist(lambda: self._values.to_failure(final, () if apart else encoded), "encode the failure")
        await self._fail(failure, encoded if apart else ())

    async def leave(self, reason: str) -> None:
        """Give the attempt back untouched: this worker cannot serve the run."""
        self.has_outcome = True
        delay = timedelta(seconds=UNREADABLE_DELAY)
        await self._give_back(reason, delay, self._journal.untouched(), wire.ATTEMPT_LEFT)

    async def _give_back(self, reason: str, delay: timedelta, details: Sequence[Payload], how: str) -> None:
        error = ApplicationError(
            reason,
            type=how,
            next_retry_delay=max(delay, _SOON),
            category=ApplicationErrorCategory.BENIGN,  # waiting is no error: not logged, not counted as one
        )
        failure = await insist(lambda: self._values.to_failure(error), "encode the failure")
        await self._fail(failure, details)

    async def _complete(self, result: Payload) -> None:
        """End the attempt, and its activity, with a result."""
        request = RespondActivityTaskCompletedRequest(
            task_token=self._task_token,
            namespace=self._client.namespace,
            identity=self._client.identity,
            result=Payloads(payloads=[result]),
        )
        service = self._client.workflow_service
        await insist(lambda: service.respond_activity_task_completed(request, timeout=RPC_TIMEOUT), "report the result")

    async def _fail(self, failure: Failure, journal: Sequence[Payload]) -> None:
        """End the attempt with a failure, which says whether and when there is another."""
        request = RespondActivityTaskFailedRequest(
            task_token=self._task_token,
            namespace=self._client.namespace,
            identity=self._client.identity,
            failure=failure,
            last_heartbeat_details=Payloads(payloads=journal) if journal else None,
        )
        service = self._client.workflow_service
        await insist(lambda: service.respond_activity_task_failed(request, timeout=RPC_TIMEOUT), "end the attempt")


def _to_application_error(error: BaseException, error_type: str, depth: int = 3) -> ApplicationError:
    """An error as a failure, kept short: what is for the reader's eye must not make the journal too large."""
    failure = ApplicationError(ErrorInfo.of(error).message, type=error_type, non_retryable=True)
    trace = error.__traceback__
    frames = sum(1 for _ in traceback.walk_tb(trace))
    for _ in range(frames - _MAX_FRAMES):
        trace = trace.tb_next if trace else None
    failure.__traceback__ = trace
    if error.__cause__ is not None and depth > 0:
        failure.__cause__ = _to_application_error(error.__cause__, type(error.__cause__).__name__, depth - 1)
    failure.__suppress_context__ = True
    return failure
