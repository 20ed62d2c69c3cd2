"""How an attempt may end."""

from __future__ import annotations

from dataclasses import dataclass

UNREADABLE_DELAY = 10.0
"""Seconds before a run that this worker cannot serve is offered again, to another or to the next deploy."""
NEVER = float("inf")
"""When something is due that waits however long it takes."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The body returned; ``result`` is encoded."""

    result: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The run is over, without a result."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Parked:
    """The attempt is given back until ``due`` (seconds since the epoch), or until one of ``events`` comes."""

    due: float
    reason: str
    events: tuple[str, ...] = ()
    left: bool = False
    """This worker cannot serve the run; another may."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The body has left after its cancellation."""

    reason: str


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another attempt has begun."""


Outcome = Completed | Failed | Parked | Cancelled | Superseded
