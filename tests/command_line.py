"""The command `async-task` as a subprocess, for the tests of it."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

COMMAND = str(Path(sysconfig.get_path("scripts")) / "async-task")
TIME_LIMIT = 60.0

SHOP = """
import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from temporal_async_task import AsyncTaskComponent, AsyncTaskComponentConfig, RetryPolicy, async_task, progress, step


@dataclass
class Order:
    prompt: str
    size: int = 1


@async_task(retry_policy=RetryPolicy(max_retries=0))
async def picture(order: Order) -> str:
    url = await step("generate", generate, order)
    progress(0.5, "half [bold]done[/bold]")
    return await step("upload", upload, url)


def generate(order):
    return f"{order.prompt}-{order.size}"


def upload(url):
    if url.startswith("bad") and not Path("mended").exists():
        raise ValueError("cannot [red]upload[/red]")
    while url.startswith("slow") and not Path("go-on").exists():
        time.sleep(0.05)
    return f"{url}.png"


@async_task
async def wait(name: str) -> str:
    try:
        await asyncio.sleep(3600)
    finally:
        Path(f"left-{name}").touch()


@async_task
async def report() -> dict[str, float]:
    return {"total": 1.5}


@async_task(execution="activity")
async def stamp() -> str:
    return "stamped"


component = AsyncTaskComponent(AsyncTaskComponentConfig.load())
component.register_all([picture, wait, report, stamp])
if os.environ.get("CHATTY"):
    os.system("echo from a child")
    print("from the application", flush=True)
"""


@dataclass(frozen=True)
class Ran:
    """How a command has ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Its one JSON document."""
        return json.loads(self.out)


class Shell:
    """Where commands are typed: a folder, and an environment without anything of the developer's own."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        foreign = ("TEMPORAL_", "ASYNC_TASK_", "NO_COLOR", "FORCE_COLOR")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        # A warning is an error here as in the tests; HOME: Temporal's own configuration file is there.
        self.env = kept | {"HOME": str(folder), "PYTHONWARNINGS": "error", "COLUMNS": "80"} | env

    def run(self, *arguments: str, stdin: str | None = None, timeout: float = TIME_LIMIT, **env: str) -> Ran:
        """Run `async-task` with these arguments to its end. There is never a traceback."""
        ran = subprocess.run(
            [COMMAND, *arguments],
            cwd=self.folder,
            env=self.env | env,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert "Traceback" not in ran.stderr + ran.stdout, ran.stderr
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    async def runs(self, *arguments: str, **options: Any) -> Ran:
        """The same beside other commands."""
        return await asyncio.to_thread(lambda: self.run(*arguments, **options))

    def start(self, *arguments: str, **env: str) -> Running:
        """Start `async-task` with these arguments."""
        return Running(self, arguments, env)


class Running:
    """A command that goes on, with its output in files."""

    def __init__(self, shell: Shell, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        self._out = shell.folder / f"out-{time.monotonic_ns()}"
        self._err = self._out.with_name(self._out.name.replace("out", "err"))
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [COMMAND, *arguments],
                cwd=shell.folder,
                env=shell.env | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
                # A shell has its background jobs ignore Ctrl-C, and these tests may run in one.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until(self, said: str, *, times: int = 1, timeout: float = TIME_LIMIT) -> None:
        """Wait until it has said something on stderr."""
        deadline = time.monotonic() + timeout
        while self.err.count(said) < times:
            assert self.process.poll() is None, f"ended with {self.process.poll()}:\n{self.err}"
            assert time.monotonic() < deadline, f"{said!r} is not in:\n{self.err}"
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = TIME_LIMIT) -> int:
        return self.process.wait(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def python(*arguments: str, env: dict[str, str] | None = None) -> Ran:
    """Run this interpreter."""
    ran = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)
