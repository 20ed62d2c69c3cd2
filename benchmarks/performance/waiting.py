"""The question how much memory a worker holds for each task that is in flight, or waits.

What is counted is what the worker has allocated and not freed, by glibc's own account, after a garbage collection. It
is not what the system has given to the process: that grows in pages and shrinks hardly ever, so that a first thousand
tasks look dear, and a second thousand free, whatever is kept of them. All of the worker allocates by that one
allocator: its Python objects (``PYTHONMALLOC=malloc``), and the SDK's core in Rust.

The figure is a slope: when some tasks of each kind wait already, many more are made to, and the difference is divided
by how many more. What is allocated once, by the first of them, does not count. Nor does it show that a task costs
something if the buffers and caches of a worker that has worked a little longer are a little larger: so the same is
asked of tasks that have ended, of which nothing can be left. That is what "0" means here.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator
from dataclasses import replace

from performance.place import calls_made
from performance.processes import EXACT_MEMORY, until
from performance.running import Running
from performance.sizes import Sizes
from performance.variants import base

FIGURES = {
    base.SLEEP: "memory-sleep",
    base.BACKOFF: "memory-backoff",
    base.POLL: "memory-poll",
    base.HOLD: "memory-in-flight",
}
ENDED, BEYOND = "memory-ended", "memory-beyond"
_CACHED = 1000
"""Workflows that the SDK's worker keeps at most: its own setting."""
_SLOTS = 4000  # more than there are tasks, since in some engines a task that waits holds one
_FEW = 0.1  # of the tasks of a kind, before the first look
_SECONDS = 3600  # that each task waits: longer than it takes to ask
_LOOK = 1.0  # seconds between two looks
_ALIKE = 16 * 1024  # bytes
_MOST_LOOKS = 30
_KB = 1024


async def memory_of_waiting(running: Running, sizes: Sizes, *, cached: bool) -> AsyncIterator[tuple[str, float]]:
    """Have tasks wait in a worker of its own; they are left behind.

    Args:
        running: The variant. Its worker is replaced by one with slots for all of them.
        sizes: How many of each kind.
        cached: Whether to ask for the tasks beyond the SDK's cache of workflows, too.

    Yields:
        A figure, and how many KB a further task takes.
    """
    await asyncio.to_thread(running.worker.stop)
    running.restart_worker(replace(running.place, slots=_SLOTS), **EXACT_MEMORY)
    await running.warm_up()
    kinds = [kind for kind in FIGURES if kind in running.kinds]
    few = max(int(sizes.waiting * _FEW), 1)
    for kind in kinds:
        await _begin(running, kind, few)
    level = await _level(running, sizes)
    await running.load.tell("throughput", kind=base.CHAIN, n=1, tasks=sizes.waiting, in_flight=sizes.in_flight)
    level, before = await _level(running, sizes), level
    yield ENDED, (level - before) / sizes.waiting / _KB
    for kind in kinds:
        await _begin(running, kind, sizes.waiting)
        level, before = await _level(running, sizes), level
        yield FIGURES[kind], (level - before) / sizes.waiting / _KB
    if cached and sizes.beyond:
        await _begin(running, base.SLEEP, max(_CACHED - len(kinds) * (few + sizes.waiting), 0) + sizes.beyond)
        before = await _level(running, sizes)
        await _begin(running, base.SLEEP, sizes.beyond)
        yield BEYOND, (await _level(running, sizes) - before) / sizes.beyond / _KB


async def _begin(running: Running, kind: str, tasks: int) -> None:
    """Have more tasks wait."""
    pid = running.worker.pid
    folder = running.place.folder
    wanted = calls_made(folder, pid) + tasks
    await running.load.tell("begin", kind=kind, n=_SECONDS, tasks=tasks)
    await until(lambda: calls_made(folder, pid) >= wanted, f"{running.name}: the tasks ({kind}) are not begun")


async def _level(running: Running, sizes: Sizes) -> float:
    """What the worker has allocated, once that does not change any more."""
    await asyncio.sleep(sizes.settling)
    looks: list[int] = []
    while len(looks) < _MOST_LOOKS:
        await asyncio.sleep(_LOOK)
        looks.append(await running.worker.live_bytes())
        latest = looks[-sizes.looks :]
        if len(latest) == sizes.looks and max(latest) - min(latest) < _ALIKE:
            break
    return statistics.median(looks[-sizes.looks :])
