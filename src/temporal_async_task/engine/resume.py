"""Finding what a run that has ended has left behind, to go on from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from temporalio.api.enums.v1 import EventType

from temporal_async_task.engine import wire
from temporal_async_task.engine.journal import Journal, Snapshot
from temporal_async_task.engine.workflow import own_input

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporalio.api.common.v1 import Payload
    from temporalio.api.history.v1 import HistoryEvent
    from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
    from temporalio.client import Client

    from temporal_async_task.engine.values import PayloadValues


@dataclass(frozen=True, slots=True)
class Remains:
    """Of a run that has ended: what it was started with, and its journal."""

    start: wire.TaskInput
    params: Payload
    journal: Journal


async def find_remains(client: Client, found: DescribeWorkflowExecutionResponse, values: PayloadValues) -> Remains:
    """Read a run's params and last journal from the server.

    The journal is in the failure, if the run ended by itself; with the activity that was pending, if it was ended from
    outside; else it is what the workflow was last given or gave.
    """
    execution = found.workflow_execution_info.execution
    handle = client.get_workflow_handle(execution.workflow_id, run_id=execution.run_id)
    events = [event async for event in handle.fetch_history_events()]
    started = events[0].workflow_execution_started_event_attributes
    inputs = list(started.input.payloads)
    journal = inputs[2:]
    for event in events:
        journal = _held(event) or journal
    encoded = True
    if found.pending_activities:
        journal = list(found.pending_activities[0].heartbeat_details.payloads) or journal
    elif failure := await _details(events[-1], values):
        journal, encoded = failure, False  # with the failure, its details were decoded
    return Remains(
        start=own_input(wire.TaskInput.from_payload(inputs[0]), started.first_execution_run_id),
        params=inputs[1],
        journal=await values.decode_journal(journal) if encoded else _plain(journal),
    )


def _held(event: HistoryEvent) -> list[Payload]:
    """The journal that the workflow was given by its activity, to hold."""
    results = event.activity_task_completed_event_attributes.result.payloads
    return wire.unpack(results[0]) if results and wire.hold_of(results[0]) is not None else []


async def _details(event: HistoryEvent, values: PayloadValues) -> list[Payload]:
    if event.event_type != EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
        return []
    failure = await values.plain_failure(event.workflow_execution_failed_event_attributes.failure)
    return list(failure.application_failure_info.details.payloads)


def _plain(journal: Sequence[Payload]) -> Journal:
    header, results = journal
    return Journal.restore(Snapshot(header.data, results.data))
