"""How much waits in a task queue, as the server estimates it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.service import RPCError

from temporal_async_task.engine.client import translated

if TYPE_CHECKING:
    from temporalio.client import Client

_KINDS = (TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY)
_TIMEOUT = timedelta(seconds=5)


async def backlog(client: Client, task_queue: str) -> int:
    """Runs that wait for a worker. The server (1.32) answers from a picture that may be 5 seconds old.

    Raises:
        ServerUnavailableError: The server does not answer.
        AsyncTaskError: It refuses the call.
    """
    count = 0
    for kind in _KINDS:
        request = DescribeTaskQueueRequest(
            namespace=client.namespace,
            task_queue=TaskQueue(name=task_queue),
            task_queue_type=kind,
            report_stats=True,
        )
        try:
            answer = await client.workflow_service.describe_task_queue(request, retry=True, timeout=_TIMEOUT)
        except RPCError as error:
            raise translated(error, client) from error
        count += answer.stats.approximate_backlog_count
    return count
