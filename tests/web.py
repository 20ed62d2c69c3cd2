"""What the tests of the web router share: its tasks, and a real web server in a thread or in this process."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from support import wait_until
from temporal_async_task import RetryPolicy, async_task, progress, sleep, step, wait_for


@dataclass
class Order:
    prompt: str
    size: int = 512


@dataclass
class Picture:
    url: str


async def generate(prompt: str) -> str:
    for done in range(4):
        progress(done / 4, f"Rendering {prompt}")
        await asyncio.sleep(0.6)
    return f"https://images.example/{prompt}"


async def fail() -> None:
    raise RuntimeError("the image service says <b>no</b>")


gate = threading.Event()
"""Whether ``mended`` succeeds."""


async def mended() -> str:
    if not gate.is_set():
        raise RuntimeError("<img src=x onerror=document.title='broken'>")
    return "mended"


def picture_tasks() -> list[Any]:
    """Tasks of a test's own: each knows its own server."""

    @async_task
    async def product_shot(order: Order) -> Picture:
        url = await step("generate", generate, order.prompt)
        await sleep("settle", 1)
        return Picture(await step("upload", str, url))

    @async_task
    async def approval(order: Order) -> str:
        await step("render", generate, order.prompt)
        return str(await wait_for("approved", timeout=3600))

    @async_task(retry_policy=RetryPolicy(max_retries=0))
    async def mended_later(text: str) -> str:
        await step("first", str, text)
        return await step("second", mended)

    @async_task
    async def no_params() -> bytes:
        return b"\xff\x00"

    @async_task
    async def maybe(number: int | None) -> int | None:
        return number

    @async_task
    async def anything(value):
        return value

    return [product_shot, approval, mended_later, no_params, maybe, anything]


@contextlib.asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Requests to an application in this process, with no web server."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://web.example", timeout=60) as client:
        yield client


@contextlib.contextmanager
def listening_socket() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        yield listening


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """A real web server on this event loop; its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=3))
    with listening_socket() as listening:
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign] # pytest's own stay
        running = asyncio.create_task(server.serve(sockets=[listening]))
        await wait_until(lambda: server.started, timeout=30)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running
