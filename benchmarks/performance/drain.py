"""The question how fast a long queue is drained, by more and more worker processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from performance.place import Place, calls_made
from performance.processes import LoadProcess, WorkerProcess, until
from performance.sizes import Sizes
from performance.variants import base


async def drain(place: Place, sizes: Sizes) -> AsyncIterator[tuple[int, float]]:
    """Queue tasks that nobody works on yet; then have ever more workers work, for some stretches each.

    The workers of a number begin at once, when all of them are up. Tasks are left over.

    Yields:
        A number of worker processes, and how many tasks a second they did in one stretch.
    """
    load = LoadProcess(place)
    await load.start()
    try:
        await load.tell("begin", kind=base.CALL, n=1, tasks=sizes.drained)
        for count in sizes.drained_by:
            gate = Path(place.folder) / f"gate-{count}"
            workers = [
                WorkerProcess(replace(place, executor=f"{count}-{number}", gate=str(gate))) for number in range(count)
            ]
            try:
                for worker in workers:
                    await until(worker.is_up, f"a worker of {place.variant} does not start")
                gate.touch()
                for worker in workers:
                    await until(worker.has_worked, f"a worker of {place.variant} finds nothing to do")
                await _rate(place, sizes.stretch)  # the pollers find their number
                for _ in range(sizes.rounds):
                    yield count, await _rate(place, sizes.stretch)
            finally:
                for worker in workers:
                    await asyncio.to_thread(worker.stop)
    finally:
        await load.stop()


async def _rate(place: Place, stretch: int) -> float:
    first, began = calls_made(place.folder), time.monotonic()
    await until(
        lambda: calls_made(place.folder) >= first + stretch, f"the workers of {place.variant} do not drain the queue"
    )
    return (calls_made(place.folder) - first) / (time.monotonic() - began)
