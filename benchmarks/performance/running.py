"""One variant with its processes."""

from __future__ import annotations

import asyncio

from performance import services
from performance.place import Place
from performance.processes import LoadProcess, WorkerProcess
from performance.registry import Variant
from performance.services import Service
from performance.variants import base

_START_TIMEOUT = 120.0  # seconds


class Running:
    """A worker, a load generator, and the server that they use."""

    def __init__(self, variant: Variant, place: Place, service: Service) -> None:
        self.variant = variant
        self.name = variant.name
        self.place = place
        self.service = service
        self.load = LoadProcess(place)
        self.worker = WorkerProcess(place)
        self.kinds: list[str] = []
        self.has_status = False

    async def start(self) -> None:
        await self.load.start()
        if self.variant.server == "restate":
            await services.register_with_restate(self.service, self.place.extra)
        abilities = await self.load.tell("abilities")
        self.kinds, self.has_status = abilities["kinds"], abilities["has_status"]
        await self.warm_up()

    async def warm_up(self) -> None:
        """Have a worker that has just begun come up to speed."""
        for kind, n in ((base.CALL, 1), (base.CHAIN, 5)):
            await self.load.tell("throughput", _START_TIMEOUT, kind=kind, n=n, tasks=30, in_flight=10)

    async def stop(self) -> None:
        await self.load.stop()
        await asyncio.to_thread(self.worker.stop)

    def restart_worker(self, place: Place | None = None, **variables: str) -> None:
        """Start another, after the end of the one that there was: as that was, unless it is told otherwise."""
        self.worker = WorkerProcess(place or self.place, **variables)
