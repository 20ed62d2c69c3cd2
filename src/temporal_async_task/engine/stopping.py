"""Stopping a run's activity where it stands, so that its journal can be taken out of it.

Cancelling an activity that backs off would close it at once, and drop its journal. So it is paused first: paused, it
begins no attempt, and what it holds does not change any more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from temporalio import activity
from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest, PauseActivityRequest
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporalio.api.common.v1 import Payload, WorkflowExecution
    from temporalio.api.workflow.v1 import PendingActivityInfo
    from temporalio.client import Client

IN_AN_ATTEMPT = {
    PendingActivityState.PENDING_ACTIVITY_STATE_STARTED,
    PendingActivityState.PENDING_ACTIVITY_STATE_PAUSE_REQUESTED,
    PendingActivityState.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED,
}
_LOOK_AGAIN = 0.1  # seconds


async def stop_and_collect(client: Client, execution: WorkflowExecution, reason: str) -> Sequence[Payload] | None:
    """Pause the run's activity, wait until no attempt is under way, and return its journal.

    Returns:
        The journal's payloads, none if no attempt has written any; None if the activity has ended by itself.
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
    while (found := await _pending(client, execution)) is not None:
        if found.state not in IN_AN_ATTEMPT:
            return list(found.heartbeat_details.payloads)
        activity.heartbeat()  # this activity has no journal, so the SDK's own heartbeat will do
        await asyncio.sleep(_LOOK_AGAIN)
    return None


async def pause_reason(client: Client, execution: WorkflowExecution) -> str | None:
    """Why the run's activity is paused."""
    found = await _pending(client, execution)
    return None if found is None else found.pause_info.manual.reason


async def _pending(client: Client, execution: WorkflowExecution) -> PendingActivityInfo | None:
    request = DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
    found = await client.workflow_service.describe_workflow_execution(request, retry=True)
    return next((one for one in found.pending_activities if one.activity_id == wire.ACTIVITY_ID), None)
