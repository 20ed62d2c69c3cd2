"""What the code of a task calls: ``step``, ``sleep``, ``poll``, ``progress`` and their like.

These functions hold no logic of their own. They name what is wanted and hand it to the run to which the calling code
belongs; ``engine/runner.py`` does the work.
"""

from __future__ import annotations

import functools
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

from temporal_async_task.checks import MAX_DURATION, seconds
from temporal_async_task.errors import StepUsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from temporal_async_task.retry import RetryPolicy
    from temporal_async_task.status import TaskResult

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step is run, where it differs from its task."""

    retry_policy: RetryPolicy | None = None
    timeout: float | None = None
    """Seconds that one call may take."""
    result_type: Any = None
    """What the result is decoded to, where the callable's return annotation does not tell."""
    at_most_once: bool = False


@dataclass(frozen=True, slots=True)
class StepCall:
    """One external call that a task asks for."""

    key: str
    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    options: StepOptions = StepOptions()


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The run that is going on."""

    task_id: str
    task_name: str
    attempt: int
    """Which attempt at the body this is, from 1."""
    params: Any


@dataclass(frozen=True, slots=True)
class StepInfo:
    """The step whose call is being made."""

    key: str
    attempt: int
    """Which call this is, from 1. A call that was lost with its worker is made again under the same number."""
    _origin: str = field(repr=False)
    _name: str = field(repr=False)

    @property
    def idempotency_key(self) -> str:
        """Stable over retries, workers and resumes, and different for every step and run (a UUID)."""
        return idempotency_key(self._origin, self._name)


@runtime_checkable
class ChildTask(Protocol):
    """A task, as a step that runs it needs it."""

    @property
    def name(self) -> str: ...

    @property
    def result_type(self) -> Any: ...

    async def __call__(self, params: Any = None) -> Any: ...

    async def submit(self, params: Any = None, **options: Any) -> str: ...

    async def get_status(self, task_id: str) -> TaskResult[Any]: ...

    async def cancel(self, task_id: str, reason: str = "") -> None: ...

    async def resume(self, task_id: str) -> str: ...


def child_of(call: Callable[..., Any]) -> ChildTask | None:
    """The task whose ``run`` a step is to call, if it is one: ``step("child", other.run, params)``."""
    owner = getattr(call, "__self__", None)
    return owner if getattr(call, "__name__", "") == "run" and isinstance(owner, ChildTask) else None


class StepRunner(Protocol):
    """The run to which the calling code belongs, as this module needs it."""

    @property
    def info(self) -> RunInfo: ...

    @property
    def body_step(self) -> StepInfo: ...

    async def step(self, call: StepCall) -> Any: ...

    async def sleep(self, key: str, duration: float) -> None: ...

    async def poll(self, call: StepCall, every: Callable[[int], float], timeout: float | None) -> Any: ...

    async def wait_for(self, key: str, timeout: float | None, hint: Any) -> Any: ...

    def progress(self, fraction: float | None, message: str) -> None: ...


runner_var: ContextVar[StepRunner | None] = ContextVar("runner", default=None)
step_var: ContextVar[StepInfo | None] = ContextVar("step", default=None)


def _runner(what: str) -> StepRunner:
    runner = runner_var.get()
    if runner is None:
        raise StepUsageError(f"{what} was called outside of a task. Call it in the body of a task that is running.")
    return runner


class StepFunction:
    """``step`` and what ``step.with_options(...)`` returns. Use the instance ``step``."""

    __slots__ = ("_options",)

    def __init__(self, options: StepOptions) -> None:
        self._options = options

    @overload
    async def __call__(self, key: str, call: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def __call__(self, key: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def __call__(self, key: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Make one external call, durably: once it has finished, it is never made again in this run.

        ``await step("child", other_task.run, params)`` makes a child run: it is submitted once, and waited for without
        a worker slot. Cancelling this run cancels it.

        Args:
            key: Names the step, unique in the run. A finished step is found by it, wherever it stands in the code.
            call: What to call, sync (it runs in a thread) or async. Its return annotation tells how the result is
                decoded; what the step returns is what a later attempt would read back from the journal.
            args: Positional arguments for ``call``.
            kwargs: Keyword arguments for ``call``.

        Returns:
            What ``call`` returned, now or in an earlier attempt.

        Raises:
            StepFailedError: Out of retries, or failed for good.
            ResultError: The result cannot be serialised, or does not fit the annotation.
            PayloadTooLargeError: The result is too large.
            DuplicateStepError: The key was asked for before in this run.
            StepUsageError: Called outside of a task, or within another step's call.
            InvalidKeyError: The key cannot be one.
        """
        return await _runner("step()").step(StepCall(key, call, args, kwargs, self._options))

    def with_options(
        self,
        *,
        retry_policy: RetryPolicy | None = None,
        timeout: float | timedelta | None = None,
        result_type: Any = None,
        at_most_once: bool = False,
    ) -> StepFunction:
        """``step`` with other settings than its task's.

        Args:
            retry_policy: Instead of the task's.
            timeout: Seconds (or a ``timedelta``) that one call may take, instead of the task's ``step_timeout``.
            result_type: What the result is decoded to, where the callable has no return annotation.
            at_most_once: Make the start durable before the call, and never call twice: if the outcome is lost with
                the worker, the body gets ``StepOutcomeUnknownError``. Not retried, but for ``RetryableError``, which
                says that nothing was done; nor called again in a resumed run, unless ``redo`` names it.
        """
        return StepFunction(_options(self._options, retry_policy, timeout, result_type, at_most_once))


def _options(
    base: StepOptions,
    retry_policy: RetryPolicy | None,
    timeout: float | timedelta | None,
    result_type: Any,
    at_most_once: bool,  # noqa: FBT001 - passed on from keywords
) -> StepOptions:
    if timeout is not None and not seconds(timeout) > 0:
        raise StepUsageError(f"A step's timeout must be over 0 seconds, not {timeout!r}")
    return replace(
        base,
        retry_policy=retry_policy or base.retry_policy,
        timeout=base.timeout if timeout is None else seconds(timeout),
        result_type=base.result_type if result_type is None else result_type,
        at_most_once=at_most_once or base.at_most_once,
    )


step = StepFunction(StepOptions())


class Step:
    """A step, as a generator yields it: ``image = yield Step("generate", images.generate, prompt)``.

    Args:
        key: As for ``step``.
        call: As for ``step``.
        args: Positional arguments for ``call``.
        kwargs: Keyword arguments for ``call``.
    """

    __slots__ = ("spec",)

    def __init__(self, key: str, call: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.spec = StepCall(key, call, args, dict(kwargs))

    def with_options(
        self,
        *,
        retry_policy: RetryPolicy | None = None,
        timeout: float | timedelta | None = None,
        result_type: Any = None,
        at_most_once: bool = False,
    ) -> Step:
        """The same step with other settings; see ``step.with_options``."""
        options = _options(self.spec.options, retry_policy, timeout, result_type, at_most_once)
        copy = Step(self.spec.key, self.spec.call)
        copy.spec = replace(self.spec, options=options)
        return copy


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """The result of an async generator, which cannot return one: ``yield Result(value)`` ends the task."""

    value: T


async def sleep(key: str, duration: float | timedelta) -> None:
    """Wait durably. Under a second the wait is in process; a longer one holds no worker slot and survives crashes.

    Args:
        key: Names the wait, unique in the run like a step's.
        duration: Seconds, or a ``timedelta``. Counted from when it was first asked for.

    Raises:
        DuplicateStepError: The key was asked for before in this run.
        StepUsageError: Called outside of a task, or within a step's call; or the duration is below 0 or over ten years.
        InvalidKeyError: The key cannot be one.
    """
    await _runner("sleep()").sleep(key, _length(f"The duration of sleep({key!r})", duration))


@overload
async def poll(
    key: str,
    check: Callable[..., Awaitable[T | None]],
    /,
    *args: Any,
    every: float | timedelta | RetryPolicy,
    timeout: float | timedelta | None = None,
) -> T: ...
@overload
async def poll(
    key: str,
    check: Callable[..., T | None],
    /,
    *args: Any,
    every: float | timedelta | RetryPolicy,
    timeout: float | timedelta | None = None,
) -> T: ...
async def poll(
    key: str,
    check: Callable[..., Any],
    /,
    *args: Any,
    every: float | timedelta | RetryPolicy,
    timeout: float | timedelta | None = None,
) -> Any:
    """Ask until the answer is ready, durably.

    As in ``video = await poll("render", api.result, job.id, every=10)``.
    Between two polls the task holds no worker slot (from a second on), and survives crashes. Start the job in a step
    of its own, so that it is started once.

    Args:
        key: Names the poll, unique in the run like a step's.
        check: Returns None until the answer is ready. An error of it that may be retried is not the job's failure: it
            is asked again, until the timeout; without one, as often as the task's retry policy says.
        args: Positional arguments for ``check``.
        every: Seconds (or a ``timedelta``) between two polls; or a ``RetryPolicy``, whose backoff is taken.
        timeout: Seconds (or a ``timedelta``) from the first poll on, however many workers were lost meanwhile.

    Raises:
        PollTimeoutError: Not ready within the timeout.
        StepFailedError: ``check`` failed for good.
        ResultError: The answer cannot be serialised, or does not fit the annotation.
        PayloadTooLargeError: The answer is too large.
        DuplicateStepError: The key was asked for before in this run.
        StepUsageError: Called outside of a task, or within a step's call; or ``every`` or ``timeout`` is below 0 or
            over ten years.
        InvalidKeyError: The key cannot be one.
    """
    limit = None if timeout is None else _length(f"poll({key!r})'s timeout", timeout)
    if isinstance(every, (int, float, timedelta)):
        pause = _length(f"poll({key!r})'s every", every)
        return await _runner("poll()").poll(StepCall(key, check, args), lambda _: pause, limit)
    return await _runner("poll()").poll(StepCall(key, check, args), every.backoff, limit)


async def wait_for(key: str, *, timeout: float | timedelta | None = None, result_type: type[T] | None = None) -> T:
    """Wait for an event from outside, durably: a webhook, a person's approval. ``task.send`` sends it.

    Args:
        key: Names the event, unique in the run like a step's. An event that was sent before is not lost; of several
            with one key, the first counts.
        timeout: Seconds (or a ``timedelta``) from when it was first waited for.
        result_type: What the event's value is decoded to.

    Raises:
        WaitTimeoutError: It has not come within the timeout.
        ResultError: The event's value does not fit ``result_type``.
        DuplicateStepError: The key was asked for before in this run.
        StepUsageError: Called outside of a task, or within a step's call; where no event can come, as in a task with
            ``execution="activity"`` or one called without a server; or the timeout is below 0 or over ten years.
        InvalidKeyError: The key cannot be one.
    """
    limit = None if timeout is None else _length(f"wait_for({key!r})'s timeout", timeout)
    value: T = await _runner("wait_for()").wait_for(key, limit, result_type)
    return value


def _length(what: str, duration: float | timedelta) -> float:
    length = seconds(duration)
    if not 0 <= length <= MAX_DURATION:
        raise StepUsageError(f"{what} must be 0 seconds or more, up to ten years, not {duration!r}")
    return length


def progress(fraction: float | None, message: str = "") -> None:
    """Tell how far the task is. Shown in the status within about a second; cheap, and not durable.

    Args:
        fraction: 0 to 1; what lies outside is cut. None if unknown.
        message: A short text beside it.

    Raises:
        StepUsageError: Called outside of a task.
    """
    _runner("progress()").progress(fraction, message)


def current_run() -> RunInfo:
    """The run that is going on: its id, attempt and params. Works in threads and in the calls that a step makes.

    Raises:
        StepUsageError: Called outside of a task.
    """
    return _runner("current_run()").info


def current_step() -> StepInfo:
    """The step whose call is being made: its key, attempt and idempotency key. In a task without steps, the body.

    Raises:
        StepUsageError: Called outside of a task.
    """
    return step_var.get() or _runner("current_step()").body_step


def idempotency_key(origin: str, key: str) -> str:
    """A UUID made of the run's own and the step's key (RFC 9562, version 5)."""
    return str(uuid.uuid5(_parsed(origin), key))


_parsed = functools.lru_cache(maxsize=1024)(uuid.UUID)
