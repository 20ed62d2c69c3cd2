"""Records of an application whose processes and Temporal server are killed at random: what is left in the end.

In full: ``python tests/records_chaos.py sqlite|postgresql [seed]``. It prints what was seen, and ends with 1 if
anything is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.pool import NullPool

from postgres import PrivatePostgres
from records_app import Base, Call, CallEvent, RecordsProcess, drawing, free_port, make_engine
from support import CallLog
from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.integrations.lifecycle import Event, RecordStatus, state_after
from temporal_async_task.integrations.sqlalchemy.mixins import state_of

_DATABASE_ERROR = re.compile(r"^(?:sqlalchemy\.exc\.|sqlite3\.|asyncpg\.exceptions\.)\w+: .*", re.MULTILINE)


@dataclass
class Seen:
    """What was seen in the end."""

    calls: int
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)
    """What the records that were created during the outage were at its end."""
    statuses: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    runs: int = 0
    """Of the task, on the server."""
    wrong: list[str] = field(default_factory=list)
    """Records whose events, columns and run do not agree."""
    generations: Counter[int] = field(default_factory=Counter)
    """How many records had so many generations (different idempotency keys) at the vendor."""
    repeated_calls: int = 0
    """Calls in flight when their worker was killed, made again with the same idempotency key."""
    errors: Counter[str] = field(default_factory=Counter)
    """Errors of the database, in what the processes have logged."""

    def faults(self) -> list[str]:
        """What should not have been seen."""
        expected = {
            "statuses": (self.statuses, {"completed": self.calls}),
            "waiting": (self.waiting, {"pending": self.calls // 4}),
            "runs": (self.runs, self.calls),
            "generations": (self.generations, {1: self.calls}),
            "wrong": (self.wrong, []),
            "errors": (self.errors, {}),
        }
        return [f"{name}: {seen!r}" for name, (seen, right) in expected.items() if seen != right]


class Chaos:
    """The application, its processes, and what kills them."""

    def __init__(self, folder: Path, url: str, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._folder = folder
        self._url = url
        self._server = DevServer(db_path=folder / "temporal.db")
        self._log = CallLog(folder / "calls.log")
        self._port = free_port()
        self._processes: dict[str, RecordsProcess] = {}

    async def run(self, calls: int, *, kills: int, outage: float, patience: float) -> Seen:
        """Create records while everything is killed in turn; then wait for the last to end.

        The last quarter of them is created while the Temporal server is down, for ``outage`` seconds.
        """
        seen = Seen(calls)
        began = time.monotonic()
        engine = make_engine(self._url, poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        sessions = async_sessionmaker(engine)
        async with self._server:
            env = {
                "DATABASE_URL": self._url,
                "CALL_LOG": str(self._log.path),
                "PORT": str(self._port),
                "CALLBACK_URL": f"http://127.0.0.1:{self._port}/integrations/reports",
                "TEMPORAL_ADDRESS": self._server.address,
                "TEMPORAL_TASK_QUEUE": "chaos",
                "PAUSE": "0.2",
            }
            roles = {"web": "web", "worker": "worker", "worker-2": "worker", "dispatcher": "dispatcher"}
            for name, role in roles.items():
                self._processes[name] = RecordsProcess(role, env, self._folder / f"{name}.log")
                self._processes[name].start()
            try:
                late = calls // 4
                creating = asyncio.create_task(self._create(range(calls - late)))
                for _ in range(kills):
                    await asyncio.sleep(self._random.uniform(0.3, 1.2))
                    await self._kill_one(seen)
                await creating
                await self._go_down(sessions, range(calls - late, calls), outage, seen)
                deadline = time.monotonic() + patience
                while time.monotonic() < deadline:
                    for process in self._processes.values():
                        process.revive()
                    found = await self._statuses(sessions, range(calls))
                    if found == {"completed": calls}:
                        break
                    await asyncio.sleep(0.2)
                seen.seconds = time.monotonic() - began
                await self._compare(sessions, seen, deadline)
            finally:
                for process in self._processes.values():
                    process.kill()
        await engine.dispose()
        return seen

    async def _go_down(self, sessions: async_sessionmaker, late: range, outage: float, seen: Seen) -> None:
        self._server.kill()
        back_at = time.monotonic() + outage
        await self._create(late)
        await asyncio.sleep(max(0.0, back_at - time.monotonic()))
        seen.waiting = await self._statuses(sessions, late)
        await self._server.start()

    async def _statuses(self, sessions: async_sessionmaker, numbers: range) -> Counter[str]:
        async with sessions() as session:
            query = select(Call.status).where(Call.id.in_([f"c{number}" for number in numbers]))
            return Counter(await session.scalars(query))

    async def _create(self, numbers: range) -> None:
        """As a client that goes on until it gets an answer: the id is its own."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=10) as client:
            for number in numbers:
                while True:
                    with contextlib.suppress(httpx.HTTPError):
                        if (await client.put(f"/calls/c{number}")).status_code == 200:
                            break
                    await asyncio.sleep(0.1)
                await asyncio.sleep(self._random.uniform(0, 0.05))

    async def _kill_one(self, seen: Seen) -> None:
        name = self._random.choice([*self._processes, "server"])
        seen.kills[name] += 1
        pause = self._random.uniform(0, 1)
        if name == "server":
            self._server.kill()
            await asyncio.sleep(pause)
            await self._server.start()
        else:
            self._processes[name].kill()
            await asyncio.sleep(pause)
            self._processes[name].start()

    async def _ended(self, task: TemporalAsyncTask[str, str], task_id: str, deadline: float) -> TaskResult[str]:
        """How a run has ended: after its record, since it waits for the report of it to be acknowledged."""
        while True:
            run = await task.get_status(task_id)
            if run.status in {TaskStatus.COMPLETED, TaskStatus.FAILED} or time.monotonic() > deadline:
                return run
            for process in self._processes.values():
                process.revive()
            await asyncio.sleep(0.2)

    async def _compare(self, sessions: async_sessionmaker, seen: Seen, deadline: float) -> None:
        component = AsyncTaskComponent(AsyncTaskComponentConfig(temporal_address=self._server.address))
        task = drawing(self._log, 0)
        component.register(task)
        await component.connect()
        async with sessions() as session:
            calls = (await session.scalars(select(Call))).all()
            events = defaultdict(list)
            for event in await session.scalars(select(CallEvent).order_by(CallEvent.sequence)):
                events[event.task_id].append(event)
        vendor = defaultdict(list)
        for _, _, prompt, key in self._log.lines():
            vendor[prompt].append(key)
        runs = {run.task_id async for run in task.list(limit=None)}
        seen.runs = len(runs)
        for call in calls:
            seen.statuses[call.status] += 1
            seen.attempts[call.attempts] += 1
            run = await self._ended(task, str(call.task_id), deadline)
            own = events.pop(call.task_id, [])
            state = state_after(Event(RecordStatus(event.type), event.at, event.payload) for event in own)
            agrees = (
                [event.sequence for event in own] == list(range(1, len(own) + 1))
                and own == sorted(own, key=lambda event: (event.at, event.sequence))
                and state == state_of(call)
                and run.status is TaskStatus.COMPLETED
                and run.result == call.response
                and call.task_id in runs
            )
            if not agrees:
                seen.wrong.append(f"{call.id}: {call.status}, run {run.status}, {[event.type for event in own]}")
            keys = vendor.pop(call.prompt, [])
            seen.generations[len(set(keys))] += 1
            seen.repeated_calls += len(keys) - len(set(keys))
        for log in self._folder.glob("*.log"):
            seen.errors.update(_DATABASE_ERROR.findall(log.read_text(errors="replace")))
        seen.wrong += [f"an event of nobody: {one}" for one in events] + [f"a call for nobody: {one}" for one in vendor]


async def _main(kind: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        url = f"sqlite+aiosqlite:///{folder}/records.db"
        if kind == "postgresql":
            url = stack.enter_context(PrivatePostgres()).create("records")
        seen = await Chaos(Path(folder), url, seed).run(200, kills=40, outage=60, patience=300)
        if seen.faults():
            shutil.copytree(folder, f"records-chaos-{kind}-{seed}")
    print(kind, seed, seen)  # noqa: T201
    sys.exit("\n".join(seen.faults()) or None)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())))
