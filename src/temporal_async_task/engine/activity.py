"""The one activity: carries a runner's attempt over Temporal.

It runs on the SDK's event loop and owns what talks to the server; the runner, and with it all of the user's code, runs
on an event loop of its own (``loops.py``). Between the two go the results for the journal one way, and what the server
answers the other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from temporalio import activity
from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.common import RawValue

from temporal_async_task.engine import wire
from temporal_async_task.engine.attempt_end import AttemptEnd
from temporal_async_task.engine.body import bind_body
from temporal_async_task.engine.carrier import RunSettings
from temporal_async_task.engine.client import AttemptGoneError
from temporal_async_task.engine.execution import execution_of
from temporal_async_task.engine.journal import Journal, Snapshot
from temporal_async_task.engine.mailbox import Mailbox
from temporal_async_task.engine.outcome import Failed, Outcome
from temporal_async_task.engine.runner import Runner
from temporal_async_task.engine.signatures import is_sync
from temporal_async_task.engine.stopping import stop_and_look
from temporal_async_task.engine.stored_journal import StoredJournal
from temporal_async_task.engine.values import NamedEvents, PayloadValues
from temporal_async_task.engine.writer import JournalWriter
from temporal_async_task.errors import ParamsError, ResultError, StoredValueLostError, TaskNotRegisteredError

if TYPE_CHECKING:
    from temporalio.api.workflowservice.v1 import RecordActivityTaskHeartbeatResponse
    from temporalio.client import Client
    from temporalio.converter import DataConverter

    from temporal_async_task.engine.loops import UserLoop, UserLoops
    from temporal_async_task.engine.threads import DaemonThreads
    from temporal_async_task.registry import Registry, TaskDefinition

logger = logging.getLogger("temporal_async_task")
T = TypeVar("T")

KEEP_ALIVE = 5.0
"""Seconds, at most, between two heartbeats; so long may a running attempt take to learn of a request."""


class AttemptActivity:
    """The activity of one worker process; knows the attempts that run in it. Made on the SDK's event loop."""

    def __init__(
        self,
        registry: Registry,
        client: Client,
        converter: DataConverter,
        user_loops: UserLoops,
        threads: DaemonThreads,
    ) -> None:
        self.registry = registry
        self.client = client
        self.converter = converter
        self.user_loops = user_loops
        self.threads = threads
        self.loop = asyncio.get_running_loop()
        self.mailbox = Mailbox(self.loop, self.loop.call_soon_threadsafe)
        self._running: dict[_AttemptCarrier, asyncio.Task[None]] = {}
        self._least_age: float | None = None
        self._draining = False
        self._abandoning = False

    def drain(self) -> None:
        """Begin no new step; give each attempt back once its steps in flight have finished."""
        self._draining = True
        for attempt in self._running:
            attempt.tell(Runner.drain)

    def interrupt(self) -> None:
        """Give every attempt back now."""
        for attempt in self._running:
            attempt.tell(Runner.interrupt)

    def abandon(self) -> None:
        """Let go of what has not ended by now, without a report: the heartbeat timeout brings it to another worker.

        What only has to be reported is left alone: it ends as soon as the server answers.
        """
        self._abandoning = True
        for attempt, carrying in self._running.items():
            if not attempt.has_outcome:
                carrying.cancel()

    def is_late(self, started: datetime, patience: float) -> bool:
        """Whether an attempt was offered long before it came here. Judged by others: no clock is trusted."""
        age = time.monotonic() - started.timestamp()  # and some constant
        if self._least_age is None or age < self._least_age:
            self._least_age = age
        return age - self._least_age > patience

    @activity.defn(name=wire.COLLECT_ACTIVITY)
    async def collect(self, request: RawValue) -> RawValue:
        """Stop the activity of the run that asks where it stands, and look for its journal.

        A local activity: it needs no slot of those that the attempts take.

        Returns:
            ``wire.pack`` of a marker and the journal; of nothing while an attempt is under way, or if the activity
            has ended by itself.
        """
        info = activity.info()
        look = wire.LookRequest.from_payload(request.payload)
        execution = WorkflowExecution(workflow_id=info.workflow_id or "", run_id=info.workflow_run_id or "")
        now = datetime.fromtimestamp(look.now, UTC)
        journal = await stop_and_look(self.client, execution, wire.PAUSED_TO_CANCEL + look.reason, now)
        return RawValue(wire.pack([] if journal is None else [Payload(), *journal]))

    @activity.defn(dynamic=True)
    async def run(self, args: Sequence[RawValue]) -> Any:
        """Run one attempt. Its outcome goes by task token, so there is nothing to return."""
        attempt = _AttemptCarrier(self, activity.info(), args)
        carrying = self._running[attempt] = asyncio.create_task(attempt.carry())
        try:
            if self._draining:
                attempt.tell(Runner.drain)
            await self._outlast_core(carrying, attempt)
        except AttemptGoneError:
            logger.info("Task run %s: another attempt has begun, this one is over", attempt.task_id)
        except asyncio.CancelledError:
            if not self._abandoning:
                raise
        finally:
            del self._running[attempt]
        activity.raise_complete_async()

    async def _outlast_core(self, carrying: asyncio.Task[None], attempt: _AttemptCarrier) -> None:
        """Wait for the attempt's end, whatever the SDK's core thinks of this activity meanwhile.

        Core sees no heartbeats, so some seconds after the heartbeat timeout it cancels this coroutine. The server has
        them, and does not. A shutdown that does not come through the component is taken for one all the same.
        """
        while True:
            try:
                return await asyncio.shield(carrying)
            except asyncio.CancelledError:
                if carrying.done():
                    raise
                if (current := asyncio.current_task()) is not None:
                    current.uncancel()
                details = activity.cancellation_details()
                if details is not None and details.worker_shutdown:
                    attempt.tell(Runner.interrupt)


class _AttemptCarrier:
    """Carries one attempt, from the server's offer to its outcome."""

    def __init__(self, owner: AttemptActivity, info: activity.Info, args: Sequence[RawValue]) -> None:
        self._owner = owner
        self._info = info
        self._client = owner.client
        self._execution = execution_of(owner.client, info, [value.payload for value in args[:2]])
        self._input = self._execution.input
        self._params = args[1].payload
        values = [value.payload.SerializeToString() for value in args[4:]]
        self.task_id = self._execution.task_id
        self._mailbox = owner.mailbox
        self._values = PayloadValues(owner.converter, info.namespace, self.task_id, owner.loop)
        given = info.heartbeat_details or args[2:4]
        self._journal = StoredJournal(self._values, info, [value.payload for value in given])
        self._events = NamedEvents(self._values, dict(zip(self._input.events, values, strict=True)))
        self._user_loop: UserLoop | None = None
        self._runner: Runner | None = None
        self._requests: list[Callable[[Runner], None]] = []
        self._meeting = threading.Lock()
        self._apart: set[asyncio.Task[Any]] = set()
        # The server's clock, so that a worker's own may be wrong: due times outlive the attempt.
        self._clock_offset = info.started_time.timestamp() - time.monotonic()
        self._end = AttemptEnd(
            self._client, info.task_token, self._execution, values=self._values, journal=self._journal, now=self.now
        )
        self._writer: JournalWriter
        self._stopping: asyncio.Task[None] | None = None
        self._cancel_saved = asyncio.Event()

    @property
    def has_outcome(self) -> bool:
        """Whether the attempt only has to be reported."""
        return self._end.has_outcome

    # Told by the worker and by the server

    def tell(self, request: Callable[[Runner], None]) -> None:
        """Call a method of the runner on its own loop, now or as soon as there is one."""
        with self._meeting:
            if self._runner is None or self._user_loop is None:
                self._requests.append(request)
            else:
                self._user_loop.call_soon(request, self._runner)

    def flagged(self, answer: RecordActivityTaskHeartbeatResponse) -> None:
        """Paused, reset or cancelled: find out what for, beside the heartbeats."""
        if self._execution.is_superseded(answer):
            self.tell(Runner.supersede)
        elif self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(answer))

    def saved(self, snapshot: Snapshot) -> None:
        if snapshot.cancelled:
            self._cancel_saved.set()

    async def _stop(self, answer: RecordActivityTaskHeartbeatResponse) -> None:
        """Cancel the body, if that is what was asked for; else, for an operator, give the attempt back."""
        reason = await self._execution.cancel_reason(answer)
        if reason is None:
            self.tell(Runner.drain)
            self._stopping = None  # it may be cancelled, yet
            return
        try:
            text = await self._values.unseal_text(reason)
        except Exception:  # a key that this worker does not have yet
            logger.exception("Task run %s: the reason of its cancellation cannot be read here", self.task_id)
            text = ""
        self.tell(lambda runner: runner.cancel(text))
        await self._cancel_saved.wait()
        await self._execution.cancel_saved()

    # The runner's carrier; called in the threads of the users' code

    def now(self) -> float:
        return self._clock_offset + time.monotonic()

    def apart(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        done = _kept_from_users(Future[T]())
        with contextlib.suppress(RuntimeError):  # the process is at its end, and nothing can be saved any more
            self._mailbox.post(self._begin_apart, done, work, args)
        return done

    def _begin_apart(self, done: Future[T], work: Callable[..., Coroutine[Any, Any, T]], args: Sequence[Any]) -> None:
        task = self._owner.loop.create_task(work(*args))
        self._apart.add(task)
        task.add_done_callback(self._apart.discard)
        task.add_done_callback(functools.partial(_pass_on, done))

    def checkpoint(self) -> Future[None]:
        saved = _kept_from_users(Future[None]())
        with contextlib.suppress(RuntimeError):  # as above
            self._mailbox.post(self._writer.checkpoint, saved)
        return saved

    async def find_event(self, key: str, until: float) -> bytes | None:
        return await asyncio.shield(asyncio.wrap_future(self.apart(self._find_event, key, until)))

    async def _find_event(self, key: str, until: float) -> bytes | None:
        found = await self._execution.find_event((self._values.event_name(key), key), until)
        return None if found is None else found.SerializeToString()

    def note(self) -> None:
        self._mailbox.post(self._writer.note)

    # The attempt

    async def carry(self) -> None:
        name = self._execution.task_name
        task = self._owner.registry.find(name)
        if task is None:
            logger.warning(
                "Task %r is not registered on this worker (task queue %r); its run %s is left to another worker. "
                "Register it with the component before start().",
                name,
                self._info.task_queue,
                self.task_id,
            )
            reason = f"task {name!r} is not registered on worker {self._client.identity!r}"
            await self._end.leave(f"{TaskNotRegisteredError.__name__}: {reason}")
            return
        journal = Journal()
        try:
            journal = await self._journal.read()
            cancel_reason = await self._values.unseal_text(self._input.reason)
            params = await self._values.readable(self._params)
        except StoredValueLostError as error:
            await self._end.report(Failed(ParamsError(f"The params of task {task.name!r}: {error}")), journal)
            return
        except Exception as error:
            # A codec's key that this worker does not have, a store that it cannot reach: another may.
            logger.exception("Task run %s: it cannot be read here, and is left to another worker", self.task_id)
            await self._end.leave(
                f"{type(error).__name__}: the run cannot be read by worker {self._client.identity!r}: {error}"
            )
            return
        if self._input.cancelled:
            journal.cancel_reason = cancel_reason
        await self._drive(task, journal, params)

    async def _drive(self, task: TaskDefinition, journal: Journal, params: Payload) -> None:
        # Params and journal travel together when a run is resumed, and the limit is for both.
        journal.max_bytes -= self._params.ByteSize()
        try:
            args = [self._values.convert(params, task.params_type)] if task.takes_params else []
        except ResultError as error:
            await self._end.report(Failed(ParamsError(f"The params of task {task.name!r}: {error}")), journal)
            return
        if journal.started is None:
            journal.started = self.now()
        journal.attempt = journal.earlier + self._info.attempt
        settings = RunSettings(
            task_id=self.task_id,
            task_name=task.name,
            origin=self._input.origin,
            retry_policy=task.retry_policy,
            step_timeout=task.step_timeout,
            deadline=self._input.deadline,
            timeout=self._input.timeout,
            attempt=journal.attempt,
            params=args[0] if args else None,
            log_errors=not self._values.encrypts,
            events=self._execution.takes_events,
        )
        heartbeat = (self._info.heartbeat_timeout or timedelta(seconds=15)).total_seconds()
        self._writer = JournalWriter(
            self._client,
            self._info.task_token,
            journal.snapshot,
            self._journal.encode,
            has_codec=self._values.has_codec,
            interval=min(heartbeat / 3, KEEP_ALIVE),
            listener=self,
        )
        writing = asyncio.create_task(self._writer.run(self._journal.given))
        writing.add_done_callback(self._writer_ended)
        try:
            if (self._journal.lost or self._owner.is_late(self._info.started_time, heartbeat / 2)) and not (
                await self._is_current(writing)
            ):
                return
            run = functools.partial(self._run, task, args, settings, journal)
            loops = self._owner.user_loops
            if is_sync(task.function):
                loop = loops.for_sync_code()
                # Shielded: who lets go of an attempt does not cancel the user's code.
                outcome = await asyncio.shield(asyncio.wrap_future(loop.run(run(loop))))
            else:
                outcome = await loops.run(run)
            await self._end.report(outcome, journal)  # still with heartbeats: it may take its time
        finally:
            writing.cancel()
            for work in self._apart:
                work.cancel()
            if self._stopping is not None:
                self._stopping.cancel()

    async def _is_current(self, writing: asyncio.Task[None]) -> bool:
        """Ask the server, before any call, whether this attempt is still the run's; waits until it answers.

        What is offered to a worker that is frozen or cut off, the server counts as lost after a while, and offers
        again. When the worker is back it gets all of that, late, and would make the same call once for each.
        """
        answer = asyncio.wrap_future(self.checkpoint())
        await asyncio.wait((answer, writing), return_when=asyncio.FIRST_COMPLETED)
        answer.cancel()
        return not writing.done()

    def _writer_ended(self, writing: asyncio.Task[None]) -> None:
        """Without its writer an attempt can save nothing, so it must not go on."""
        if not writing.cancelled():
            if (error := writing.exception()) is not None:
                logger.error("Task run %s: its journal cannot be written", self.task_id, exc_info=error)
            self.tell(Runner.supersede)

    async def _run(
        self, task: TaskDefinition, args: Sequence[Any], settings: RunSettings, journal: Journal, loop: UserLoop
    ) -> Outcome:
        """Run the attempt's code; on the user's loop."""
        runner = Runner(
            settings,
            journal,
            self._values,
            self,
            threads=self._owner.threads,
            events=self._events,
        )
        with self._meeting:
            self._user_loop, self._runner = loop, runner
        for request in self._requests:
            request(runner)
        return await runner.run(bind_body(task.function, tuple(args), runner))


def _kept_from_users(future: Future[T]) -> Future[T]:
    """A future that cannot be cancelled by who waits for it."""
    future.set_running_or_notify_cancel()
    return future


def _pass_on(done: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        done.set_exception(concurrent.futures.CancelledError())
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())
