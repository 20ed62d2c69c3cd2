"""taskiq on Redis: a plain queue, whose tasks are called and have no steps. The broker is the one that acknowledges."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from taskiq.api import run_receiver_task
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from performance import calls
from performance.place import Place
from performance.variants import base

_POLLING = 0.01  # seconds; taskiq's own is 0.2


async def call(n: int) -> str:
    return await calls.call(n)


async def chain(n: int) -> str:
    """Without steps, a task of n calls is a task that makes n calls."""
    text = ""
    for i in range(n):
        text = await calls.call(i)
    return text


async def hold(n: int) -> str:
    return await calls.hold(n)


_FUNCTIONS = {base.CALL: call, base.CHAIN: chain, base.HOLD: hold}


def _broker(place: Place, queue: str) -> tuple[RedisStreamBroker, dict[str, Any]]:
    broker = RedisStreamBroker(place.address, queue_name=queue).with_result_backend(
        RedisAsyncResultBackend(place.address, result_ex_time=600)
    )
    tasks = {kind: broker.register_task(function, task_name=kind) for kind, function in _FUNCTIONS.items()}
    return broker, tasks


class TaskiqPeer(base.Peer):
    kinds = tuple(_FUNCTIONS)
    has_status = False

    async def open(self) -> None:
        self._brokers = {queue: _broker(self.place, queue) for queue in (self.place.queue, "nobody")}
        for broker, _ in self._brokers.values():
            await broker.startup()

    async def close(self) -> None:
        for broker, _ in self._brokers.values():
            await broker.shutdown()

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        _, tasks = self._brokers[queue or self.place.queue]
        return await tasks[kind].kicker().with_task_id(task_id).kiq(n)

    async def result(self, submitted: Any) -> Any:
        return await submitted.wait_result(check_interval=_POLLING)


async def work(place: Place) -> None:
    broker, _ = _broker(place, place.queue)
    running = asyncio.create_task(run_receiver_task(broker, max_async_tasks=place.slots, run_startup=True))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await asyncio.wait((running,))
