"""What the tests share: waiting for a condition, one test's components, and workers in processes of their own."""

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import pytest
import uvloop
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import (
    DeleteActivityExecutionRequest,
    DeleteWorkflowExecutionRequest,
    PauseActivityExecutionRequest,
    ResetActivityExecutionRequest,
    UnpauseActivityExecutionRequest,
)
from temporalio.client import Client
from temporalio.runtime import MetricBuffer, Runtime, TelemetryConfig

from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    RetryPolicy,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
)
from temporal_async_task.engine import wire
from temporal_async_task.task import Execution

AT_ONCE = RetryPolicy(max_retries=3, initial_delay=0.01, max_delay=0.01, jitter=0)
"""Retries that are spent in the attempt."""
BY_TIMER = RetryPolicy(max_retries=3, initial_delay=1.05, max_delay=1.05, jitter=0)
"""Retries for which the attempt ends: the server's timer brings the next one."""
FOR_AN_HOUR = RetryPolicy(max_retries=3, initial_delay=3600, max_delay=3600, jitter=0)
"""A backoff that outlasts the test."""
NEVER_AGAIN = RetryPolicy(max_retries=0)


PATIENCE = 60.0
"""Seconds for what has to happen, and is not measured. A server that is short of time may begin an attempt that no
worker gets (https://github.com/temporalio/temporal/issues/11733): it is made up for after the heartbeat timeout."""

T = TypeVar("T")

on_both = pytest.mark.parametrize("execution", get_args(Execution))
"""A test that runs twice: once with a workflow around each run, once with the activity alone."""
on_an_activity = pytest.mark.parametrize("execution", ["activity"])
"""A test of what is so with the activity alone."""


async def wait_until(condition: Callable[[], Any], *, timeout: float = PATIENCE, interval: float = 0.02) -> Any:
    """Wait for a condition (a function, sync or async) to be truthy, and return what it returned then."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(_not_true(condition, timeout, value))
        await asyncio.sleep(interval)


async def status_when(
    task: TemporalAsyncTask[Any, Any],
    task_id: str,
    condition: Callable[[TaskResult[Any]], object],
    *,
    timeout: float = PATIENCE,
) -> TaskResult[Any]:
    """Wait until a run's status fulfils a condition, and return that status."""
    last: TaskResult[Any] | None = None
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        last = await task.get_status(task_id)
        if condition(last):
            return last
        await asyncio.sleep(0.03)
    raise AssertionError(_not_true(condition, timeout, last))


def _not_true(condition: Callable[..., Any], timeout: float, last: Any) -> str:
    return f"not true within {timeout} s: {inspect.getsource(condition).strip()} - at last it was {last!r}"


async def undisturbed(measure: Callable[[], Awaitable[T]], fits: Callable[[T], object], *, tries: int = 10) -> T:
    """What is measured when it fits, or else at the last of the tries: whatever else runs may disturb some of them."""
    while True:
        measured = await measure()
        tries -= 1
        if fits(measured) or not tries:
            return measured


def ended(run: TaskResult[Any]) -> bool:
    return run.status in {TaskStatus.COMPLETED, TaskStatus.FAILED}


def backs_off(run: TaskResult[Any]) -> bool:
    return run.next_retry_at is not None


def utc_now() -> datetime:
    return datetime.now(UTC)


class Operator:
    """What somebody does to a run with Temporal's own means: its UI, its command."""

    def __init__(self, client: Client, execution: Execution, task_id: str) -> None:
        self._client = client
        self._task_id = task_id
        self._in_workflow = execution == "workflow"
        self._which = {
            "namespace": client.namespace,
            "workflow_id": task_id if self._in_workflow else "",
            "activity_id": f"{wire.ACTIVITY_ID}1" if self._in_workflow else task_id,
            "identity": "an operator",
        }

    def _handle(self) -> Any:
        if self._in_workflow:
            return self._client.get_workflow_handle(self._task_id)
        return self._client.get_activity_handle(self._task_id)

    async def cancel(self) -> None:
        await self._handle().cancel()

    async def terminate(self, reason: str | None = None) -> None:
        await self._handle().terminate(reason=reason)

    async def pause(self) -> None:
        request = PauseActivityExecutionRequest(**self._which, reason="the vendor is down")
        await self._client.workflow_service.pause_activity_execution(request)

    async def unpause(self) -> None:
        await self._client.workflow_service.unpause_activity_execution(UnpauseActivityExecutionRequest(**self._which))

    async def reset(self) -> None:
        await self._client.workflow_service.reset_activity_execution(ResetActivityExecutionRequest(**self._which))

    async def delete(self) -> None:
        """Have the server forget a run that has ended, as it does when its retention is over."""
        service, namespace = self._client.workflow_service, self._client.namespace
        if self._in_workflow:
            execution = WorkflowExecution(workflow_id=self._task_id)
            await service.delete_workflow_execution(
                DeleteWorkflowExecutionRequest(namespace=namespace, workflow_execution=execution)
            )
        else:
            await service.delete_activity_execution(
                DeleteActivityExecutionRequest(namespace=namespace, activity_id=self._task_id)
            )

    async def attempt(self) -> int:
        """The number of the run's attempt."""
        if not self._in_workflow:
            return int((await self._handle().describe()).attempt)
        found = await self._handle().describe()
        return max((one.attempt for one in found.raw_description.pending_activities), default=0)


class App:
    """One test's application: components on a task queue of its own, stopped with the test."""

    def __init__(self, address: str, queue: str, execution: Execution = "workflow") -> None:
        self.address = address
        self.queue = queue
        self.execution: Execution = execution
        self._components: list[AsyncTaskComponent] = []

    def component(self, *tasks: TemporalAsyncTask[Any, Any], **config: Any) -> AsyncTaskComponent:
        """A component that knows the tasks, and is neither connected nor started."""
        settings = {
            "temporal_address": self.address,
            "task_queue": self.queue,
            "execution": self.execution,
            "graceful_shutdown_timeout": 0.05,
        }
        component = AsyncTaskComponent(AsyncTaskComponentConfig(**{**settings, **config}))
        component.register_all(tasks)
        self._components.append(component)
        return component

    async def connect(self, *tasks: TemporalAsyncTask[Any, Any], **config: Any) -> AsyncTaskComponent:
        """A web process: it can submit and ask."""
        component = self.component(*tasks, **config)
        await component.connect()
        return component

    async def start(self, *tasks: TemporalAsyncTask[Any, Any], **config: Any) -> AsyncTaskComponent:
        """A worker process."""
        component = self.component(*tasks, **config)
        await component.start()
        return component

    def operator(self, component: AsyncTaskComponent, task_id: str) -> Operator:
        """Somebody who handles a run with Temporal's own means."""
        return Operator(component.client, self.execution, task_id)

    async def stop(self) -> None:
        await asyncio.gather(*(component.stop() for component in self._components))


class Meter:
    """Counts the calls to the server where they leave the process: by the SDK's own metrics."""

    def __init__(self) -> None:
        self._buffer = MetricBuffer(100_000)
        self._runtime = Runtime(telemetry=TelemetryConfig(metrics=self._buffer))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Count the calls of each component that connects meanwhile."""
        before = Runtime.default()
        Runtime.set_default(self._runtime, error_if_already_set=False)
        try:
            yield
        finally:
            Runtime.set_default(before, error_if_already_set=False)

    def calls(self) -> list[str]:
        """The operations that were asked of the server since this was called last."""
        found: list[str] = []
        for update in self._buffer.retrieve_updates():
            if update.metric.name in {"temporal_request", "temporal_long_request"}:
                found += [str(update.attributes["operation"])] * int(update.value)
        return found


# Workers in processes of their own: a test file that has some runs as their program, too. ----------------


class WorkerProcess:
    """A worker, as a process that runs a test file: ``if __name__ == "__main__": work(tasks)``."""

    def __init__(self, program: str, app: App, **env: str) -> None:
        variables = {
            **os.environ,
            "TEMPORAL_ADDRESS": app.address,
            "TEMPORAL_TASK_QUEUE": app.queue,
            "ASYNC_TASK_EXECUTION": app.execution,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **env,
        }
        # A file and not a pipe, which would fill up and block the worker.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, program],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would, by SIGKILL."""
        self._process.kill()
        self._process.wait()

    async def exit_status(self, timeout: float) -> int:
        return await asyncio.to_thread(self._process.wait, timeout)

    def errors(self) -> str:
        """All that it has written to stderr."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stderr.close()


def work(tasks: Iterable[TemporalAsyncTask[Any, Any]]) -> None:
    """What a worker process does: run the tasks until it is told to stop."""
    grace = float(os.environ.get("GRACE", "30"))
    slots = int(os.environ.get("SLOTS", "200"))
    config = AsyncTaskComponentConfig.load(
        graceful_shutdown_timeout=grace,
        max_concurrent_tasks=slots,
        event_loop_per_run="LOOP_PER_RUN" in os.environ,
    )
    component = AsyncTaskComponent(config)
    component.register_all(tasks)
    run = uvloop.run if os.environ.get("LOOP") == "uvloop" else asyncio.run
    run(component.run())


class CallLog:
    """What was called, in the order in which it was, by whichever process: a file that is only appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, *words: object) -> None:
        """Append a line. One write with O_APPEND is not torn apart, nor lost with the process that made it."""
        line = " ".join(map(str, words)) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def lines(self) -> list[Sequence[str]]:
        with contextlib.suppress(FileNotFoundError):
            return [line.split() for line in self.path.read_text().splitlines()]
        return []
