"""Starts runs and asks about them, over a Temporal client. Needs no worker: all answers are the server's."""

from __future__ import annotations

import asyncio
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import Client, WorkflowFailureError
from temporalio.common import Priority, RawValue, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire
from temporal_async_task.engine.describe import completed, failed, failure_of, header_in, header_of, result_of, running
from temporal_async_task.engine.digest import digest
from temporal_async_task.engine.journal import ErrorInfo, Journal
from temporal_async_task.engine.resume import find_remains
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.errors import (
    AsyncTaskError,
    ParamsError,
    PayloadTooLargeError,
    ResultError,
    ServerUnavailableError,
    TaskConflictError,
    TaskNotFoundError,
)
from temporal_async_task.status import TaskResult, TaskStatus

if TYPE_CHECKING:
    from temporalio.api.failure.v1 import Failure
    from temporalio.api.workflow.v1 import WorkflowExecutionInfo
    from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse

MAX_EVENT = 32 * 1024
"""Bytes; what the limit of a journal leaves."""
_PAGE = 1000
_UNQUOTABLE = re.compile(r"""['"\\]""")
_ENDING = 7
"""Events that a run's history has at least when its activity has ended."""
_RUNNING = {
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING,
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_PAUSED,
}
QUERIES = {
    TaskStatus.COMPLETED: "ExecutionStatus = 'Completed'",
    TaskStatus.FAILED: "ExecutionStatus IN ('Failed', 'Canceled', 'Terminated', 'TimedOut')",
    TaskStatus.PENDING: "ExecutionStatus = 'Running'",
    TaskStatus.PROCESSING: "ExecutionStatus = 'Running'",
}


@dataclass(frozen=True, slots=True)
class TaskAddress:
    """What the backend has to know of a task."""

    name: str
    workflow_type: str
    task_queue: str
    params_type: Any
    result_type: Any
    heartbeat_timeout: float
    timeout: float | None


@dataclass(frozen=True, slots=True)
class EncodedParams:
    """Params as the server gets them."""

    payload: Payload
    fingerprint: str
    """A digest of them, before any codec."""
    memo: dict[str, Payload]
    """What a run keeps of them, for the next submit to compare."""


class Backend(ABC):
    """Starts the runs of tasks and asks about them, in one of the ways in which Temporal can carry them."""

    def __init__(self, client: Client) -> None:
        self._converter = client.data_converter
        self._client = raw_client(client)
        try:
            self._home: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:  # a client that is set before any loop runs
            self._home = None

    @property
    def client(self) -> Client:
        """The connection, for payloads as they are."""
        return self._client

    def _values(self, task_id: str) -> PayloadValues:
        return PayloadValues(self._converter, self._client.namespace, task_id, self._home)

    @abstractmethod
    async def start(
        self,
        task: TaskAddress,
        task_id: str,
        params: Any,
        *,
        delay: float = 0.0,
        priority: Priority = Priority.default,
    ) -> None:
        """Start a run, or find that it was started before with the same params."""

    @abstractmethod
    async def status(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        """All that the server knows of a run."""

    @abstractmethod
    async def wait(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        """Of a run that has ended, however long that takes, how: status, result and error."""

    @abstractmethod
    def ids(self, task: TaskAddress, status: TaskStatus | None) -> AsyncIterator[str]:
        """The ids of a task's runs, newest first. Of a status as far as visibility can tell; it may be another."""

    @abstractmethod
    async def resume(self, task: TaskAddress, task_id: str, redo: Collection[str]) -> None:
        """Start a run that has failed or was cancelled again, with its params and its journal."""

    @abstractmethod
    async def cancel(self, task: TaskAddress, task_id: str, reason: str) -> None:
        """Ask for a run's cancellation; nothing happens to one that has ended."""

    @abstractmethod
    async def send(self, task: TaskAddress, task_id: str, key: str, value: Any) -> None:
        """Send an event to a run."""

    async def encode_params(self, task: TaskAddress, task_id: str, params: Any) -> EncodedParams:
        """Params for a run with this id.

        Raises:
            ParamsError: They do not fit the task's annotation, or cannot be serialised.
            PayloadTooLargeError: They are larger than the server takes.
        """
        values = self._values(task_id)
        try:
            plain = values.check(params, task.params_type)
            payload = await values.to_payload(params)
        except ResultError as error:
            raise ParamsError(f"The params of task {task.name!r} do not fit: {error}") from error
        except PayloadTooLargeError as error:
            raise PayloadTooLargeError(f"The params of task {task.name!r}: {error}") from None
        fingerprint = digest(plain, params)
        memo = {wire.MEMO_PARAMS: await values.to_payload(fingerprint, inline=True)}
        return EncodedParams(payload, fingerprint, memo)

    async def _check_params(self, task_id: str, kept: Payload | None, ours: str) -> None:
        """Refuse an id whose run has other params: ``kept`` is the digest of its own, ``ours`` of those submitted."""
        known = await self._values(task_id).from_payload(kept) if kept is not None else None
        if known != ours:
            raise TaskConflictError(
                f"The task id {task_id!r} was submitted before with other params. A task id stands for one run with "
                f"one set of params: choose another id, or submit the same params."
            )

    async def _reopened(
        self, task: TaskAddress, task_id: str, journal: Sequence[Payload], redo: Collection[str]
    ) -> Journal:
        """The journal of a run that has ended, for another try."""
        try:
            return (await self._values(task_id).decode_journal(journal)).reopen(redo)
        except KeyError as error:
            raise TaskConflictError(
                f"Run {task_id!r} of task {task.name!r} has no finished step {error.args[0]!r} to do again."
            ) from None


_REMEMBERED = 10_000  # submitted runs, which ``wait`` need not ask about


class WorkflowBackend(Backend):
    """Tasks carried by the generic workflow."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._submitted: dict[str, str] = {}  # what was submitted here lately: workflow types by task id

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
        )
        try:
            await self._client.start_workflow(
                task.workflow_type,
                args=[RawValue(start.to_payload()), RawValue(encoded.payload)],
                id=task_id,
                task_queue=task.task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=encoded.memo,
                priority=priority,
            )
        except WorkflowAlreadyStartedError:
            await self._check_same(task, task_id, encoded.fingerprint)
        except RPCError as error:
            raise translated(error, self._client) from error
        self._submitted[task_id] = task.workflow_type
        if len(self._submitted) > _REMEMBERED:
            del self._submitted[next(iter(self._submitted))]

    async def _check_same(self, task: TaskAddress, task_id: str, fingerprint: str) -> None:
        info = (await self._describe(task_id)).workflow_execution_info
        if info.type.name != task.workflow_type:
            raise is_anothers(task_id)
        await self._check_params(task_id, info.memo.fields.get(wire.MEMO_PARAMS), fingerprint)

    async def status(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        """One call to the server while the run goes on, two after its end."""
        found = await self._found(task, task_id)
        values = self._values(task_id)
        info = found.workflow_execution_info
        if info.status in _RUNNING:
            left = None
            if not found.pending_activities and found.HasField("pending_workflow_task"):
                left = await self._left_by_the_activity(info)
            return await running(task_id, found, values, left)
        return await self._ended(task, task_id, found, values)

    async def wait(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        if self._submitted.get(task_id) != task.workflow_type:  # else it need not be asked whose run it is
            await self._found(task, task_id)
        handle = self._client.get_workflow_handle(task_id, result_type=RawValue)
        values = self._values(task_id)
        try:
            result = (await handle.result()).payload
        except WorkflowFailureError:  # it may have been resumed since
            return await self._ended(task, task_id, await self._found(task, task_id), values)
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
        clauses = f"{of_type('WorkflowType', task)} AND ExecutionStatus != 'ContinuedAsNew'"
        seen: set[str] = set()  # a run that was resumed stands there more than once
        query = "" if status is None else f" AND {QUERIES[status]}"
        pages = self._client.list_workflows(clauses + query, page_size=_PAGE)
        try:
            while True:
                await pages.fetch_next_page()
                # The server puts those first that go on, and then those that ended last.
                for found in sorted(pages.current_page or (), key=lambda run: run.start_time, reverse=True):
                    if found.id not in seen and found.workflow_type == task.workflow_type:
                        seen.add(found.id)
                        yield found.id
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
            events=tuple(events),
        )
        parts = (start.to_payload(), remains.params, header, results, *events.values())
        memo = {
            wire.MEMO_PARAMS: info.memo.fields[wire.MEMO_PARAMS],
            wire.MEMO_CREATED: info.memo.fields.get(wire.MEMO_CREATED) or wire.created_payload(info.start_time),
            wire.MEMO_JOURNAL: header,
        }
        latest = (await self._found(task, task_id)).workflow_execution_info.execution
        if latest.run_id != info.execution.run_id:
            raise resumed_elsewhere(task, task_id)
        try:
            await self._client.start_workflow(
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
        if info.status not in _RUNNING:
            return False
        # Of a run that goes on in a new history, the last one.
        handle = self._client.get_workflow_handle(info.execution.workflow_id)
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


def of_type(attribute: str, task: TaskAddress) -> str:
    """A visibility query's clause for the runs of a task, and perhaps of others whose names begin alike."""
    # The server's SQL stores find no text with quotes or backslashes, however they are escaped.
    plain = _UNQUOTABLE.split(task.workflow_type, maxsplit=1)[0]
    comparison = "=" if plain == task.workflow_type else "STARTS_WITH"
    return f"{attribute} {comparison} '{plain}'"


# Refusals that do not depend on what carries the task.


def is_anothers(task_id: str) -> TaskConflictError:
    return TaskConflictError(
        f"The task id {task_id!r} is in use, by a run of another task or workflow. Choose another id."
    )


def unknown(task: TaskAddress, task_id: str) -> TaskNotFoundError:
    return TaskNotFoundError(f"There is no run {task_id!r} of task {task.name!r}.")


def unknown_anywhere(task_id: str) -> TaskNotFoundError:
    return TaskNotFoundError(
        f"There is no task run {task_id!r}: it was never submitted, or the server's retention is over."
    )


def goes_on(task: TaskAddress, task_id: str) -> TaskConflictError:
    return TaskConflictError(f"Run {task_id!r} of task {task.name!r} is going on; there is nothing to resume.")


def has_completed(task: TaskAddress, task_id: str) -> TaskConflictError:
    return TaskConflictError(
        f"Run {task_id!r} of task {task.name!r} has completed; get its result, or submit another run."
    )


def resumed_elsewhere(task: TaskAddress, task_id: str) -> TaskConflictError:
    return TaskConflictError(f"Run {task_id!r} of task {task.name!r} was resumed by somebody else.")


def raw_client(client: Client) -> Client:
    """The same connection, for payloads as they are. What is the user's is encoded by ``PayloadValues``."""
    config = client.config()
    config["data_converter"] = wire.RAW
    return Client(**config)


def translated(error: RPCError, client: Client) -> AsyncTaskError:
    """The server's refusal, in this library's words."""
    address = client.service_client.config.target_host
    torn = error.status == RPCStatusCode.UNKNOWN and "transport error" in str(
        error
    )  # the connection, by a killed server
    if torn or error.status in {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED}:
        return ServerUnavailableError(
            f"The Temporal server at {address} does not answer ({error}). Nothing was lost: try again when it is back."
        )
    return AsyncTaskError(f"The Temporal server at {address} refused the call: {error.status.name}: {error}")
