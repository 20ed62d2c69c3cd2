"""This library: the same tasks carried by a workflow, or by a standalone activity."""

from __future__ import annotations

import asyncio
from typing import Any

from performance import calls
from performance.place import Place
from performance.variants import base
from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    ConfigError,
    RetryableError,
    TemporalAsyncTask,
    current_run,
    poll,
    sleep,
    step,
)


async def call(n: int) -> str:
    return await calls.call(n)


async def chain(n: int) -> str:
    for i in range(n - 1):
        await step(f"step-{i}", calls.call, i)
    return await step(f"step-{n - 1}", calls.call, n - 1)


async def fan(n: int) -> int:
    return len(await asyncio.gather(*(step(f"step-{i}", calls.call, i) for i in range(n))))


async def hold(n: int) -> str:
    return await step("hold", calls.hold, float(n))


async def wait(n: int) -> str:
    await step("before", calls.call, n)
    await sleep("wait", n)
    return "done"


async def _busy(n: int) -> str:
    try:
        return await calls.fail(n)
    except calls.BusyError as error:
        raise RetryableError("busy", retry_after=n) from error


async def backoff(n: int) -> str:
    return await step("busy", _busy, n)


async def polls(n: int) -> str:
    return await poll("ready", calls.look, n, every=n, timeout=100 * n)


async def crash(n: int) -> str:
    await step("first", calls.call, n)
    return await step("second", calls.hang_once, current_run().task_id)


_FUNCTIONS = {
    base.CALL: call,
    base.CHAIN: chain,
    base.FAN: fan,
    base.HOLD: hold,
    base.SLEEP: wait,
    base.BACKOFF: backoff,
    base.POLL: polls,
    base.CRASH: crash,
}


def _component(place: Place, execution: Any, queue: str) -> AsyncTaskComponent:
    config = AsyncTaskComponentConfig(
        temporal_address=place.address, task_queue=queue, max_concurrent_tasks=place.slots, graceful_shutdown_timeout=1
    )
    component = AsyncTaskComponent(config)
    component.register_all(
        TemporalAsyncTask(kind, function, execution=execution, heartbeat_timeout=base.HEARTBEAT_TIMEOUT)
        for kind, function in _FUNCTIONS.items()
    )
    return component


class _Ours(base.Peer):
    execution: str
    kinds = base.KINDS

    async def open(self) -> None:
        self._components = {
            queue: _component(self.place, self.execution, queue) for queue in (self.place.queue, "nobody")
        }
        for component in self._components.values():
            await component.connect()
        self._tasks = {
            (queue, task.name): task for queue, component in self._components.items() for task in component.tasks
        }

    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        task = self._tasks[queue or self.place.queue, kind]
        return task, await task.submit(n, task_id=task_id)

    async def result(self, submitted: Any) -> Any:
        task, task_id = submitted
        return await task.result(task_id)

    async def status(self, submitted: Any) -> Any:
        task, task_id = submitted
        return len((await task.get_status(task_id)).completed_steps)


class WorkflowPeer(_Ours):
    execution = "workflow"


class StandalonePeer(_Ours):
    execution = "activity"


def has_standalone() -> bool:
    """Whether this library can carry a task by a standalone activity."""
    try:
        TemporalAsyncTask("probe", call, execution="activity")
    except ConfigError:
        return False
    return True


async def work(place: Place) -> None:
    execution = StandalonePeer.execution if "standalone" in place.variant else WorkflowPeer.execution
    await _component(place, execution, place.queue).run()
