"""A worker process of one variant: ``python -m performance.worker PLACE``."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import sys

from performance import calls
from performance.place import Place
from performance.registry import VARIANTS


def main() -> None:
    place = Place.from_json(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    calls.set_up(place)
    work = importlib.import_module(VARIANTS[place.variant].module).work
    running = work(place)
    if inspect.iscoroutine(running):
        asyncio.run(running)


if __name__ == "__main__":
    main()
