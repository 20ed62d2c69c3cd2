"""Records where others use the database, too: locks that are not to be had, transactions that are undone."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

import ark  # noqa: F401 - makes the example importable
from nanobanana2_image.entities import create_engine
from postgres import PrivatePostgres
from records_app import Base, Call, CallEvent, drawing, make_engine
from support import CallLog, wait_until
from temporal_async_task import TaskNotFoundError
from temporal_async_task.engine.unwind import Unwind, _Unwindable
from temporal_async_task.integrations.lifecycle import Event, RecordStatus
from temporal_async_task.integrations.reports import Report, ReportedEvent, utc_now
from temporal_async_task.integrations.sqlalchemy import RecordTask
from temporal_async_task.integrations.sqlalchemy.sessions import Database
from temporal_async_task.integrations.sqlalchemy.store import TO_CHECK, TO_START, RecordStore, Settled

LEASE = timedelta(seconds=60)
STARTED = Event(RecordStatus.QUEUED, utc_now())
HAS_BEGUN = Report(
    task="draw",
    task_id="t1",
    generation=1,
    events=(ReportedEvent(sequence=1, type=RecordStatus.PROCESSING, at=utc_now(), payload={}),),
)


class Place:
    """A database, with two records in it, and the errors that its engine has met."""

    def __init__(self, engine: AsyncEngine, folder: Path) -> None:
        self.engine = engine
        self.sessions = async_sessionmaker(engine)
        mapping = RecordTask(
            record=Call, event=CallEvent, task=drawing(CallLog(folder / "log"), 0), params=lambda call: call.prompt
        )
        self.store = RecordStore(mapping, Database(self.sessions))
        self.errors: list[BaseException] = []
        self.on_error: Callable[[], None] = lambda: None
        event.listen(engine.sync_engine, "handle_error", self._note)

    def _note(self, context: Any) -> None:
        self.errors.append(context.original_exception)
        self.on_error()

    async def fill(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with self.sessions.begin() as session:
            session.add_all([Call(id=f"c{one}", prompt="p", task_id=f"t{one}") for one in (1, 2)])

    async def told(self, task_id: str = "t1") -> list[str]:
        async with self.sessions() as session:
            query = select(CallEvent.type).where(CallEvent.task_id == task_id).order_by(CallEvent.sequence)
            return list(await session.scalars(query))


@contextlib.asynccontextmanager
async def opened(engine: AsyncEngine, folder: Path) -> AsyncIterator[Place]:
    place = Place(engine, folder)
    await place.fill()
    yield place
    await engine.dispose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "records.db"


@pytest.fixture
def other(file: Path) -> Iterator[sqlite3.Connection]:
    """Another process, as far as SQLite is concerned: it waits for nothing, and commits by itself."""
    connection = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
    yield connection
    connection.close()


def sqlite_engine(file: Path, **options: Any) -> AsyncEngine:
    return make_engine(f"sqlite+aiosqlite:///{file}", poolclass=NullPool, **options)


def begin_with(engine: AsyncEngine, begin: str) -> None:
    """Have transactions begun by SQLAlchemy, as its documentation advises, and not by sqlite3 with the first write."""

    @event.listens_for(engine.sync_engine, "connect")
    def leave_it_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def start(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def write_before_each_statement(engine: AsyncEngine, other: sqlite3.Connection) -> None:
    """Have another process write whenever it can: between any two statements of a transaction."""

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def write(*_: Any) -> None:
        with contextlib.suppress(sqlite3.OperationalError):
            other.execute("UPDATE calls SET prompt = random()")  # the same once more would change nothing


# SQLite -------------------------------------------------------------------------------------------------------


async def test_a_transaction_that_reads_before_it_writes_fails_at_once_unless_it_begins_immediate(
    tmp_path: Path,
):
    """SQLite's own rule, and why the documentation asks applications that read first for BEGIN IMMEDIATE."""

    async def read_and_write(place: Place) -> None:
        async with place.sessions.begin() as session:
            (await session.get_one(Call, "c1")).prompt = "by the application"

    for begin in ("BEGIN", "BEGIN IMMEDIATE"):
        file = tmp_path / f"{begin}.db"
        engine = sqlite_engine(file)
        begin_with(engine, begin)
        async with opened(engine, tmp_path) as place:
            with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as other:
                write_before_each_statement(engine, other)
                if begin == "BEGIN":
                    with pytest.raises(OperationalError, match="database is locked"):
                        await read_and_write(place)
                    assert [error.sqlite_errorname for error in place.errors] == ["SQLITE_BUSY_SNAPSHOT"]  # type: ignore[attr-defined]
                else:
                    await read_and_write(place)


@pytest.mark.parametrize("begin", [None, "BEGIN"], ids=["begun by sqlite3", "begun by SQLAlchemy"])
async def test_whatever_another_process_writes_meanwhile_the_librarys_transactions_go_through(
    file: Path, tmp_path: Path, other: sqlite3.Connection, begin: str | None
):
    """They write before they read."""
    engine = sqlite_engine(file)
    if begin is not None:
        begin_with(engine, begin)
    async with opened(engine, tmp_path) as place:
        write_before_each_statement(engine, other)
        store = place.store
        claims = await store.claim(TO_START, 5, LEASE, max_waiting=10)
        await store.settle([Settled(claim, STARTED) for claim in claims])
        assert await store.apply(HAS_BEGUN) == 1
        other.execute("UPDATE calls SET due_at = '2000-01-01 00:00:00.000000'")
        for claim in await store.claim(TO_CHECK, 5, LEASE):
            assert await store.note(claim, TaskNotFoundError("it is gone"))
        assert place.errors == []
        assert await place.told("t1") == ["queued", "processing", "failed"]
        assert await place.told("t2") == ["queued", "failed"]


async def test_a_lock_that_was_not_to_be_had_in_time_is_asked_for_again(
    file: Path, tmp_path: Path, other: sqlite3.Connection
):
    """SQLite gives the lock to whoever asks at the right moment: with many that ask, one may wait in vain."""
    engine = sqlite_engine(file, connect_args={"timeout": 0.05})
    async with opened(engine, tmp_path) as place:
        other.execute("BEGIN IMMEDIATE")
        place.on_error = lambda: other.execute("ROLLBACK")
        assert await place.store.apply(HAS_BEGUN) == 1
        assert [str(error) for error in place.errors] == ["database is locked"]
        assert await place.told() == ["queued", "processing"]


async def test_a_lock_that_is_never_to_be_had_is_told_after_some_tries(
    file: Path, tmp_path: Path, other: sqlite3.Connection
):
    engine = sqlite_engine(file, connect_args={"timeout": 0.05})
    async with opened(engine, tmp_path) as place:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="database is locked"):
            await place.store.apply(HAS_BEGUN)
        assert len(place.errors) == 5
        other.execute("ROLLBACK")
        assert await place.told() == []


@pytest.mark.parametrize(
    ("scope", "left_by"), [(None, asyncio.CancelledError), (SimpleNamespace(unwinding=True), Unwind)]
)
async def test_a_transaction_whose_caller_is_stopped_goes_to_its_end_and_leaves_no_lock(
    file: Path, tmp_path: Path, scope: Any, left_by: type[BaseException]
):
    """In the caller's context, by which an application may choose its database."""
    tenant = ContextVar("tenant", default="")
    begun, gate = asyncio.Event(), asyncio.Event()

    def write(session: Any) -> None:
        session.execute(update(Call).values(prompt=tenant.get()))
        begun.set()
        await_only(gate.wait())

    async with opened(sqlite_engine(file), tmp_path) as place:
        tenant.set("shop")
        call = asyncio.create_task(_Unwindable(Database(place.sessions).run(write), scope))
        await begun.wait()
        for _ in range(2):  # an attempt that is unwound asks again
            call.cancel()
            await asyncio.sleep(0.05)
        gate.set()
        with pytest.raises(left_by):
            await call
        async with place.sessions.begin() as session:
            assert set(await session.scalars(select(Call.prompt))) == {"shop"}
            await session.execute(update(Call).values(prompt="by the next"))


async def test_what_is_wrong_with_a_statement_is_told_at_once(file: Path, tmp_path: Path):
    async with opened(sqlite_engine(file), tmp_path) as place:
        async with place.engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
        with pytest.raises(OperationalError, match="no such table"):
            await place.store.apply(HAS_BEGUN)
        assert len(place.errors) == 1


@pytest.mark.parametrize("make", [make_engine, create_engine], ids=["tests", "example"])
async def test_a_connection_waits_for_a_file_that_is_locked_as_it_is_opened(
    file: Path, tmp_path: Path, make: Callable[[str], AsyncEngine]
):
    """The last connection that is closed locks the file while it writes all to the disk, which may take its time.

    With a PRAGMA for the timeout the connection's first statement would still have sqlite3's own: 5 seconds.
    """
    async with opened(sqlite_engine(file), tmp_path):
        pass
    closing = sqlite3.connect(file, isolation_level=None)
    closing.execute("PRAGMA locking_mode=EXCLUSIVE")
    closing.execute("UPDATE calls SET prompt = 'the last'")
    engine = make(f"sqlite+aiosqlite:///{file}")

    async def read() -> str:
        async with AsyncSession(engine) as session:
            return (await session.get_one(Call, "c1")).prompt

    reading = asyncio.create_task(read())
    await asyncio.wait((reading,), timeout=6)
    assert not reading.done()
    closing.close()
    assert await reading == "the last"
    await engine.dispose()


# PostgreSQL ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def on_postgres(postgres: PrivatePostgres, tmp_path: Path) -> AsyncIterator[Place]:
    """With transactions that PostgreSQL undoes when another has changed what they have read."""
    url = postgres.create(f"locks_{tmp_path.name[-8:].lower().replace('-', '_')}_{id(tmp_path):x}")
    async with opened(make_engine(url, poolclass=NullPool, isolation_level="REPEATABLE READ"), tmp_path) as place:
        yield place


async def waits_for_a_lock(place: Place) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with place.engine.connect() as connection:
        return bool((await connection.execute(text(query))).scalar_one())


async def test_a_transaction_that_could_not_be_serialized_is_run_again(on_postgres: Place):
    async with on_postgres.sessions.begin() as session:
        await session.execute(update(Call).values(prompt="by the application"))
        applying = asyncio.create_task(on_postgres.store.apply(HAS_BEGUN))
        await wait_until(lambda: waits_for_a_lock(on_postgres))
    assert await applying == 1
    assert [error.sqlstate for error in on_postgres.errors] == ["40001"]  # type: ignore[attr-defined]
    assert await on_postgres.told() == ["queued", "processing"]


async def test_a_transaction_that_was_undone_for_a_deadlock_is_run_again(on_postgres: Place):
    claims = await on_postgres.store.claim(TO_START, 5, LEASE)
    async with on_postgres.sessions.begin() as session:
        await session.execute(text("SET LOCAL deadlock_timeout = '1min'"))  # so that the other one is the victim
        await session.execute(update(Call).where(Call.id == "c2").values(prompt="by the application"))
        settling = asyncio.create_task(on_postgres.store.settle([Settled(claim, STARTED) for claim in claims]))
        await wait_until(lambda: waits_for_a_lock(on_postgres))
        await session.execute(update(Call).where(Call.id == "c1").values(prompt="by the application"))
    await settling
    assert on_postgres.errors[0].sqlstate == "40P01"  # type: ignore[attr-defined]
    assert await on_postgres.told("t1") == await on_postgres.told("t2") == ["queued"]
