"""Stopping a run's activity where it stands, so that its journal can be taken out of it.

Cancelling an activity that backs off would close it at once, and drop its journal. So it is paused first: paused, it
begins no attempt, and what it holds does not change any more.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.workflowservice.v1 import (
    DescribeWorkflowExecutionRequest,
    PauseActivityRequest,
    UnpauseActivityRequest,
)
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporalio.api.common.v1 import Payload, WorkflowExecution
    from temporalio.api.workflow.v1 import PendingActivityInfo
    from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
    from temporalio.client import Client

_LATE = timedelta(seconds=5)
"""By how much a heartbeat may be late before its attempt is taken to be lost."""
IN_AN_ATTEMPT = {
    PendingActivityState.PENDING_ACTIVITY_STATE_STARTED,
    PendingActivityState.PENDING_ACTIVITY_STATE_PAUSE_REQUESTED,
    PendingActivityState.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED,
}


async def stop_and_look(
    client: Client, execution: WorkflowExecution, reason: str, now: datetime
) -> Sequence[Payload] | None:
    """Have the run's activity stop where it stands, and return its journal if no attempt is under way.

    Paused, it begins no new attempt. A running one learns of it with its next heartbeat, cancels its body, and
    unpauses the activity as soon as the journal says so; from then on whatever becomes of it, the run is cancelled.

    Args:
        client: A raw client.
        execution: The run's workflow.
        reason: For the pause.
        now: The server's time, or a little earlier. A worker's clock that is ahead would take every attempt for lost.

    Returns:
        The journal's payloads, none if no attempt has written any; None while an attempt is under way, or if the
        activity has ended by itself.
    """
    found = await _pending(client, execution)
    if found is None:
        return None
    ours = found.pause_info.manual.reason.startswith(wire.PAUSED_TO_CANCEL)
    try:
        if found.state in IN_AN_ATTEMPT and wire.is_cancelling(found.heartbeat_details.payloads):
            if found.paused and ours:  # its worker may be lost before it could: then nobody else does
                await unpause(client, execution, found.activity_id)
            return None
        if found.paused and not ours:  # by an operator; a second pause would not change the reason
            await unpause(client, execution, found.activity_id)
        await client.workflow_service.pause_activity(_pause(client, execution, found.activity_id, reason), retry=True)
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return None
    found = await _pending(client, execution)
    if found is None or (found.state in IN_AN_ATTEMPT and not _is_lost(found, now)):
        return None
    journal = list(found.heartbeat_details.payloads)
    return [] if any(map(wire.is_nothing_begun, journal)) else journal


async def unpause(client: Client, execution: WorkflowExecution, activity_id: str) -> None:
    """Let the run's activity have its next attempt, when this one has ended."""
    request = UnpauseActivityRequest(
        namespace=client.namespace, execution=execution, identity=client.identity, id=activity_id
    )
    await client.workflow_service.unpause_activity(request, retry=True)


def _pause(client: Client, execution: WorkflowExecution, activity_id: str, reason: str) -> PauseActivityRequest:
    return PauseActivityRequest(
        namespace=client.namespace,
        execution=execution,
        identity=client.identity,
        id=activity_id,
        reason=reason,
    )


def _is_lost(found: PendingActivityInfo, now: datetime) -> bool:
    """Whether the attempt's worker is gone: the server does not time out an attempt while it is paused."""
    last = max(found.last_heartbeat_time.ToDatetime(UTC), found.last_started_time.ToDatetime(UTC))
    patience = found.activity_options.heartbeat_timeout.ToTimedelta() or timedelta(seconds=60)
    return now - last > patience + _LATE


async def pause_reason(client: Client, execution: WorkflowExecution) -> str | None:
    """Why the run's activity is paused."""
    found = await _pending(client, execution)
    return None if found is None else found.pause_info.manual.reason


async def _pending(client: Client, execution: WorkflowExecution) -> PendingActivityInfo | None:
    request = DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
    found = await client.workflow_service.describe_workflow_execution(request, retry=True)
    return task_activity(found)


def task_activity(found: DescribeWorkflowExecutionResponse) -> PendingActivityInfo | None:
    """The activity that carries the run, if one is pending: the last that was scheduled, and not given up.

    One whose worker is gone is cancelled, and kept by the server until the run ends.
    """
    given_up = PendingActivityState.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED
    ours = [
        one
        for one in found.pending_activities
        if one.activity_id.startswith(wire.ACTIVITY_ID) and one.state != given_up
    ]
    return max(ours, key=lambda one: one.scheduled_time.ToNanoseconds(), default=None)
