"""The processes of a run: workers and load generators, and what they have used, by /proc."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from performance.place import Place, calls_made

_ROOT = Path(__file__).parent.parent
_ANSWER_LIMIT = 2**24  # bytes
STOP_TIMEOUT = 15.0  # seconds


class BenchmarkError(Exception):
    """A process of the benchmark did not do what it was told."""


async def until(condition: Callable[[], bool], otherwise: str, timeout: float = 300.0) -> None:
    """Wait for a condition.

    Args:
        condition: Asked again and again.
        otherwise: What it means if it does not come true.
        timeout: Seconds.

    Raises:
        BenchmarkError: It does not come true.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{otherwise} ({timeout:.0f} s)")
        await asyncio.sleep(0.01)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}


EXACT_MEMORY = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""The environment of a worker whose memory is asked for: all of it by one allocator, which sees what is freed."""


class WorkerProcess:
    """A worker, and the log of what it says."""

    def __init__(self, place: Place, **variables: str) -> None:
        self._folder = Path(place.folder)
        self._log = (self._folder / "worker.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "performance.worker", place.to_json()],
            env={**environment(), **variables},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
        )

        self._counter = self._folder / f"calls-{self.pid}"

    @property
    def pid(self) -> int:
        return self.process.pid

    async def live_bytes(self) -> int:
        """What it has allocated and not freed.

        Raises:
            BenchmarkError: It does not say.
        """
        answer = self._folder / f"live-{self.pid}"
        answer.unlink(missing_ok=True)
        assert self.process.stdin is not None  # noqa: S101 - it was asked for
        self.process.stdin.write(b"m")
        self.process.stdin.flush()
        await until(answer.exists, "a worker does not say how much memory it has allocated")
        return int(answer.read_text())

    def is_up(self) -> bool:
        """Whether it could begin, but for its gate."""
        return self._counter.exists()

    def has_worked(self) -> bool:
        return calls_made(str(self._folder), self.pid) > 0

    def kill(self) -> None:
        """End it as a crash would; and the processes that it has started."""
        for pid in (*_descendants(self.pid), self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Have it stop in good order; end it if it does not."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.close()
        if self.process.stdin is not None:
            self.process.stdin.close()


class LoadProcess:
    """A load generator: told what to do by lines of JSON."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        log = (Path(self._place.folder) / "load.log").open("ab")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "performance.load",
            self._place.to_json(),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            limit=_ANSWER_LIMIT,
        )
        log.close()
        await self._answer(60)

    async def tell(self, command: str, timeout: float = 600.0, **arguments: Any) -> Any:
        """Have a method of ``load.Load`` called.

        Raises:
            BenchmarkError: It failed.
        """
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        self._process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
        return await self._answer(timeout, command)

    async def _answer(self, timeout: float, command: str = "start") -> Any:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout)
        except TimeoutError:
            raise BenchmarkError(f"{self._place.variant}: no answer to {command!r} in {timeout:.0f} s") from None
        if not line:
            log = (Path(self._place.folder) / "load.log").read_text(errors="replace")[-2000:]
            raise BenchmarkError(f"{self._place.variant}: its load generator has ended:\n{log}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise BenchmarkError(f"{self._place.variant}: {command!r} failed: {answer['error']}")
        return answer

    async def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def cpu_seconds(pid: int | None) -> float:
    """User and system time of a process so far, with its children's; 0 without a process."""
    if pid is None:
        return 0.0
    total = 0
    for one in (pid, *_descendants(pid)):
        try:
            # After the name, which is in brackets: proc(5) counts from 1, and the name is the second field.
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        total += sum(map(int, fields[11:13]))
        if one == pid:
            total += sum(map(int, fields[13:15]))  # of its children that have ended
    return total / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Bytes that a process, with its children, has to itself."""
    total = 0
    for one in (pid, *_descendants(pid)):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_"):
                total += int(line.split()[1]) * 1024
    return total


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found
