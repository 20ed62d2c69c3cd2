"""The columns of a record that carries work, and of its events."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, DateTime, Index, Integer, String, Table, Text, event, func
from sqlalchemy.orm import Mapped, Mapper, mapped_column
from sqlalchemy.types import TypeDecorator

from temporal_async_task.integrations.lifecycle import RecordState, RecordStatus
from temporal_async_task.integrations.reports import utc_now

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect


class UTCDateTime(TypeDecorator[datetime]):
    """Aware times, also in databases whose times have no zone (SQLite): there they are kept in UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; use datetime.now(UTC)")
        return value if dialect.name == "postgresql" else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class APICallMixin:
    """The columns of a record whose task is started once it is committed. Business code sets none of them.

    A table in which they have other names keeps those: ``status: Mapped[str] = mapped_column("state", ...)``.
    """

    # What follows from the record's events, for the application to read.
    status: Mapped[str] = mapped_column(String(20), default=RecordStatus.PENDING, server_default="pending")
    attempts: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """How often its task was started or resumed."""
    external_id: Mapped[str | None] = mapped_column(String(255), default=None, index=True)
    """The vendor's id of the job (``report_external_id``)."""
    response: Mapped[Any] = mapped_column(JSON, default=None, nullable=True)
    """The task's result, as JSON."""
    error: Mapped[str | None] = mapped_column(Text, default=None)
    started_at: Mapped[datetime | None] = mapped_column(UTCDateTime, default=None)
    completed_at: Mapped[datetime | None] = mapped_column(UTCDateTime, default=None)
    task_id: Mapped[str | None] = mapped_column(
        String(255), default=lambda: uuid.uuid4().hex, unique=True, nullable=True
    )
    """The id of its one run, committed with the record: submitting twice is submitting once."""

    # The dispatcher's own.
    due_at: Mapped[datetime | None] = mapped_column(
        UTCDateTime, default=utc_now, server_default=func.now(), nullable=True
    )
    """When it is looked at next; while a dispatcher has claimed it: when that claim runs out. None: never."""
    claims: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """How often it was claimed since it was started last, or came into being."""
    event_count: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """How many events it has."""
    generation: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Of the last event that was reported, and ..."""
    reported: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """... its place in the generation: what was reported before is not applied again. Negative: it was the end."""

    def try_again(self) -> None:
        """Have a failed record tried again, whatever its error and the number of its attempts; on commit."""
        if self.status == RecordStatus.FAILED:
            self.due_at, self.claims = utc_now(), 0

    def give_up(self) -> None:
        """Have a pending record not started, or a failed one not tried again by itself; on commit.

        A run that goes on, goes on: cancel it, once this is committed.
        """
        if self.status in {RecordStatus.PENDING, RecordStatus.FAILED}:
            self.due_at = None


@event.listens_for(APICallMixin, "after_mapper_constructed", propagate=True)
def _add_indexes(mapper: Mapper[Any], _: type[Any]) -> None:
    """The indexes that the dispatcher looks by. Not in ``__table_args__``: an application has its own."""
    table = mapper.local_table
    if not isinstance(table, Table) or mapper.inherits is not None:
        return
    status, due_at, claims = (mapper.columns[name] for name in ("status", "due_at", "claims"))
    Index(None, status, due_at)
    Index(None, claims, status, due_at)


class IntegrationEventMixin:
    """The columns of the table of events. One table may serve any number of record classes."""

    task_id: Mapped[str] = mapped_column(String(255), primary_key=True)
    """The record's."""
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """1 for the record's first event, without gaps."""
    type: Mapped[str] = mapped_column(String(20))
    """``queued``, ``processing``, ``completed`` or ``failed``."""
    at: Mapped[datetime] = mapped_column(UTCDateTime)
    payload: Mapped[Any] = mapped_column(JSON, nullable=False)


STATE_COLUMNS = ("status", "attempts", "external_id", "response", "error", "started_at", "completed_at")
RECORD_COLUMNS = (*STATE_COLUMNS, "task_id", "due_at", "claims", "event_count", "generation", "reported")
EVENT_COLUMNS = ("task_id", "sequence", "type", "at", "payload")


def state_of(record: Any) -> RecordState:
    """Where a record stands, from its own columns."""
    values = {name: getattr(record, name) for name in STATE_COLUMNS}
    values["status"] = RecordStatus(values["status"])
    return RecordState(**values)
