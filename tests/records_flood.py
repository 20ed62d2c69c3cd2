"""Many records at once, and one slow worker: how many wait in Temporal's queue, and how many in the database.

In full: ``python tests/records_flood.py sqlite|postgresql``. It prints what was seen, and ends with 1 if that was
too much.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.pool import NullPool
from temporalio.client import Client

from postgres import PrivatePostgres
from records_app import Base, Call, RecordsProcess, free_port, make_engine
from support import CallLog
from temporal_async_task.devserver import DevServer
from temporal_async_task.integrations.sqlalchemy.backlog import backlog


@dataclass
class Seen:
    """What was seen while the records were worked on."""

    looks: int = 0
    seconds: float = 0.0
    most_queued: int = 0
    """Records that were started and had not begun."""
    most_waiting: int = 0
    """Runs on the Temporal server that had not called the vendor: those that waited, and some that had a slot."""
    most_in_queue: int = 0
    """The server's estimate of it: of workflows and of activities, at moments that may be seconds apart."""
    statuses: Counter[str] = field(default_factory=Counter)


async def flood(
    records: int, url: str, address: str, folder: Path, *, max_backlog: int, slots: int, patience: float
) -> Seen:
    """Commit all records at once; let two dispatchers and one worker with few slots work on them."""
    engine = make_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(engine)
    async with sessions.begin() as session:
        session.add_all([Call(id=f"c{number}", prompt=f"p{number}") for number in range(records)])
    queue = f"flood-{uuid.uuid4().hex[:8]}"
    port = str(free_port())
    log = CallLog(folder / "calls.log")
    env = {
        "DATABASE_URL": url,
        "CALL_LOG": str(log.path),
        "PORT": port,
        "CALLBACK_URL": f"http://127.0.0.1:{port}/integrations/reports",
        "TEMPORAL_ADDRESS": address,
        "TEMPORAL_TASK_QUEUE": queue,
        "MAX_BACKLOG": str(max_backlog),
        "SLOTS": str(slots),
        "LEASE": "3",  # which a dispatcher on a busy machine overruns
    }
    client = await Client.connect(address)
    seen = Seen()
    began = time.monotonic()
    with contextlib.ExitStack() as processes:
        for role in ("web", "dispatcher", "worker"):  # the first one dispatches, too
            processes.enter_context(RecordsProcess(role, env, folder / f"{role}.log"))
        while time.monotonic() < began + patience and seen.statuses != {"completed": records}:
            async with sessions() as session:
                counted = await session.execute(select(Call.status, func.count()).group_by(Call.status))
                seen.statuses = Counter()
                for status, count in counted:
                    seen.statuses[status] = count
            seen.most_queued = max(seen.most_queued, seen.statuses["queued"])
            started = (await client.count_workflows(f"TaskQueue = '{queue}'")).count
            begun = len({prompt for _, _, prompt, _ in log.lines()})
            seen.most_waiting = max(seen.most_waiting, started - begun)
            seen.most_in_queue = max(seen.most_in_queue, await backlog(client, queue))
            seen.looks += 1
            await asyncio.sleep(0.1)
    seen.seconds = time.monotonic() - began
    await engine.dispose()
    return seen


async def _main(kind: str) -> None:
    limit, slots = 200, 10
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        url = f"sqlite+aiosqlite:///{folder}/records.db"
        if kind == "postgresql":
            url = stack.enter_context(PrivatePostgres()).create("records")
        async with DevServer(db_path=folder / "temporal.db") as server:
            seen = await flood(5000, url, server.address, folder, max_backlog=limit, slots=slots, patience=3000)
    print(kind, seen)  # noqa: T201
    if seen.most_queued > limit or seen.most_waiting > limit + slots or seen.statuses != {"completed": 5000}:
        sys.exit(1)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
