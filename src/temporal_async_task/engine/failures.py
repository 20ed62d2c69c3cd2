"""Errors, to and from the journal: what a step has failed with, raised in the body in this attempt or a later one."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from temporal_async_task.engine.journal import ErrorInfo
from temporal_async_task.errors import (
    AsyncTaskError,
    PayloadTooLargeError,
    PollTimeoutError,
    ResultError,
    StepFailedError,
    StepOutcomeUnknownError,
    StoredValueLostError,
    WaitTimeoutError,
    WorkerLostError,
)

if TYPE_CHECKING:
    from temporal_async_task.engine.journal import StepRecord


def only_leaf(error: BaseException) -> BaseException:
    """Of a group with a single error in it, that error."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return only_leaf(group.exceptions[0]) if len(group.exceptions) == 1 else group
    return error


def worker_lost(record: StepRecord) -> ErrorInfo:
    """The error of a step, or of a body, that has taken too many workers down."""
    return ErrorInfo.named("WorkerLostError", f"its worker was lost with it {record.lost} times in a row")


def recorded_failure(record: StepRecord) -> AsyncTaskError:
    """The error of a step that has failed for good, in this attempt or an earlier one."""
    info = record.error or ErrorInfo.named("Exception", "")
    match info.type:
        case "PayloadTooLargeError":
            return PayloadTooLargeError(info.message)
        case "ResultError":
            return ResultError(info.message)
        case "StoredValueLostError":
            return StoredValueLostError(info.message)
        case "WorkerLostError":
            return WorkerLostError(record.key, record.calls, info.type, info.message)
        case "StepOutcomeUnknownError":
            return StepOutcomeUnknownError(record.key, record.calls, info.type, info.message)
        case "PollTimeoutError":
            return PollTimeoutError(record.key, record.calls, info.type, info.message)
        case "WaitTimeoutError":
            return WaitTimeoutError(record.key, record.calls, info.type, info.message)
        case _:
            return StepFailedError(record.key, record.calls, info.type, info.message)
