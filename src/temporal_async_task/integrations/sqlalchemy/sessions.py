"""Work in a transaction, with whatever kind of session the application has."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool

from temporal_async_task.engine.unwind import Unwind, apart
from temporal_async_task.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from sqlalchemy.orm import Session

T = TypeVar("T")

Sessions = async_sessionmaker[Any] | sessionmaker[Any]

_TRIES = 5
_PATIENCE = 30.0  # seconds, beside what the database waits by itself: a caller has a timeout of its own
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNDONE = {"40001", "40P01", "55P03"}  # SQLSTATE: serialization_failure, deadlock_detected, lock_not_available


class Database:
    """Runs functions of a ``Session`` in transactions of their own: in a thread, or on an ``AsyncSession``.

    A transaction that the database has undone for another's sake (a lock that was not to be had, a deadlock, a
    serialization failure) is run again, a few times. So what is run must do nothing but work on the session.

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
        return await _tried(lambda: self._run_once(work))

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in a transaction, of which nothing is kept."""
        return await _tried(lambda: self._read_once(work))

    async def _run_once(self, work: Callable[[Session], T]) -> T:
        if self.is_async:
            return await _to_its_end(self._run_async(work))
        return await asyncio.to_thread(self._run, work)

    async def _run_async(self, work: Callable[[Session], T]) -> T:
        async with self._sessions.begin() as session:
            return cast("T", await session.run_sync(work))

    async def _read_once(self, work: Callable[[Session], T]) -> T:
        if self.is_async:
            return await _to_its_end(self._read_async(work))
        return await asyncio.to_thread(self._read, work)

    async def _read_async(self, work: Callable[[Session], T]) -> T:
        async with self._sessions() as session:
            return cast("T", await session.run_sync(work))

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


async def _to_its_end(transaction: Coroutine[Any, Any, T]) -> T:
    """Await a transaction that nothing stops on its way: what it holds in the database might stay held."""
    task = asyncio.get_running_loop().create_task(transaction, context=apart())
    stopped: BaseException | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except (asyncio.CancelledError, Unwind) as error:  # by its caller, or with its attempt, which asks repeatedly
            stopped = error
    if stopped is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # seen, but nobody waits for it any more
    raise stopped


async def _tried(transaction: Callable[[], Awaitable[T]]) -> T:
    give_up_at = time.monotonic() + _PATIENCE
    tried = 0
    while True:
        try:
            return await transaction()
        except Exception as error:
            tried += 1
            if tried == _TRIES or time.monotonic() > give_up_at or not _was_undone(error):
                raise
        await asyncio.sleep(random.uniform(0, 0.05 * 2**tried))  # noqa: S311 - so that two do not meet again


def is_outage(error: Exception) -> bool:
    """Whether the database is away or busy, whatever was to be written."""
    return isinstance(error, OperationalError | InterfaceError | PoolTimeout | OSError) or _was_undone(error)


def _was_undone(error: Exception) -> bool:
    """Whether a transaction failed for another's sake, and would do as well after it."""
    cause: Any = getattr(error, "orig", None) or error  # SQLAlchemy wraps no error of a listener that configures
    if isinstance(cause, sqlite3.Error):
        return (getattr(cause, "sqlite_errorcode", 0) & 0xFF) in _LOCKED  # the rest tells which kind of BUSY
    return (getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)) in _UNDONE
