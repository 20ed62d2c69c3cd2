"""A process whose clock is wrong."""

import datetime as dt
import os
import sys
import time
from pathlib import Path

LIBRARIES = [
    Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"),
    Path("/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1"),
    Path("/usr/lib/faketime/libfaketime.so.1"),
]
"""Of the Debian package `libfaketime`."""


def means() -> str:
    """What makes the clock wrong."""
    return "libfaketime" if any(path.exists() for path in LIBRARIES) else "a patch of Python"


def set_clock_off(seconds: float, program: Path) -> None:
    """Let this process' clock be wrong from now on.

    With libfaketime, where it is installed, for everything in the process, the SDK's core in Rust among it: the program
    is started once more. Without, for all of Python.
    """
    library = next((path for path in LIBRARIES if path.exists()), None)
    if library is None:
        _patch(seconds)
    elif "FAKETIME" not in os.environ:
        # Times that processes measure are not changed: no machine's monotonic clock jumps.
        env = {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+.0f}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        os.execve(sys.executable, [sys.executable, str(program)], {**os.environ, **env})  # noqa: S606


def _patch(seconds: float) -> None:
    true_time, true_time_ns = time.time, time.time_ns

    class WrongDatetime(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> "WrongDatetime":
            return cls.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> "WrongDatetime":
            return cls.fromtimestamp(time.time(), dt.UTC).replace(tzinfo=None)

    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)
    # Modules that have taken the class by name already keep it, as the engine's have: they are given the other one.
    for module in list(sys.modules.values()):
        if getattr(module, "datetime", None) is dt.datetime:
            module.datetime = WrongDatetime  # type: ignore[attr-defined]
    dt.datetime = WrongDatetime  # type: ignore[misc]
