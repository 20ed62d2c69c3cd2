"""Work in a transaction, with whatever kind of session the application has."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool

from temporal_async_task.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

T = TypeVar("T")

Sessions = async_sessionmaker[Any] | sessionmaker[Any]


class Database:
    """Runs functions of a ``Session`` in transactions of their own: in a thread, or on an ``AsyncSession``.

    Args:
        sessions: The application's ``async_sessionmaker`` or ``sessionmaker``.

    Raises:
        ConfigError: It is neither.
    """

    def __init__(self, sessions: Sessions) -> None:
        if not isinstance(sessions, async_sessionmaker | sessionmaker):
            raise ConfigError(f"sessions= must be an async_sessionmaker or a sessionmaker, not {sessions!r:.200}.")
        self._sessions: Any = sessions
        self.is_async = isinstance(sessions, async_sessionmaker)

    async def run(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in a transaction, which is committed if it returns."""
        if self.is_async:
            async with self._sessions.begin() as session:
                return cast("T", await session.run_sync(work))
        return await asyncio.to_thread(self._run, work)

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in a transaction, of which nothing is kept."""
        if self.is_async:
            async with self._sessions() as session:
                return cast("T", await session.run_sync(work))
        return await asyncio.to_thread(self._read, work)

    def _read(self, work: Callable[[Session], T]) -> T:
        with self._sessions() as session:
            return work(session)

    def _run(self, work: Callable[[Session], T]) -> T:
        with self._sessions.begin() as session:
            return work(session)

    def check_usable_on_any_loop(self) -> None:
        """Refuse a pool of asyncio connections, where they would be used on one event loop after another.

        Raises:
            ConfigError: The engine has one.
        """
        engine = self._sessions.kw.get("bind")
        if self.is_async and engine is not None and not isinstance(engine.sync_engine.pool, NullPool):
            raise ConfigError(
                "A worker runs tasks on event loops of its own, and the connections of an asyncio pool belong to one "
                "loop. Give it a sessionmaker (sync), or an async engine made with poolclass=NullPool."
            )
