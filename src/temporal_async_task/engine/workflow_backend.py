"""Tasks carried by the generic workflow: over a Temporal client, with no worker."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import WorkflowExecution as WorkflowListed
from temporalio.client import WorkflowFailureError
from temporalio.common import Priority, RawValue, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
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
from temporal_async_task.engine.describe import completed, failed, failure_of, header_in, header_of, result_of, running
from temporal_async_task.engine.journal import ErrorInfo
from temporal_async_task.engine.resume import find_remains, start_of
from temporal_async_task.engine.stopping import task_activity
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.errors import ParamsError, PayloadTooLargeError, ResultError, TaskConflictError
from temporal_async_task.status import TaskResult, TaskStatus

if TYPE_CHECKING:
    from temporalio.api.failure.v1 import Failure
    from temporalio.api.workflow.v1 import WorkflowExecutionInfo
    from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse

MAX_EVENT = 32 * 1024
"""Bytes; what the limit of a journal leaves."""
_AROUND_AN_EVENT = 16
"""Bytes, at most, that a value and its key take as arguments beside themselves."""
_PAGE = 1000
_ENDING = 7
"""Events that a run's history has at least when its activity has ended."""
_RUNNING = {
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING,
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_PAUSED,
}
_QUERIES = {
    TaskStatus.COMPLETED: "ExecutionStatus = 'Completed'",
    TaskStatus.FAILED: "ExecutionStatus IN ('Failed', 'Canceled', 'Terminated', 'TimedOut')",
    TaskStatus.PENDING: "ExecutionStatus = 'Running'",
    TaskStatus.PROCESSING: "ExecutionStatus = 'Running'",
}


class WorkflowBackend(Backend):
    """Tasks carried by the generic workflow."""

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
        start = wire.TaskInput(
            origin=uuid.uuid4().hex,
            heartbeat_timeout=task.heartbeat_timeout,
            timeout=task.timeout,
            delay=delay,
            digest=encoded.sealed_digest,
        )
        try:
            started = await self._client.start_workflow(
                task.workflow_type,
                args=[RawValue(start.to_payload()), RawValue(encoded.payload)],
                id=task_id,
                task_queue=task.task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                priority=priority,
            )
        except WorkflowAlreadyStartedError as error:
            await self._check_same(task, task_id, encoded.digest)
            run_id = error.run_id
        except RPCError as error:
            raise translated(error, self._client) from error
        else:
            run_id = started.result_run_id
        self._remember(task, task_id, run_id or "")

    async def _check_same(self, task: TaskAddress, task_id: str, digest: str) -> None:
        try:
            started = await start_of(self._client, task_id)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                raise unknown_anywhere(task_id) from None
            raise translated(error, self._client) from error
        if started.workflow_type.name != task.workflow_type:
            raise is_anothers(task_id)
        await self._check_params(task_id, started.input.payloads, digest)

    async def status(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        """One call to the server while the run goes on, two after its end."""
        found = await self._found(task, task_id)
        values = self._values(task_id)
        info = found.workflow_execution_info
        if info.status in _RUNNING:
            left = None
            if task_activity(found) is None and found.HasField("pending_workflow_task"):
                left = await self._left_by_the_activity(info)
            return await running(task_id, found, values, left)
        return await self._ended(task, task_id, found, values)

    async def _run_id(self, task: TaskAddress, task_id: str) -> str:
        return (await self._found(task, task_id)).workflow_execution_info.execution.run_id

    async def _wait_for(self, task: TaskAddress, task_id: str, run_id: str) -> TaskResult[Any]:
        handle = self._client.get_workflow_handle(task_id, run_id=run_id, result_type=RawValue)
        values = self._values(task_id)
        try:
            result = (await handle.result()).payload
        except WorkflowFailureError:
            found = await self._found(task, task_id)
            info = found.workflow_execution_info
            if info.status in _RUNNING:  # it was resumed since
                return await self._wait_for(task, task_id, info.execution.run_id)
            return await self._ended(task, task_id, found, values)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                raise unknown_anywhere(task_id) from None
            raise translated(error, self._client) from error
        outcome = await result_of(result, values, task.result_type)
        return TaskResult(task_id=task_id, status=TaskStatus.COMPLETED, **outcome)

    async def _left_by_the_activity(self, info: WorkflowExecutionInfo) -> Sequence[Payload] | None:
        """The journal's header, if the run's activity has ended and its workflow has yet to take note of it."""
        if info.history_length < _ENDING:
            return None
        handle = self._client.get_workflow_handle(info.execution.workflow_id, run_id=info.execution.run_id)
        left = None
        async for event in handle.fetch_history_events():
            if event.HasField("activity_task_completed_event_attributes"):
                result = event.activity_task_completed_event_attributes.result.payloads
                left = header_of(result[0]) if result else ()
            elif event.HasField("activity_task_failed_event_attributes"):
                left = header_in(event.activity_task_failed_event_attributes.failure)
        return left

    async def ids(self, task: TaskAddress, status: TaskStatus | None) -> AsyncIterator[str]:
        async for run in self.runs(of_type("WorkflowType", task.workflow_type), status):
            if run.workflow_type == task.workflow_type:
                yield run.id

    async def runs(self, query: str, status: TaskStatus | None) -> AsyncIterator[WorkflowListed]:
        """The runs that a visibility query finds, newest first. Of a status as far as visibility can tell."""
        query += " AND ExecutionStatus != 'ContinuedAsNew'"
        if status is not None:
            query += f" AND {_QUERIES[status]}"
        seen: set[str] = set()  # a run that was resumed stands there more than once
        pages = self._client.list_workflows(query, page_size=_PAGE)
        try:
            while True:
                await pages.fetch_next_page()
                # The server puts those first that go on, and then those that ended last.
                for found in sorted(pages.current_page or (), key=lambda run: run.start_time, reverse=True):
                    if found.id not in seen:
                        seen.add(found.id)
                        yield found
                if not pages.next_page_token:
                    return
        except RPCError as error:
            raise translated(error, self._client) from error

    async def resume(self, task: TaskAddress, task_id: str, redo: Collection[str]) -> None:
        found = await self._found(task, task_id)
        info = found.workflow_execution_info
        if info.status in _RUNNING:
            raise goes_on(task, task_id)
        if info.status == WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_COMPLETED:
            raise has_completed(task, task_id)
        values = self._values(task_id)
        try:
            remains = await find_remains(self._client, found)
        except RPCError as error:
            raise translated(error, self._client) from error
        journal = await self._reopened(task, task_id, remains.journal, redo)
        snapshot = journal.snapshot()
        header, results = await values.encode_journal(snapshot)
        finished = {name for record in journal.done() for name in (record.key, values.event_name(record.key))}
        events = {key: value for key, value in remains.events.items() if key not in finished}
        start = replace(
            remains.start,
            heartbeat_timeout=task.heartbeat_timeout,
            timeout=task.timeout,
            delay=0.0,
            deadline=None,
            events=(),
            given=(),
            history_before=info.execution.run_id,
        )
        parts = [start.to_payload(), remains.params, header, results]
        carried = _that_fit(wire.MAX_INPUT - wire.input_size(parts), events)
        rest = {key: value for key, value in events.items() if key not in carried}
        start = replace(start, events=tuple(carried), history_before=start.history_before if rest else "")
        parts = [start.to_payload(), *parts[1:], *carried.values()]
        memo = {
            wire.MEMO_CREATED: info.memo.fields.get(wire.MEMO_CREATED) or wire.created_payload(info.start_time),
            wire.MEMO_JOURNAL: header,
        }
        latest = (await self._found(task, task_id)).workflow_execution_info.execution
        if latest.run_id != info.execution.run_id:
            raise resumed_elsewhere(task, task_id)
        try:
            started = await self._client.start_workflow(
                task.workflow_type,
                args=[RawValue(part) for part in parts],
                id=task_id,
                task_queue=task.task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=memo,
                priority=_priority(info),
            )
        except WorkflowAlreadyStartedError:
            raise resumed_elsewhere(task, task_id) from None
        except RPCError as error:
            raise translated(error, self._client) from error
        self._remember(task, task_id, started.result_run_id or "")
        for key, value in rest.items():
            if not await self._signal_run(task_id, wire.SIGNAL_EVENT, wire.EventInput(key).to_payload(), value):
                break  # it has ended, and is to be resumed with the rest

    async def cancel(self, task: TaskAddress, task_id: str, reason: str) -> None:
        text = await self._values(task_id).seal_text(ErrorInfo.named("", reason).message)
        info = (await self._found(task, task_id)).workflow_execution_info
        await self._signal(info, wire.SIGNAL_CANCEL, wire.CancelRequest(text).to_payload())

    async def send(self, task: TaskAddress, task_id: str, key: str, value: Any) -> None:
        values = self._values(task_id)
        try:
            payload = await values.to_payload(value)
        except ResultError as error:
            raise ParamsError(f"The value of event {key!r} for task {task.name!r}: {error}") from error
        except PayloadTooLargeError as error:
            raise PayloadTooLargeError(f"The value of event {key!r} for task {task.name!r}: {error}") from None
        if payload.ByteSize() > MAX_EVENT:
            raise PayloadTooLargeError(
                f"The value of event {key!r} has {payload.ByteSize():,} bytes; the limit is {MAX_EVENT:,}, so that it "
                f"fits beside the run's journal. Store large values elsewhere, and send a reference."
            )
        info = (await self._found(task, task_id)).workflow_execution_info
        # A run that waits since before there was a codec waits for the key itself.
        name = key if _is_held_in_clear(info) else values.event_name(key)
        if not await self._signal(info, wire.SIGNAL_EVENT, wire.EventInput(name).to_payload(), payload):
            raise TaskConflictError(f"Run {task_id!r} of task {task.name!r} has ended; it waits for no event.")

    async def _signal(self, info: WorkflowExecutionInfo, name: str, *args: Payload) -> bool:
        """Signal a run; False if it has ended."""
        return info.status in _RUNNING and await self._signal_run(info.execution.workflow_id, name, *args)

    async def _signal_run(self, task_id: str, name: str, *args: Payload) -> bool:
        # Of a run that goes on in a new history, the last one.
        handle = self._client.get_workflow_handle(task_id)
        try:
            await handle.signal(name, args=[RawValue(arg) for arg in args])
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:  # it has ended meanwhile
                return False
            raise translated(error, self._client) from error
        return True

    async def _found(self, task: TaskAddress, task_id: str) -> DescribeWorkflowExecutionResponse:
        found = await self._describe(task_id)
        if found.workflow_execution_info.type.name != task.workflow_type:
            raise unknown(task, task_id)
        return found

    async def _describe(self, task_id: str) -> DescribeWorkflowExecutionResponse:
        request = DescribeWorkflowExecutionRequest(
            namespace=self._client.namespace, execution=WorkflowExecution(workflow_id=task_id)
        )
        try:
            return await self._client.workflow_service.describe_workflow_execution(request, retry=True)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                raise unknown_anywhere(task_id) from None
            raise translated(error, self._client) from error

    async def _ended(
        self,
        task: TaskAddress,
        task_id: str,
        found: DescribeWorkflowExecutionResponse,
        values: PayloadValues,
    ) -> TaskResult[Any]:
        info = found.workflow_execution_info
        handle = self._client.get_workflow_handle(task_id, run_id=info.execution.run_id, result_type=RawValue)
        try:
            outcome: Payload | Failure = (await handle.result(follow_runs=False)).payload
        except WorkflowFailureError as error:
            outcome = failure_of(error)
        except RPCError as error:
            raise translated(error, self._client) from error
        if isinstance(outcome, Payload):
            return await completed(task_id, info, outcome, values, task.result_type)
        return await failed(task_id, found, outcome, values)


def _that_fit(room: int, events: Mapping[str, Payload]) -> dict[str, Payload]:
    """Events, with their keys, for which there is room."""
    fit: dict[str, Payload] = {}
    for key, value in events.items():
        size = value.ByteSize() + len(json.dumps(key)) + _AROUND_AN_EVENT
        if size <= room:
            fit[key] = value
            room -= size
    return fit


def _priority(info: WorkflowExecutionInfo) -> Priority:
    stored = info.priority
    return Priority(
        priority_key=stored.priority_key or None,
        fairness_key=stored.fairness_key or None,
        fairness_weight=stored.fairness_weight or None,
    )


def _is_held_in_clear(info: WorkflowExecutionInfo) -> bool:
    held = info.memo.fields.get(wire.MEMO_JOURNAL)
    return held is not None and held.metadata.get("encoding") == b"json/plain"
