"""A small application with records that run tasks. As a program: its web process, its worker, its dispatcher.

``python records_app.py web|worker|dispatcher``, with the environment that ``RecordsProcess`` makes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import uvicorn
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from support import CallLog
from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    RetryPolicy,
    TemporalAsyncTask,
    current_run,
    current_step,
    step,
)
from temporal_async_task.integrations.base import AggregatedIntegration
from temporal_async_task.integrations.callbacks import Callback
from temporal_async_task.integrations.reported import report_external_id
from temporal_async_task.integrations.sqlalchemy import (
    APICallMixin,
    Dispatcher,
    IntegrationEventMixin,
    RecordIntegration,
    RecordTask,
)

SECRET = "a secret that only the tests know"  # noqa: S105


class Base(DeclarativeBase):
    pass


class Call(APICallMixin, Base):
    __tablename__ = "calls"
    id: Mapped[str] = mapped_column(primary_key=True)
    prompt: Mapped[str]


class CallEvent(IntegrationEventMixin, Base):
    __tablename__ = "call_events"


def make_engine(url: str, **options: Any) -> AsyncEngine:
    if not url.startswith("sqlite"):
        return create_async_engine(url, **options)
    engine = create_async_engine(url, **({"connect_args": {"timeout": 20}} | options))

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    return engine


def drawing(log: CallLog, pause: float) -> TemporalAsyncTask[str, str]:
    """A paid call whose outcome is asked for by an id, and a second step."""

    async def generate(prompt: str) -> str:
        # A vendor with idempotency keys: calls with the same one are one generation.
        log.note("generate", current_run().task_id, prompt, current_step().idempotency_key)
        return f"job-of-{prompt}"

    async def store(job: str) -> str:
        await asyncio.sleep(pause)
        return f"https://bucket.example/{job}.png"

    async def draw(prompt: str) -> str:
        job = await step("generate", generate, prompt)
        report_external_id(job)
        return await step("store", store, job)

    policy = RetryPolicy(max_retries=50, initial_delay=0.2, max_delay=1)
    return TemporalAsyncTask("draw", draw, retry_policy=policy, heartbeat_timeout=2)


class Parts:
    """What all of the application's processes make."""

    def __init__(self) -> None:
        self.engine = make_engine(os.environ["DATABASE_URL"])
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self.component = AsyncTaskComponent(
            AsyncTaskComponentConfig.load(
                graceful_shutdown_timeout=1, max_concurrent_tasks=int(os.environ.get("SLOTS", "200"))
            )
        )
        log = CallLog(Path(os.environ["CALL_LOG"]))
        self.records = RecordTask(
            record=Call,
            event=CallEvent,
            task=drawing(log, float(os.environ.get("PAUSE", "0.1"))),
            params=lambda call: call.prompt,
            check_every=float(os.environ.get("CHECK_EVERY", "2")),
            max_backlog=int(os.environ.get("MAX_BACKLOG", "1000")),
        )
        self.integration = RecordIntegration(
            self.component,
            self.sessions,
            self.records,
            report_to=Callback(os.environ["CALLBACK_URL"], SECRET, timeout=5),
            lease=float(os.environ.get("LEASE", "3")),
            batch=int(os.environ.get("BATCH", "50")),
        )


def web() -> None:
    parts = Parts()
    aggregate = AggregatedIntegration(parts.integration)
    app = FastAPI(lifespan=aggregate.lifespan(parts.component))
    aggregate.mount(app)

    @app.put("/calls/{call_id}")
    async def create(call_id: str) -> dict[str, str]:
        async with parts.sessions.begin() as session:
            if await session.get(Call, call_id) is None:
                session.add(Call(id=call_id, prompt=call_id))
        return {"id": call_id}

    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning", timeout_graceful_shutdown=2)


def worker() -> None:
    parts = Parts()
    parts.component.register_all(parts.integration.create_async_tasks())
    asyncio.run(parts.component.run())


def dispatcher() -> None:
    async def dispatch() -> None:
        parts = Parts()
        parts.component.register_all(parts.integration.create_async_tasks())
        lease = float(os.environ.get("LEASE", "3"))
        await Dispatcher(parts.component, parts.sessions, *parts.integration.records, lease=lease, batch=10).run()

    asyncio.run(dispatch())


class RecordsProcess:
    """One of the application's processes, which may be killed and started again."""

    def __init__(self, role: str, env: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, __file__, role]
        self._env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def revive(self) -> None:
        """Start it again if it has ended by itself, as a supervisor does: a worker gives up if it finds no server."""
        if self._process is not None and self._process.poll() is not None:
            self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    {"web": web, "worker": worker, "dispatcher": dispatcher}[sys.argv[1]]()
