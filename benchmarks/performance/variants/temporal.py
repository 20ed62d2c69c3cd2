"""Temporal's Python SDK without this library: a workflow written by hand, and the floor.

The *floor* is an activity that makes its calls in a row and saves after each by an awaited heartbeat (after the last by
its result), as this library does, with no engine around them: no replay of a journal, no retries of a step. It is
carried by a workflow that does nothing else, or stands alone.
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
from temporalio.exceptions import ApplicationError
from temporalio.worker import PollerBehaviorAutoscaling, UnsandboxedWorkflowRunner, Worker

from performance import calls
from performance.place import Place
from performance.variants import base

_HEARTBEAT = timedelta(seconds=base.HEARTBEAT_TIMEOUT)
_CALL_TIMEOUT = _HEARTBEAT
"""Of a call that takes no time. On a busy machine the server loses a task now and then; so it comes back as soon."""
_NO_LIMIT = timedelta(days=1)
_MANY = 100  # steps


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


@activity.defn
async def busy(n: int) -> str:
    try:
        return await calls.fail(n)
    except calls.BusyError as error:
        raise ApplicationError("busy", next_retry_delay=timedelta(seconds=n)) from error


@activity.defn
async def look(n: int) -> str:
    """Polled by retries, as Temporal's documentation has it for what is polled seldom."""
    found = await calls.look(n)
    if found is None:
        raise ApplicationError("not ready", next_retry_delay=timedelta(seconds=n))
    return found


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
                    hold, n, start_to_close_timeout=_NO_LIMIT, heartbeat_timeout=_HEARTBEAT
                )
            case base.SLEEP:
                text = await self._call(n)
                await asyncio.sleep(n)
            case base.BACKOFF:
                text = await workflow.execute_activity(busy, n, start_to_close_timeout=_CALL_TIMEOUT)
            case base.POLL:
                text = await workflow.execute_activity(look, n, start_to_close_timeout=_CALL_TIMEOUT)
            case base.CRASH:
                await self._call(n)
                text = await workflow.execute_activity(
                    hang_once,
                    workflow.info().workflow_id,
                    start_to_close_timeout=_NO_LIMIT,
                    heartbeat_timeout=_HEARTBEAT,
                )
        return text


class _Temporal(base.Peer):
    async def open(self) -> None:
        self._client = await Client.connect(self.place.address)

    async def result(self, submitted: Any) -> Any:
        return await submitted.result()


class ByHandPeer(_Temporal):
    kinds = base.KINDS

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

        async def save() -> None:
            await service.record_activity_task_heartbeat(
                RecordActivityTaskHeartbeatRequest(
                    task_token=info.task_token,
                    namespace=namespace,
                    identity=identity,
                    details=Payloads(payloads=await converter.encode([done])),
                )
            )

        match kind:
            case base.CALL:
                done.append(await calls.call(n))
            case base.CHAIN:
                for i in range(n - 1):
                    done.append(await calls.call(i))
                    await save()
                done.append(await calls.call(n - 1))  # saved with the result
            case base.FAN:
                done += await asyncio.gather(*(calls.call(i) for i in range(n)))
                await save()
            case base.HOLD:
                with _heartbeats():
                    done.append(await calls.hold(n))
        await service.respond_activity_task_completed(
            RespondActivityTaskCompletedRequest(
                task_token=info.task_token,
                namespace=namespace,
                identity=identity,
                result=Payloads(payloads=await converter.encode([done[-1]])),
            )
        )
        activity.raise_complete_async()


def _heartbeat_of(steps: int) -> timedelta:
    """As the library's, but for a task that takes long: the SDK's core, which sees no heartbeats by token, ends it."""
    return _HEARTBEAT if steps < _MANY else _NO_LIMIT


@workflow.defn
class FloorWorkflow:
    """The least that carries an activity."""

    @workflow.run
    async def run(self, kind: str, n: int) -> str:
        return await workflow.execute_activity(
            Floor.steps,  # type: ignore[arg-type]
            args=[kind, n],
            start_to_close_timeout=_NO_LIMIT,
            heartbeat_timeout=_heartbeat_of(n),
        )


class _Floor(_Temporal):
    kinds = (base.CALL, base.CHAIN, base.FAN, base.HOLD)

    async def status(self, submitted: Any) -> Any:
        """The least that a question to the server can be."""
        return await submitted.describe()


class FloorWorkflowPeer(_Floor):
    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        return await self._client.start_workflow(
            FloorWorkflow.run, args=[kind, n], id=task_id, task_queue=queue or self.place.queue
        )


class FloorStandalonePeer(_Floor):
    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        return await self._client.start_activity(
            "steps",
            args=[kind, n],
            id=task_id,
            task_queue=queue or self.place.queue,
            start_to_close_timeout=_NO_LIMIT,
            heartbeat_timeout=_heartbeat_of(n),
            result_type=str,
        )


async def work(place: Place) -> None:
    client = await Client.connect(place.address)
    worker = Worker(
        client,
        task_queue=place.queue,
        workflows=[ByHand, FloorWorkflow],
        activities=[call, hold, hang_once, busy, look, Floor(client).steps],
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
