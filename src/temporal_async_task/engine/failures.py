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

_PLAIN = {kind.__name__: kind for kind in (PayloadTooLargeError, ResultError, StoredValueLostError)}
_OF_STEPS = {
    kind.__name__: kind for kind in (WorkerLostError, StepOutcomeUnknownError, PollTimeoutError, WaitTimeoutError)
}


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
    if plain := _PLAIN.get(info.type):
        return plain(info.message)
    return _OF_STEPS.get(info.type, StepFailedError)(record.key, record.calls, info.type, info.message)
