"""The calls that the tasks of every variant make. They take no time: what is measured is what is around them."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from performance.place import CallCounter, Place

_counter: CallCounter | None = None
_marks: Path | None = None
HANG = 600.0
"""Seconds that a call takes whose worker is to be killed meanwhile."""


def set_up(place: Place) -> None:
    """Have this process's calls counted."""
    global _counter, _marks  # noqa: PLW0603 - of one process, which does nothing else
    _counter = CallCounter(place.folder)
    _marks = Path(place.folder) / "marks"


async def call(n: int) -> str:
    """What stands for an external call: 20 characters, at once."""
    if _counter is not None:
        _counter.add()
    return f"{n:020d}"


async def hold(seconds: float) -> str:
    """A call that takes its time."""
    if _counter is not None:
        _counter.add()
    await asyncio.sleep(seconds)
    return "held"


class BusyError(Exception):
    """What ``fail`` raises."""


async def fail(n: int) -> str:
    """A call that is answered with an error."""
    raise BusyError(await call(n))


async def look(n: int) -> str | None:
    """A call that asks whether something is ready, and never is told so."""
    await call(n)
    return None


async def hang_once(run: str) -> str:
    """A call that hangs when it is made for the first time, and returns at once when it is made again.

    Notes when it was made, for the load generator to see.
    """
    first = not any(line.startswith(run) for line in _lines())
    if _marks is not None:
        descriptor = os.open(_marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{run} {time.time()}\n".encode())
        os.close(descriptor)
    if first:
        await asyncio.sleep(HANG)
    return "resumed"


def _lines() -> list[str]:
    return _marks.read_text().splitlines() if _marks is not None and _marks.exists() else []


def times_made(folder: str, run: str) -> list[float]:
    """When ``hang_once`` was called for a run, in order; seconds since the epoch."""
    marks = Path(folder) / "marks"
    lines = marks.read_text().splitlines() if marks.exists() else []
    return [float(line.split()[1]) for line in lines if line.split()[0] == run]
