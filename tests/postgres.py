"""A private PostgreSQL on loopback, from the binaries of the system, gone with the process that started it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

MISSING = (
    "No PostgreSQL was found: neither `initdb` on the PATH nor /usr/lib/postgresql/*/bin. Install it "
    "(apt-get install postgresql, brew install postgresql); it need not run."
)
_START_TIMEOUT = 60.0


def find_binaries() -> Path | None:
    """Where the binaries of the newest PostgreSQL are."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(versions, key=lambda path: float(path.parts[-3]), default=None)
    return newest.parent if newest else None


class PrivatePostgres:
    """A server with a directory of its own. It takes no care of power cuts, and is quick."""

    def __init__(self) -> None:
        binaries = find_binaries()
        if binaries is None:
            raise RuntimeError(MISSING)
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="async-task-postgres-"))
        self._prefix = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            user = _unprivileged()
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._prefix += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        data = self._folder / "data"
        options = ["--auth=trust", "--username=tests", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run("initdb", "-D", str(data), *options)
        self.port = _free_port()
        settings = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200")
        command = [*self._prefix, str(self._binaries / "postgres"), "-D", str(data), "-h", "127.0.0.1"]
        command += ["-p", str(self.port), "-k", ""]
        log = (self._folder / "log").open("wb")
        with log:
            self._process = subprocess.Popen(
                [*command, *(part for one in settings for part in ("-c", one))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: at once, all of it
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def create(self, database: str) -> str:
        """A new database's URL."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tests", database)
        return f"postgresql+asyncpg://tests@127.0.0.1:{self.port}/{database}"

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        ready = [str(self._binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode:
            if time.monotonic() > deadline or (self._process and self._process.poll() is not None):
                raise RuntimeError(f"PostgreSQL does not start:\n{(self._folder / 'log').read_text()}")
            time.sleep(0.05)

    def _run(self, program: str, *args: str) -> None:
        command = [*self._prefix, str(self._binaries / program), *args]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL refuses to run as root, and there is no user 'postgres' or 'nobody'.")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
