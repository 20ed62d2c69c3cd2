"""Temporal's Python SDK without this library: a workflow written by hand, and the floor.

The *floor* is an activity that makes its calls in a row and saves after each by an awaited heartbeat, as this library
does, with no engine around them: no replay of a journal, no retries of a step. It is carried by a workflow that does
nothing else, or stands alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Generator
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow
from temporalio.api.common.v1 import Payloads
from temporalio.api.workflowservice.v1 import RecordActivityTaskHeartbeatRequest, RespondActivityTaskCompletedRequest
from temporalio.client import Client
from temporalio.converter import DataConverter
from temporalio.worker import PollerBehaviorAutoscaling, UnsandboxedWorkflowRunner, Worker

from performance import calls
from performance.place import Place
from performance.variants import base

_CALL_TIMEOUT = timedelta(minutes=30)
_HEARTBEAT = timedelta(seconds=base.HEARTBEAT_TIMEOUT)


# By hand: one activity a step ----------------


@activity.defn
async def call(n: int) -> str:
    return await calls.call(n)


@contextlib.contextmanager
def _heartbeats() -> Generator[None]:
    async def beat() -> None:
        while True:
            activity.heartbeat()
            await asyncio.sleep(base.HEARTBEAT_TIMEOUT / 3)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


@activity.defn
async def hold(n: int) -> str:
    with _heartbeats():
        return await calls.hold(n)


@activity.defn
async def hang_once(run: str) -> str:
    with _heartbeats():
        return await calls.hang_once(run)


@workflow.defn
class ByHand:
    """The workflow that a user would write; it answers how far it is by a query."""

    def __init__(self) -> None:
        self._finished = 0

    @workflow.query
    def finished(self) -> int:
        return self._finished

    async def _call(self, n: int) -> str:
        text: str = await workflow.execute_activity(call, n, start_to_close_timeout=_CALL_TIMEOUT)
        self._finished += 1
        return text

    @workflow.run
    async def run(self, kind: str, n: int) -> str:
        text = ""
        match kind:
            case base.CALL:
                text = await self._call(n)
            case base.CHAIN:
                for i in range(n):
                    text = await self._call(i)
            case base.FAN:
                text = str(len(await asyncio.gather(*(self._call(i) for i in range(n)))))
            case base.HOLD:
                text = await workflow.execute_activity(
                    hold, n, start_to_close_timeout=_CALL_TIMEOUT, heartbeat_timeout=_HEARTBEAT
                )
            case base.SLEEP:
                await asyncio.sleep(n)
                text = await self._call(n)
            case base.CRASH:
                await self._call(n)
                text = await workflow.execute_activity(
                    hang_once,
                    workflow.info().workflow_id,
                    start_to_close_timeout=_CALL_TIMEOUT,
                    heartbeat_timeout=_HEARTBEAT,
                )
        return text


class _Temporal(base.Peer):
    async def open(self) -> None:
        self._client = await Client.connect(self.place.address)

    async def result(self, submitted: Any) -> Any:
        return await submitted.result()


class ByHandPeer(_Temporal):
    kinds = (base.CALL, base.CHAIN, base.FAN, base.HOLD, base.SLEEP, base.CRASH)

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        return await self._client.start_workflow(
            ByHand.run, args=[kind, n], id=task_id, task_queue=queue or self.place.queue
        )

    async def status(self, submitted: Any) -> Any:
        return await submitted.query(ByHand.finished)


# The floor: one activity, its progress saved by heartbeats ----------------


class Floor:
    """The activity. It writes by task token, as the engine does, and reports its result the same way."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @activity.defn
    async def steps(self, kind: str, n: int) -> str:
        info = activity.info()
        converter = DataConverter.default
        service, namespace, identity = self._client.workflow_service, self._client.namespace, self._client.identity
        done: list[str] = []
        if kind == base.CALL:
            done.append(await calls.call(n))
        for i in range(n if kind == base.CHAIN else 0):
            done.append(await calls.call(i))
            await service.record_activity_task_heartbeat(
                RecordActivityTaskHeartbeatRequest(
                    task_token=info.task_token,
                    namespace=namespace,
                    identity=identity,
                    details=Payloads(payloads=await converter.encode([done])),
                )
            )
        await service.respond_activity_task_completed(
            RespondActivityTaskCompletedRequest(
                task_token=info.task_token,
                namespace=namespace,
                identity=identity,
                result=Payloads(payloads=await converter.encode([done[-1]])),
            )
        )
        activity.raise_complete_async()


@workflow.defn
class FloorWorkflow:
    """The least that carries an activity."""

    @workflow.run
    async def run(self, kind: str, n: int) -> str:
        return await workflow.execute_activity(
            Floor.steps,  # type: ignore[arg-type]
            args=[kind, n],
            start_to_close_timeout=_CALL_TIMEOUT,
            heartbeat_timeout=timedelta(minutes=10),
        )


class FloorWorkflowPeer(_Temporal):
    has_status = False

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        return await self._client.start_workflow(
            FloorWorkflow.run, args=[kind, n], id=task_id, task_queue=queue or self.place.queue
        )


class FloorStandalonePeer(_Temporal):
    has_status = False

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        return await self._client.start_activity(
            "steps",
            args=[kind, n],
            id=task_id,
            task_queue=queue or self.place.queue,
            start_to_close_timeout=_CALL_TIMEOUT,
            heartbeat_timeout=timedelta(minutes=10),
            result_type=str,
        )


async def work(place: Place) -> None:
    client = await Client.connect(place.address)
    worker = Worker(
        client,
        task_queue=place.queue,
        workflows=[ByHand, FloorWorkflow],
        activities=[call, hold, hang_once, Floor(client).steps],
        # As the library's own workers are. The sandbox would cost the workflow by hand more.
        workflow_runner=UnsandboxedWorkflowRunner(),
        max_concurrent_activities=place.slots,
        activity_task_poller_behavior=PollerBehaviorAutoscaling(),
        workflow_task_poller_behavior=PollerBehaviorAutoscaling(),
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
    )
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with worker:
        await stopping.wait()
