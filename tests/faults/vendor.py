"""The judge: a stub of a slow, paid API, over HTTP, that writes down each call when it comes and when it is answered.

It runs in the test's process, which nobody kills. What it saw is in a file to which lines are only appended.
"""

import asyncio
import os
import time
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Self

import aiohttp
import requests
from aiohttp import web

from support import CallLog, wait_until
from temporal_async_task import current_run, current_step


@dataclass(frozen=True)
class Call:
    """A call of the API, as the API saw it; times in seconds since the epoch."""

    number: int
    begun: float
    task_id: str
    key: str
    idempotency_key: str
    pid: int
    answered: float | None = None

    @property
    def step(self) -> tuple[str, str]:
        return self.task_id, self.key


class Vendor:
    """The API. It answers each call with ``<task id>/<key>``, after the seconds that the caller asked for."""

    def __init__(self, log: Path) -> None:
        self._log = CallLog(log)
        self._calls: dict[int, Call] = {}
        self._closed: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._held: set[str] = set()
        self.url = ""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=2048)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        for key in list(self._held):
            self.release(key)
        await self._runner.cleanup()

    def hold(self, key: str) -> None:
        """Let calls of this key wait, until they are released."""
        self._held.add(key)
        self._closed[key].clear()

    def release(self, key: str) -> None:
        self._held.discard(key)
        self._closed[key].set()

    async def _answer(self, request: web.Request) -> web.Response:
        asked = await request.json()
        number = len(self._calls) + 1
        key, task_id = asked["key"], asked["task_id"]
        call = Call(number, time.time(), task_id, key, request.headers["Idempotency-Key"], asked["pid"])
        self._calls[number] = call
        self._log.note("begun", *astuple(call)[:-1])
        if key in self._held:
            await self._closed[key].wait()
        elif asked["seconds"]:
            await asyncio.sleep(asked["seconds"])
        self._calls[number] = replace(call, answered=time.time())
        self._log.note("answered", number, self._calls[number].answered)
        return web.json_response(f"{task_id}/{key}")

    def calls(self, task_id: str | None = None, key: str | None = None) -> list[Call]:
        """All calls so far, in the order in which they came."""
        calls = self._calls.values()
        return [call for call in calls if task_id in (None, call.task_id) and key in (None, call.key)]

    def count(self, task_id: str) -> dict[str, int]:
        """How often each step of a run was called."""
        return dict(Counter(call.key for call in self.calls(task_id)))

    async def called(self, task_id: str, key: str, times: int = 1, timeout: float = 180.0) -> Call:
        """Wait for a run's call of a key, and return it."""
        await wait_until(lambda: len(self.calls(task_id, key)) >= times, timeout=timeout)
        return self.calls(task_id, key)[times - 1]

    async def answered(self, call: Call, timeout: float = 60.0) -> float:
        """Wait until a call was answered, and return when."""

        def when() -> float | None:
            return next(one.answered for one in self.calls(call.task_id) if one.number == call.number)

        return await wait_until(when, timeout=timeout, interval=0.005)


# In a worker: the steps that call the API.


async def order(seconds: float = 0.0) -> str:
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(os.environ["VENDOR_URL"], json=_asked(seconds), headers=_headers()) as answer,
    ):
        answer.raise_for_status()
        return str(await answer.json())


def order_blocking(seconds: float = 0.0) -> str:
    """The same, by a client that blocks."""
    url = os.environ["VENDOR_URL"]
    answer = requests.post(url, json=_asked(seconds), headers=_headers(), timeout=600)  # blocking line
    answer.raise_for_status()
    return str(answer.json())


def _asked(seconds: float) -> dict[str, Any]:
    return {"task_id": current_run().task_id, "key": current_step().key, "seconds": seconds, "pid": os.getpid()}


def _headers() -> dict[str, str]:
    return {"Idempotency-Key": current_step().idempotency_key}


def expected(task_id: str, *keys: str) -> list[str]:
    """What the API answers to these keys of a run."""
    return [f"{task_id}/{key}" for key in keys]
