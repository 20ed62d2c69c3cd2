"""Side effects of records: after the commit, once for each record, and never for what was rolled back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool

from records_app import make_engine
from support import wait_until
from temporal_async_task import ConfigError
from temporal_async_task.integrations.sqlalchemy import MutationType, RecordMutation, RecordMutationSideEffect

CREATE, UPDATE, DELETE = MutationType.CREATE, MutationType.UPDATE, MutationType.DELETE


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")
    kind: Mapped[str] = mapped_column(default="plain")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}  # noqa: RUF012


class SpecialItem(Item):
    __mapper_args__ = {"polymorphic_identity": "special"}  # noqa: RUF012


class Other(Base):
    __tablename__ = "others"
    id: Mapped[int] = mapped_column(primary_key=True)


class RollBackError(Exception):
    pass


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(database_url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
def sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine)


@pytest.fixture
def seen() -> Iterator[list[RecordMutation]]:
    """What a side effect of all changes of items was told."""
    told: list[RecordMutation] = []
    effect = RecordMutationSideEffect(Item, told.append)
    effect.install()
    effect.install()  # a second time is the same
    yield told
    effect.remove()


def kinds(seen: list[RecordMutation]) -> list[tuple[Any, ...]]:
    return [(mutation.type, mutation.identity) for mutation in seen]


async def test_it_is_told_of_each_kind_of_change_after_its_commit(sessions, seen):
    async with sessions() as session:
        item = Item(id=1, name="a")
        session.add_all([item, Other(id=1)])
        await session.flush()
        assert seen == []
        await session.commit()
        assert kinds(seen) == [(CREATE, 1)]
        assert seen[0].values == {"id": 1, "name": "a", "kind": "plain"}
        assert seen[0].record is Item

        await session.refresh(item)
        item.name = "b"
        await session.commit()
        assert kinds(seen)[1:] == [(UPDATE, 1)]
        assert seen[1].changes == {"name": ("a", "b")}

        await session.delete(item)
        await session.commit()
        assert kinds(seen)[2:] == [(DELETE, 1)]


async def test_what_was_rolled_back_is_not_told_of(sessions, seen):
    async with sessions() as session:
        session.add(Item(id=1))
        await session.flush()
        await session.rollback()
        session.add(Item(id=2))
        await session.commit()
    with contextlib.suppress(RollBackError):
        async with sessions.begin() as session:
            session.add(Item(id=3))
            await session.flush()
            raise RollBackError
    async with sessions() as session:  # closed with neither
        session.add(Item(id=4))
        await session.flush()
    assert kinds(seen) == [(CREATE, 2)]


async def test_what_was_neither_committed_nor_rolled_back_is_forgotten_with_its_transaction(sessions, seen):
    session = sessions()
    session.add(Item(id=1))
    await session.flush()
    await session.close()
    session.add(Item(id=2))  # a closed session may be used again
    await session.commit()
    assert kinds(seen) == [(CREATE, 2)]


async def test_a_session_that_was_closed_with_neither_is_not_kept(sessions, seen):
    async def work() -> weakref.ref[Any]:
        async with sessions() as session:
            session.add(Item(id=1))
            await session.flush()
            return weakref.ref(session.sync_session)

    kept = await work()
    gc.collect()
    assert kept() is None
    assert seen == []


async def test_a_flush_that_failed_leaves_nothing_behind(sessions, seen):
    async with sessions.begin() as session:
        session.add(Item(id=1))
    async with sessions() as session:
        session.add_all([Item(id=2), Item(id=1)])
        with pytest.raises(Exception, match=r"(?i)unique"):
            await session.commit()
        await session.rollback()
        session.add(Item(id=3))
        await session.commit()
    assert kinds(seen) == [(CREATE, 1), (CREATE, 3)]


async def test_savepoints_are_told_of_with_the_transaction_around_them(sessions, seen):
    async with sessions() as session:
        session.add(Item(id=1))
        async with session.begin_nested():
            session.add(Item(id=2))
            with contextlib.suppress(RollBackError):
                async with session.begin_nested():
                    session.add(Item(id=3))
                    await session.flush()
                    async with session.begin_nested():
                        session.add(Item(id=4))
                    raise RollBackError
            async with session.begin_nested():
                session.add(Item(id=5))
        assert seen == []
        await session.commit()
    assert sorted(kinds(seen)) == [(CREATE, 1), (CREATE, 2), (CREATE, 5)]


async def test_savepoints_that_were_released_go_with_a_rollback_around_them(sessions, seen):
    async with sessions() as session:
        async with session.begin_nested():
            session.add(Item(id=1))
        await session.rollback()
        async with session.begin_nested():
            session.add(Item(id=2))
        await session.commit()
    assert kinds(seen) == [(CREATE, 2)]


async def test_changes_of_one_record_in_one_transaction_are_one(sessions, seen):
    async with sessions() as session:
        item, gone = Item(id=1, name="a"), Item(id=2)
        session.add_all([item, gone])
        await session.flush()
        item.name = "b"
        await session.delete(gone)
        await session.flush()
        await session.commit()
        assert kinds(seen) == [(CREATE, 1)]
        assert seen[0].values["name"] == "b"

        await session.refresh(item)
        item.name = "c"
        await session.flush()
        item.name = "d"
        await session.commit()
    assert kinds(seen)[1:] == [(UPDATE, 1)]
    assert seen[1].changes == {"name": ("b", "d")}


async def test_a_record_that_was_touched_and_not_changed_is_not_told_of(sessions, seen):
    async with sessions() as session:
        item = Item(id=1, name="a")
        session.add(item)
        await session.commit()
        await session.refresh(item)
        item.name = "a"
        await session.commit()
    assert kinds(seen) == [(CREATE, 1)]


async def test_subclasses_are_told_of_and_other_classes_are_not(sessions, seen):
    async with sessions.begin() as session:
        session.add_all([SpecialItem(id=1), Other(id=2)])
    assert [(mutation.record, mutation.identity) for mutation in seen] == [(SpecialItem, 1)]


async def test_bulk_statements_pass_it_by(sessions, seen):
    async with sessions.begin() as session:
        session.add(Item(id=1))
    async with sessions.begin() as session:
        await session.execute(update(Item).values(name="b"))
        await session.execute(delete(Item))
    assert kinds(seen) == [(CREATE, 1)]


async def test_it_may_be_for_some_kinds_of_change_only(sessions):
    told: list[RecordMutation] = []
    effect = RecordMutationSideEffect(Item, told.append, on="delete")
    effect.install()
    try:
        async with sessions() as session:
            item = Item(id=1)
            session.add(item)
            await session.commit()
            await session.delete(item)
            await session.commit()
    finally:
        effect.remove()
    assert kinds(told) == [(DELETE, 1)]


async def test_an_async_one_runs_on_the_event_loop(sessions):
    told: list[Any] = []

    async def tell(mutation: RecordMutation) -> None:
        await asyncio.sleep(0)
        async with sessions() as session:  # the commit is there to be seen
            told.append(await session.get(Item, mutation.identity))

    effect = RecordMutationSideEffect(Item, tell)
    effect.install()
    try:
        async with sessions.begin() as session:
            session.add(Item(id=1, name="a"))
        await wait_until(lambda: told)
    finally:
        effect.remove()
    assert told[0].name == "a"


async def test_an_error_of_it_is_logged_and_the_commit_stands(sessions, caplog: pytest.LogCaptureFixture):
    async def fail_later(_: RecordMutation) -> None:
        raise ValueError("no mail server")

    def fail(_: RecordMutation) -> None:
        raise KeyError("no such user")

    effects = [RecordMutationSideEffect(Item, fail, name="mail"), RecordMutationSideEffect(Item, fail_later)]
    for effect in effects:
        effect.install()
    try:
        with caplog.at_level(logging.ERROR):
            async with sessions.begin() as session:
                session.add(Item(id=1))
            await wait_until(lambda: "no mail server" in caplog.text and "no such user" in caplog.text)
    finally:
        for effect in effects:
            effect.remove()
    assert "Side effect mail failed, after the create of Item 1 was committed" in caplog.text
    async with sessions() as session:
        assert await session.get(Item, 1)


async def test_the_session_can_be_used_on_after_it(sessions, seen):
    async with sessions() as session:
        for number in range(3):
            session.add(Item(id=number))
            await session.commit()
    assert kinds(seen) == [(CREATE, number) for number in range(3)]


# Sync sessions --------------------------------------------------------------------------------------------


@pytest.fixture
def sync_engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'items.db'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_sync_sessions_are_listened_to_as_well(sync_engine: Engine, seen):
    sessions = sessionmaker(sync_engine)
    with sessions.begin() as session:
        session.add(Item(id=1))
        with session.begin_nested() as nested:
            session.add(Item(id=2))
            session.flush()
            nested.rollback()
        assert seen == []
    assert kinds(seen) == [(CREATE, 1)]


async def test_a_commit_in_a_thread_has_an_async_one_run_on_the_loop_that_installed_it(sync_engine: Engine):
    threads: list[threading.Thread] = []

    async def tell(_: RecordMutation) -> None:
        threads.append(threading.current_thread())

    def commit() -> None:
        with sessionmaker(sync_engine).begin() as session:
            session.add(Item(id=1))

    effect = RecordMutationSideEffect(Item, tell)
    effect.install()
    try:
        await asyncio.to_thread(commit)
        await wait_until(lambda: threads)
    finally:
        effect.remove()
    assert threads == [threading.current_thread()]


def test_without_any_event_loop_an_async_one_runs_before_commit_returns(sync_engine: Engine):
    told: list[RecordMutation] = []

    async def tell(mutation: RecordMutation) -> None:
        told.append(mutation)

    effect = RecordMutationSideEffect(Item, tell)
    effect.install()
    try:
        with sessionmaker(sync_engine).begin() as session:
            session.add(Item(id=1))
    finally:
        effect.remove()
    assert kinds(told) == [(CREATE, 1)]


def test_what_cannot_be_listened_to_is_refused():
    with pytest.raises(ConfigError, match="mapped class"):
        RecordMutationSideEffect(dict, print)
    with pytest.raises(ConfigError, match="'create', 'update', 'delete'"):
        RecordMutationSideEffect(Item, print, on="upsert")
