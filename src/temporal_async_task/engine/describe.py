"""What the server says of a run, as a ``TaskResult``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from temporalio.api.activity.v1 import ActivityExecutionInfo
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import ActivityExecutionStatus, WorkflowExecutionStatus
from temporalio.api.failure.v1 import Failure
from temporalio.exceptions import FailureError

from temporal_async_task.engine import wire
from temporal_async_task.engine.journal import Journal, StepRecord
from temporal_async_task.engine.stopping import IN_AN_ATTEMPT, task_activity
from temporal_async_task.errors import DecryptionError, ResultError, StorageError
from temporal_async_task.status import StepState, StepStatus, TaskResult, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from google.protobuf.timestamp_pb2 import Timestamp
    from temporalio.api.workflow.v1 import PendingActivityInfo, WorkflowExecutionInfo
    from temporalio.api.workflowservice.v1 import (
        DescribeActivityExecutionResponse,
        DescribeWorkflowExecutionResponse,
    )
    from temporalio.client import WorkflowFailureError

    from temporal_async_task.engine.values import PayloadValues

    _Info = WorkflowExecutionInfo | ActivityExecutionInfo

_ENDED_WITHOUT_CODE = {
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_TERMINATED: "TerminatedError",
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_TIMED_OUT: "TimeoutError",
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_CANCELED: wire.CANCELLED,
}
_CANCELLED_BY_THE_SERVER = {
    ActivityExecutionStatus.ACTIVITY_EXECUTION_STATUS_CANCELED,  # while it waited
    ActivityExecutionStatus.ACTIVITY_EXECUTION_STATUS_TIMED_OUT,  # its cleanup's worker was lost; no other limit is set
}


async def running(
    task_id: str, found: DescribeWorkflowExecutionResponse, values: PayloadValues, left: Sequence[Payload] | None
) -> TaskResult[Any]:
    """A run that has not ended. ``left`` is its activity's header, if that has ended and the workflow does not know."""
    info = found.workflow_execution_info
    activity = task_activity(found)
    held = _held(info)
    details = activity.heartbeat_details.payloads[:1] if activity else left or ()
    journal = await _journal(details or held, values)
    if activity is None:  # the workflow holds the journal, or takes the outcome, or has not begun yet
        status = TaskStatus.PROCESSING if held or left is not None else TaskStatus.PENDING
        due = min((record.due for record in journal if record.due is not None), default=None)
        return _picture(task_id, status, info, journal, next_retry_at=_from_epoch(due), last_error=_last_error(journal))
    begun = bool(held) or (activity.attempt > 1 and not any(map(wire.is_nothing_begun, details)))
    lost = await _attempt_lost(activity.last_failure, values)
    return _under_way(
        task_id, info, journal, activity, waiting=activity.state not in IN_AN_ATTEMPT, begun=begun, lost=lost
    )


async def running_activity(
    task_id: str, found: DescribeActivityExecutionResponse, values: PayloadValues
) -> TaskResult[Any]:
    """A run that has not ended, carried by a standalone activity."""
    info = found.info
    held = _held(info)
    details = info.heartbeat_details.payloads[:1]
    journal = await _journal(details or held, values)
    # By its start and not by the number of its attempts, which a reset sets back.
    begun = bool(held) or (info.HasField("last_started_time") and not any(map(wire.is_nothing_begun, details)))
    lost = await _attempt_lost(info.last_failure, values)
    return _under_way(task_id, info, journal, info, waiting=info.run_state not in IN_AN_ATTEMPT, begun=begun, lost=lost)


def _under_way(
    task_id: str,
    info: _Info,
    journal: Journal,
    activity: PendingActivityInfo | ActivityExecutionInfo,
    *,
    waiting: bool,
    begun: bool,
    lost: str | None,
) -> TaskResult[Any]:
    next_retry_at = None
    if waiting and activity.attempt > 1 and activity.HasField("next_attempt_schedule_time"):
        next_retry_at = _from_stamp(activity.next_attempt_schedule_time)
    last_error = (waiting and lost) or _last_error(journal) or lost  # an attempt that goes on may have failed at more
    if waiting and not begun:
        return _picture(task_id, TaskStatus.PENDING, info, journal, next_retry_at=next_retry_at, last_error=last_error)
    return _picture(
        task_id,
        TaskStatus.PROCESSING,
        info,
        journal,
        attempt=max(activity.attempt, journal.attempt),
        started_at=_from_stamp(activity.last_started_time) if activity.HasField("last_started_time") else None,
        next_retry_at=next_retry_at,
        last_error=last_error,
    )


async def completed(
    task_id: str, info: _Info, result: Payload, values: PayloadValues, result_type: Any
) -> TaskResult[Any]:
    """A run that ended with a result."""
    journal = await _journal(header_of(result), values)
    outcome = await result_of(result, values, result_type)
    return _picture(task_id, TaskStatus.COMPLETED, info, journal, completed_at=_from_stamp(info.close_time), **outcome)


async def result_of(result: Payload, values: PayloadValues, result_type: Any) -> dict[str, Any]:
    """The fields of a ``TaskResult`` that say what a run returned."""
    try:
        return {"result": await values.from_payload(result, result_type)}
    except (ResultError, StorageError) as error:  # the code's annotation has changed since; the object is not there
        return {"error": str(error), "error_type": type(error).__name__}


async def failed(
    task_id: str, found: DescribeWorkflowExecutionResponse, failure: Failure, values: PayloadValues
) -> TaskResult[Any]:
    """A run, carried by a workflow, that ended without a result."""
    info = found.workflow_execution_info
    plain = await values.plain_failure(failure)
    error_type = _ENDED_WITHOUT_CODE.get(info.status) or plain.application_failure_info.type or "Error"
    header = header_in(failure)
    if not header and (activity := task_activity(found)) is not None:  # ended from outside: it is where it was
        header = activity.heartbeat_details.payloads[:1]
    journal = await _journal(header or _held(info), values)
    return _picture(
        task_id,
        TaskStatus.FAILED,
        info,
        journal,
        error=await values.unseal_text(plain.message),
        error_type=error_type,
        completed_at=_from_stamp(info.close_time),
    )


async def failed_activity(
    task_id: str, found: DescribeActivityExecutionResponse, values: PayloadValues
) -> TaskResult[Any]:
    """A run that ended without a result, carried by a standalone activity. Its last heartbeat is its journal."""
    info, failure = found.info, found.outcome.failure
    journal = await _journal(info.heartbeat_details.payloads[:1] or _held(info), values)
    kind = failure.application_failure_info.type
    if info.status == ActivityExecutionStatus.ACTIVITY_EXECUTION_STATUS_TERMINATED:
        message, error_type = failure.message, "TerminatedError"
    elif info.status in _CANCELLED_BY_THE_SERVER or kind in {wire.ATTEMPT_ENDED, wire.ATTEMPT_LEFT}:
        message = info.canceled_reason if journal.cancel_reason is None else journal.cancel_reason
        error_type = wire.CANCELLED
    else:
        plain = await values.plain_failure(failure)
        message, error_type = plain.message, plain.application_failure_info.type or "Error"
    return _picture(
        task_id,
        TaskStatus.FAILED,
        info,
        journal,
        error=await values.unseal_text(message),
        error_type=error_type,
        completed_at=_from_stamp(info.close_time),
    )


def failure_of(error: WorkflowFailureError) -> Failure:
    """What the server has kept of a run's failure."""
    cause = error.cause
    if isinstance(cause, FailureError) and cause.failure is not None:
        return cause.failure
    return Failure(message=str(cause))


def header_of(result: Payload) -> Sequence[Payload]:
    """The journal's header that came with an activity's result."""
    if wire.hold_of(result) is not None:
        return wire.unpack(result)[:1]
    header = result.metadata.get(wire.RESULT_JOURNAL)
    return [Payload.FromString(header)] if header else []


def header_in(failure: Failure) -> Sequence[Payload]:
    """The journal's header that came with an activity's failure."""
    return failure.application_failure_info.details.payloads[:1]


def _kept(info: _Info) -> Mapping[str, Payload]:
    """What is kept with a run, beside its activity's heartbeats: in the workflow's memo, or the activity's header."""
    return info.header.fields if isinstance(info, ActivityExecutionInfo) else info.memo.fields


def _held(info: _Info) -> Sequence[Payload]:
    """The journal's header that is kept with a run, if one is."""
    held = _kept(info).get(wire.MEMO_JOURNAL)
    return [] if held is None else [held]


async def _journal(header: Sequence[Payload], values: PayloadValues) -> Journal:
    """The journal's header; an empty journal where there is none."""
    if not header or wire.is_nothing_begun(header[0]):
        return Journal()
    plain = await values.decode_header(header[0])
    try:
        return Journal.of_header(plain)
    except ValueError as error:
        raise DecryptionError(
            f"The status of a run cannot be read here: {error}. This process needs the workers' version of "
            f"temporal-async-task, and their data_converter."
        ) from error


def _picture(task_id: str, status: TaskStatus, info: _Info, journal: Journal, **fields: Any) -> TaskResult[Any]:
    begun = [record for record in journal if record.is_begun]
    records = sorted(begun, key=lambda record: (record.started is None, record.started or 0.0))
    unfinished = [record for record in records if record.finished is None]
    unfinished.sort(
        key=lambda record: (record.key in (journal.cancelled_at or ()), record.state is not StepState.RUNNING)
    )
    fraction, message = journal.progress or (None, None)
    fields.setdefault("attempt", journal.attempt)
    if journal.started is not None:
        fields["started_at"] = _from_epoch(journal.started)
    return TaskResult(
        task_id=task_id,
        status=status,
        created_at=_created(info),
        current_step=unfinished[0].key if unfinished and status is TaskStatus.PROCESSING else None,
        completed_steps=tuple(record.key for record in journal if record.state is StepState.COMPLETED),
        steps=tuple(_step(record) for record in records),
        progress=fraction,
        progress_message=message or None,
        **fields,
    )


def _created(info: _Info) -> datetime:
    first = _kept(info).get(wire.MEMO_CREATED)
    start = info.schedule_time if isinstance(info, ActivityExecutionInfo) else info.start_time
    try:
        return _from_stamp(wire.created_time(first) if first else start)
    except ValueError:  # written by hand
        return _from_stamp(start)


def _step(record: StepRecord) -> StepStatus:
    return StepStatus(
        key=record.key,
        state=record.state,
        attempts=record.calls + (record.state is StepState.RUNNING),
        started_at=_from_epoch(record.started),
        finished_at=_from_epoch(record.finished),
        last_error=str(record.error) if record.error else None,
        next_attempt_at=_from_epoch(record.due),
        child_task_id=record.child,
    )


def _last_error(journal: Journal) -> str | None:
    """Of what goes on: the error of the step (or the body) that failed last."""
    failing = [record for record in journal if record.error and record.finished is None]
    if journal.body.error:
        failing.append(journal.body)
    last = max(failing, key=lambda record: record.due or 0.0, default=None)
    return str(last.error) if last else None


async def _attempt_lost(failure: Failure, values: PayloadValues) -> str | None:
    """Why the last attempt has come to nothing, if that was its worker's fault."""
    if failure.WhichOneof("failure_info") == "timeout_failure_info":
        return "WorkerLostError: the worker of the last attempt was lost"
    if failure.application_failure_info.type != wire.ATTEMPT_LEFT:
        return None
    try:
        return (await values.plain_failure(failure)).message
    except Exception:  # of a worker with another key
        return "the last attempt was left to another worker"


def _from_stamp(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(UTC)


def _from_epoch(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
