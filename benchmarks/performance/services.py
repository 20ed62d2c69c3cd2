"""The servers that the variants need, each started for one run of the benchmark and gone with it.

A service that cannot be had says why, and its variants are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from temporal_async_task.devserver import DevServer

_ENVIRONMENT = Path(os.environ.get("BENCH_HOME", ".venv-bench")).absolute()
_START_TIMEOUT = 60.0  # seconds
_HOST = "127.0.0.1"


class UnavailableError(Exception):
    """A service that cannot be started here, and why."""


@dataclass(frozen=True, slots=True)
class Service:
    """A server that runs."""

    address: str
    version: str
    pid: int | None = None
    """None: it is a file."""
    extra: str = ""
    """Restate: its admin API."""


@contextlib.asynccontextmanager
async def temporal(folder: Path) -> AsyncIterator[Service]:
    """The dev server, with a database file: the engine of all Temporal variants."""
    async with DevServer(folder / "temporal.db", log_path=folder / "temporal.log") as server:
        yield Service(server.address, _version("temporal"), server.pid)


@contextlib.asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Service]:
    """No server: a database file."""
    yield Service(f"sqlite:///{folder / 'dbos.sqlite'}", f"SQLite {sqlite3.sqlite_version}")


@contextlib.asynccontextmanager
async def postgres(folder: Path) -> AsyncIterator[Service]:
    """A PostgreSQL cluster of its own, with PostgreSQL's own settings."""
    initdb = _find("initdb", "/usr/lib/postgresql/*/bin/initdb")
    server = _find("postgres", "/usr/lib/postgresql/*/bin/postgres")
    data = folder / "data"
    prefix: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = next((name for name in ("postgres", "nobody") if _exists(name)), None)
        if user is None or shutil.which("setpriv") is None:
            raise UnavailableError("PostgreSQL does not run as root, and there is no other user to run it")
        prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
        data.mkdir()
        shutil.chown(data, user, user)
        for parent in (folder, *folder.parents):
            if parent.stat().st_uid == 0 and parent not in {Path("/"), Path("/tmp")}:  # noqa: S108 - not written to
                parent.chmod(parent.stat().st_mode | 0o011)
    port = free_port()
    command = [*prefix, initdb, "-D", str(data), "-U", "bench", "-A", "trust"]
    await asyncio.to_thread(_check, command)
    command = [*prefix, server, "-D", str(data), "-p", str(port), "-h", _HOST, "-k", ""]
    async with _running(command, folder / "postgres.log", port) as process:
        yield Service(f"postgresql://bench@{_HOST}:{port}/benchmark", _version(server), process.pid)


@contextlib.asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[Service]:
    """Redis, appending each write to a file and syncing that every second."""
    unpacked = _ENVIRONMENT / "debian"
    env = dict(os.environ)
    binary = shutil.which("redis-server")
    if binary is None:
        binary = str(unpacked / "usr/bin/redis-check-rdb")  # Debian's redis-server is a link to it
        libraries = [str(path) for path in (unpacked / "usr/lib").glob("*-linux-gnu*")]
        env["LD_LIBRARY_PATH"] = ":".join(libraries)
    if shutil.which(binary) is None:
        raise UnavailableError("there is no redis-server, and Debian's package could not be had")
    version = _version("redis-server", executable=binary, env=env)
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", _HOST, "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "everysec"]
    async with _running(command, folder / "redis.log", port, env=env, executable=binary) as process:
        yield Service(f"redis://{_HOST}:{port}", version, process.pid)


@contextlib.asynccontextmanager
async def restate(folder: Path) -> AsyncIterator[Service]:
    """Restate's server, one node, with its own defaults but for ports and folder."""
    binaries = sorted((_ENVIRONMENT / "npm/node_modules/@restatedev").glob("restate-server-*/bin/restate-server"))
    if not binaries:
        raise UnavailableError("restate-server could not be installed from npm")
    ports = {name: free_port() for name in ("ingress", "admin", "node")}
    env = {
        **os.environ,
        "RESTATE_BASE_DIR": str(folder),
        "RESTATE_LISTEN_MODE": "tcp",
        "RESTATE_BIND_ADDRESS": f"{_HOST}:{ports['node']}",
        "RESTATE_ADVERTISED_ADDRESS": f"http://{_HOST}:{ports['node']}",
        "RESTATE_INGRESS__BIND_ADDRESS": f"{_HOST}:{ports['ingress']}",
        "RESTATE_ADMIN__BIND_ADDRESS": f"{_HOST}:{ports['admin']}",
        "RESTATE_LOG_FILTER": "warn",
        "RESTATE_DISABLE_TELEMETRY": "true",
    }
    command = [str(binaries[0]), "--no-logo", "--node-name", "benchmark"]
    async with _running(command, folder / "restate.log", ports["ingress"], env=env) as process:
        yield Service(
            f"http://{_HOST}:{ports['ingress']}",
            _version(str(binaries[0])),
            process.pid,
            f"http://{_HOST}:{ports['admin']}",
        )


async def register_with_restate(service: Service, endpoint: str) -> None:
    """Tell Restate where the handlers are; they must be there."""
    deadline = time.monotonic() + _START_TIMEOUT
    async with httpx.AsyncClient(timeout=30) as http:
        while True:
            try:
                answer = await http.post(f"{service.extra}/deployments", json={"uri": f"http://{endpoint}"})
                answer.raise_for_status()
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
            else:
                return


SERVICES = {"temporal": temporal, "sqlite": sqlite, "postgres": postgres, "redis": redis, "restate": restate}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def _running(
    command: Sequence[str],
    log_path: Path,
    port: int,
    *,
    env: dict[str, str] | None = None,
    executable: str | None = None,
) -> AsyncIterator[subprocess.Popen[bytes]]:
    with log_path.open("ab") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            command, executable=executable, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            await _listening(process, port, log_path)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, 20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _listening(process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        try:
            _, writer = await asyncio.open_connection(_HOST, port)
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(
                    f"it does not start (exit status {process.poll()}): {_end_of(log_path)}"
                ) from None
            await asyncio.sleep(0.1)
        else:
            writer.close()
            if process.poll() is not None:  # somebody else's, who took the port
                raise UnavailableError(f"it has ended (exit status {process.poll()}): {_end_of(log_path)}")
            return


def _version(binary: str, **run: Any) -> str:
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, **run)
    return (done.stdout.splitlines() or [Path(binary).name])[0].strip()


def _end_of(log_path: Path) -> str:
    return log_path.read_text(errors="replace")[-1000:]


def _find(name: str, pattern: str) -> str:
    found = sorted(Path("/").glob(pattern.lstrip("/")))
    binary = shutil.which(name) or (str(found[-1]) if found else None)
    if binary is None:
        raise UnavailableError(f"there is no {name} (Debian: apt-get install postgresql)")
    return binary


def _exists(user: str) -> bool:
    return subprocess.run(["id", "-u", user], capture_output=True, check=False).returncode == 0  # noqa: S607


def _check(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode != 0:
        raise UnavailableError(f"{command[0]} failed: {done.stderr[-1000:]}")
