"""Server-sent events of runs: what a listener is told, what it costs, and what it leaves behind."""

import asyncio
import gc
import json
import os
import signal
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

import web
from support import App, Meter, wait_until
from temporal_async_task.integrations import _events
from temporal_async_task.integrations.fastapi import create_task_router

DESCRIBE = "DescribeWorkflowExecution"


def application(tasks: list[Any]) -> FastAPI:
    web_app = FastAPI()
    web_app.include_router(create_task_router(tasks, public=True))
    return web_app


def parsed(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The events of a stream: id, name, data."""
    found = []
    for block in text.split("\n\n"):
        parts = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if "event" in parts:
            found.append((parts["id"], parts["event"], json.loads(parts["data"])))
    return found


def watchers() -> list[str]:
    """What the streams have going on in this loop."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("watch ")]


async def test_a_stream_tells_each_change_of_status_steps_and_progress_and_closes_at_the_end(app: App):
    tasks = web.picture_tasks()
    await app.start(*tasks)
    async with web.client_of(application(tasks)) as client:
        where = (await client.post("/tasks/product_shot", json={"prompt": "cup"})).headers["location"]
        answer = await client.get(where + "/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    told = parsed(answer.text)
    runs = [data for _, name, data in told if name == "run"]
    assert told[-1][1:] == ("end", {"status": "completed"})
    assert runs[-1]["result"] == {"url": "https://images.example/cup"}
    assert [run["status"] for run in runs][-2:] == ["processing", "completed"]
    assert any(run["current_step"] == "generate" for run in runs)
    assert any(run["progress"] for run in runs)
    assert any(run["completed_steps"] == ["generate"] for run in runs)
    ids = [number for number, name, _ in told if name == "run"]
    assert len(set(ids)) == len(ids)  # each only once


async def test_a_client_that_comes_back_hears_only_what_is_new_and_after_the_end_stays_away(app: App):
    """By the state's digest: also after a restart of the web server, here another router."""
    tasks = web.picture_tasks()
    await app.start(*tasks)
    async with web.client_of(application(tasks)) as client:
        where = (await client.post("/tasks/anything", json=1)).headers["location"]
        told = parsed((await client.get(where + "/events")).text)
    async with web.client_of(application(tasks)) as client:
        again = await client.get(where + "/events", headers={"Last-Event-ID": told[-1][0]})
        assert (again.status_code, again.content) == (204, b"")
        behind = parsed((await client.get(where + "/events", headers={"Last-Event-ID": "older"})).text)
    assert behind == told[-2:]


async def test_a_run_that_is_resumed_is_told_of_anew(app: App):
    web.gate.clear()
    tasks = web.picture_tasks()
    await app.start(*tasks)
    async with web.client_of(application(tasks)) as client:
        where = (await client.post("/tasks/mended_later", json="x")).headers["location"]
        told = parsed((await client.get(where + "/events")).text)
        assert told[-1][2] == {"status": "failed"}
        web.gate.set()
        await client.post(where + "/resume")
        again = parsed((await client.get(where + "/events", headers={"Last-Event-ID": told[-1][0]})).text)
    assert again[-1][2] == {"status": "completed"}


class Listener:
    """A client of the application itself, without a web server: what is sent to it is counted, and not kept."""

    def __init__(self, app: FastAPI, path: str) -> None:
        self.events = 0
        self._gone = asyncio.Event()
        self._running = asyncio.create_task(app(scope(path), self._receive, self._send))

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
        self.events += message.get("body", b"").count(b"event: run")

    async def leave(self) -> None:
        self._gone.set()
        await self._running


def scope(path: str) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip


@pytest.mark.slow
async def test_a_thousand_listeners_to_ten_runs_cost_a_look_a_second_each_and_leave_nothing(app: App, meter: Meter):
    tasks = web.picture_tasks()
    with meter.attached():
        await app.connect(*tasks)
    web_app = application(tasks)
    ids = [await tasks[1].submit(web.Order("cup")) for _ in range(10)]  # no worker: they do not end

    async def round_of_listeners(seconds: float) -> tuple[Counter[str], float]:
        listeners = [Listener(web_app, f"/tasks/approval/{ids[number % 10]}/events") for number in range(1000)]
        await wait_until(lambda: all(one.events for one in listeners), timeout=60)
        meter.calls()
        clock = asyncio.get_running_loop().time
        begun = clock()
        await asyncio.sleep(seconds)
        calls, took = Counter(meter.calls()), clock() - begun
        await asyncio.gather(*(one.leave() for one in listeners))
        await wait_until(lambda: not watchers())
        return calls, took

    calls, took = await round_of_listeners(3)
    assert 10 <= calls[DESCRIBE] <= 10 * (took + 1)
    assert set(calls) == {DESCRIBE}
    tracemalloc.start()
    try:
        for _ in range(2):  # until what Python keeps for later use has been filled
            await round_of_listeners(0.3)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(3):
            await round_of_listeners(0.3)
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [one for one in gc.get_objects() if isinstance(one, _events.Watch | _events.EventStream)] == []
    # A thousand listeners take some 20 MB while they listen. What is left of three times as many is what the process
    # needs for other things that went on meanwhile.
    assert after - before < peak / 10, f"{before=} {after=} {peak=}"


async def test_who_leaves_and_comes_back_within_a_second_costs_no_further_look(app: App, meter: Meter):
    tasks = web.picture_tasks()
    with meter.attached():
        await app.connect(*tasks)
    web_app = application(tasks)
    task_id = await tasks[1].submit(web.Order("cup"))
    meter.calls()
    clock = asyncio.get_running_loop().time
    begun = clock()
    for _ in range(30):
        listener = Listener(web_app, f"/tasks/approval/{task_id}/events")
        await wait_until(lambda: listener.events, interval=0.005)  # noqa: B023 - waited for at once
        await listener.leave()
    assert Counter(meter.calls())[DESCRIBE] <= clock() - begun + 2


async def test_a_client_of_a_real_web_server_that_hangs_up_leaves_nothing_behind(app: App):
    tasks = web.picture_tasks()
    await app.connect(*tasks)
    task_id = await tasks[1].submit(web.Order("cup"))
    async with web.serving(application(tasks)) as address, httpx.AsyncClient(base_url=address) as client:
        async with client.stream("GET", f"/tasks/approval/{task_id}/events") as answer:
            await anext(answer.aiter_bytes())
            assert watchers()
        await wait_until(lambda: not watchers())
        with pytest.raises(httpx.ReadTimeout):
            await client.get(f"/tasks/approval/{task_id}/result?wait=50", timeout=0.5)
        await wait_until(lambda: not watchers())


async def test_a_silent_stream_is_kept_alive(app: App, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_events, "KEEP_ALIVE", 0.05)
    tasks = web.picture_tasks()
    await app.connect(*tasks)
    task_id = await tasks[1].submit(web.Order("cup"))
    async with (
        web.serving(application(tasks)) as address,
        httpx.AsyncClient(base_url=address) as client,
        client.stream("GET", f"/tasks/approval/{task_id}/events") as answer,
    ):
        async for line in answer.aiter_lines():
            if line == ": keep-alive":
                break


async def test_a_stream_ends_after_a_while_so_that_the_client_is_let_in_anew(app: App, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_events, "MAX_STREAM", 0.1)
    monkeypatch.setattr(_events, "KEEP_ALIVE", 0.05)
    tasks = web.picture_tasks()
    await app.connect(*tasks)
    task_id = await tasks[1].submit(web.Order("cup"))
    async with web.client_of(application(tasks)) as client:
        answer = await asyncio.wait_for(client.get(f"/tasks/approval/{task_id}/events"), 10)
    assert [name for _, name, _ in parsed(answer.text)] == ["run"]


WEB_SERVER = """
import asyncio, os, sys
import uvicorn
from fastapi import FastAPI
from contextlib import asynccontextmanager
import web
from temporal_async_task import AsyncTaskComponent, AsyncTaskComponentConfig
from temporal_async_task.integrations.fastapi import create_task_router

component = AsyncTaskComponent(AsyncTaskComponentConfig.load())
tasks = web.picture_tasks()
component.register_all(tasks)

@asynccontextmanager
async def lifespan(_):
    await component.connect()
    yield
    await component.stop()

app = FastAPI(lifespan=lifespan)
app.include_router(create_task_router(tasks, public=True))
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


async def test_a_web_server_with_an_open_stream_stops_at_sigterm(app: App, tmp_path: Path):
    """uvicorn waits for its responses without end; so they end by themselves."""
    tasks = web.picture_tasks()
    await app.connect(*tasks)
    task_id = await tasks[1].submit(web.Order("cup"))
    with web.listening_socket() as free:
        port = free.getsockname()[1]
    (tmp_path / "serve.py").write_text(WEB_SERVER)
    environment = {
        **os.environ,
        "TEMPORAL_ADDRESS": app.address,
        "TEMPORAL_TASK_QUEUE": app.queue,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(tmp_path / "serve.py"), str(port), env=environment
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            async def is_up() -> bool:
                try:
                    return (await client.get("/tasks")).status_code == 200
                except httpx.TransportError:
                    return False

            await wait_until(is_up, timeout=60, interval=0.2)
            async with client.stream("GET", f"/tasks/approval/{task_id}/events") as answer:
                await anext(answer.aiter_bytes())
                process.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(process.wait(), 20) in {0, -signal.SIGTERM}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
