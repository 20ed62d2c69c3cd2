"""A worker process of one variant: ``python -m performance.worker PLACE``."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import sys
import threading

from performance import calls
from performance.place import Place
from performance.registry import VARIANTS


def _end_with_the_benchmark() -> None:
    """Its end of the pipe is closed when it is gone, however it ended."""
    os.read(sys.stdin.fileno(), 1)  # not by its buffer, whose lock the interpreter would want at its end
    os._exit(1)


def main() -> None:
    place = Place.from_json(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    calls.set_up(place)
    threading.Thread(target=_end_with_the_benchmark, daemon=True).start()
    work = importlib.import_module(VARIANTS[place.variant].module).work
    running = work(place)
    if inspect.iscoroutine(running):
        asyncio.run(running)


if __name__ == "__main__":
    main()
