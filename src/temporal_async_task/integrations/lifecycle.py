"""Where a record stands, and how that follows from its events. Pure functions: no database, no Temporal.

::

    pending ──▶ queued ──▶ processing ──▶ completed
       │          ▲  └──────────┬─┴────▶ failed
       │          └─────────────┼──────────┘ (another try, which may be refused, too: failed again)
       └────────────────────────┴─────────▲ (refused at submit)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime


class RecordStatus(StrEnum):
    """Where a record stands. All but the first are types of events, too."""

    PENDING = "pending"
    """Committed; its task was not started yet."""
    QUEUED = "queued"
    """Its task was started, or resumed, and waits for a worker."""
    PROCESSING = "processing"
    """A worker has begun."""
    COMPLETED = "completed"
    """Ended with a result: ``response``."""
    FAILED = "failed"
    """Ended without: ``error``. While ``due_at`` is set, it will be tried again."""


_NEXT = {
    RecordStatus.PENDING: {RecordStatus.QUEUED, RecordStatus.FAILED},
    RecordStatus.QUEUED: {RecordStatus.PROCESSING, RecordStatus.COMPLETED, RecordStatus.FAILED},
    RecordStatus.PROCESSING: {RecordStatus.PROCESSING, RecordStatus.COMPLETED, RecordStatus.FAILED},
    RecordStatus.COMPLETED: set[RecordStatus](),
    RecordStatus.FAILED: {RecordStatus.QUEUED, RecordStatus.FAILED},
}
NOT_AGAIN = frozenset({"WorkerLostError", "StepOutcomeUnknownError", "PollTimeoutError", "WaitTimeoutError"})
"""Failures of steps that are left to a person: another try would take more workers down, or might pay twice."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened to a record."""

    type: RecordStatus
    at: datetime
    payload: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class RecordState:
    """What follows from a record's events."""

    status: RecordStatus = RecordStatus.PENDING
    attempts: int = 0
    external_id: str | None = None
    response: Any = None
    error: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None

    def can(self, event: RecordStatus) -> bool:
        """Whether such an event may come next."""
        return event in _NEXT[self.status]

    def after(self, event: Event) -> RecordState:
        """The state that follows.

        Raises:
            ValueError: Such an event cannot come next.
        """
        if not self.can(event.type):
            raise ValueError(f"a record that is {self.status} cannot become {event.type}")
        known = replace(self, external_id=event.payload.get("external_id", self.external_id))
        match event.type:
            case RecordStatus.QUEUED:
                return replace(
                    self, status=event.type, attempts=self.attempts + 1, error=None, started_at=None, completed_at=None
                )
            case RecordStatus.COMPLETED:
                return replace(
                    known, status=event.type, response=event.payload.get("result"), error=None, completed_at=event.at
                )
            case RecordStatus.FAILED:
                return replace(known, status=event.type, error=event.payload.get("error", ""), completed_at=event.at)
            case _:
                return replace(known, status=event.type, started_at=self.started_at or event.at)


def state_after(events: Iterable[Event]) -> RecordState:
    """The state of a record with these events, from its first on.

    Raises:
        ValueError: They are not in an order in which they can have happened.
    """
    state = RecordState()
    for event in events:
        state = state.after(event)
    return state
