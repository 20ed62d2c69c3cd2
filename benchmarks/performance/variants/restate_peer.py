"""Restate: a service behind its server, called over HTTP at the server's ingress."""

from __future__ import annotations

import asyncio
import logging
import signal
from datetime import timedelta
from typing import Any

import aiohttp
import hypercorn
import hypercorn.asyncio
import restate

from performance import calls
from performance.place import Place
from performance.variants import base

_SUSPEND_AFTER = timedelta(seconds=5)  # Restate's own is a minute; then nothing of a task that waits is in the worker
service = restate.Service("tasks")


@service.handler()
async def call(ctx: restate.Context, n: int) -> str:
    return await ctx.run_typed("call", calls.call, n=n)


@service.handler()
async def chain(ctx: restate.Context, n: int) -> str:
    text = ""
    for i in range(n):
        text = await ctx.run_typed(f"step-{i}", calls.call, n=i)
    return text


@service.handler()
async def fan(ctx: restate.Context, n: int) -> int:
    return len(await restate.gather(*(ctx.run_typed(f"step-{i}", calls.call, n=i) for i in range(n))))


@service.handler()
async def hold(ctx: restate.Context, n: int) -> str:
    return await ctx.run_typed("hold", calls.hold, seconds=n)


@service.handler(inactivity_timeout=_SUSPEND_AFTER)
async def sleep(ctx: restate.Context, n: int) -> str:
    text = await ctx.run_typed("before", calls.call, n=n)
    await ctx.sleep(timedelta(seconds=n))
    return text


@service.handler()
async def backoff(ctx: restate.Context, n: int) -> str:
    delay = timedelta(seconds=n)
    options = restate.RunOptions[str](initial_retry_interval=delay, max_retry_interval=delay)
    return await ctx.run_typed("busy", calls.fail, options, n=n)


@service.handler(inactivity_timeout=_SUSPEND_AFTER)
async def poll(ctx: restate.Context, n: int) -> str:
    while (found := await ctx.run_typed("look", calls.look, n=n)) is None:
        await ctx.sleep(timedelta(seconds=n))
    return found


@service.handler()
async def crash(ctx: restate.Context, run: str) -> str:
    await ctx.run_typed("first", calls.call, n=1)
    return await ctx.run_typed("second", calls.hang_once, run=run)


class RestatePeer(base.Peer):
    """Over aiohttp: with httpx, which Restate's own client uses, it is the load generator that is the limit.

    Its status is not asked for: it is a query of the server's SQL, of another kind and cost.
    """

    kinds = base.KINDS
    has_status = False

    async def open(self) -> None:
        self._http = aiohttp.ClientSession(
            self.place.address,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(600),
            raise_for_status=True,
        )

    async def close(self) -> None:
        await self._http.close()

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:  # noqa: ARG002
        what = task_id if kind == base.CRASH else n
        async with self._http.post(f"/tasks/{kind}/send", json=what) as answer:
            return (await answer.json())["invocationId"]

    async def result(self, submitted: Any) -> Any:
        async with self._http.get(f"/restate/invocation/{submitted}/attach") as answer:
            return await answer.json()


async def work(place: Place) -> None:
    """Serve the handlers where the server was told that they are."""
    logging.getLogger("hypercorn").setLevel(logging.ERROR)
    config = hypercorn.Config()
    config.bind = [place.extra]
    # What Restate's documentation recommends for production.
    config.h2_max_concurrent_streams = 2147483647
    config.keep_alive_max_requests = 2147483647
    config.keep_alive_timeout = 2147483647
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    app: Any = restate.app([service])

    async def stopped() -> None:
        await stopping.wait()

    await hypercorn.asyncio.serve(app, config, shutdown_trigger=stopped)
