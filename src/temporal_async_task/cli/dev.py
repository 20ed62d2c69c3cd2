"""The command for development: a server, its web UI, and a worker that is started anew when the code changes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from watchfiles import PythonFilter, awatch  # pyright: ignore[reportUnknownVariableType] - it knows trio, too

from temporal_async_task.cli.exits import CommandError, ExitStatus
from temporal_async_task.config import AsyncTaskComponentConfig
from temporal_async_task.devserver import DevServer

if TYPE_CHECKING:
    from temporal_async_task.cli.output import Output

_PATIENCE = 5.0
"""Seconds for a worker to drain before its second signal, and again before SIGKILL."""
_SETTINGS_OF_OTHER_SERVERS = ("TEMPORAL_API_KEY", "TEMPORAL_PROFILE", "TEMPORAL_CONFIG_FILE")


async def serve(
    reference: str,
    output: Output,
    *,
    port: int,
    ui_port: int,
    database: Path | None,
    namespace: str | None,
    watched: list[Path] | None,
) -> ExitStatus:
    """Run server and worker together until SIGINT or SIGTERM.

    Args:
        reference: The application, as ``module:attribute``.
        output: Where the addresses are printed.
        port: The server's, on 127.0.0.1; 0 takes a free one.
        ui_port: The web UI's.
        database: The server's file; without one, it forgets everything when it stops.
        namespace: Temporal's namespace, which is created; by default the configuration's.
        watched: Folders whose Python files start the worker anew when they change; None: never.
    """
    namespace = AsyncTaskComponentConfig.load(namespace=namespace).namespace
    if database is not None:
        _make_folder(database.parent)
    with _signals() as stop:
        async with DevServer(database, port, ui=True, ui_port=ui_port, namespace=namespace) as server:
            _tell(output, server, reference, database, namespace)
            worker = _WorkerProcess(reference, server.address, namespace)
            try:
                return await _keep_working(worker, output, watched, stop)
            finally:
                await worker.stop()


def port_of(address: str | None, port: int) -> int:
    """The server's port, from either option."""
    if address is None:
        return port
    host, _, number = address.rpartition(":")
    if host not in {"127.0.0.1", "localhost"} or not number.isdigit():
        raise CommandError(
            f"dev starts a server of its own, on 127.0.0.1, and not at {address}. For a server that is there, use "
            f"`async-task worker`."
        )
    return int(number)


def _make_folder(folder: Path) -> None:
    """A folder of the server's file, kept out of git where it is this command's own."""
    if folder.name == ".async-task" and not folder.exists():
        folder.mkdir(parents=True)
        (folder / ".gitignore").write_text("*\n")


async def _keep_working(
    worker: _WorkerProcess, output: Output, watched: list[Path] | None, stop: asyncio.Event
) -> ExitStatus:
    changes: asyncio.Queue[list[str]] = asyncio.Queue()
    watcher = asyncio.create_task(_watch(watched, changes, stop))
    stopped = asyncio.create_task(stop.wait())
    try:
        for start in itertools.count():
            await worker.start()
            ended = asyncio.create_task(worker.wait())
            changed = asyncio.create_task(changes.get())
            await _first_of(stopped, watcher, ended, changed)
            if ended.done() and not stopped.done() and not changed.done():
                status = ended.result()
                if start == 0 and status in {ExitStatus.APP, ExitStatus.USAGE}:  # a slip in the command, most likely
                    return ExitStatus(status)
                output.say(f"The worker has ended with exit status {status}. It is started anew when a file changes.")
                await _first_of(stopped, watcher, changed)
            if not changed.done():
                changed.cancel()
                await _first_of(stopped, watcher)
                if not stop.is_set():
                    await watcher  # raises what has ended it
                return ExitStatus.SUCCESS
            output.say(f"Changed: {', '.join(changed.result())}. The worker is started anew.")
            await worker.stop()
    finally:
        stop.set()
        await asyncio.gather(watcher, stopped, return_exceptions=True)
    raise AssertionError("unreachable")


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _watch(watched: list[Path] | None, changes: asyncio.Queue[list[str]], stop: asyncio.Event) -> None:
    """Tell the names of files that have changed, each time that some have."""
    if watched is None:
        await stop.wait()
        return
    here = Path.cwd()
    try:
        async for found in awatch(*watched, watch_filter=PythonFilter(), stop_event=stop):
            paths = sorted({Path(path) for _, path in found})
            changes.put_nowait([str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths])
    except OSError as error:
        folders = ", ".join(str(folder.absolute()) for folder in watched)
        raise CommandError(
            f"{folders} cannot be watched for changes: {error}. Name smaller folders with --watch, or use --no-reload.",
            ExitStatus.FAILED,
        ) from error


class _WorkerProcess:
    """``async-task worker`` as a process that is gone when this one is."""

    def __init__(self, reference: str, address: str, namespace: str) -> None:
        options = ["--address", address, "--namespace", namespace, "--no-tls", "--stop-with-stdin"]
        self._command = [sys.executable, "-m", "temporal_async_task.cli", "worker", reference, *options]
        # An application that reads the configuration itself finds this server, and no credentials go to it.
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _SETTINGS_OF_OTHER_SERVERS and not name.startswith(("TEMPORAL_TLS", "TEMPORAL_GRPC_META_"))
        } | {"TEMPORAL_ADDRESS": address, "TEMPORAL_NAMESPACE": namespace}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            # A Ctrl-C in the terminal is for this process, which then stops the worker, and the server after it.
            process_group=0,
        )

    async def wait(self) -> int:
        return await self._process.wait() if self._process else 0

    async def stop(self) -> None:
        """Let it drain, but not for long: a developer waits."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await process.wait()


def _tell(output: Output, server: DevServer, reference: str, database: Path | None, namespace: str) -> None:
    if output.as_json:
        output.document(
            {
                "address": server.address,
                "ui_url": server.ui_url,
                "namespace": namespace,
                "database": None if database is None else str(database.absolute()),
                "app": reference,
            }
        )
        return
    output.text(
        f"Temporal server  {server.address}\n"
        f"Web UI           {server.ui_url}/namespaces/{namespace}\n"
        f"Database         {database or 'none: all is forgotten in the end'}\n"
        f"Ctrl-C stops everything."
    )


@contextlib.contextmanager
def _signals() -> Generator[asyncio.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
