"""Records that are due, claimed by one process at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from sqlalchemy import false, func, inspect, or_, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import lazyload

from temporal_async_task.integrations.lifecycle import RecordStatus
from temporal_async_task.integrations.reports import utc_now

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy.orm import Mapper, Session

    from temporal_async_task.integrations.sqlalchemy.mapping import RecordTask
    from temporal_async_task.integrations.sqlalchemy.sessions import Database

TO_START = (RecordStatus.PENDING, RecordStatus.FAILED)
TO_CHECK = (RecordStatus.QUEUED, RecordStatus.PROCESSING)
MAX_CLAIMS = 10
"""Claims in a row that may end with the process that made them: a record must not kill all dispatchers for ever."""


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
        """Whether to look for a run that goes on with the params that it has."""
        return self.status is RecordStatus.FAILED and self.claims <= MAX_CLAIMS


class RecordClaims:
    """The records of one ``RecordTask`` in one database, to be claimed."""

    def __init__(self, records: RecordTask[Any], database: Database) -> None:
        self.records = records
        self.database = database

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

    async def find(self, key: Any) -> Claim | None:
        """A record as it stands, claimed by nobody."""
        found = await self.database.read(
            lambda session: self._claimed(session, [key], tuple(RecordStatus), with_params=False)
        )
        return found[0] if found else None

    def _records(self) -> Any:
        """Of one table: what a class loads with its records by a join is neither wanted here nor can be locked."""
        return select(self.records.record).options(lazyload("*")).order_by(self.records.key)
