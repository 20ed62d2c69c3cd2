"""The one workflow. It serves every task, contains no user code, and imports nothing but the wire's types.

It runs the task's activity. Two things it does besides, because they happen while no activity can: it waits for events
from outside, and it carries a run over from the activity that a cancellation stopped to the one that runs the body's
cleanup. In both cases it holds the journal meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta

from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue, RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError

from temporal_async_task.engine import wire

_LOOKS = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_interval=timedelta(seconds=2))
_LOOK_AGAIN = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds between two looks at an activity that is to be cancelled; the last for all that follow."""


@workflow.defn(dynamic=True)
class TaskWorkflow:
    """Carries one run of one task."""

    def __init__(self) -> None:
        self._cancel_reason: str | None = None
        self._events: dict[str, Payload] = {}
        self._activities = 0
        self._journal: list[Payload] = []
        """The journal, while no activity has it."""

    @workflow.signal(name=wire.SIGNAL_CANCEL)
    def cancel(self, *request: RawValue) -> None:
        """Cancel the run: its body is told, and may clean up."""
        if self._cancel_reason is None:
            try:
                self._cancel_reason = wire.CancelRequest.from_payload(request[0].payload).reason
            except (IndexError, TypeError, ValueError):  # sent by hand
                self._cancel_reason = ""

    @workflow.signal(name=wire.SIGNAL_EVENT)
    def event(self, *event: RawValue) -> None:
        """Keep an event for the body, whether it waits for it yet or not. The first of a key counts."""
        try:
            key = wire.EventInput.from_payload(event[0].payload).key
            self._events.setdefault(key, event[1].payload)
        except (IndexError, TypeError, ValueError):
            workflow.logger.warning("An event that was not sent by task.send() is ignored")

    @workflow.run
    async def run(self, args: Sequence[RawValue]) -> RawValue:
        """Run the activity ``<name>`` of the workflow ``asyncTask_<name>`` to its end."""
        name, start = _task_of(args)
        params = args[1]
        self._journal = [arg.payload for arg in args[2:4]]
        for key, value in zip(start.events, args[4:], strict=False):
            self._events.setdefault(key, value.payload)
        if start.delay > 0:  # not the server's own start delay, during which a run cannot be cancelled
            await self._until(self._is_cancelled, start.delay)
        deadline = start.deadline
        if deadline is None and start.timeout is not None:
            deadline = workflow.now().timestamp() + start.timeout
        attempt = wire.AttemptInput(
            origin=start.origin, timeout=start.timeout, deadline=deadline, events=tuple(start.given)
        )
        while True:
            if self._cancel_reason is not None and not attempt.cancelled:
                if not self._journal:  # nothing was begun, so there is nothing to clean up
                    raise ApplicationError(self._cancel_reason, type=wire.CANCELLED, non_retryable=True)
                attempt = wire.AttemptInput(origin=start.origin, cancelled=True, reason=self._cancel_reason)
            result = await self._attempt(name, start, attempt, params)
            if result is None:
                continue
            hold = wire.hold_of(result.payload)
            if hold is None:
                return result
            for key in attempt.events if hold.taken is None else hold.taken:
                del self._events[key]  # it is in the journal now
            self._hold(wire.unpack(result.payload))
            await self._wait_for_event(hold, attempt)
            first = next((key for key in hold.events if key in self._events), None)
            given = () if first is None else (first,)
            if workflow.info().is_continue_as_new_suggested() and not self._is_cancelled():
                # With the event: a large journal makes the new history long at once, which else would only hand it on.
                self._continue_in_a_new_history(replace(start, delay=0.0, deadline=deadline, given=given), params)
            attempt = replace(attempt, events=given)

    async def _attempt(
        self, name: str, start: wire.TaskInput, attempt: wire.AttemptInput, params: RawValue
    ) -> RawValue | None:
        """Run the activity. None: a cancellation has stopped it, and its journal is here."""
        self._activities += 1
        payloads = [*self._journal, *(self._events[key] for key in attempt.events)]
        activity = workflow.start_activity(
            name,
            args=[RawValue(attempt.to_payload()), params, *map(RawValue, payloads)],
            activity_id=f"{wire.ACTIVITY_ID}{self._activities}",
            result_type=RawValue,
            start_to_close_timeout=wire.NO_LIMIT,
            heartbeat_timeout=timedelta(seconds=start.heartbeat_timeout),
            retry_policy=wire.AFTER_A_LOSS,
            cancellation_type=workflow.ActivityCancellationType.TRY_CANCEL,
        )
        await self._until(lambda: activity.done() or (self._is_cancelled() and not attempt.cancelled))
        looks = 0
        while not activity.done():
            journal = await self._look()
            if journal is not None and not activity.done():
                activity.cancel()
                await self._until(activity.done)
                activity.exception()  # seen: that it was cancelled is no news
                if journal:  # else no attempt of this activity has written any, and the one that it was given holds
                    self._hold(journal)
                return None
            await self._until(activity.done, _LOOK_AGAIN[min(looks, len(_LOOK_AGAIN) - 1)])
            looks += 1
        try:
            result: RawValue = await activity
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError):
                raise error.cause from None  # as it is: its details are the journal
            raise
        return result

    async def _look(self) -> list[Payload] | None:
        """Stop the run's activity where it stands; its journal, once no attempt is under way."""
        looking = workflow.start_local_activity(
            wire.COLLECT_ACTIVITY,
            RawValue(wire.LookRequest(self._cancel_reason or "", workflow.now().timestamp()).to_payload()),
            result_type=RawValue,
            start_to_close_timeout=timedelta(seconds=10),
            retry_policy=_LOOKS,
        )
        await self._until(looking.done)
        found = wire.unpack((await looking).payload)
        return found[1:] if found else None

    def _hold(self, journal: list[Payload]) -> None:
        self._journal = journal
        if journal:
            workflow.upsert_memo({wire.MEMO_JOURNAL: RawValue(journal[0])})

    async def _wait_for_event(self, hold: wire.Hold, attempt: wire.AttemptInput) -> None:
        wait = None if hold.due is None else max(hold.due - workflow.now().timestamp(), 0)
        await self._until(
            lambda: any(key in self._events for key in hold.events) or (self._is_cancelled() and not attempt.cancelled),
            wait,
        )

    def _continue_in_a_new_history(self, start: wire.TaskInput, params: RawValue) -> None:
        """Many rounds of waiting have made the history long: go on with an empty one, if all that is kept fits in."""
        start = replace(start, events=tuple(self._events))
        parts = [start.to_payload(), params.payload, *self._journal, *self._events.values()]
        if wire.input_size(parts) > wire.MAX_INPUT:
            return  # too many events that nobody has read yet
        info = workflow.info()
        memo = {wire.MEMO_CREATED: wire.created_payload(info.workflow_start_time), **info.raw_memo}
        memo[wire.MEMO_JOURNAL] = self._journal[0]
        workflow.continue_as_new(
            args=[RawValue(part) for part in parts], memo={key: RawValue(value) for key, value in memo.items()}
        )

    def _is_cancelled(self) -> bool:
        return self._cancel_reason is not None

    async def _until(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait for a condition; a cancellation by Temporal's own means (its UI, its command) counts as ours."""
        try:
            await workflow.wait_condition(condition, timeout=timeout)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if self._cancel_reason is None:
                self._cancel_reason = ""
            await self._until(condition, timeout)


def _task_of(args: Sequence[RawValue]) -> tuple[str, wire.TaskInput]:
    """The task's name, and what its run was started with."""
    info = workflow.info()
    name = info.workflow_type.removeprefix(wire.WORKFLOW_PREFIX)
    if name in {info.workflow_type, ""} or name.startswith(wire.OWN_PREFIX):
        raise ApplicationError(
            f"Workflow type {info.workflow_type!r} is not a task. Task queue {info.task_queue!r} belongs to "
            f"temporal-async-task: run other workflows on a queue of their own.",
            non_retryable=True,
        )
    try:
        start, _ = wire.TaskInput.from_payload(args[0].payload), args[1]
        return name, wire.own_input(start, info.first_execution_run_id)
    except (IndexError, TypeError, ValueError) as error:
        raise ApplicationError(
            f"Task {name!r} was not started by temporal-async-task. Use task.submit().",
            non_retryable=True,
        ) from error
