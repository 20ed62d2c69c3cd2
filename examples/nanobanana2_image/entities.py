"""The records: what is asked for, and what has become of it. Business code writes an ``APICall`` and reads it."""

import asyncio
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, String, make_url
from sqlalchemy.exc import DBAPIError
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
    address = make_url(url)
    if address.get_backend_name() != "sqlite":
        return create_async_engine(address)
    if address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    # Seconds to wait for locks: one process writes at a time. Given here it holds from a connection's first moment on,
    # in which the file may be locked as well; a PRAGMA would come too late.
    return create_async_engine(address, connect_args={"timeout": 20})


async def create_tables(engine: AsyncEngine) -> None:
    """Make what is missing. An application that lives on uses migrations (Alembic)."""
    for pause in (0.2, 1.0, 5.0, None):
        try:
            async with engine.connect() as connection:
                if engine.dialect.name == "sqlite":  # the file keeps it: readers and the writer are not in each
                    await connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # other's way
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
        except DBAPIError:  # two web processes may start at once, and make the same
            if pause is None:
                raise
            await asyncio.sleep(pause)
        else:
            return
