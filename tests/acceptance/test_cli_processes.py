"""The commands that go on: `async-task worker` and `async-task dev`, by how they start, change over and stop."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import support
from command_line import SHOP, Running, Shell

if TYPE_CHECKING:
    from temporal_async_task.devserver import DevServer

README = Path(__file__).parents[2] / "README.md"
APP = ("--app", "shop:component")
DEV = ("dev", "shop:component", "--port", "0", "--ui-port", "0")


@pytest.fixture
def shop(server: DevServer, tmp_path: Path) -> Shell:
    """A folder with an application, and the session's server."""
    (tmp_path / "shop.py").write_text(SHOP)
    return Shell(tmp_path, TEMPORAL_ADDRESS=server.address, TEMPORAL_TASK_QUEUE=f"shop-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def alone(tmp_path: Path) -> Shell:
    """A folder with the README's example, and no server."""
    [example] = re.findall(r"(?ms)^<!-- test: worker as shop.py -->\n```python\n(.*?)^```", README.read_text())
    (tmp_path / "shop.py").write_text(example)
    return Shell(tmp_path)


async def begin_slow_step(shop: Shell) -> str:
    """A run in the middle of a step, which goes on until the file `go-on` is there."""
    task_id = (await shop.runs("submit", "picture", '{"prompt": "slow"}', *APP)).out.strip()

    async def in_step() -> bool:
        return (await shop.runs("status", task_id, "--json")).document["current_step"] == "upload"

    await support.wait_until(in_step, timeout=30)
    return task_id


# Worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_that_gets_a_signal_finishes_its_steps_and_exits_with_0(shop: Shell, number: signal.Signals):
    with shop.start("worker", "shop:component") as worker:
        worker.until("Started:")
        task_id = await begin_slow_step(shop)
        worker.signal(number)
        worker.until("Beginning worker shutdown")
        assert worker.process.poll() is None
        (shop.folder / "go-on").touch()
        assert await asyncio.to_thread(worker.wait, 30) == 0
        assert "Traceback" not in worker.err
    assert (await shop.runs("status", task_id, "--json")).document["completed_steps"] == ["generate", "upload"]


async def test_a_worker_that_gets_a_second_signal_exits_without_waiting_for_its_steps(shop: Shell):
    with shop.start("worker", "shop:component", "--grace", "600") as worker:
        worker.until("Started:")
        await begin_slow_step(shop)
        worker.signal(signal.SIGTERM)
        worker.until("Beginning worker shutdown")
        worker.signal(signal.SIGTERM)
        begin = time.monotonic()
        assert await asyncio.to_thread(worker.wait, 60) == 0
        assert time.monotonic() - begin < 15
        assert "Traceback" not in worker.err


async def test_a_worker_tells_in_json_what_it_works_on_and_prints_nothing_else_on_stdout(
    shop: Shell, server: DevServer
):
    shop.folder.joinpath("shop.py").write_text(SHOP.replace("return {", "print('from the task', flush=True); return {"))
    with shop.start("worker", "shop:component", "--json") as worker:
        worker.until("Started:")
        assert (await shop.runs("submit", "report", "--wait", *APP)).status == 0
        worker.until("from the task")
        told = json.loads(worker.out)
    assert told["address"] == server.address
    assert told["tasks"] == ["picture", "report", "stamp", "wait"]
    assert told["task_queues"] == [shop.env["TEMPORAL_TASK_QUEUE"]]
    assert told["pid"] == worker.process.pid


async def test_ctrl_c_ends_a_command_that_waits(shop: Shell):
    with shop.start("worker", "shop:component", "--grace", "1") as worker:
        worker.until("Started:")
        task_id = await begin_slow_step(shop)
        with shop.start("status", task_id, "--watch") as watch:
            await support.wait_until(lambda: "upload=running" in watch.out, timeout=30)
            watch.signal(signal.SIGINT)
            assert await asyncio.to_thread(watch.wait, 30) == 130
            assert watch.err == ""


# Dev


async def test_dev_serves_the_readme_s_example_from_nothing_and_stops_everything_at_ctrl_c(alone: Shell):
    with alone.start(*DEV) as dev:
        dev.until("Started:")
        address = re.search(r"(?m)^Temporal server +(\S+)$", dev.out)
        ui = re.search(r"(?m)^Web UI +(\S+)$", dev.out)
        assert address
        assert ui
        submitted = await alone.runs(
            "submit", "product_shot", '{"prompt": "cup"}', "--wait", *APP, TEMPORAL_ADDRESS=address[1]
        )
        assert (submitted.status, submitted.out) == (0, "https://bucket.example/26.png\n")
        assert (await asyncio.to_thread(fetched, ui[1])) == 200
        worker = worker_pid(dev)
        dev.signal(signal.SIGINT)
        assert await asyncio.to_thread(dev.wait, 60) == 0
        assert "Traceback" not in dev.err
        assert not is_alive(worker)
    away = await alone.runs("list", "--address", address[1])
    assert away.status == 5
    assert (alone.folder / ".async-task" / "dev.db").exists()

    # The file is kept: the run is there again.
    with alone.start(*DEV, "--json") as again:
        again.until("Started:")
        told = json.loads(again.out)
        listed = await alone.runs("list", "--json", "--address", told["address"])
        assert [run["result"] for run in listed.document] == ["https://bucket.example/26.png"]
        assert told["database"] == str(alone.folder / ".async-task" / "dev.db")


async def test_dev_changes_over_to_new_code_and_outlives_code_that_is_broken(alone: Shell):
    module = alone.folder / "shop.py"
    code = module.read_text()
    with alone.start(*DEV, "--in-memory", "--json") as dev:
        dev.until("Started:")
        address = json.loads(dev.out)["address"]
        module.write_text(code + "\ndef broken(:\n")
        dev.until("It is started anew when a file changes.")
        assert "SyntaxError" in dev.err
        assert 'shop.py", line ' in dev.err
        module.write_text(code.replace("bucket.example", "new.example"))
        dev.until("Started:", times=2)
        submitted = await alone.runs(
            "submit", "product_shot", '{"prompt": "cup"}', "--wait", *APP, "--address", address
        )
        assert submitted.out == "https://new.example/26.png\n"
        dev.signal(signal.SIGTERM)
        assert await asyncio.to_thread(dev.wait, 60) == 0
        assert "Traceback" not in dev.err


async def test_dev_ends_at_once_if_its_application_cannot_be_loaded_in_the_beginning(alone: Shell):
    ran = await alone.runs("dev", "shop:compnent", *DEV[2:], "--in-memory")
    assert ran.status == 3
    assert "has no attribute 'compnent'. Did you mean 'component'?" in ran.err


async def test_dev_says_that_its_port_is_taken(alone: Shell, server: DevServer):
    ran = await alone.runs("dev", "shop:component", "--address", server.address, "--in-memory")
    assert ran.status == 5
    assert f"cannot listen on {server.address}" in ran.err
    elsewhere = await alone.runs("dev", "shop:component", "--address", "temporal.example:7233", "--in-memory")
    assert elsewhere.status == 2
    assert "`async-task worker`" in elsewhere.err


async def test_dev_that_is_killed_leaves_neither_server_nor_worker_behind(alone: Shell):
    with alone.start(*DEV, "--in-memory", "--json") as dev:
        dev.until("Started:")
        worker, address = worker_pid(dev), json.loads(dev.out)["address"]
        dev.signal(signal.SIGKILL)
        await support.wait_until(lambda: not is_alive(worker), timeout=60)
    assert (await alone.runs("list", "--address", address)).status == 5


def worker_pid(dev: Running) -> int:
    return int(re.findall(r"(?m)^Worker (\d+): \w", dev.err)[-1])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # one that nobody has waited for is no process any more
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def fetched(url: str) -> int:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - our own server
        return int(answer.status)
