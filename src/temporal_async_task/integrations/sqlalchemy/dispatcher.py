"""Starts the tasks of committed records, and finds out what no report has told.

Any number of dispatchers may run, in web processes, in workers or alone. A record is claimed by one of them at a time,
and its task's id is committed with it: whatever dies in between, the record's task is started, and only once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from temporal_async_task.checks import seconds
from temporal_async_task.errors import (
    ConfigError,
    InvalidKeyError,
    ParamsError,
    PayloadTooLargeError,
    ServerUnavailableError,
    TaskConflictError,
    TaskNotFoundError,
    TaskNotRegisteredError,
    in_words,
)
from temporal_async_task.integrations.lifecycle import Event, RecordStatus
from temporal_async_task.integrations.reports import utc_now
from temporal_async_task.integrations.sqlalchemy.backlog import backlog
from temporal_async_task.integrations.sqlalchemy.claims import TO_CHECK, TO_START, Claim
from temporal_async_task.integrations.sqlalchemy.sessions import Database, Sessions
from temporal_async_task.integrations.sqlalchemy.store import ENDED_BY_HAND, RecordStore, Settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from temporal_async_task.component import AsyncTaskComponent
    from temporal_async_task.integrations.sqlalchemy.mapping import RecordTask
    from temporal_async_task.status import TaskResult

logger = logging.getLogger("temporal_async_task")
T = TypeVar("T")

SHORTEST_INTERVAL = 0.1
"""Seconds between two looks into the database while there is work."""
LONGEST_INTERVAL = 5.0
"""... and while there is none, unless a commit of this process calls for one."""
_ENDING = (0.05, 0.1, 0.2, 0.4)
"""Seconds between tries to resume a run that goes on: it tells of its failure a moment before its end."""
TROUBLE_DELAY = timedelta(seconds=30)
"""Before a record is tried again that neither was submitted nor is unfit for it."""
_CONCURRENCY = 20
_FRESH = 0.5
"""Seconds for which a claimed record is taken for what it was. If it has its turn later, it is looked at again."""
_STOP_TIMEOUT = 15.0  # seconds; a submit to a server that is gone takes 10
_UNFIT = (ParamsError, PayloadTooLargeError, TaskConflictError, InvalidKeyError)


class Dispatcher:
    """Starts the tasks of committed records.

    Args:
        component: A component that knows the tasks; the dispatcher connects it.
        sessions: The application's ``async_sessionmaker`` or ``sessionmaker``.
        records: Which records run which task.
        batch: How many records are claimed at once.
        lease: Seconds (or a ``timedelta``) for which a claim holds: so long the records of a dispatcher that was
            killed have to wait. It must be enough for a batch to be submitted.

    Raises:
        ConfigError: ``batch`` or ``lease`` makes no sense.
    """

    def __init__(
        self,
        component: AsyncTaskComponent,
        sessions: Sessions,
        *records: RecordTask[Any],
        batch: int = 50,
        lease: float | timedelta = 60.0,
    ) -> None:
        if batch < 1 or not seconds(lease) > 0:
            raise ConfigError(f"batch must be 1 or more and lease over 0 seconds, not {batch!r} and {lease!r}.")
        self._component = component
        database = Database(sessions)
        self._stores = [RecordStore(one, database) for one in records]
        self._batch = batch
        self._lease = timedelta(seconds=seconds(lease))
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Task[None] | None = None
        self._stopping = False
        self._troubled = False

    # From outside

    def wake(self) -> None:
        """Look into the database now. May be called in any thread, and when nothing runs."""
        if self._loop is not None and self._wake is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop is closed just now
                self._loop.call_soon_threadsafe(self._wake.set)

    async def start(self) -> None:
        """Run in the background of this event loop, until ``stop``. Does nothing if it runs.

        Raises:
            TaskNotRegisteredError: The component does not know one of the tasks.
        """
        self._check_registered()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self.run())

    async def stop(self) -> None:
        """Finish what is being submitted, and stop. Takes 15 seconds at most, even if the server is gone."""
        running, self._running = self._running, None
        if running is None:
            return
        self._stopping = True
        self.wake()
        await asyncio.wait((running,), timeout=_STOP_TIMEOUT)
        running.cancel()
        await asyncio.wait((running,))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def run(self) -> None:
        """Dispatch until cancelled, as a process of its own does.

        Raises:
            TaskNotRegisteredError: The component does not know one of the tasks.
        """
        self._check_registered()
        self._loop, self._wake, self._stopping = asyncio.get_running_loop(), asyncio.Event(), False
        interval = SHORTEST_INTERVAL
        while not self._stopping:
            self._wake.clear()
            try:
                worked = await self.sweep()
            except Exception as error:
                self._trouble(error)
                worked = False
            else:
                self._troubled = False
            interval = SHORTEST_INTERVAL if worked else min(interval * 2, LONGEST_INTERVAL)
            if self._stopping:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._wake.wait()
                    interval = SHORTEST_INTERVAL

    async def refresh(self, record: type[Any], key: Any) -> bool:
        """See ``RecordIntegration.refresh``."""
        for store in self._stores:
            if store.records.record is record:
                claim = await store.find(key)
                if claim is not None and claim.status in TO_CHECK:
                    return await _ask(store, claim)
        return False

    def _check_registered(self) -> None:
        for store in self._stores:
            if store.records.task not in self._component.tasks:
                raise TaskNotRegisteredError(
                    f"The dispatcher's component does not know task {store.records.task.name!r}. Register it first: "
                    f"component.register_all(integration.create_async_tasks())."
                )

    def _trouble(self, error: Exception) -> None:
        """Log what keeps the dispatcher from its work, once for as long as it does."""
        if not self._troubled:
            expected = isinstance(error, ServerUnavailableError)
            logger.warning("Records wait: %s: %s", type(error).__name__, error, exc_info=None if expected else error)
        self._troubled = True

    # One look

    async def sweep(self) -> bool:
        """Look once at what is due, and work on a batch of it. True if there may be more at once.

        Raises:
            ServerUnavailableError: The Temporal server does not answer. Records wait as they are.
            Exception: The database's errors.
        """
        await self._component.connect()
        worked = False
        trouble: Exception | None = None
        for store in self._stores:
            try:
                worked = await self._start(store) or worked
                worked = await self._check(store) or worked
            except Exception as error:  # of one kind of records, which keeps the others from nothing
                trouble = error
        if trouble is not None:
            raise trouble
        return worked

    async def _start(self, store: RecordStore) -> bool:
        records = store.records
        # The server's count lags behind, and the database's knows of records only: both have to leave room.
        room = records.max_backlog - await backlog(self._component.client, records.task.task_queue)
        if room <= 0:
            return False
        limit = min(room, self._batch)
        claimed_at = time.monotonic()
        claims = await store.claim(TO_START, limit, self._lease, max_waiting=records.max_backlog)
        outcomes = await _each(claims, lambda claim: self._submit(store, claim, claimed_at))
        for claim in await store.settle(outcomes):
            await _withdraw(records.task, claim)
        for outcome in outcomes:
            if outcome.trouble is not None:
                raise outcome.trouble
        return bool(claims)

    async def _submit(self, store: RecordStore, claim: Claim, claimed_at: float) -> Settled:
        task = store.records.task
        try:
            age = time.monotonic() - claimed_at
            if age > self._lease.total_seconds() or (age > _FRESH and not await store.holds(claim)):
                return Settled(claim)
            if claim.may_resume and (event := await _resume(store, claim)):  # which takes no params
                return Settled(claim, event)
            if claim.fault is not None:
                return _refused(claim, "RecordError", claim.fault)
            if claim.status is RecordStatus.FAILED and not await store.begin_anew(claim):
                return Settled(claim)
            await task.submit(claim.params, task_id=claim.task_id)
        except _UNFIT as error:
            return _refused(claim, type(error).__name__, str(error))
        except ServerUnavailableError as error:
            return Settled(claim, trouble=error)
        except Exception as error:  # of the server, which refuses, or of a codec: it may pass
            return Settled(claim, trouble=error, after=TROUBLE_DELAY)
        return Settled(claim, Event(RecordStatus.QUEUED, utc_now()))

    async def _check(self, store: RecordStore) -> bool:
        """Ask about runs of which nothing was heard for a while: terminated ones tell nothing."""
        claims = await store.claim(TO_CHECK, self._batch, self._lease)
        news = await _each(claims, lambda claim: _ask(store, claim))
        return len(claims) == self._batch or any(news)


async def _ask(store: RecordStore, claim: Claim) -> bool:
    """Bring a started record up to date with its run. True if there was news."""
    run: TaskResult[Any] | TaskNotFoundError
    try:
        run = await store.records.task.get_status(claim.task_id)
    except TaskNotFoundError as error:
        run = error
    return await store.note(claim, run)


async def _resume(store: RecordStore, claim: Claim) -> Event | None:
    """Have a failed run go on from its last finished step. None: there is no such run."""
    task = store.records.task
    for pause in (*_ENDING, None):
        try:
            run = await task.get_status(claim.task_id)
            if run.error_type in ENDED_BY_HAND and run.error_type != await store.last_error_type(claim):
                # It had failed before, and is not to go on by itself. Once the record tells so, a person may have it.
                return _failed(run.error_type, run.error or "")
            await task.resume(claim.task_id)
        except TaskNotFoundError:
            return None
        except TaskConflictError:
            if pause is not None:
                await asyncio.sleep(pause)
                continue
            # It goes on already, or has completed: the record will be told.
        break
    return Event(RecordStatus.QUEUED, utc_now())


async def _withdraw(task: Any, claim: Claim) -> None:
    """Cancel a run that was started while its record was deleted or given up: whoever did it could not."""
    try:
        await task.cancel(claim.task_id, "its record was deleted or given up")
    except Exception as error:
        logger.warning("Task run %s, which nobody wants any more, goes on: %s", claim.task_id, error)


def _refused(claim: Claim, error_type: str, error: str) -> Settled:
    """A record that cannot be submitted fails, and is in nobody's way."""
    return Settled(claim, _failed(error_type, in_words(error_type, error)[:4000]))


def _failed(error_type: str, error: str) -> Event:
    payload = {"error": error, "error_type": error_type, "retryable": False}
    return Event(RecordStatus.FAILED, utc_now(), payload)


async def _each(claims: Sequence[Claim], work: Callable[[Claim], Awaitable[T]]) -> list[T]:
    """Work on some claims at a time. If one goes wrong, the others are ended first."""
    places = asyncio.Semaphore(_CONCURRENCY)

    async def one(claim: Claim) -> T:
        async with places:
            return await work(claim)

    found = await asyncio.gather(*(one(claim) for claim in claims), return_exceptions=True)
    for answer in found:
        if isinstance(answer, BaseException):
            raise answer
    return cast("list[T]", found)
