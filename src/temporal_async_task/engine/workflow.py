"""The one workflow. It serves every task, contains no user code, and imports nothing but the wire's types."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from temporalio import workflow
from temporalio.common import RawValue, RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError

from temporal_async_task.engine import wire

# How attempts are repeated is the engine's business: an attempt that ends in order says when the next is due. What is
# left to this policy is the attempt whose worker was lost: the next one begins after a second, as often as it takes.
_ATTEMPTS = RetryPolicy(initial_interval=timedelta(seconds=1), backoff_coefficient=1.0)
# The server wants a bound. It is not what notices a dead worker (the heartbeat timeout is).
_NO_LIMIT = timedelta(days=3650)


@workflow.defn(dynamic=True)
class TaskWorkflow:
    """Carries one run of one task."""

    @workflow.run
    async def run(self, args: Sequence[RawValue]) -> RawValue:
        """Run the activity ``<name>`` of the workflow ``asyncTask_<name>`` to its end."""
        info = workflow.info()
        name = info.workflow_type.removeprefix(wire.WORKFLOW_PREFIX)
        if name == info.workflow_type:
            raise ApplicationError(
                f"Workflow type {info.workflow_type!r} is not a task. Task queue {info.task_queue!r} belongs to "
                f"temporal-async-task: run other workflows on a queue of their own.",
                non_retryable=True,
            )
        try:
            start = wire.TaskInput.from_payload(args[0].payload)
        except (IndexError, TypeError, ValueError) as error:
            raise ApplicationError(
                f"Task {name!r} was not started by temporal-async-task. Use task.submit(), or the async-task command.",
                non_retryable=True,
            ) from error
        params, journal = args[1], args[2:]
        attempt = wire.AttemptInput(
            origin=start.origin,
            timeout=start.timeout,
            deadline=workflow.now().timestamp() + start.timeout if start.timeout is not None else None,
        )
        try:
            result: RawValue = await workflow.execute_activity(
                name,
                args=[RawValue(attempt.to_payload()), params, *journal],
                activity_id=wire.ACTIVITY_ID,
                result_type=RawValue,
                start_to_close_timeout=_NO_LIMIT,
                heartbeat_timeout=timedelta(seconds=start.heartbeat_timeout),
                retry_policy=_ATTEMPTS,
            )
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError):
                raise error.cause from None  # as it is: its details are the journal
            raise
        return result
