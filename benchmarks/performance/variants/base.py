"""What every variant has: tasks of the same kinds, a worker, and a client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from performance.place import Place

CALL = "call"
"""A task that is one call, written as simply as the variant allows."""
CHAIN = "chain"
"""A task of n steps, one after the other."""
FAN = "fan"
"""A task of n steps at once."""
HOLD = "hold"
"""A task of one step whose call takes n seconds."""
SLEEP = "sleep"
"""A task that makes a call, and then waits for n seconds by the variant's own means."""
BACKOFF = "backoff"
"""A task whose one step fails, and is called again after n seconds; it fails again."""
POLL = "poll"
"""A task that asks every n seconds whether something is ready, which it never is."""
CRASH = "crash"
"""A task of two steps: the first returns, the second hangs until the worker is killed."""
KINDS = (CALL, CHAIN, FAN, HOLD, SLEEP, BACKOFF, POLL, CRASH)
HEARTBEAT_TIMEOUT = 5.0
"""Seconds after which a lost worker is noticed, where that is for the variant to say."""


class Peer(ABC):
    """A client of one variant."""

    kinds: ClassVar[Sequence[str]] = (CALL, CHAIN)
    """What it can do."""
    has_status: ClassVar[bool] = True

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:  # noqa: B027 - few have anything to close
        """Disconnect."""

    @abstractmethod
    async def submit(self, kind: str, n: int, task_id: str, *, queue: str | None = None) -> Any:
        """Have a task run, and return what ``result`` needs.

        Args:
            kind: One of ``kinds``.
            n: See there.
            task_id: A new one.
            queue: One without a worker, to measure what the submit alone takes. None: the worker's.
        """

    @abstractmethod
    async def result(self, submitted: Any) -> Any:
        """Wait for a task's end."""

    async def status(self, submitted: Any) -> Any:
        """Ask where a task stands; how many of its steps have finished, where the variant can tell that."""
        raise NotImplementedError
