"""A worker process of one variant: ``python -m performance.worker PLACE``."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import inspect
import logging
import os
import sys
import threading
import time
from pathlib import Path

from performance import calls
from performance.place import Place
from performance.registry import VARIANTS


class _Mallinfo2(ctypes.Structure):
    """See mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _live_bytes() -> int:
    """What this process has allocated and not freed: Python's objects, and those of the libraries in C and Rust."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    gc.collect()
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def _obey(place: Place) -> None:
    """Answer each byte on the pipe with the live memory; its other end is closed when the benchmark is gone."""
    answer = Path(place.folder) / f"live-{os.getpid()}"
    while os.read(sys.stdin.fileno(), 1):  # not by its buffer, whose lock the interpreter would want at its end
        unfinished = answer.with_suffix(".part")
        unfinished.write_text(str(_live_bytes()))
        unfinished.rename(answer)
    os._exit(1)


def main() -> None:
    place = Place.from_json(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    threading.Thread(target=_obey, args=(place,), daemon=True).start()
    work = importlib.import_module(VARIANTS[place.variant].module).work
    calls.set_up(place)
    while place.gate and not Path(place.gate).exists():
        time.sleep(0.01)
    running = work(place)
    if inspect.iscoroutine(running):
        asyncio.run(running)


if __name__ == "__main__":
    main()
