"""Records in the database: claimed, brought from one state to the next, with an event for each change.

Each method is one transaction. All changes of a record's state go through ``_apply``, with the record locked.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from sqlalchemy import false, func, inspect, or_, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import lazyload, load_only

from temporal_async_task.errors import ReportRefusedError, TaskNotFoundError
from temporal_async_task.integrations.lifecycle import NOT_AGAIN, Event, RecordStatus
from temporal_async_task.integrations.reports import Report, ReportedEvent, as_json, storable, utc_now
from temporal_async_task.integrations.sqlalchemy.mixins import RECORD_COLUMNS, STATE_COLUMNS, state_of
from temporal_async_task.integrations.sqlalchemy.sessions import is_outage
from temporal_async_task.status import TaskResult, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy.orm import Mapper, Session

    from temporal_async_task.integrations.sqlalchemy.mapping import RecordTask
    from temporal_async_task.integrations.sqlalchemy.sessions import Database

logger = logging.getLogger("temporal_async_task")

TO_START = (RecordStatus.PENDING, RecordStatus.FAILED)
TO_CHECK = (RecordStatus.QUEUED, RecordStatus.PROCESSING)
_ENDS = (RecordStatus.COMPLETED, RecordStatus.FAILED)
MAX_CLAIMS = 10
"""Claims in a row that may end with the process that made them: a record must not kill all dispatchers for ever."""
ENDED_BY_HAND = frozenset({"TaskCancelledError", "TerminatedError"})
_NOT_AGAIN = NOT_AGAIN | ENDED_BY_HAND | {"NonRetryableError", "ResultError", "PayloadTooLargeError"}
"""Types of errors, as a status shows them, after which a record is left to a person."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A record that this process may work on until the claim runs out."""

    key: Any
    task_id: str
    status: RecordStatus
    events: int
    """How many events the record had: if it has more by now, the claim is worth nothing."""
    claims: int
    """How often it was claimed in a row, this time included."""
    due_at: datetime | None
    """When the claim runs out. No two claims have the same."""
    params: Any = None
    fault: str | None = None
    """Why it cannot be submitted: its params could not be made, or it has been claimed too often."""

    @property
    def may_resume(self) -> bool:
        return self.status is RecordStatus.FAILED and self.claims <= MAX_CLAIMS


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
        return self.event is not None and self.event.type is RecordStatus.QUEUED


class RecordStore:
    """The records of one ``RecordTask`` in one database."""

    def __init__(self, records: RecordTask[Any], database: Database) -> None:
        self.records = records
        self.database = database

    # Claiming

    async def claim(
        self, statuses: Collection[RecordStatus], limit: int, lease: timedelta, *, max_waiting: int | None = None
    ) -> list[Claim]:
        """Claim records that are due, each for this caller only, for as long as the lease.

        A claim holds no lock. Whoever made it may die: when it has run out, the record is due again.

        Args:
            statuses: Only records with one of these.
            limit: How many at most.
            lease: How long the claims hold.
            max_waiting: How many there may be, with these, that were started and have not begun. Claims with this
                limit are made one after the other, by whichever process, so that together they keep it.
        """
        keys = await self.database.run(lambda session: self._claim(session, statuses, limit, lease, max_waiting))
        if not keys:
            return []
        with_params = RecordStatus.PENDING in statuses
        return await self.database.read(lambda session: self._claimed(session, keys, statuses, with_params=with_params))

    def _claim(
        self,
        session: Session,
        statuses: Collection[RecordStatus],
        limit: int,
        lease: timedelta,
        max_waiting: int | None,
    ) -> list[Any]:
        record = self.records.record
        if max_waiting is None:
            return self._take(session, statuses, limit, lease)
        self._take_turn(session)
        room = max_waiting - self._waiting(session)
        # Claims that have run out are made again first, and whatever the room: they count as waiting all along, since
        # whoever made them may be slow, and start their records yet.
        keys = self._take(session, statuses, limit, lease, record.claims > 0)
        return keys + self._take(session, statuses, min(room, limit - len(keys)), lease, record.claims == 0)

    def _take(
        self, session: Session, statuses: Collection[RecordStatus], limit: int, lease: timedelta, *criteria: Any
    ) -> list[Any]:
        """Claim records with a status that are due, those first that have been due the longest. Returns their keys."""
        if limit <= 0:
            return []
        record, key, now = self.records.record, self.records.key, utc_now()
        due = (
            select(key.label("key"))
            .where(*self.records.criteria(), record.status.in_(statuses), record.due_at <= now, *criteria)
            .order_by(record.due_at)
            .limit(limit)
            # PostgreSQL leaves out what another claims just now. SQLite has one writer at a time, and no such clause.
            .with_for_update(skip_locked=True)
            .cte("due")
        )
        claimed = cast("Any", update(record).where(key.in_(select(due.c.key))))
        claimed = claimed.values(due_at=now + lease, claims=record.claims + 1).returning(key, record.task_id)
        result = cast("Any", session.execute(claimed.execution_options(synchronize_session=False)))
        rows: list[Any] = result.all()
        for found, task_id in rows:
            if task_id is None:  # inserted by something else than this mapping
                session.execute(
                    update(record)
                    .where(key == found)
                    .values(task_id=uuid4().hex)
                    .execution_options(synchronize_session=False)
                )
        return [row[0] for row in rows]

    def _take_turn(self, session: Session) -> None:
        """Wait until no other transaction claims records of this class with a limit."""
        record = self.records.record
        if session.get_bind(record).dialect.name == "postgresql":
            lock = select(func.pg_advisory_xact_lock(func.hashtext(f"async-task {self._table}")))
            session.execute(lock, bind_arguments={"mapper": record})
        else:
            self._begin_writing(session, false())

    def _waiting(self, session: Session) -> int:
        """How many records were started and have not begun, or were claimed to be started and are not settled."""
        record = self.records.record
        being_started = record.status.in_(TO_START) & (record.claims > 0) & record.due_at.is_not(None)
        query = select(func.count()).where(
            *self.records.criteria(), or_(record.status == RecordStatus.QUEUED, being_started)
        )
        return session.execute(query, bind_arguments={"mapper": record}).scalar_one()

    def _begin_writing(self, session: Session, criterion: Any) -> None:
        """Make this transaction the only one that writes: on SQLite, its first write does."""
        record = self.records.record
        nothing = update(record).where(criterion).values(event_count=record.event_count)
        session.execute(nothing.execution_options(synchronize_session=False))

    @property
    def _table(self) -> str:
        mapper: Mapper[Any] = inspect(self.records.record)
        return str(mapper.local_table)

    def _claimed(
        self, session: Session, keys: Sequence[Any], statuses: Collection[RecordStatus], *, with_params: bool
    ) -> list[Claim]:
        record = self.records.record
        columns = (self.records.key, record.task_id, record.status, record.event_count, record.claims, record.due_at)
        # One class of records may run several tasks: another's run must not be looked for among this one's.
        ours = (self.records.key.in_(keys), *self.records.criteria())
        claims = [
            Claim(key, task_id, RecordStatus(status), *rest)
            for key, task_id, status, *rest in session.execute(select(*columns).where(*ours).order_by(self.records.key))
            if status in statuses  # else a report has come since it was claimed: there is nothing to be done any more
        ]
        if not with_params:
            return claims
        loaded = self._loaded(session, [claim.key for claim in claims])
        return [self._with_params(session, loaded[claim.key], claim) for claim in claims if claim.key in loaded]

    def _loaded(self, session: Session, keys: Sequence[Any]) -> dict[Any, Any]:
        """Records by their keys. One that cannot be loaded is in no other's way: of it, there is the error."""
        try:
            found = session.scalars(self._records().where(self.records.key.in_(keys))).all()
        except DBAPIError:
            raise
        except Exception as error:  # a column's type can make nothing of what the row has
            if len(keys) == 1:
                return {keys[0]: error}
            return {key: one for single in keys for key, one in self._loaded(session, [single]).items()}
        return {getattr(one, self.records.key.key): one for one in found}

    def _with_params(self, session: Session, record: Any, claim: Claim) -> Claim:
        if claim.claims > MAX_CLAIMS:
            return replace(claim, fault=f"it was claimed {claim.claims - 1} times, and never released")
        if isinstance(record, Exception):
            return replace(claim, fault=f"it cannot be loaded: {type(record).__name__}: {record}")
        try:
            with session.no_autoflush:
                return replace(claim, params=self.records.params(record))
        except Exception as error:
            if isinstance(error, SQLAlchemyError):
                session.rollback()  # the transaction is of no use any more; the others are read again
            return replace(claim, fault=f"params() failed: {type(error).__name__}: {error}")

    async def holds(self, claim: Claim) -> bool:
        """Whether a claim still stands: the record is there as it was, and nobody else's."""
        record = self.records.record
        columns = (record.task_id, record.status, record.event_count, record.claims, record.due_at)
        query = select(*columns).where(self.records.key == claim.key)
        as_claimed = (claim.task_id, claim.status, claim.events, claim.claims, claim.due_at)
        return await self.database.read(lambda session: session.execute(query).all()) == [as_claimed]

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

    # Bringing records on

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
        if state.can(RecordStatus.QUEUED) and event.type is not RecordStatus.QUEUED:
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

    async def find(self, key: Any) -> Claim | None:
        """A record as it stands, claimed by nobody."""
        found = await self.database.read(
            lambda session: self._claimed(session, [key], tuple(RecordStatus), with_params=False)
        )
        return found[0] if found else None

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

    def _records(self) -> Any:
        """Of one table: what a class loads with its records by a join is neither wanted here nor can be locked."""
        return select(self.records.record).options(lazyload("*")).order_by(self.records.key)

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
