"""What a run looks like from outside: one frozen picture, made from the server's answer alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from datetime import datetime

T_co = TypeVar("T_co", covariant=True)


class TaskStatus(StrEnum):
    """Where a run stands."""

    PENDING = "pending"
    """Submitted; no attempt has begun."""
    PROCESSING = "processing"
    """At least one attempt has begun. A run in backoff, asleep or polling is processing too."""
    COMPLETED = "completed"
    """Ended with a result."""
    FAILED = "failed"
    """Ended without one: failed, cancelled, terminated or timed out; ``error_type`` tells them apart."""


class StepState(StrEnum):
    """Where a step stands."""

    RUNNING = "running"
    """Its call is being made."""
    RETRYING = "retrying"
    """Its last call failed or was interrupted; it will be called again."""
    WAITING = "waiting"
    """Asleep, between two polls, or waiting for an event."""
    COMPLETED = "completed"
    """Its result is in the journal; it is never called again."""
    FAILED = "failed"
    """Out of retries, or failed for good."""


@dataclass(frozen=True, slots=True)
class StepStatus:
    """One step of a run."""

    key: str
    state: StepState
    attempts: int
    """Calls that were made, the running one included. A call lost with its worker does not count."""
    started_at: datetime | None = None
    """When it was first called."""
    finished_at: datetime | None = None
    last_error: str | None = None
    """``Type: message`` of the last failed call."""
    next_attempt_at: datetime | None = None
    """When it is due again, while it backs off or waits."""
    child_task_id: str | None = None
    """The id of the run that it has submitted, if it is a child task."""


@dataclass(frozen=True)  # no slots: before Python 3.12, `TaskResult[str](...)` could not be made with them
class TaskResult(Generic[T_co]):
    """All that the server knows of a run. Times are aware, in UTC."""

    task_id: str
    status: TaskStatus
    result: T_co | None = None
    error: str | None = None
    """Of a failed run: the error's message. Of a completed one: why its result cannot be read."""
    error_type: str | None = None
    """Of a failed run: the name of the error's class, as ``StepFailedError`` or ``TaskCancelledError``."""
    created_at: datetime | None = None
    started_at: datetime | None = None
    """When the first attempt began."""
    completed_at: datetime | None = None
    """When the run ended, with a result or without."""
    current_step: str | None = None
    """The step that runs or is waited for; with several at once, one that runs, and the first of these."""
    completed_steps: tuple[str, ...] = ()
    """Keys of the finished steps, in the order in which they finished."""
    steps: tuple[StepStatus, ...] = field(default=())
    """Every step that was asked for, in the order in which they began."""
    attempt: int = 0
    """Which attempt at the task's body runs or is due; 0 before the first."""
    last_error: str | None = None
    """``Type: message`` of what went wrong last, while the run goes on."""
    next_retry_at: datetime | None = None
    """When the next attempt is due, while the run backs off, sleeps or polls."""
    progress: float | None = None
    """What the task last told with ``progress()``, 0 to 1."""
    progress_message: str | None = None
