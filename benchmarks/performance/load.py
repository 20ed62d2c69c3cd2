"""A load generator of one variant, in a process of its own: ``python -m performance.load PLACE``.

It takes one JSON command a line, and answers each with one line of JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from performance import calls
from performance.place import Place
from performance.registry import VARIANTS
from performance.variants import base
from performance.variants.base import Peer

_POLL = 0.05  # seconds


class Load:
    """What a load generator can be told to do; each method is one command."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._held: list[Any] = []

    async def abilities(self) -> dict[str, Any]:
        """What this variant can do."""
        return {"kinds": list(self._peer.kinds), "has_status": self._peer.has_status}

    async def throughput(self, kind: str, n: int, tasks: int, in_flight: int) -> dict[str, Any]:
        """Have tasks run, so many at once; each is submitted and waited for."""
        slots = asyncio.Semaphore(in_flight)
        latencies: list[float] = []

        async def one() -> None:
            async with slots:
                latencies.append(await self._timed(kind, n))

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(tasks)))
        return {"seconds": time.perf_counter() - began, "latencies": latencies}

    async def _timed(self, kind: str, n: int) -> float:
        began = time.perf_counter()
        await self._peer.result(await self._peer.submit(kind, n, _new_id()))
        return time.perf_counter() - began

    async def latency(self, kind: str, n: int, tasks: int) -> dict[str, Any]:
        """Have tasks run one after the other."""
        return {"latencies": [await self._timed(kind, n) for _ in range(tasks)]}

    async def submit(self, tasks: int) -> dict[str, Any]:
        """Submit to a queue that nobody works on."""
        times = [await _time(lambda: self._peer.submit(base.CALL, 1, _new_id(), queue="nobody")) for _ in range(tasks)]
        return {"latencies": times}

    async def status(self, asks: int, hold: float) -> dict[str, Any]:
        """Ask where a task stands, while it runs and after it."""
        finished = await self._peer.submit(base.CHAIN, 5, _new_id())
        await self._peer.result(finished)
        began = time.perf_counter()
        running = await self._peer.submit(base.HOLD, int(hold), _new_id())
        times = {"running": [await _time(lambda: self._peer.status(running)) for _ in range(asks)]}
        if time.perf_counter() - began > hold:
            raise TimeoutError(f"the task has ended before it was asked for {asks} times")
        times["finished"] = [await _time(lambda: self._peer.status(finished)) for _ in range(asks)]
        return times

    async def begin(self, kind: str, n: int, tasks: int) -> dict[str, Any]:
        """Submit tasks, to be waited for by ``finish``."""
        began = time.perf_counter()
        slots = asyncio.Semaphore(100)

        async def one() -> Any:
            async with slots:
                return await self._peer.submit(kind, n, _new_id())

        self._held += await asyncio.gather(*(one() for _ in range(tasks)))
        return {"seconds": time.perf_counter() - began}

    async def finish(self) -> dict[str, Any]:
        """Wait for all that was begun."""
        held, self._held = self._held, []
        await asyncio.gather(*(self._peer.result(submitted) for submitted in held))
        return {}

    async def crash(self) -> dict[str, Any]:
        """Submit a task whose worker is to be killed; returns its id once it hangs in its second step."""
        task_id = _new_id()
        self._held.append(await self._peer.submit(base.CRASH, 1, task_id))
        while not calls.times_made(self._peer.place.folder, task_id):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(_POLL)
        return {"task": task_id}


def _new_id() -> str:
    return uuid.uuid4().hex


async def _time(call: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


def make_peer(place: Place) -> Peer:
    variant = VARIANTS[place.variant]
    peer: Peer = getattr(importlib.import_module(variant.module), variant.peer)(place)
    return peer


async def serve(place: Place) -> None:
    peer = make_peer(place)
    await peer.open()
    load = Load(peer)
    reader = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    print(json.dumps({}), file=answers, flush=True)
    while line := await reader.readline():
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = await getattr(load, name)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    await peer.close()


if __name__ == "__main__":
    asyncio.run(serve(Place.from_json(sys.argv[1])))
