"""What an attempt is given, and the interfaces through which it reaches storage, time and the engine's event loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future

    from temporal_async_task.retry import RetryPolicy

T = TypeVar("T")

IN_PLACE = 0.9
"""Seconds. Shorter waits are spent in the attempt, as the server's timer has a floor of about a second. It is a little
less than one, because part of a wait of one second has passed by the time it is looked at."""


class Values(Protocol):
    """Encodes and decodes what the user's code passes around."""

    def serialise(self, value: Any) -> Any:
        """The value by the application's converter, whose code may take its time: made where the call was made."""
        ...

    def pack(self, plain: Any) -> bytes:
        """What ``serialise`` has made as it is stored, where there is no codec."""
        ...

    async def seal(self, plain: Any) -> bytes:
        """What ``serialise`` has made as it is stored: by the codec, and by the store of large values."""
        ...

    async def unseal(self, data: bytes) -> Any:
        """What ``seal`` was given."""
        ...

    def convert(self, plain: Any, type_hint: Any, /) -> Any:
        """What ``serialise`` has made, decoded to the type."""
        ...

    @property
    def has_codec(self) -> bool:
        """Whether ``seal`` and ``unseal`` do anything that may take time, or fail, or belong to an event loop."""
        ...


class Carrier(Protocol):
    """What keeps the journal, and tells the time."""

    def now(self) -> float:
        """Seconds since the epoch, by a clock that all attempts of the run share."""
        ...

    def apart(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Do work of the engine's on an event loop that no user's code can hold up. Called in any thread.

        What has not ended with the attempt is cancelled.
        """
        ...

    def checkpoint(self) -> Future[None]:
        """Make the journal durable, as it is now; it is when the future is done. Called in any thread.

        It never fails. If the attempt may not write any more, ``Runner.supersede()`` is called, and this stays pending.
        """
        ...

    async def find_event(self, key: str, until: float) -> bytes | None:
        """An event that has come until then, whether or not the attempt was given it."""
        ...

    def note(self) -> None:
        """Make the journal durable some time soon. Called in any thread."""
        ...


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a runner has to know of its task and its run."""

    task_id: str
    task_name: str
    origin: str
    """A UUID made when the run was submitted; idempotency keys derive from it."""
    retry_policy: RetryPolicy
    step_timeout: float | None = None
    deadline: float | None = None
    timeout: float | None = None
    in_place: float = IN_PLACE
    local: bool = False
    """No server: a child task is run on the spot."""
    events: bool = True
    """Whether events from outside can come."""
    attempt: int = 1
    params: Any = None
    log_errors: bool = True
    """Whether the log may show what errors say. Not where it is encrypted on the server."""
