"""What carries a run, as one of its attempts sees it: a workflow, or nothing but the activity itself."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.workflowservice.v1 import (
    DescribeActivityExecutionRequest,
    RequestCancelActivityExecutionRequest,
)
from temporalio.exceptions import ApplicationError

from temporal_async_task.engine import wire
from temporal_async_task.engine.client import AttemptGoneError, insist
from temporal_async_task.engine.resume import sent_events
from temporal_async_task.engine.stopping import pause_reason, unpause

if TYPE_CHECKING:
    from temporalio import activity
    from temporalio.api.workflowservice.v1 import RecordActivityTaskHeartbeatResponse
    from temporalio.client import Client


class RunExecution(Protocol):
    """What differs between the two ways in which a run is carried."""

    task_id: str
    task_name: str
    input: wire.AttemptInput
    takes_events: bool
    keeps_heartbeats: bool
    """Whether the journal of a run that has failed for good stays in the heartbeat details. Else the failure has it."""

    def is_superseded(self, answer: RecordActivityTaskHeartbeatResponse) -> bool:
        """Whether a heartbeat's answer says that the run goes on without this attempt."""
        ...

    async def cancel_reason(self, answer: RecordActivityTaskHeartbeatResponse) -> str | None:
        """Why the run is cancelled, as it was handed on, if that is what a heartbeat's answer is about."""
        ...

    async def cancel_saved(self) -> None:
        """To be called once the journal on the server says that the run is cancelled."""
        ...

    async def find_event(self, names: Sequence[str], until: float) -> Payload | None:
        """An event with one of the names that has come until then, whether or not the attempt was given it."""
        ...

    async def cancel_done(self, reason: str) -> None:
        """The body has left after its cancellation: what follows must be the end of the run."""
        ...


def execution_of(client: Client, info: activity.Info, given: Sequence[Payload]) -> RunExecution:
    """What carries the run of an attempt.

    Args:
        client: The connection, for payloads as they are.
        info: Of the activity.
        given: The activity's first two arguments.

    Raises:
        ApplicationError: It is some standalone activity that is not a task's.
    """
    return InWorkflow(client, info, given[0]) if info.in_workflow else Standalone(client, info, given)


class InWorkflow:
    """An attempt at a run that the generic workflow carries: that holds the journal when no activity does."""

    takes_events = True
    keeps_heartbeats = False  # they go with the activity

    def __init__(self, client: Client, info: activity.Info, first: Payload) -> None:
        self._client = client
        self._activity_id = info.activity_id
        self.task_id = info.workflow_id or ""
        self.task_name = info.activity_type
        self.input = wire.AttemptInput.from_payload(first)
        self._workflow = WorkflowExecution(workflow_id=self.task_id, run_id=info.workflow_run_id or "")

    def is_superseded(self, answer: RecordActivityTaskHeartbeatResponse) -> bool:
        return answer.cancel_requested  # the run goes on in another activity

    async def cancel_reason(self, answer: RecordActivityTaskHeartbeatResponse) -> str | None:
        if not answer.activity_paused:
            return None
        reason = await insist(lambda: pause_reason(self._client, self._workflow), "ask why the run is paused")
        if reason is None or not reason.startswith(wire.PAUSED_TO_CANCEL):
            return None
        return reason.removeprefix(wire.PAUSED_TO_CANCEL)

    async def cancel_saved(self) -> None:
        # A paused activity has no heartbeat timeout, and with the worker it would be lost: so it is paused no longer
        # than until the journal says that the run is cancelled.
        await insist(lambda: unpause(self._client, self._workflow, self._activity_id), "go on with the cancellation")

    async def find_event(self, names: Sequence[str], until: float) -> Payload | None:
        events = await insist(lambda: sent_events(self._client, self._workflow, until), "look for an event")
        return next((events[name] for name in names if name in events), None)

    async def cancel_done(self, reason: str) -> None:
        pass


class Standalone:
    """An attempt at a run that nothing carries but its activity."""

    takes_events = False
    keeps_heartbeats = True

    def __init__(self, client: Client, info: activity.Info, given: Sequence[Payload]) -> None:
        self._client = client
        self._run_id = info.activity_run_id or ""
        self.task_id = info.activity_id
        self.task_name = info.activity_type.removeprefix(wire.WORKFLOW_PREFIX)
        if self.task_name == info.activity_type:
            raise ApplicationError(
                f"Activity type {info.activity_type!r} is not a task. Task queue {info.task_queue!r} belongs to "
                f"temporal-async-task: run other activities on a queue of their own.",
                non_retryable=True,
            )
        try:
            start, _ = wire.TaskInput.from_payload(given[0]), given[1]
        except (IndexError, TypeError, ValueError) as error:
            raise ApplicationError(
                f"Task {self.task_name!r} was not started by temporal-async-task. Use task.submit().",
                non_retryable=True,
            ) from error
        reason = wire.cancel_mark(info.retry_policy.non_retryable_error_types if info.retry_policy else None)
        deadline = None
        if reason is None and start.timeout is not None:
            deadline = info.scheduled_time.timestamp() + start.delay + start.timeout
        self.input = wire.AttemptInput(
            origin=start.origin,
            timeout=start.timeout,
            deadline=deadline,
            cancelled=reason is not None,
            reason=reason or "",
        )

    def is_superseded(self, answer: RecordActivityTaskHeartbeatResponse) -> bool:  # noqa: ARG002
        return False

    async def cancel_reason(self, answer: RecordActivityTaskHeartbeatResponse) -> str | None:
        request = DescribeActivityExecutionRequest(
            namespace=self._client.namespace, activity_id=self.task_id, run_id=self._run_id
        )
        service = self._client.workflow_service
        found = await insist(lambda: service.describe_activity_execution(request), "ask whether the run is cancelled")
        reason = wire.cancel_mark(found.info.retry_policy.non_retryable_error_types)
        if reason is None and answer.cancel_requested:  # by Temporal's own means
            reason = found.info.canceled_reason
        return reason

    async def cancel_saved(self) -> None:
        pass  # the activity was not paused, but marked

    async def find_event(self, names: Sequence[str], until: float) -> Payload | None:  # noqa: ARG002
        return None

    async def cancel_done(self, reason: str) -> None:
        # An activity that was reset gets another attempt even if this one fails for good: but for this.
        request = RequestCancelActivityExecutionRequest(
            namespace=self._client.namespace,
            activity_id=self.task_id,
            run_id=self._run_id,
            identity=self._client.identity,
            request_id=str(uuid.uuid4()),
            reason=reason,
        )
        service = self._client.workflow_service
        with contextlib.suppress(AttemptGoneError):  # it was cancelled so before
            await insist(lambda: service.request_cancel_activity_execution(request), "end the run as cancelled")
