"""The records: what is asked for, and what has become of it. Business code writes an ``APICall`` and reads it."""

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, String, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from temporal_async_task.integrations.sqlalchemy import APICallMixin, IntegrationEventMixin, UTCDateTime

PICTURE = "picture"
VIDEO = "video"


class Base(DeclarativeBase):
    pass


class APICall(APICallMixin, Base):
    """One picture or video that was ordered.

    The mixin brings what follows from its events (``status``, ``attempts``, ``started_at``, ``completed_at``,
    ``external_id``, ``response``, ``error``) and what the dispatcher needs.
    """

    __tablename__ = "api_calls"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: uuid.uuid4().hex)
    kind: Mapped[str] = mapped_column(String(20))
    request_params: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=lambda: datetime.now(UTC), index=True)


class IntegrationEvent(IntegrationEventMixin, Base):
    """What has happened to an ``APICall``: queued, processing, completed, failed. It follows from these alone."""

    __tablename__ = "integration_events"


def create_engine(url: str) -> AsyncEngine:
    """An engine for ``sqlite+aiosqlite:///file`` or ``postgresql+asyncpg://...``. Connects when it is used."""
    engine = create_async_engine(url)
    if engine.dialect.name == "sqlite":
        if engine.url.database:
            Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)

        @event.listens_for(engine.sync_engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode=WAL")  # readers and the one writer do not wait for each other
            cursor.execute("PRAGMA busy_timeout=20000")  # milliseconds
            cursor.close()

    return engine


async def create_tables(engine: AsyncEngine) -> None:
    """Make what is missing. An application that lives on uses migrations (Alembic)."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
