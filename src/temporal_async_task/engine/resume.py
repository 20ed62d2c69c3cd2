"""What a run's history tells: what it was started with, and what it has left behind, to go on from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire
from temporal_async_task.engine.stopping import task_activity
from temporal_async_task.errors import TaskConflictError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporalio.api.history.v1 import HistoryEvent, WorkflowExecutionStartedEventAttributes
    from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
    from temporalio.client import Client


@dataclass(slots=True)
class Remains:
    """Of a run that has ended: what it was started with, its last journal, and the events that were sent to it."""

    start: wire.TaskInput
    params: Payload
    journal: Sequence[Payload]
    activity_id: str = ""
    """The activity that was given the journal, and has not given it back."""
    events: dict[str, Payload] = field(default_factory=dict[str, Payload])


def started_by_hand(task_id: str) -> TaskConflictError:
    return TaskConflictError(
        f"Run {task_id!r} was not started by temporal-async-task, so there is nothing to resume it with. Submit "
        f"another with task.submit()."
    )


async def find_remains(client: Client, found: DescribeWorkflowExecutionResponse) -> Remains:
    """Read what a run has left on the server.

    The journal is in the failure, if the run ended by itself; with its activity, if that was ended from outside; else
    it is what the activity was last given, or what the workflow held.

    Raises:
        TaskConflictError: It was started by hand, with something that is not a task's input.
    """
    execution = found.workflow_execution_info.execution
    handle = client.get_workflow_handle(execution.workflow_id, run_id=execution.run_id)
    remains: Remains | None = None
    async for event in handle.fetch_history_events():
        if remains is None:  # the first event
            started = event.workflow_execution_started_event_attributes
            inputs = list(started.input.payloads)
            try:
                start = wire.own_input(wire.TaskInput.from_payload(inputs[0]), started.first_execution_run_id)
                params = inputs[1]
            except (IndexError, TypeError, ValueError):
                raise started_by_hand(execution.workflow_id) from None
            events = await _events_from_before(client, execution.workflow_id, event)
            remains = Remains(start, params, inputs[2:4], events=events)
        else:
            _look_at(event, remains)
    if remains is None:
        raise ValueError("The run has no history")
    pending = task_activity(found)
    # One whose worker is gone is kept until the run ends, and is older than what others have done since.
    if pending is not None and pending.activity_id == remains.activity_id:
        remains.journal = list(pending.heartbeat_details.payloads) or remains.journal
    return remains


async def start_of(client: Client, workflow_id: str) -> WorkflowExecutionStartedEventAttributes:
    """What a workflow was started with."""
    events = client.get_workflow_handle(workflow_id).fetch_history_events(page_size=1)
    return (await anext(events)).workflow_execution_started_event_attributes


async def sent_events(client: Client, execution: WorkflowExecution, until: float) -> dict[str, Payload]:
    """The events that were sent to a run until then, whether its workflow has seen them yet or not.

    When an event from before a resume or a new history was sent is not known; it counts.
    """
    handle = client.get_workflow_handle(execution.workflow_id, run_id=execution.run_id)
    events: dict[str, Payload] | None = None
    async for event in handle.fetch_history_events():
        if events is None:  # the first event
            events = await _events_from_before(client, execution.workflow_id, event)
        elif event.event_time.ToNanoseconds() / 1e9 > until:
            break
        else:
            _look_for_event(event, events)
    return events or {}


async def _events_from_before(client: Client, workflow_id: str, first: HistoryEvent) -> dict[str, Payload]:
    inputs = first.workflow_execution_started_event_attributes.input.payloads
    start = wire.TaskInput.from_payload(inputs[0])
    events = dict(zip(start.events, inputs[4:], strict=False))  # of a run that was started by hand, some may lack
    if not start.history_before:
        return events
    try:
        return events | await sent_events(
            client, WorkflowExecution(workflow_id=workflow_id, run_id=start.history_before), inf
        )
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:  # else the retention of that history is over
            raise
        return events


def _look_at(event: HistoryEvent, remains: Remains) -> None:
    scheduled = event.activity_task_scheduled_event_attributes
    if scheduled.activity_id.startswith(wire.ACTIVITY_ID):
        remains.activity_id = scheduled.activity_id
        remains.journal = list(scheduled.input.payloads[2:4]) or remains.journal
    for result in event.activity_task_completed_event_attributes.result.payloads:
        if wire.hold_of(result) is not None:
            remains.activity_id, remains.journal = "", wire.unpack(result)
    failure = event.workflow_execution_failed_event_attributes.failure.application_failure_info
    if failure.details.payloads:
        remains.activity_id, remains.journal = "", list(failure.details.payloads)
    _look_for_event(event, remains.events)


def _look_for_event(event: HistoryEvent, events: dict[str, Payload]) -> None:
    signal = event.workflow_execution_signaled_event_attributes
    if signal.signal_name == wire.SIGNAL_EVENT:
        try:
            key, value = signal.input.payloads
            events.setdefault(wire.EventInput.from_payload(key).key, value)
        except (TypeError, ValueError):  # sent by hand; the workflow ignores it, too
            return
