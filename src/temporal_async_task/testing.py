"""Run a task's body in memory, with virtual time and no server.

The journal, the retries and the attempts are the engine's own; what is left out is the server. A 24-hour poll takes
milliseconds, and a worker can be lost at any call::

    run = TaskRun(product_shot, Order(prompt="a cat"))
    run.on("generate").returns("https://cdn/1.png")
    run.on("download").raises(TimeoutError(), times=2)
    run.on("upload").loses_worker()
    assert run.execute() == Shot(url="https://bucket/1.png")
    assert run.calls_of("generate") == 1
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import selectors
import threading
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

from temporalio.contrib.pydantic import pydantic_data_converter

from temporal_async_task.engine.body import bind_body
from temporal_async_task.engine.carrier import RunSettings
from temporal_async_task.engine.journal import Journal, Snapshot, StepRecord
from temporal_async_task.engine.outcome import NEVER, Cancelled, Completed, Failed, Outcome, Parked, Superseded
from temporal_async_task.engine.runner import Runner
from temporal_async_task.engine.unwind import prepare
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.errors import TaskCancelledError
from temporal_async_task.steps import StepCall

if TYPE_CHECKING:
    from types import FrameType

    from temporalio.converter import DataConverter

    from temporal_async_task.engine.timing import CallTimeout
    from temporal_async_task.task import TemporalAsyncTask

R = TypeVar("R")
T = TypeVar("T")

When = Literal["before", "after", "saved"]
"""Of a lost worker: before the call; after it, its result not yet saved; after its result was saved."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the body's steps made."""

    key: str
    attempt: int
    """Of the run, from 1."""
    at: float
    """Virtual seconds since the run began."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at the body."""

    number: int
    began: float
    """Virtual seconds since the run began."""
    ended: float
    outcome: Outcome


@dataclass(slots=True)
class StepScript:
    """What a step's calls do, in place of the real call. Without a script the real call is made."""

    acts: list[Callable[[], Any]] = field(default_factory=list[Callable[[], Any]])
    otherwise: Callable[[], Any] | None = None
    duration: float = 0.0
    losses: dict[str, int] = field(default_factory=dict[str, int])

    def returns(self, value: Any) -> Self:
        """Return ``value`` (or what it returns, if it is callable with no arguments), once earlier acts are done."""
        self.otherwise = value if callable(value) else lambda: value
        return self

    def raises(self, error: BaseException | type[BaseException], times: int = 1) -> Self:
        """Raise ``error`` in the next ``times`` calls."""

        def act() -> Any:
            raise error

        self.acts += [act] * times
        return self

    def takes(self, seconds: float) -> Self:
        """Let every call take so many virtual seconds."""
        self.duration = seconds
        return self

    def loses_worker(self, times: int = 1, *, when: When = "before") -> Self:
        """Lose the worker at the next ``times`` calls."""
        self.losses[when] = self.losses.get(when, 0) + times
        return self

    def loses(self, when: When) -> bool:
        """Whether the worker is lost now; counts it."""
        left = self.losses.get(when, 0)
        self.losses[when] = max(left - 1, 0)
        return left > 0


class TaskRun(Generic[R]):
    """One run of a task, in memory.

    Args:
        task: The task.
        params: What it is submitted with.
        task_id: The run's id.
        lost_after: Virtual seconds after which a lost worker is noticed (the heartbeat timeout).
        data_converter: Instead of the default, pydantic's.
    """

    def __init__(
        self,
        task: TemporalAsyncTask[Any, R],
        params: Any = None,
        *,
        task_id: str = "test-run",
        lost_after: float = 15.0,
        data_converter: DataConverter | None = None,
    ) -> None:
        self.task = task
        self.params = params
        self.calls: list[Call] = []
        self.attempts: list[Attempt] = []
        self.saved: Snapshot | None = None
        """The journal as it is stored."""
        self.writes = 0
        """Checkpoints, and other writes of the journal."""
        self._values = PayloadValues(data_converter or pydantic_data_converter)
        self._task_id = task_id
        self._lost_after = lost_after
        self._origin = uuid.uuid5(uuid.NAMESPACE_OID, task_id).hex
        self._scripts: dict[str, StepScript] = {}
        self._accounted = 0
        self._events: dict[str, tuple[float, bytes]] = {}
        self._given: dict[str, bytes] = {}
        self._timeline: list[tuple[float, Callable[[], object]]] = []
        self._sent: list[tuple[float, str, Any]] = []
        self._cancel_reason: str | None = None
        self._runner: _ScriptedRunner | None = None

    def on(self, key: str) -> StepScript:
        """Script the calls of the step ``key``."""
        return self._scripts.setdefault(key, StepScript())

    def script_of(self, key: str) -> StepScript | None:
        """The script of a step, if it has one."""
        return self._scripts.get(key)

    def cancel(self, *, at: float, reason: str = "") -> None:
        """Cancel the run at so many virtual seconds after its begin."""
        self._timeline.append((at, lambda: self._request_cancel(reason)))

    def drain(self, *, at: float) -> None:
        """Have the worker of that moment shut down: it finishes what is in flight and gives the attempt back."""
        self._timeline.append((at, lambda: self._tell(Runner.drain)))

    def interrupt(self, *, at: float) -> None:
        """Have the worker of that moment shut down at once, its grace over."""
        self._timeline.append((at, lambda: self._tell(Runner.interrupt)))

    def send(self, key: str, value: Any, *, at: float = 0.0) -> None:
        """Send an event at so many virtual seconds after the run's begin."""
        self._sent.append((at, key, value))

    def calls_of(self, key: str) -> int:
        """How often the step was called."""
        return sum(call.key == key for call in self.calls)

    @property
    def journal(self) -> Journal:
        """The journal as it is stored."""
        return Journal() if self.saved is None else Journal.restore(self.saved)

    @property
    def elapsed(self) -> float:
        """Virtual seconds from the run's begin to its end."""
        return self.attempts[-1].ended if self.attempts else 0.0

    def execute(self, *, max_attempts: int = 10_000) -> R:
        """Run to the end, through as many attempts as it takes.

        Returns:
            The task's result.

        Raises:
            Exception: What the run failed with.
            TaskCancelledError: The run was cancelled.
            RuntimeError: It has not ended after ``max_attempts``.
        """
        outcome: concurrent.futures.Future[R] = concurrent.futures.Future()

        def run() -> None:
            with asyncio.Runner(loop_factory=self._new_loop) as runner:
                try:
                    outcome.set_result(runner.run(self._execute(max_attempts)))
                except BaseException as error:
                    outcome.set_exception(error)

        # In a thread of its own, so that a test that is async itself may call it.
        thread = threading.Thread(target=run, name="task-run")
        thread.start()
        thread.join()
        return outcome.result()

    def _new_loop(self) -> VirtualTimeLoop:
        loop = VirtualTimeLoop()
        prepare(loop)
        return loop

    async def _execute(self, max_attempts: int) -> R:
        loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        for at, act in self._timeline:
            loop.call_later(at, act)
        for at, key, sent in self._sent:
            data = await self._values.seal(self._values.serialise(sent))
            loop.call_later(at, self._receive, key, data)
        for number in range(1, max_attempts + 1):
            began = self.now()
            outcome = await self._attempt(number)
            self.attempts.append(Attempt(number, began, self.now(), outcome))
            match outcome:
                case Completed(result):
                    value: R = self._values.convert(await self._values.unseal(result), self.task.result_type)
                    return value
                case Failed(error):
                    raise error
                case Cancelled(reason):
                    raise TaskCancelledError(self._task_id, "TaskCancelledError", reason)
                case Parked(due, _, events):
                    await self._wait(due, events)
                    if events:  # the workflow held the journal; else the activity has the same arguments again
                        self._given = {key: self._events[key][1] for key in events if key in self._events}
                case Superseded():
                    await asyncio.sleep(self._lost_after)
        raise RuntimeError(f"The run has not ended after {max_attempts} attempts")

    async def _attempt(self, number: int) -> Outcome:
        journal = self.journal
        journal.attempt = number
        journal.count_lost(number - 1 - self._accounted)
        if self._cancel_reason is not None:
            journal.cancel_reason = self._cancel_reason
        if journal.started is None:
            journal.started = self.now()
        settings = RunSettings(
            task_id=self._task_id,
            task_name=self.task.name,
            origin=self._origin,
            retry_policy=self.task.retry_policy,
            step_timeout=self.task.step_timeout,
            deadline=self.task.timeout,
            timeout=self.task.timeout,
            local=True,
            attempt=number,
            params=self.params,
            log_errors=not self._values.encrypts,
        )
        self._runner = _ScriptedRunner(
            settings,
            journal,
            self._values,
            _Carrier(self, number, journal),
            threads=_Inline(),
            events=self._given,
        )
        self._runner.test = self
        args = (self.params,) if self.task.takes_params else ()
        outcome = await self._runner.run(bind_body(self.task.function, args, self._runner))
        self._runner = None
        if not isinstance(outcome, Superseded):
            self.saved, self._accounted = journal.snapshot(), number
        return outcome

    async def _wait(self, due: float, events: tuple[str, ...]) -> None:
        """Wait as the server does: until it is due, an event has come, or the run is cancelled."""
        told = self._cancel_reason
        while self.now() < due and self._cancel_reason == told and not self._events.keys() & set(events):
            self._woken.clear()
            try:
                async with asyncio.timeout_at(due if due != NEVER else None):
                    await self._woken.wait()
            except TimeoutError:
                return

    def save(self, snapshot: Snapshot, attempt: int) -> None:
        """What the server does with a checkpoint: the last one is kept."""
        self.writes += 1
        self.saved, self._accounted = snapshot, attempt - 1

    def now(self) -> float:
        """Virtual seconds since the run began."""
        return asyncio.get_running_loop().time()

    def _tell(self, request: Callable[[Runner], None]) -> None:
        if self._runner is not None:
            request(self._runner)

    def event_of(self, key: str, until: float) -> bytes | None:
        """The event that was sent with a key, if it was until then."""
        came, data = self._events.get(key, (float("inf"), None))
        return data if came <= until else None

    def _receive(self, key: str, data: bytes) -> None:
        self._events.setdefault(key, (self.now(), data))
        self._woken.set()

    def _request_cancel(self, reason: str) -> None:
        self._cancel_reason = reason
        self._woken.set()
        self._tell(lambda runner: runner.cancel(reason))


class _Carrier:
    """Keeps the journal in memory."""

    def __init__(self, run: TaskRun[Any], attempt: int, journal: Journal) -> None:
        self._run = run
        self._attempt = attempt
        self._journal = journal
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        return self._run.now()

    def apart(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work(*args), self._loop)  # there is no other

    def checkpoint(self) -> concurrent.futures.Future[None]:
        saved: concurrent.futures.Future[None] = concurrent.futures.Future()
        # As on a server, it takes a turn of the loop at least.
        self._loop.call_soon(self._save, self._journal.snapshot(), saved)
        return saved

    def _save(self, snapshot: Snapshot, saved: concurrent.futures.Future[None]) -> None:
        self._run.save(snapshot, self._attempt)
        saved.set_result(None)

    async def find_event(self, key: str, until: float) -> bytes | None:
        return self._run.event_of(key, until)

    def note(self) -> None:
        self._run.save(self._journal.snapshot(), self._attempt)


class _ScriptedRunner(Runner):
    """A runner whose calls may be scripted."""

    test: TaskRun[Any]

    async def make_call(self, call: StepCall, land: Callable[[Any], None] | None, limit: CallTimeout) -> Any:
        test = self.test
        script = test.script_of(call.key)
        test.calls.append(Call(call.key, self.settings.attempt, test.now(), call.args, call.kwargs))
        if script is None:
            return await super().make_call(call, land, limit)
        if script.duration:
            await asyncio.sleep(script.duration)
        if script.loses("before"):
            await self._lose_worker()
        result = await self._act(script, call, limit)
        if script.loses("after"):
            await self._lose_worker()
        return result

    async def _act(self, script: StepScript, call: StepCall, limit: CallTimeout) -> Any:
        if script.acts:
            return script.acts.pop(0)()
        if script.otherwise is not None:
            return script.otherwise()
        return await super().make_call(call, None, limit)  # it may be lost with its worker, yet

    def is_last(self, call: StepCall, caller: FrameType | None) -> bool:
        script = self.test.script_of(call.key)
        # Its worker is lost after its result was saved: so it is, by itself.
        return super().is_last(call, caller) and not (script and script.losses.get("saved"))

    async def _saved(self, record: StepRecord) -> None:
        script = self.test.script_of(record.key)
        if script is not None and script.loses("saved"):
            await self._lose_worker()

    async def _lose_worker(self) -> None:
        """End the attempt as a killed worker would: nothing more is written."""
        self.supersede()
        await asyncio.get_running_loop().create_future()


class _Inline(concurrent.futures.Executor):
    """Runs sync calls on the spot: virtual time stands still while code runs."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever nothing else is to be done."""

    def __init__(self) -> None:
        self._virtual = 0.0
        super().__init__(_JumpingSelector(self))
        self._clock_resolution = 1e-6  # a year in seconds has no more digits left for a timer to be told from now

    def time(self) -> float:
        return self._virtual

    def jump(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._virtual += seconds


class _JumpingSelector(selectors.DefaultSelector):  # chosen for the platform
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._jumping_loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise RuntimeError(
                "The task waits for something that cannot come: no step, timer or event of this run is left. In memory "
                "a body cannot wait for real sockets or threads; script such a step with on(key).returns(...)."
            )
        self._jumping_loop.jump(timeout)
        return ready
