"""Stopping a run's activity where it stands, so that its journal can be taken out of it.

Cancelling an activity that backs off would close it at once, and drop its journal. So it is paused first: paused, it
begins no attempt, and what it holds does not change any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest, PauseActivityRequest
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporalio.api.common.v1 import Payload, WorkflowExecution
    from temporalio.api.workflow.v1 import PendingActivityInfo
    from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse
    from temporalio.client import Client

IN_AN_ATTEMPT = {
    PendingActivityState.PENDING_ACTIVITY_STATE_STARTED,
    PendingActivityState.PENDING_ACTIVITY_STATE_PAUSE_REQUESTED,
    PendingActivityState.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED,
}


async def stop_and_look(client: Client, execution: WorkflowExecution, reason: str) -> Sequence[Payload] | None:
    """Pause the run's activity, and return its journal if no attempt is under way.

    A running attempt learns of it with its next heartbeat, and cancels its body. It ends the activity, or leaves it
    paused in a backoff, where nothing can change its journal.

    Returns:
        The journal's payloads, none if no attempt has written any; None while an attempt is under way, or if the
        activity has ended by itself.
    """
    request = PauseActivityRequest(
        namespace=client.namespace,
        execution=execution,
        identity=client.identity,
        id=wire.ACTIVITY_ID,
        reason=reason,
    )
    try:
        await client.workflow_service.pause_activity(request, retry=True)
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise
        return None
    found = await _pending(client, execution)
    return None if found is None or found.state in IN_AN_ATTEMPT else list(found.heartbeat_details.payloads)


async def pause_reason(client: Client, execution: WorkflowExecution) -> str | None:
    """Why the run's activity is paused."""
    found = await _pending(client, execution)
    return None if found is None else found.pause_info.manual.reason


async def _pending(client: Client, execution: WorkflowExecution) -> PendingActivityInfo | None:
    request = DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
    found = await client.workflow_service.describe_workflow_execution(request, retry=True)
    return task_activity(found)


def task_activity(found: DescribeWorkflowExecutionResponse) -> PendingActivityInfo | None:
    """The activity that carries the run, if one is pending."""
    return next((one for one in found.pending_activities if one.activity_id == wire.ACTIVITY_ID), None)
