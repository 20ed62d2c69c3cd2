"""What an application holds: a function made durable."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Generator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, Unpack, get_args, overload

from temporalio.common import Priority

from temporal_async_task.checks import check_seconds, check_text
from temporal_async_task.engine import wire
from temporal_async_task.engine.backend import Backend, TaskAddress
from temporal_async_task.engine.local import run_here
from temporal_async_task.engine.signatures import names, signature_types
from temporal_async_task.engine.standalone import StandaloneBackend
from temporal_async_task.engine.workflow_backend import WorkflowBackend
from temporal_async_task.errors import (
    ConfigError,
    InvalidKeyError,
    NotConnectedError,
    ParamsError,
    ServerUnavailableError,
    TaskCancelledError,
    TaskFailedError,
    unreadable_result,
)
from temporal_async_task.retry import RetryPolicy
from temporal_async_task.schedules import (
    ScheduleHandle,
    ScheduleOptions,
    TaskSchedule,
    create_schedule,
    find_schedule,
    list_schedules,
)
from temporal_async_task.status import TaskResult, TaskStatus
from temporal_async_task.steps import Result, Step, wait_for

if TYPE_CHECKING:
    from temporalio.client import Client

P = TypeVar("P")
R = TypeVar("R")
S = TypeVar("S")

Execution = Literal["workflow", "activity"]

DEFAULT_TASK_QUEUE = "async-tasks"

_PRIORITIES = range(1, 6)
_MAX_FAIRNESS_KEY = 64  # bytes; the server's


class TaskOptions(TypedDict, total=False):
    """The keywords of ``TemporalAsyncTask``."""

    task_queue: str
    retry_policy: RetryPolicy | None
    step_timeout: float | timedelta
    timeout: float | timedelta | None
    heartbeat_timeout: float | timedelta
    execution: Execution | None


class SubmitOptions(TypedDict, total=False):
    """The keywords of ``TemporalAsyncTask.submit``."""

    task_id: str | None
    delay: float | timedelta | None
    priority: int | None
    fairness_key: str | None


class TemporalAsyncTask(Generic[P, R]):
    """A function made durable: submitted from anywhere, run by workers, asked about by its id.

    Args:
        name: Unique in the application; workers find the task by it.
        task: The function, of one parameter (the params) or none. ``async def`` or ``def``, or a generator of ``Step``.
        task_queue: Which workers run it.
        retry_policy: How failed calls are repeated; of a step, unless it has a policy of its own.
        step_timeout: Seconds (or a ``timedelta``) that one call may take.
        timeout: Seconds (or a ``timedelta``) that the run as a whole may take, waits and backoffs included. None: any.
        heartbeat_timeout: Seconds after which a run whose worker is silent is given to another.
        execution: What carries its runs: a ``"workflow"``, or an ``"activity"`` alone, which costs about half, needs
            Temporal server 1.32 or newer, and knows neither ``wait_for`` nor schedules. None: what the component says,
            which by default is ``"workflow"``. See docs/execution.md.

    Raises:
        ConfigError: A value that makes no sense, or a function that cannot be a task.
        InvalidKeyError: The name, or the task queue's, cannot be one.
    """

    @overload
    def __init__(self, name: str, task: Callable[[P], Awaitable[R]], **options: Unpack[TaskOptions]) -> None: ...
    @overload
    def __init__(
        self, name: str, task: Callable[[P], Generator[Step, Any, R]], **options: Unpack[TaskOptions]
    ) -> None: ...
    @overload
    def __init__(
        self, name: str, task: Callable[[P], AsyncGenerator[Step | Result[R], Any]], **options: Unpack[TaskOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: TemporalAsyncTask[None, S], name: str, task: Callable[[], Awaitable[S]], **options: Unpack[TaskOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: TemporalAsyncTask[None, S],
        name: str,
        task: Callable[[], Generator[Step, Any, S]],
        **options: Unpack[TaskOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: TemporalAsyncTask[None, S],
        name: str,
        task: Callable[[], AsyncGenerator[Step | Result[S], Any]],
        **options: Unpack[TaskOptions],
    ) -> None: ...
    @overload
    def __init__(self, name: str, task: Callable[[P], R], **options: Unpack[TaskOptions]) -> None: ...
    @overload
    def __init__(
        self: TemporalAsyncTask[None, S], name: str, task: Callable[[], S], **options: Unpack[TaskOptions]
    ) -> None: ...
    def __init__(
        self,
        name: str,
        task: Callable[..., Any],
        *,
        task_queue: str = DEFAULT_TASK_QUEUE,
        retry_policy: RetryPolicy | None = None,
        step_timeout: float | timedelta = 1800.0,
        timeout: float | timedelta | None = None,
        heartbeat_timeout: float | timedelta = 15.0,
        execution: Execution | None = None,
    ) -> None:
        if not callable(task):
            raise ConfigError(f"The task {name!r} needs a function, not {type(task).__name__}.")
        if execution is not None and execution not in get_args(Execution):
            raise ConfigError(f"execution={execution!r} of task {name!r} must be 'workflow' or 'activity'.")
        self.name = check_text(name, "A task's name")
        if name.startswith(wire.OWN_PREFIX):
            raise ConfigError(
                f"The task name {name!r} is the engine's own, as all that begin with {wire.OWN_PREFIX!r}."
            )
        self.task_queue = check_text(task_queue, f"The task queue of task {name!r}")
        self.workflow_type = check_text(wire.WORKFLOW_PREFIX + name, f"The workflow type of task {name!r}")
        self.function = task
        if not isinstance(retry_policy, RetryPolicy | None):
            raise ConfigError(f"retry_policy of task {name!r} must be a RetryPolicy(...), not {retry_policy!r}.")
        self.retry_policy = RetryPolicy() if retry_policy is None else retry_policy
        self.step_timeout = _positive(step_timeout, "step_timeout", name)
        self.timeout = None if timeout is None else _positive(timeout, "timeout", name)
        self.heartbeat_timeout = _positive(heartbeat_timeout, "heartbeat_timeout", name)
        self._execution: Execution | None = execution
        self._default_execution: Execution = "workflow"
        self.takes_params, self.params_type, self.result_type = signature_types(task, _callers_locals())
        self._backend: Backend | None = None
        if execution == "activity":
            self._refuse_events()
        functools.update_wrapper(self, task, updated=())

    @property
    def task_function(self) -> Callable[..., Any]:
        """The function as it was written."""
        return self.function

    @property
    def is_multi_step(self) -> bool:
        """Whether the function is a generator of steps. A coroutine may call ``step()``, too."""
        return inspect.isgeneratorfunction(self.function) or inspect.isasyncgenfunction(self.function)

    def use_default_queue(self, task_queue: str) -> None:
        """Take the component's task queue, unless the task names one of its own."""
        if self.task_queue == DEFAULT_TASK_QUEUE:
            self.task_queue = task_queue

    @property
    def execution(self) -> Execution:
        """What carries its runs."""
        return self._execution or self._default_execution

    @property
    def own_execution(self) -> Execution | None:
        """What the task itself says of that; None where it leaves it to the component."""
        return self._execution

    def use_default_execution(self, execution: Execution) -> None:
        """Have the runs carried as the component says, unless the task says it itself.

        Raises:
            ConfigError: The task's function waits for events, and the component says ``"activity"``.
        """
        if self._execution is None:
            if execution == "activity":
                self._refuse_events()
            self._default_execution = execution

    def set_client(self, client: Client) -> None:
        """Use this client to submit and to ask; the component does it for its tasks."""
        self._backend = StandaloneBackend(client) if self.execution == "activity" else WorkflowBackend(client)

    def __repr__(self) -> str:
        return f"<TemporalAsyncTask {self.name!r} on task queue {self.task_queue!r}>"

    # Running

    @overload
    async def __call__(self: TemporalAsyncTask[None, S], params: None = None) -> S: ...
    @overload
    async def __call__(self, params: P) -> R: ...
    async def __call__(self, params: Any = None) -> Any:
        """Run the body right here, with no server, for unit tests and scripts. Retries wait in place."""
        return await run_here(self, params)

    @overload
    async def submit(
        self: TemporalAsyncTask[None, S], params: None = None, **options: Unpack[SubmitOptions]
    ) -> str: ...
    @overload
    async def submit(self, params: P, **options: Unpack[SubmitOptions]) -> str: ...
    async def submit(
        self,
        params: Any = None,
        *,
        task_id: str | None = None,
        delay: float | timedelta | None = None,
        priority: int | None = None,
        fairness_key: str | None = None,
    ) -> str:
        """Have the task run by a worker, and return at once. Once this has returned, the run is kept.

        Args:
            params: What the function is called with.
            task_id: The run's id, unless a random one will do. The same id and params twice is one run, as long as the
                server keeps it; so a caller that is not sure whether its submit went through submits again.
            delay: Seconds (or a ``timedelta``) before the run begins.
            priority: 1 to 5, the lower the sooner, among the runs that wait for a worker; Temporal's default is 3.
                See https://docs.temporal.io/develop/task-queue-priority-fairness.
            fairness_key: At most 64 bytes. Runs with different keys (tenants, say) get an equal share of the workers,
                among those of one priority. The server has to be told to heed it: on Temporal Cloud by the namespace's
                setting, on a server of your own by ``matching.enableFairness``. ``DevServer`` does.

        Returns:
            The run's id.

        Raises:
            ParamsError: The params do not fit the function's annotation, or cannot be serialised; or there is no such
                priority, or the fairness key cannot be one.
            PayloadTooLargeError: The params are larger than the server takes.
            StorageError: The external storage, where the params are to be kept, cannot be used just now.
            DecryptionError: The id is in use, and what its run was started with cannot be compared here: this process
                lacks the codec or the key.
            TaskConflictError: The id stands for a run with other params, or of another task.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
            InvalidKeyError: The id cannot be one.
            ConfigError: The delay makes no sense; or the server cannot carry a task with ``execution="activity"``.
        """
        backend = self._connected()
        self._refuse_params_in_vain(params)
        if task_id is None:
            task_id = str(uuid.uuid4())
        check_text(task_id, "A task id")
        if priority is not None and priority not in _PRIORITIES:
            raise ParamsError(f"priority must be a whole number from 1 (soonest) to 5, not {priority!r}.")
        if fairness_key is not None:
            _check_fairness_key(fairness_key)
        wait = 0.0 if delay is None else _not_negative(delay, "delay", self.name)
        order = Priority(priority_key=priority, fairness_key=fairness_key)
        try:
            await backend.start(self._address, task_id, params, delay=wait, priority=order)
        except ServerUnavailableError as error:
            raise ServerUnavailableError(
                f"{error} The submit may have gone through, its answer lost: repeat it with task_id={task_id!r}, and "
                f"it is one run."
            ) from error
        return task_id

    async def get_status(self, task_id: str) -> TaskResult[R]:
        """All that is known of a run, from the server alone: no worker need be up.

        Raises:
            TaskNotFoundError: No run of this task has the id.
            DecryptionError: What is known of the run cannot be read here: this process lacks the codec or the key.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
            InvalidKeyError: The id cannot be one.
        """
        return await self._connected().status(self._address, _known_text(task_id, self.name))

    async def result(self, task_id: str, *, timeout: float | timedelta | None = None) -> R:
        """Wait for the end of a run, and return its result.

        Args:
            task_id: The run's id.
            timeout: Seconds (or a ``timedelta``) to wait. The run itself goes on after it.

        Raises:
            TaskFailedError: The run failed.
            TaskCancelledError: The run was cancelled.
            TimeoutError: It has not ended in time.
            ResultError: The result does not fit the function's annotation any more, or is not in external storage.
            StorageError: The external storage, where the result is, cannot be used just now.
            DecryptionError: The result cannot be read here: this process lacks the codec or the key.
            TaskNotFoundError: No run of this task has the id.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
            InvalidKeyError: The id cannot be one.
            ConfigError: The timeout makes no sense.
        """
        backend = self._connected()
        limit = None if timeout is None else _not_negative(timeout, "timeout", self.name)
        waiting = asyncio.timeout(limit)
        try:
            async with waiting:
                ended = await backend.wait(self._address, _known_text(task_id, self.name))
        except TimeoutError:
            if not waiting.expired():  # of a codec that asks a key service, say
                raise
            raise TimeoutError(
                f"Run {task_id!r} of task {self.name!r} has not ended within {limit} s; it goes on."
            ) from None
        if ended.status is TaskStatus.COMPLETED and ended.error is not None:
            text = f"Run {task_id!r} of task {self.name!r} has completed, but {ended.error}"
            raise unreadable_result(ended.error_type, text)
        if ended.status is TaskStatus.COMPLETED:
            return ended.result  # type: ignore[return-value]  # None is a result where R says so
        kind = TaskCancelledError if ended.error_type == wire.CANCELLED else TaskFailedError
        raise kind(task_id, ended.error_type or "Error", ended.error or "")

    @overload
    async def run(
        self: TemporalAsyncTask[None, S],
        params: None = None,
        *,
        timeout: float | timedelta | None = None,
        **options: Unpack[SubmitOptions],
    ) -> S: ...
    @overload
    async def run(
        self, params: P, *, timeout: float | timedelta | None = None, **options: Unpack[SubmitOptions]
    ) -> R: ...
    async def run(self, params: Any = None, *, timeout: float | timedelta | None = None, **options: Any) -> Any:
        """Submit, and wait for the result. Arguments and errors are those of ``submit`` and ``result``.

        In another task it makes a child of a step: ``await step("child", other.run, params)``. The child is submitted
        once, and waited for outside of the worker.
        """
        return await self.result(await self.submit(params, **options), timeout=timeout)

    async def cancel(self, task_id: str, reason: str = "") -> None:
        """Cancel a run: its body gets ``CancelledError`` where it waits, and may clean up with further steps.

        Returns once the request is durable. A waiting run is cancelled within about a second, a running step within
        the keep-alive interval (a third of the heartbeat timeout, at most five seconds). Cancelling twice, or a run
        that has ended, changes nothing. A cancelled run can be resumed.

        Args:
            task_id: The run's id.
            reason: Shown as the run's error.

        Raises:
            TaskNotFoundError: No run of this task has the id.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
            InvalidKeyError: The id cannot be one.
        """
        await self._connected().cancel(self._address, _known_text(task_id, self.name), reason)

    async def resume(self, task_id: str, *, redo: Collection[str] = ()) -> str:
        """Have a run that failed or was cancelled go on from its last finished step, with the same id and params.

        Steps that failed get all of their tries anew, but for those with ``at_most_once``. The task's ``timeout``
        begins anew, too.

        Args:
            task_id: The run's id.
            redo: Keys of steps that are to be done again: finished ones, or failed ones with ``at_most_once``.

        Returns:
            The run's id.

        Raises:
            TaskConflictError: The run is going on, has completed, or has no step of ``redo``.
            TaskNotFoundError: No run of this task has the id.
            DecryptionError: What the run has done cannot be read here: this process lacks the codec or the key.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
            InvalidKeyError: The id cannot be one.
        """
        await self._connected().resume(self._address, _known_text(task_id, self.name), redo)
        return task_id

    async def send(self, task_id: str, key: str, value: Any = None) -> None:
        """Send an event to a run, whose body waits for it with ``wait_for(key)``, now or later.

        Args:
            task_id: The run's id.
            key: Names the event. Of several with one key the first counts.
            value: What ``wait_for`` returns.

        Raises:
            TaskNotFoundError: No run of this task has the id.
            TaskConflictError: The run has ended.
            ParamsError: The value cannot be serialised.
            PayloadTooLargeError: The value is larger than 32 KiB.
            StorageError: The external storage, where the value is to be kept, cannot be used just now.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
            InvalidKeyError: The key or the id cannot be one.
            ConfigError: The task has ``execution="activity"``, whose runs wait for no event.
        """
        check_text(key, "The key of an event")
        await self._connected().send(self._address, _known_text(task_id, self.name), key, value)

    async def list(
        self, *, status: TaskStatus | str | None = None, limit: int | None = 100, skip: int = 0
    ) -> AsyncIterator[TaskResult[R]]:
        """The task's runs, newest first, as the server's visibility store has them (some moments behind).

        Of more than a thousand runs, those that go on come before those that have ended.

        Args:
            status: Only runs with this status.
            limit: At most so many; None for all.
            skip: Leave out so many of the newest, for pages.

        Raises:
            ConfigError: There is no such status.
            DecryptionError: A run cannot be read here: this process lacks the codec or the key.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
        """
        backend = self._connected()
        wanted = None if status is None else _status(status, self.name)
        if limit is not None and limit < 1:
            return
        # Only a run that goes on has to be asked itself whether it has begun.
        by_query = wanted not in {TaskStatus.PENDING, TaskStatus.PROCESSING}
        found = 0
        async for task_id in backend.ids(self._address, wanted):
            if by_query and skip > 0:
                skip -= 1
                continue
            run = await self.get_status(task_id)
            if wanted is None or run.status is wanted:
                if skip > 0:
                    skip -= 1
                    continue
                yield run
                found += 1
                if limit is not None and found >= limit:
                    return

    # Schedules

    @overload
    async def schedule(
        self: TemporalAsyncTask[None, Any], schedule_id: str, params: None = None, **options: Unpack[ScheduleOptions]
    ) -> ScheduleHandle: ...
    @overload
    async def schedule(self, schedule_id: str, params: P, **options: Unpack[ScheduleOptions]) -> ScheduleHandle: ...
    async def schedule(
        self, schedule_id: str, params: Any = None, **options: Unpack[ScheduleOptions]
    ) -> ScheduleHandle:
        """Have runs begin by the clock, from now on. The server keeps the schedule: no process need be up for it.

        A run's id is the schedule's and the time for which it was due, as in ``nightly-2026-01-31T03:00:00Z``. The
        runs are like any others, and get the params, task queue, ``timeout`` and ``heartbeat_timeout`` as they are now:
        to change them, delete the schedule and make it anew.

        Args:
            schedule_id: The schedule's id, unique in the Temporal namespace.
            params: What the function is called with, each time.
            cron: When runs begin: one or more cron expressions of five fields, or ``@daily`` and the like; see
                https://docs.temporal.io/schedule#spec. Either this or ``every``.
            every: Whole seconds (or a ``timedelta``) between two runs, counted from 1970: 3600 is at the full hour.
            overlap: What happens when a run is due while the one before it goes on: ``"skip"`` leaves it out,
                ``"buffer_one"`` and ``"buffer_all"`` begin it (or all of them) later, ``"cancel_other"`` and
                ``"terminate_other"`` end the older, ``"allow_all"`` lets them run side by side.
            time_zone: Whose clock ``cron`` means, as in ``"Europe/Berlin"``; UTC by default.
            jitter: Seconds (or a ``timedelta``) by which a run may begin later, at random.
            paused: Start no runs yet.
            note: Shown with the schedule.

        Returns:
            A handle to pause, trigger and delete it.

        Raises:
            ConfigError: Neither or both of ``cron`` and ``every``, or one that the server does not take.
            TaskConflictError: The id is in use.
            ParamsError: As for ``submit``, and ``PayloadTooLargeError``, too.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
            InvalidKeyError: The id cannot be one.
        """
        backend = self._scheduler()
        self._refuse_params_in_vain(params)
        return await create_schedule(backend, self._address, schedule_id, params, **options)

    async def get_schedule(self, schedule_id: str) -> ScheduleHandle:
        """A handle of one of this task's schedules.

        Raises:
            TaskNotFoundError: No schedule of this task has the id.
            NotConnectedError: There is no client yet.
            ServerUnavailableError: The server does not answer.
        """
        return await find_schedule(self._scheduler(), self._address, schedule_id)

    def schedules(self) -> AsyncIterator[TaskSchedule]:
        """The task's schedules, as the server's visibility store has them (some moments behind)."""
        return list_schedules(self._scheduler(), self._address)

    def _refuse_params_in_vain(self, params: object) -> None:
        if not self.takes_params and params is not None:
            raise ParamsError(f"Task {self.name!r} takes no params; it was given {type(params).__name__}.")

    def _refuse_events(self) -> None:
        """Say at the definition what would fail every run; a call that is better hidden is refused in the run."""
        if names(self.function, wait_for):
            raise ConfigError(
                f"Task {self.name!r} calls wait_for, and events cannot come to a task with execution='activity'. "
                f"Define it with execution='workflow', or poll() for what it waits for."
            )

    def _scheduler(self) -> WorkflowBackend:
        backend = self._connected()
        if not isinstance(backend, WorkflowBackend):
            raise ConfigError(
                f"Task {self.name!r} has execution='activity', and Temporal's schedules can only start workflows. "
                f"Define it with execution='workflow', or submit its runs by a clock of your own."
            )
        return backend

    def _connected(self) -> Backend:
        if self._backend is None:
            raise NotConnectedError(
                f"Task {self.name!r} has no connection to a Temporal server. Register it with an AsyncTaskComponent "
                f"and await component.connect() or component.start() first."
            )
        return self._backend

    @property
    def _address(self) -> TaskAddress:
        return TaskAddress(
            name=self.name,
            workflow_type=self.workflow_type,
            task_queue=self.task_queue,
            params_type=self.params_type,
            result_type=self.result_type,
            heartbeat_timeout=self.heartbeat_timeout,
            timeout=self.timeout,
        )


class _TaskDecorator:
    """``@async_task(...)``: the function follows."""

    def __init__(self, name: str | None, options: dict[str, Any]) -> None:
        self._name = name
        self._options = options

    @overload
    def __call__(self, function: Callable[[P], Awaitable[R]], /) -> TemporalAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[[P], Generator[Step, Any, R]], /) -> TemporalAsyncTask[P, R]: ...
    @overload
    def __call__(
        self, function: Callable[[P], AsyncGenerator[Step | Result[R], Any]], /
    ) -> TemporalAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[[], Awaitable[R]], /) -> TemporalAsyncTask[None, R]: ...
    @overload
    def __call__(self, function: Callable[[], Generator[Step, Any, R]], /) -> TemporalAsyncTask[None, R]: ...
    @overload
    def __call__(
        self, function: Callable[[], AsyncGenerator[Step | Result[R], Any]], /
    ) -> TemporalAsyncTask[None, R]: ...
    @overload
    def __call__(self, function: Callable[[P], R], /) -> TemporalAsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[[], R], /) -> TemporalAsyncTask[None, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> TemporalAsyncTask[Any, Any]:
        name = self._name or str(getattr(function, "__name__", type(function).__name__))
        return TemporalAsyncTask(name, function, **self._options)


@overload
def async_task(function: Callable[[P], Awaitable[R]], /) -> TemporalAsyncTask[P, R]: ...
@overload
def async_task(function: Callable[[P], Generator[Step, Any, R]], /) -> TemporalAsyncTask[P, R]: ...
@overload
def async_task(function: Callable[[P], AsyncGenerator[Step | Result[R], Any]], /) -> TemporalAsyncTask[P, R]: ...
@overload
def async_task(function: Callable[[], Awaitable[R]], /) -> TemporalAsyncTask[None, R]: ...
@overload
def async_task(function: Callable[[], Generator[Step, Any, R]], /) -> TemporalAsyncTask[None, R]: ...
@overload
def async_task(function: Callable[[], AsyncGenerator[Step | Result[R], Any]], /) -> TemporalAsyncTask[None, R]: ...
@overload
def async_task(function: Callable[[P], R], /) -> TemporalAsyncTask[P, R]: ...
@overload
def async_task(function: Callable[[], R], /) -> TemporalAsyncTask[None, R]: ...
@overload
def async_task(
    *,
    name: str | None = ...,
    task_queue: str = ...,
    retry_policy: RetryPolicy | None = ...,
    step_timeout: float | timedelta = ...,
    timeout: float | timedelta | None = ...,
    heartbeat_timeout: float | timedelta = ...,
    execution: Execution | None = ...,
) -> _TaskDecorator: ...
def async_task(function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Make a function durable: ``@async_task``, or ``@async_task(name=..., retry_policy=..., ...)``.

    The keywords are ``TemporalAsyncTask``'s; the name is the function's unless given.
    """
    decorator = _TaskDecorator(name, options)
    return decorator if function is None else decorator(function)


def _callers_locals() -> Mapping[str, Any]:
    """The local names where a task is being defined: its annotations may name a class that is local there."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # noqa: SLF001 - as in the standard library
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return frame.f_locals


def _check_fairness_key(key: str) -> None:
    try:
        size = len(check_text(key, "fairness_key").encode())
    except InvalidKeyError as error:
        raise ParamsError(str(error)) from None
    if size > _MAX_FAIRNESS_KEY:
        raise ParamsError(
            f"fairness_key {key!r} is {size} bytes long; Temporal's limit is {_MAX_FAIRNESS_KEY}. Use a digest of it."
        )


def _positive(value: float | timedelta, what: str, name: str) -> float:
    length = check_seconds(value, f"{what} of task {name!r}")
    if not 0 < length < float("inf"):
        raise ConfigError(f"{what} of task {name!r} must be over 0 seconds, not {value!r}.")
    return length


def _not_negative(value: float | timedelta, what: str, name: str) -> float:
    length = check_seconds(value, f"{what} of task {name!r}")
    if not 0 <= length < float("inf"):
        raise ConfigError(f"{what} of task {name!r} must be 0 seconds or more, not {value!r}.")
    return length


def _status(status: str, name: str) -> TaskStatus:
    try:
        return TaskStatus(status)
    except ValueError:
        raise ConfigError(
            f"status of the runs of task {name!r} must be one of {', '.join(TaskStatus)}, not {status!r}."
        ) from None


def _known_text(task_id: str, name: str) -> str:
    return check_text(task_id, f"The id of a run of task {name!r}")
