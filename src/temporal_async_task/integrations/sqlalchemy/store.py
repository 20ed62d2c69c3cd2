"""Records in the database, brought from one state to the next, with an event for each change.

Each method is one transaction. All changes of a record's state go through ``_apply``, with the record locked.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import load_only

from temporal_async_task.errors import ReportRefusedError, TaskNotFoundError
from temporal_async_task.integrations.lifecycle import NOT_AGAIN, Event, RecordStatus
from temporal_async_task.integrations.reports import Report, ReportedEvent, as_json, storable, utc_now
from temporal_async_task.integrations.sqlalchemy.claims import TO_CHECK, TO_START, Claim, RecordClaims
from temporal_async_task.integrations.sqlalchemy.mixins import RECORD_COLUMNS, STATE_COLUMNS, state_of
from temporal_async_task.integrations.sqlalchemy.sessions import is_outage
from temporal_async_task.status import TaskResult, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

logger = logging.getLogger("temporal_async_task")

_ENDS = (RecordStatus.COMPLETED, RecordStatus.FAILED)
ENDED_BY_HAND = frozenset({"TaskCancelledError", "TerminatedError"})
_NOT_AGAIN = NOT_AGAIN | ENDED_BY_HAND | {"NonRetryableError", "ResultError", "PayloadTooLargeError"}
"""Types of errors, as a status shows them, after which a record is left to a person."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What has come of a claim: an event, or another look after a while."""

    claim: Claim
    event: Event | None = None
    retryable: bool = False
    """Of a failure: whether another try may help."""
    trouble: Exception | None = None
    """What was in the way, if nothing has come of it. The record is not to blame, ..."""
    after: timedelta = timedelta(0)
    """... and is due again after this."""

    @property
    def starts(self) -> bool:
        """Whether its task was started, or resumed."""
        return self.event is not None and self.event.type is RecordStatus.QUEUED


class RecordStore(RecordClaims):
    """The records of one ``RecordTask`` in one database: claimed, and brought from one state to the next."""

    async def settle(self, outcomes: Sequence[Settled]) -> list[Claim]:
        """Write what has come of claims, except where something else has happened to the record meanwhile.

        Returns:
            The claims of records that were deleted or given up while their tasks were started.
        """
        if not outcomes:
            return []
        try:
            return await self.database.run(lambda session: self._settle(session, outcomes))
        except Exception as error:
            if len(outcomes) == 1 or is_outage(error):
                raise
        unwanted: list[Claim] = []
        for one in outcomes:  # with something in it that is not to be written, which must not hold the others
            try:
                unwanted += await self.settle([one])
            except Exception:
                logger.exception("The record of task %s cannot be written; it is claimed again", one.claim.task_id)
        return unwanted

    def _settle(self, session: Session, outcomes: Sequence[Settled]) -> list[Claim]:
        unwanted: list[Claim] = []
        by_key = {settled.claim.key: settled for settled in outcomes}
        found = {getattr(one, self.records.key.key): one for one in self._locked(session, self.records.key.in_(by_key))}
        for key, settled in by_key.items():
            claim, record = settled.claim, found.get(key)
            # By its task, too: SQLite gives the key of a record that was deleted to another.
            if record is None or record.task_id != claim.task_id:
                if settled.starts:
                    unwanted.append(claim)
            elif (record.event_count, record.status) != (claim.events, claim.status):
                continue
            elif settled.event is not None:
                if settled.starts and record.due_at is None:
                    unwanted.append(claim)
                self._apply(session, record, settled.event, retryable=settled.retryable)
            elif record.due_at == claim.due_at:  # else it is another's by now
                record.due_at, record.claims = utc_now() + settled.after, max(record.claims - 1, 0)
        return unwanted

    async def last_error_type(self, claim: Claim) -> str | None:
        """Of the failure that the claimed record has learned of last."""
        event = self.records.event
        query = select(event.payload).where(event.task_id == claim.task_id, event.sequence == claim.events)
        payload = await self.database.read(lambda session: session.scalars(query).one_or_none())
        return None if payload is None else payload.get("error_type")

    async def begin_anew(self, claim: Claim) -> bool:
        """Expect the reports of another run, as of one that has told nothing: the server has forgotten the record's.

        Returns:
            False if something else has happened to the record since it was claimed.
        """
        record = self.records.record
        unchanged = (record.task_id == claim.task_id, record.event_count == claim.events)
        anew = cast("Any", update(record).where(self.records.key == claim.key, *unchanged))
        anew = anew.values(generation=0, reported=0).returning(record.task_id)
        anew = anew.execution_options(synchronize_session=False)
        return bool(await self.database.run(lambda session: session.execute(anew).all()))

    async def apply(self, report: Report) -> int:
        """Apply what is new in a report. Applying it again changes nothing.

        Returns:
            How many of its events were new.

        Raises:
            ReportRefusedError: There is no such record, or the events cannot follow on those that it has.
        """
        return await self.database.run(lambda session: self._apply_report(session, report))

    def _apply_report(self, session: Session, report: Report) -> int:
        [record] = self._locked(session, self.records.record.task_id == report.task_id) or [None]
        if record is None:
            raise ReportRefusedError("unknown_record", f"No record has the task {report.task_id!r}.")
        return sum(self._apply_new(session, record, report.generation, one) for one in report.events)

    def _apply_new(self, session: Session, record: Any, generation: int, reported: ReportedEvent) -> bool:
        """Apply an event that is not known yet; False if it is.

        The end of a generation is news until it has come, whatever its place: the attempt that tells it may not know
        all that the one before it had told.
        """
        if generation < record.generation:
            return False
        is_new_generation = generation > record.generation
        last = 0 if is_new_generation else abs(record.reported)
        has_ended = not is_new_generation and record.reported < 0
        ends = reported.type in _ENDS
        if reported.sequence <= last and (has_ended or not ends):
            return False
        if has_ended or reported.sequence > last + 1:
            expected = "none" if has_ended else f"event {last + 1}"
            raise ReportRefusedError("out_of_order", f"Event {reported.sequence} came where {expected} was to come.")
        self._apply_reported(session, record, Event(reported.type, reported.at, dict(reported.payload)))
        record.generation, record.reported = generation, -reported.sequence if ends else reported.sequence
        return True

    def _apply_reported(self, session: Session, record: Any, event: Event) -> None:
        state = state_of(record)
        if event.type == state.status and event.type in _ENDS:
            return  # the run was asked before it could tell
        if state.status in TO_START:
            # It was started or resumed, and the process that did it has not written so, and may never do.
            self._apply(session, record, Event(RecordStatus.QUEUED, event.at, {"by": "report"}))
            state = state_of(record)
        if not state.can(event.type):
            raise ReportRefusedError("out_of_order", f"A record that is {state.status} cannot become {event.type}.")
        if event.type is RecordStatus.PROCESSING and state.after(event) == state:
            return
        self._apply(session, record, event, retryable=bool(event.payload.get("retryable")))

    async def note(self, claim: Claim, run: TaskResult[Any] | TaskNotFoundError) -> bool:
        """Apply what the server says of a started record's run. True if it was news."""
        event = _event_of(run)
        retryable = isinstance(run, TaskNotFoundError) or run.error_type not in _NOT_AGAIN

        def write(session: Session) -> bool:
            for record in self._locked(session, self.records.key == claim.key):
                if (record.task_id, record.event_count) != (claim.task_id, claim.events):
                    return False
                if event is None or event.type == record.status:
                    record.due_at, record.claims = utc_now() + self.records.check_delay(), 0
                    return False
                self._apply(session, record, event, retryable=retryable)
                return True
            return False

        return await self.database.run(write)

    def _locked(self, session: Session, criterion: Any) -> Sequence[Any]:
        """Records that nobody else changes before this transaction has ended."""
        record = self.records.record
        if session.get_bind(record).dialect.name == "sqlite":
            self._begin_writing(session, criterion)
        query = self._records().where(criterion).with_for_update(of=record).execution_options(populate_existing=True)
        try:
            return session.scalars(query).all()
        except DBAPIError:
            raise
        except Exception:  # a column of the application's cannot be loaded; it is not needed here
            own = load_only(*(getattr(record, name) for name in RECORD_COLUMNS))
            return session.scalars(query.options(own)).all()

    def _apply(self, session: Session, record: Any, event: Event, *, retryable: bool = False) -> None:
        """Write an event, and what follows from it."""
        at = max(event.at, self._last_event_at(session, record) or event.at)
        event = replace(event, at=at, payload=storable(event.payload))
        state = state_of(record).after(event)
        payload = event.payload | ({"attempt": state.attempts} if event.type is RecordStatus.QUEUED else {})
        record.event_count += 1
        session.add(
            self.records.event(
                task_id=record.task_id, sequence=record.event_count, type=str(event.type), at=event.at, payload=payload
            )
        )
        for name in STATE_COLUMNS:
            value = getattr(state, name)
            setattr(record, name, str(value) if name == "status" else value)
        record.claims = 0
        record.due_at = self._next_look(event.type, state.attempts, retryable=retryable)

    def _last_event_at(self, session: Session, record: Any) -> datetime | None:
        """When the record's last event was, by a clock that may be ahead: a dispatcher's, a worker's, the server's."""
        if not record.event_count:
            return None
        session.flush()  # it may have been added just now, in a session that does not do so by itself
        event = self.records.event
        query = select(event.at).where(event.task_id == record.task_id, event.sequence == record.event_count)
        return session.scalars(query).one_or_none()

    def _next_look(self, status: RecordStatus, attempts: int, *, retryable: bool) -> datetime | None:
        delay: timedelta | None = None
        if status in TO_CHECK:
            delay = self.records.check_delay()
        elif status is RecordStatus.FAILED and retryable:
            delay = self.records.delay_after(attempts)
        return None if delay is None else utc_now() + delay


def _event_of(run: TaskResult[Any] | TaskNotFoundError) -> Event | None:
    """What a run's status says to a record that was started."""
    if isinstance(run, TaskNotFoundError):
        return Event(RecordStatus.FAILED, utc_now(), {"error": str(run), "error_type": "TaskNotFoundError"})
    match run.status:
        case TaskStatus.PENDING:
            return None
        case TaskStatus.PROCESSING:
            return Event(RecordStatus.PROCESSING, run.started_at or utc_now())
        case TaskStatus.COMPLETED if run.error is not None:  # not what the result is, but why this process cannot tell
            logger.warning("The result of task run %s cannot be read; its record waits: %s", run.task_id, run.error)
            return None
        case TaskStatus.COMPLETED:
            result = as_json(run.result)
            return Event(RecordStatus.COMPLETED, run.completed_at or utc_now(), {"result": result})
        case TaskStatus.FAILED:
            payload = {"error": run.error or "", "error_type": run.error_type or "Error"}
            return Event(RecordStatus.FAILED, run.completed_at or utc_now(), payload)
