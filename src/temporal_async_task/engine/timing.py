"""How long a call may take, counted from when it begins: that a sync call waits for a thread does not count."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

T = TypeVar("T")


class CallTimeout:
    """Ends the block around a call, with ``TimeoutError``, once the call has taken too long.

    Args:
        seconds: From the call's begin; None for any.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._began: float | None = self._loop.time()  # set by a sync call in its thread
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    def counted_from_begin(self, call: Callable[[], T]) -> Callable[[], T]:
        """A sync call whose time begins with it, in its thread. Until then none passes."""
        self._began = None

        def begin() -> T:
            self._began = self._loop.time()
            return call()

        return begin

    @property
    def remaining(self) -> float | None:
        """Seconds that the call has left; all of them as long as it has not begun. None for any."""
        if self._seconds is None or self._began is None:
            return self._seconds
        return self._began + self._seconds - self._loop.time()

    @property
    def expired(self) -> bool:
        """Whether it is this that has ended the block."""
        return self._scope.expired()

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._scope.__aexit__(kind, error, trace)

    def _look(self) -> None:
        # The thread does not tell when the call begins: to wake the event loop for it costs more than to look again.
        left = self.remaining
        if left is None:
            return
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._scope.reschedule(self._loop.time())
