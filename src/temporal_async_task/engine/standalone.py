"""Tasks carried by Temporal's standalone activity: the activity alone, with no workflow around it.

What the workflow holds is held by the activity itself: of a resumed run, the journal's header in its header; the
journal in its heartbeats. See docs/architecture.md for how a run is cancelled.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from google.protobuf.field_mask_pb2 import FieldMask
from temporalio.api.activity.v1 import (
    ActivityExecutionInfo,
    ActivityExecutionListInfo,
    ActivityExecutionOutcome,
    ActivityOptions,
)
from temporalio.api.common.v1 import ActivityType, Header, Payload, Payloads
from temporalio.api.common.v1 import Priority as PriorityMessage
from temporalio.api.enums.v1 import ActivityExecutionStatus as Status
from temporalio.api.enums.v1 import (
    ActivityIdConflictPolicy,
    ActivityIdReusePolicy,
    PendingActivityState,
)
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeActivityExecutionRequest,
    DescribeActivityExecutionResponse,
    DescribeNamespaceRequest,
    ListActivityExecutionsRequest,
    PollActivityExecutionRequest,
    RequestCancelActivityExecutionRequest,
    ResetActivityExecutionRequest,
    StartActivityExecutionRequest,
    UpdateActivityExecutionOptionsRequest,
)
from temporalio.common import Priority
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire
from temporal_async_task.engine.backend import (
    Backend,
    TaskAddress,
    goes_on,
    has_completed,
    is_anothers,
    of_type,
    resumed_elsewhere,
    unknown,
    unknown_anywhere,
)
from temporal_async_task.engine.client import translated
from temporal_async_task.engine.describe import completed, failed_activity, result_of, running_activity
from temporal_async_task.engine.journal import ErrorInfo
from temporal_async_task.engine.resume import started_by_hand
from temporal_async_task.engine.stopping import IN_AN_ATTEMPT
from temporal_async_task.errors import ConfigError, TaskNotFoundError
from temporal_async_task.status import TaskResult, TaskStatus

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from temporalio.api.namespace.v1 import NamespaceInfo
    from temporalio.client import Client

_PAGE = 1000
_GOES_ON = {Status.ACTIVITY_EXECUTION_STATUS_RUNNING, Status.ACTIVITY_EXECUTION_STATUS_PAUSED}
_QUERIES = {
    TaskStatus.COMPLETED: "ExecutionStatus = 'Completed'",
    TaskStatus.FAILED: "ExecutionStatus IN ('Failed', 'Canceled', 'Terminated', 'TimedOut')",
    TaskStatus.PENDING: "ExecutionStatus IN ('Running', 'Paused')",
    TaskStatus.PROCESSING: "ExecutionStatus IN ('Running', 'Paused')",
}


class StandaloneBackend(Backend):
    """Tasks carried by standalone activities."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._service = self._client.workflow_service
        self._is_checked = False

    async def start(
        self,
        task: TaskAddress,
        task_id: str,
        params: Any,
        *,
        delay: float = 0.0,
        priority: Priority = Priority.default,
    ) -> None:
        encoded = await self.encode_params(task, task_id, params)
        if not self._is_checked:
            await self._check_server()
        start = wire.TaskInput(
            origin=uuid.uuid4().hex,
            heartbeat_timeout=task.heartbeat_timeout,
            timeout=task.timeout,
            delay=delay,
            digest=encoded.sealed_digest,
        )
        request = self._request(task, task_id, start, (encoded.payload,))
        request.id_reuse_policy = ActivityIdReusePolicy.ACTIVITY_ID_REUSE_POLICY_REJECT_DUPLICATE
        request.priority.CopyFrom(_priority(priority))
        if delay > 0:
            _set(request.start_delay, delay)
        try:
            started = await self._service.start_activity_execution(request, retry=True)
        except RPCError as error:
            if error.status != RPCStatusCode.ALREADY_EXISTS:
                self._refuse(error)
            try:
                found = await self._found(task, task_id, given=True)
            except TaskNotFoundError:
                raise is_anothers(task_id) from None
            await self._check_params(task_id, found.input.payloads, encoded.digest)
            self._remember(task, task_id, found.run_id)
        else:
            self._remember(task, task_id, started.run_id)

    def _request(
        self,
        task: TaskAddress,
        task_id: str,
        start: wire.TaskInput,
        payloads: Sequence[Payload],
        kept: Mapping[str, Payload] | None = None,
    ) -> StartActivityExecutionRequest:
        request = StartActivityExecutionRequest(
            namespace=self._client.namespace,
            identity=self._client.identity,
            request_id=str(uuid.uuid4()),
            activity_id=task_id,
            activity_type=ActivityType(name=task.workflow_type),
            task_queue=TaskQueue(name=task.task_queue),
            input=Payloads(payloads=(start.to_payload(), *payloads)),
            # Not the summary, which the server's UI shows.
            header=Header(fields=kept),
            id_conflict_policy=ActivityIdConflictPolicy.ACTIVITY_ID_CONFLICT_POLICY_FAIL,
        )
        wire.AFTER_A_LOSS.apply_to_proto(request.retry_policy)
        request.start_to_close_timeout.FromTimedelta(wire.NO_LIMIT)
        _set(request.heartbeat_timeout, start.heartbeat_timeout)
        return request

    async def _check_server(self) -> None:
        """Refuse a server that would take a run and not carry it through."""
        try:
            found = await self._service.describe_namespace(
                DescribeNamespaceRequest(namespace=self._client.namespace), retry=True
            )
        except RPCError as error:
            if error.status != RPCStatusCode.PERMISSION_DENIED:
                self._refuse(error)
        else:
            if not has_standalone_activities(found.namespace_info):
                raise too_old(self._client.service_client.config.target_host)
        self._is_checked = True

    async def status(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        """One call to the server, before the end and after it."""
        return await self._picture(task, task_id, await self._found(task, task_id, journal=True, outcome=True))

    async def _run_id(self, task: TaskAddress, task_id: str) -> str:
        return (await self._found(task, task_id)).run_id

    async def _wait_for(self, task: TaskAddress, task_id: str, run_id: str) -> TaskResult[Any]:
        outcome = await self._poll(task_id, run_id)
        if outcome.HasField("result"):
            ended = await result_of(outcome.result.payloads[0], self._values(task_id), task.result_type)
            return TaskResult(task_id=task_id, status=TaskStatus.COMPLETED, **ended)
        while True:
            found = await self._found(task, task_id, journal=True, outcome=True)
            if found.info.status not in _GOES_ON:
                return await self._picture(task, task_id, found)
            await self._poll(task_id, found.run_id)  # it was resumed since

    async def _poll(self, task_id: str, run_id: str) -> ActivityExecutionOutcome:
        """Wait for the end of a run."""
        request = PollActivityExecutionRequest(namespace=self._client.namespace, activity_id=task_id, run_id=run_id)
        while True:  # the server answers after a while in any case
            try:
                answer = await self._service.poll_activity_execution(request, retry=True)
            except RPCError as error:
                if error.status == RPCStatusCode.NOT_FOUND:
                    raise unknown_anywhere(task_id) from None
                if error.status != RPCStatusCode.DEADLINE_EXCEEDED:
                    self._refuse(error)
            else:
                if answer.HasField("outcome"):
                    return answer.outcome

    async def _picture(
        self, task: TaskAddress, task_id: str, found: DescribeActivityExecutionResponse
    ) -> TaskResult[Any]:
        values = self._values(task_id)
        if found.info.status in _GOES_ON:
            return await running_activity(task_id, found, values)
        if found.outcome.HasField("result"):
            return await completed(task_id, found.info, found.outcome.result.payloads[0], values, task.result_type)
        return await failed_activity(task_id, found, values)

    async def ids(self, task: TaskAddress, status: TaskStatus | None) -> AsyncIterator[str]:
        async for run in self.runs(of_type("ActivityType", task.workflow_type), status):
            if run.activity_type.name == task.workflow_type:
                yield run.activity_id

    async def runs(self, query: str, status: TaskStatus | None) -> AsyncIterator[ActivityExecutionListInfo]:
        """The runs that a visibility query finds, newest first. Of a status as far as visibility can tell."""
        if status is not None:
            query += f" AND {_QUERIES[status]}"
        request = ListActivityExecutionsRequest(namespace=self._client.namespace, page_size=_PAGE, query=query)
        seen: set[str] = set()  # a run that was resumed stands there more than once
        while True:
            try:
                page = await self._service.list_activity_executions(request, retry=True)
            except RPCError as error:
                self._refuse(error)
            # The server puts those first that go on, and then those that ended last.
            begun = sorted(page.executions, key=lambda run: run.schedule_time.ToNanoseconds(), reverse=True)
            for run in begun:
                if run.activity_id not in seen:
                    seen.add(run.activity_id)
                    yield run
            if not page.next_page_token:
                return
            request.next_page_token = page.next_page_token

    async def resume(self, task: TaskAddress, task_id: str, redo: Collection[str]) -> None:
        found = await self._found(task, task_id, given=True, journal=True)
        info = found.info
        if info.status in _GOES_ON:
            raise goes_on(task, task_id)
        if info.status == Status.ACTIVITY_EXECUTION_STATUS_COMPLETED:
            raise has_completed(task, task_id)
        try:
            given, params, *first = found.input.payloads
            start = wire.TaskInput.from_payload(given)
        except (TypeError, ValueError):
            raise started_by_hand(task_id) from None
        journal = await self._reopened(task, task_id, list(info.heartbeat_details.payloads) or first, redo)
        header, results = await self._values(task_id).encode_journal(journal.snapshot())
        again = replace(
            start,
            heartbeat_timeout=task.heartbeat_timeout,
            timeout=task.timeout,
            delay=0.0,
        )
        kept = {
            wire.MEMO_CREATED: info.header.fields.get(wire.MEMO_CREATED) or wire.created_payload(info.schedule_time),
            wire.MEMO_JOURNAL: header,
        }
        request = self._request(task, task_id, again, (params, header, results), kept)
        request.id_reuse_policy = ActivityIdReusePolicy.ACTIVITY_ID_REUSE_POLICY_ALLOW_DUPLICATE_FAILED_ONLY
        request.priority.CopyFrom(info.priority)
        if (await self._found(task, task_id)).run_id != found.run_id:
            raise resumed_elsewhere(task, task_id)
        try:
            started = await self._service.start_activity_execution(request, retry=True)
        except RPCError as error:
            if error.status == RPCStatusCode.ALREADY_EXISTS:
                raise resumed_elsewhere(task, task_id) from None
            self._refuse(error)
        self._remember(task, task_id, started.run_id)

    async def cancel(self, task: TaskAddress, task_id: str, reason: str) -> None:
        """Ask for a run's cancellation; nothing happens to one that has ended.

        The run is marked, so that whatever attempt comes next is cancelled, and then its activity is reset: an attempt
        that goes on hears of it with its next heartbeat and looks for the mark; else the next one begins at once. If
        none has begun, the server cancels the activity. A caller that dies in between has left the mark; another call
        does what is missing.
        """
        found = await self._found(task, task_id, journal=True)
        if found.info.status not in _GOES_ON or _is_told(found.info):
            return
        text = await self._values(task_id).seal_text(ErrorInfo.named("", reason).message)
        # An attempt may have begun since it was asked, without having seen the mark; the next one will see it.
        if await self._mark(task, task_id, found, text) and (
            _is_begun(found.info) or _is_begun((await self._found(task, task_id, journal=True)).info)
        ):
            await self._command(
                self._service.reset_activity_execution,
                ResetActivityExecutionRequest(
                    namespace=self._client.namespace,
                    activity_id=task_id,
                    run_id=found.run_id,
                    identity=self._client.identity,
                ),
            )
            return
        await self._command(
            self._service.request_cancel_activity_execution,
            RequestCancelActivityExecutionRequest(
                namespace=self._client.namespace,
                activity_id=task_id,
                run_id=found.run_id,
                identity=self._client.identity,
                request_id=str(uuid.uuid4()),
                reason=text,
            ),
        )

    async def _mark(
        self, task: TaskAddress, task_id: str, found: DescribeActivityExecutionResponse, reason: str
    ) -> bool:
        """Mark a run as cancelled. False if it can only be cancelled by the server's own means."""
        if _is_marked(found.info):
            return True
        options = ActivityOptions(retry_policy=found.info.retry_policy)
        options.retry_policy.non_retryable_error_types.append(wire.CANCEL_MARK + reason)
        request = UpdateActivityExecutionOptionsRequest(
            namespace=self._client.namespace,
            activity_id=task_id,
            run_id=found.run_id,
            identity=self._client.identity,
            activity_options=options,
            update_mask=FieldMask(paths=["retry_policy"]),
        )
        if await self._command(self._service.update_activity_execution_options, request):
            return True
        # It has ended, another caller has cancelled it just now, or an operator has reset it: then, options stay as
        # they are until the attempt that goes on has ended. Or such commands are switched off.
        return _is_marked((await self._found(task, task_id)).info)

    async def _command(self, command: Any, request: Any) -> bool:
        """Tell the activity something; False if its state, or the server, has no place for it."""
        try:
            await command(request, retry=True)
        except RPCError as error:
            if error.status not in {
                RPCStatusCode.FAILED_PRECONDITION,
                RPCStatusCode.UNIMPLEMENTED,
                RPCStatusCode.NOT_FOUND,
            }:
                self._refuse(error)
            return False
        return True

    async def send(self, task: TaskAddress, task_id: str, key: str, value: Any) -> NoReturn:  # noqa: ARG002
        raise ConfigError(
            f"Task {task.name!r} has execution='activity', so its runs cannot wait for events. Define it with "
            f"execution='workflow' to send it any."
        )

    async def _found(
        self,
        task: TaskAddress,
        task_id: str,
        *,
        given: bool = False,
        journal: bool = False,
        outcome: bool = False,
    ) -> DescribeActivityExecutionResponse:
        """What the server says of a run; with what it was given, its journal and how it ended, or its attempts did."""
        request = DescribeActivityExecutionRequest(
            namespace=self._client.namespace,
            activity_id=task_id,
            include_input=given,
            include_heartbeat_details=journal,
            include_outcome=outcome,
            include_last_failure=outcome,
        )
        try:
            found = await self._service.describe_activity_execution(request, retry=True)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                raise unknown_anywhere(task_id) from None
            self._refuse(error)
        if found.info.activity_type.name != task.workflow_type:
            raise unknown(task, task_id)
        return found

    def _refuse(self, error: RPCError) -> NoReturn:
        if error.status == RPCStatusCode.UNIMPLEMENTED:
            raise too_old(self._client.service_client.config.target_host) from error
        raise translated(error, self._client) from error


def has_standalone_activities(namespace: NamespaceInfo) -> bool:
    """Whether a namespace's server is able to carry runs.

    In 1.31 they were a preview, which forgets the journal that a failing attempt leaves. What came after it tells.
    """
    can = namespace.capabilities
    return can.standalone_activities and (
        can.standalone_activity_operator_commands
        or can.standalone_activity_batch_operations
        or can.standalone_activity_start_delay
    )


class ServerTooOldError(ConfigError):
    """The server has no standalone activities."""


def too_old(address: str) -> ServerTooOldError:
    """What is said of a server that has no standalone activities."""
    return ServerTooOldError(
        f"The Temporal server at {address} has no standalone activities, which execution='activity' needs: they come "
        f"with server 1.32, and can be switched off for a namespace. Use execution='workflow', or a newer server."
    )


def _is_marked(info: ActivityExecutionInfo) -> bool:
    return wire.cancel_mark(info.retry_policy.non_retryable_error_types) is not None


def _is_told(info: ActivityExecutionInfo) -> bool:
    """Whether the body knows already that it is cancelled."""
    by_the_server = info.run_state == PendingActivityState.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED
    return by_the_server or wire.is_cancelling(info.heartbeat_details.payloads)


def _is_begun(info: ActivityExecutionInfo) -> bool:
    """Whether there may be something to clean up. What has not begun is ended by the server, at once."""
    begun = not all(map(wire.is_nothing_begun, info.heartbeat_details.payloads))
    return begun or info.run_state in IN_AN_ATTEMPT or wire.MEMO_JOURNAL in info.header.fields


def _priority(priority: Priority) -> PriorityMessage:
    return PriorityMessage(
        priority_key=priority.priority_key or 0,
        fairness_key=priority.fairness_key or "",
        fairness_weight=priority.fairness_weight or 0.0,
    )


def _set(duration: Duration, seconds: float) -> None:
    duration.FromTimedelta(timedelta(seconds=seconds))
