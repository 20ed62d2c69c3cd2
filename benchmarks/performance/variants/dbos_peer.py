"""DBOS: workflows in a worker process, enqueued by a client in another, as its "queue worker" example does.

Its queues and its waiting for results poll, by default once a second; here as often as does it the most good.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSClient

from performance import calls
from performance.place import Place
from performance.variants import base

_START_TIMEOUT = 50.0  # seconds


@DBOS.step()
async def step(n: int) -> str:
    return await calls.call(n)


@DBOS.step()
async def hold_step(n: int) -> str:
    return await calls.hold(n)


@DBOS.step()
async def hang_step(run: str) -> str:
    return await calls.hang_once(run)


@DBOS.workflow()
async def call(n: int) -> str:
    return await step(n)


@DBOS.workflow()
async def chain(n: int) -> str:
    text = ""
    for i in range(n):
        text = await step(i)
    return text


@DBOS.workflow()
async def fan(n: int) -> int:
    return len(await asyncio.gather(*(step(i) for i in range(n))))


@DBOS.workflow()
async def hold(n: int) -> str:
    return await hold_step(n)


@DBOS.workflow()
async def sleep(n: int) -> str:
    text = await step(n)
    await DBOS.sleep_async(n)
    return text


@DBOS.workflow()
async def backoff(n: int) -> str:
    return await DBOS.run_step_async({"retries_allowed": True, "interval_seconds": n}, calls.fail, n)


@DBOS.workflow()
async def poll(n: int) -> str:
    while (found := await DBOS.run_step_async({}, calls.look, n)) is None:
        await DBOS.sleep_async(n)
    return found


@DBOS.workflow()
async def crash(n: int) -> str:
    await step(n)
    return await hang_step(DBOS.workflow_id or "")


def _polling(place: Place) -> float:
    """Seconds; oftener costs DBOS more throughput on SQLite, and gains PostgreSQL nothing."""
    return 0.05 if place.address.startswith("sqlite") else 0.02


def _ready(place: Place) -> Path:
    """There once a worker has made the tables, which is not for a client to do: of one database, for all places."""
    return Path(place.folder).parent / f"{place.variant}-ready"


class DBOSPeer(base.Peer):
    kinds = base.KINDS

    async def open(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not _ready(self.place).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"its worker is not ready after {_START_TIMEOUT} s")
            await asyncio.sleep(0.1)
        self._client = DBOSClient(system_database_url=self.place.address)

    async def close(self) -> None:
        self._client.destroy()

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        options: Any = {
            "workflow_name": kind,
            "queue_name": queue or self.place.queue,
            "workflow_id": task_id,
            "app_version": "1",
        }
        return await self._client.enqueue_async(options, n)

    async def result(self, submitted: Any) -> Any:
        return await submitted.get_result(polling_interval_sec=_polling(self.place))

    async def status(self, submitted: Any) -> Any:
        return len(await self._client.list_workflow_steps_async(submitted.get_workflow_id()))


async def work(place: Place) -> None:
    DBOS(
        config={
            "name": "benchmark",
            "system_database_url": place.address,
            "application_version": "1",
            "executor_id": place.executor,
            "log_level": "WARNING",
        }
    )
    DBOS.listen_queues([place.queue])
    DBOS.launch()
    await DBOS.register_queue_async(place.queue, worker_concurrency=place.slots, polling_interval_sec=_polling(place))
    _ready(place).touch()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    DBOS.destroy()
