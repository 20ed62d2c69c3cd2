"""Records while processes are killed: each has one task, and in the end one outcome."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.pool import NullPool

from records_app import Base, Call, CallEvent, RecordsProcess, drawing, make_engine
from records_chaos import Chaos
from records_flood import flood
from support import App, CallLog, wait_until
from temporal_async_task.devserver import DevServer

pytestmark = pytest.mark.slow


async def test_whatever_is_killed_each_record_has_one_task_and_ends_in_agreement_with_it(
    database_url: str, tmp_path: Path
):
    """In full (200 records, 40 kills, an outage of a minute): ``python tests/records_chaos.py sqlite``."""
    seen = await Chaos(tmp_path, database_url, seed=7).run(20, kills=6, outage=3, patience=90)
    assert seen.faults() == [], seen


async def test_many_dispatchers_in_processes_of_their_own_start_each_record_once(
    database_url: str, server: DevServer, tmp_path: Path, app: App
):
    engine = make_engine(database_url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(engine)
    mark = uuid.uuid4().hex[:6]
    async with sessions.begin() as session:
        session.add_all([Call(id=f"c{one}", prompt=f"{mark}-{one}") for one in range(150)])
    env = {
        "DATABASE_URL": database_url,
        "CALL_LOG": str(tmp_path / "log"),
        "CALLBACK_URL": "http://127.0.0.1:1/",
        "TEMPORAL_ADDRESS": server.address,
        "TEMPORAL_TASK_QUEUE": app.queue,
    }

    async def all_queued() -> bool:
        async with sessions() as session:
            return set(await session.scalars(select(Call.status))) == {"queued"}

    with ExitStack() as processes:
        for number in range(4):
            processes.enter_context(RecordsProcess("dispatcher", env, tmp_path / f"{number}.log"))
        await wait_until(all_queued, timeout=60, interval=0.1)
        await asyncio.sleep(1)  # for one that would do it again
    async with sessions() as session:
        events = (await session.scalars(select(CallEvent))).all()
        ids = set(await session.scalars(select(Call.task_id)))
    assert Counter(event.task_id for event in events) == dict.fromkeys(ids, 1)
    task = drawing(CallLog(tmp_path / "log"), 0)
    await app.connect(task)
    for task_id in ids:
        assert (await task.get_status(task_id)).task_id == task_id
    await engine.dispose()


async def test_a_flood_of_records_waits_in_the_database_and_ends_with_one_slow_worker(
    database_url: str, server: DevServer, tmp_path: Path
):
    """In full (5,000 records, a limit of 200): ``python tests/records_flood.py sqlite``."""
    seen = await flood(120, database_url, server.address, tmp_path, max_backlog=20, slots=4, patience=120)
    assert seen.statuses == {"completed": 120}, seen
    assert 10 < seen.most_queued <= 20
    assert 10 < seen.most_waiting <= 20 + 4  # those in slots may not have called yet
