"""Where one variant runs: the addresses of its server, and what its processes share. Passed on as JSON."""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

SLOTS = 200
"""Tasks that a worker may run at once, in every variant."""
_COUNT = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker or a load generator of one variant has to know."""

    variant: str
    folder: str
    """For this variant alone: its counters and marks."""
    address: str = ""
    """Of its server, if it has one."""
    extra: str = ""
    """A second address, or whatever else the variant needs."""
    queue: str = "benchmark"
    slots: int = SLOTS
    executor: str = "benchmark"
    """DBOS: who runs what it runs. Started again, a worker recovers what was its own."""
    gate: str = ""
    """A file without which the worker does not begin: so that several begin at once."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


class CallCounter:
    """Counts the calls of one worker process, where other processes can read it: some nanoseconds a call."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / f"calls-{os.getpid()}"
        self._path.write_bytes(bytes(_COUNT.size))
        with self._path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _COUNT.size)
        self._calls = 0

    def add(self) -> None:
        self._calls += 1
        _COUNT.pack_into(self._memory, 0, self._calls)


def calls_made(folder: str, pid: int | None = None) -> int:
    """The calls of one worker process, or of all that have ever used the folder."""
    name = "calls-*" if pid is None else f"calls-{pid}"
    return sum(_COUNT.unpack(path.read_bytes())[0] for path in Path(folder).glob(name))
