"""DBOS: workflows in a worker process, enqueued by a client in another, as its "queue worker" example does.

Its queues and its waiting for results poll, by default once a second; here as often as ``_POLLING``.
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

_POLLING = 0.05  # seconds; faster costs DBOS more than it gains
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
    await DBOS.sleep_async(n)
    return await step(n)


@DBOS.workflow()
async def crash(n: int) -> str:
    await step(n)
    return await hang_step(DBOS.workflow_id or "")


def _ready(place: Place) -> Path:
    return Path(place.folder) / "ready"


class DBOSPeer(base.Peer):
    kinds = (base.CALL, base.CHAIN, base.FAN, base.HOLD, base.SLEEP, base.CRASH)

    async def open(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not _ready(self.place).exists():  # the worker makes the tables
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
        return await submitted.get_result(polling_interval_sec=_POLLING)

    async def status(self, submitted: Any) -> Any:
        return len(await self._client.list_workflow_steps_async(submitted.get_workflow_id()))


async def work(place: Place) -> None:
    DBOS(
        config={
            "name": "benchmark",
            "system_database_url": place.address,
            "application_version": "1",
            "executor_id": "benchmark",  # so that, started again, it recovers its own
            "log_level": "WARNING",
        }
    )
    DBOS.launch()
    await DBOS.register_queue_async(place.queue, worker_concurrency=place.slots, polling_interval_sec=_POLLING)
    _ready(place).touch()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    DBOS.destroy()
