"""The example `nanobanana2_image` as its README says: its processes, and a customer with a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from playwright.async_api import Page, async_playwright, expect

from support import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from temporal_async_task.devserver import DevServer

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "nanobanana2_image" / "README.md").read_text()
TERMINALS = README.partition("Then in four terminals")[2].partition("Open <http")[0]
COMMANDS = re.findall(r"^\$ (.+)$", TERMINALS, re.MULTILINE)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Processes:
    """The README's terminals: a command each, in `examples`, after dev.env."""

    def __init__(self, folder: Path, temporal: str) -> None:
        self.folder = folder
        self.ports = {name: free_port() for name in ("WEB_PORT", "STUB_PORT")}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("TEMPORAL_")}
        self._environment |= {name: str(port) for name, port in self.ports.items()}
        self._environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TEMPORAL_ADDRESS": temporal,
            "TEMPORAL_TASK_QUEUE": f"example-{uuid.uuid4().hex[:8]}",
            "MEDIA_DIR": str(folder / "media"),
            "WORKER_LOST_AFTER": "5",
            "DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'app.db'}",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, command: str, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        """The process, and the file with its output."""
        log = self.folder / f"{len(self._started)}.log"
        script = f"set -a; . nanobanana2_image/dev.env; set +a; exec {command}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", script], cwd=EXAMPLES, env=self._environment | environment, stdout=output, stderr=output
            )
        self._started.append(process)
        return process, log

    def stop(self) -> list[int]:
        """Stop all of them, and return their exit statuses."""
        for process in self._started:
            process.terminate()
        return [process.wait(30) for process in self._started]

    def output(self) -> str:
        return "\n".join(f"{log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def terminals(folder: Path, server: DevServer) -> Iterator[Processes]:
    processes = Processes(folder, server.address)
    try:
        yield processes
    finally:
        processes.stop()


@contextlib.asynccontextmanager
async def browser_page(url: str) -> AsyncIterator[tuple[Page, list[str]]]:
    """A page in Chromium, and what its console complains about."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "Chromium is needed: apt-get install chromium"
    complaints: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            page = await browser.new_page()
            page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            await page.goto(url)
            yield page, complaints
        finally:
            await browser.close()


def logged(log: Path, message: str) -> dict[str, Any] | None:
    """The line with this message, of a log of JSON lines."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return next((line for line in lines if line["message"].startswith(message)), None)


async def answers(url: str) -> bool:
    async with httpx.AsyncClient() as http:
        try:
            return (await http.get(url)).is_success
        except httpx.TransportError:
            return False


def test_the_readme_has_the_commands_that_are_run_here() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["temporal", "python", "python", "uvicorn"]


async def test_a_worker_that_cannot_start_says_why_in_a_line(tmp_path: Path, server: DevServer) -> None:
    with terminals(tmp_path, server) as processes:
        wrong = {"ARK_API_KEY": " ", "CALLBACK_SECRET": "short", "WORKER_LOST_AFTER": "soon"}
        started = [processes.start(COMMANDS[2], **{variable: value}) for variable, value in wrong.items()]
        for (process, log), reason in zip(
            started, ("ARK_API_KEY", "callback's secret", "WORKER_LOST_AFTER"), strict=True
        ):
            assert process.wait(60) == 1
            told = logged(log, "not started")
            assert told, log.read_text()
            assert reason in told["message"]
            assert "Traceback" not in log.read_text()


async def test_a_picture_ordered_on_the_page_appears_though_its_worker_was_killed(
    tmp_path: Path, server: DevServer
) -> None:
    """Killed when the picture was made and paid for, and before it was stored; another worker is started."""
    _, stub_command, worker_command, web_command = COMMANDS
    with terminals(tmp_path, server) as processes:
        try:
            processes.start(stub_command)
            worker, worker_log = processes.start(worker_command)
            processes.start(web_command)
            stub = f"http://127.0.0.1:{processes.ports['STUB_PORT']}"
            web = f"http://127.0.0.1:{processes.ports['WEB_PORT']}"
            await wait_until(lambda: answers(f"{stub}/stub/generations"), timeout=30)
            await wait_until(lambda: answers(f"{web}/api/calls"), timeout=30)
            found = await wait_until(lambda: logged(worker_log, "tasks found"), timeout=30)
            assert found["tasks"] == ["asyncTask_nanobanana2_image", "asyncTask_seedance_video"]

            async with httpx.AsyncClient(base_url=stub) as vendor, browser_page(web) as (page, complaints):
                # The download of what was made takes long, once: that is where the worker is killed.
                fault = {"route": "files", "kind": "slow", "seconds": 60}
                assert (await vendor.post("/stub/faults", json=fault)).status_code == 201
                sample = tmp_path / "fox.png"
                sample.write_bytes((await vendor.get("/samples/fox.png")).content)

                await page.set_input_files("[name=source_file]", sample)
                await page.fill("[name=uploaded_url]", f"{stub}/samples/cup.png")
                await page.fill("[name=prompt]", "a fox in a cup")
                await page.click("text=Make it")
                await expect(page.locator("[data-key=generate]")).to_have_class("running", timeout=20_000)
                await expect(page.locator("[data-key=generate]")).to_have_class("completed", timeout=20_000)
                await expect(page.locator("[data-key=store]")).to_have_class("running", timeout=10_000)
                worker.kill()
                assert worker.wait(10) == -signal.SIGKILL
                second, second_log = processes.start(worker_command)

                await expect(page.locator("#result img")).to_be_visible(timeout=60_000)
                await expect(page.locator("#status")).to_have_text("completed")
                await expect(page.locator("#result figcaption")).to_have_text("768 \u00d7 512, image/png")
                await expect(page.locator("#steps .completed")).to_have_count(4)
                shown = "document.querySelector('#result img')"
                await page.wait_for_function(f"{shown}.complete && {shown}.naturalWidth > 0")
                assert await page.evaluate(f"[{shown}.naturalWidth, {shown}.naturalHeight]") == [768, 512]
                assert complaints == []

                made = (await vendor.get("/stub/generations")).json()
                assert [(one["kind"], one["prompt"], one["images"]) for one in made] == [
                    ("picture", "a fox in a cup", 2)
                ], "made, and paid for, once"
            second.terminate()
            assert second.wait(30) == 0, "the worker ends in order"
            assert logged(second_log, "stopped")
        except BaseException:
            print(processes.output())  # noqa: T201 - pytest shows it with the failure
            raise
