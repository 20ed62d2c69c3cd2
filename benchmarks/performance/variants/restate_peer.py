"""Restate: a service behind its server, called over HTTP at the server's ingress."""

from __future__ import annotations

import asyncio
import logging
import signal
from datetime import timedelta
from typing import Any

import httpx
import hypercorn
import hypercorn.asyncio
import restate

from performance import calls
from performance.place import Place
from performance.variants import base

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


@service.handler()
async def sleep(ctx: restate.Context, n: int) -> str:
    await ctx.sleep(timedelta(seconds=n))
    return await ctx.run_typed("after", calls.call, n=n)


@service.handler()
async def crash(ctx: restate.Context, run: str) -> str:
    await ctx.run_typed("first", calls.call, n=1)
    return await ctx.run_typed("second", calls.hang_once, run=run)


class RestatePeer(base.Peer):
    """Its status is not asked for: it is a query of the server's SQL, of another kind and cost."""

    kinds = (base.CALL, base.CHAIN, base.FAN, base.HOLD, base.SLEEP, base.CRASH)
    has_status = False

    async def open(self) -> None:
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=500)
        self._http = httpx.AsyncClient(base_url=self.place.address, limits=limits, timeout=600)

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:  # noqa: ARG002
        answer = await self._http.post(f"/tasks/{kind}/send", json=task_id if kind == base.CRASH else n)
        answer.raise_for_status()
        return answer.json()["invocationId"]

    async def result(self, submitted: Any) -> Any:
        answer = await self._http.get(f"/restate/invocation/{submitted}/attach")
        answer.raise_for_status()
        return answer.json()


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
