"""Calls from other threads to an event loop, with as few wake-ups as possible."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import TYPE_CHECKING

if sys.platform == "win32":
    from asyncio import ProactorEventLoop as _EventLoop
else:
    from asyncio import SelectorEventLoop as _EventLoop

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable


class Mailbox:
    """Calls to be made on an event loop, posted in other threads. One wake-up brings all that were posted meanwhile.

    A wake-up is a write to a socket, by a thread that lets go of the interpreter for it: it costs several times what
    is to be called, which is mostly no more than the end of a future.

    Args:
        loop: Where the calls are made.
        wake: Its ``call_soon_threadsafe``.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[Callable[[], None]], object]) -> None:
        self._loop = loop
        self._wake = wake
        self._posted: deque[asyncio.Handle] = deque()
        self._woken = False

    def post(
        self, call: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Call something on the loop, soon, and after what was posted before.

        Raises:
            RuntimeError: The loop is closed.
        """
        if self._loop.is_closed():
            raise RuntimeError("Event loop is closed")
        handle = asyncio.Handle(call, args, self._loop, context)
        self._posted.append(handle)
        if not self._woken:
            self._woken = True
            self._wake(self._deliver)
        return handle

    def _deliver(self) -> None:
        self._woken = False  # first: what is posted from now on and not delivered here wakes the loop again
        for _ in range(len(self._posted)):
            handle = self._posted.popleft()
            if not handle.cancelled():
                handle._run()  # noqa: SLF001 - as an event loop does


class WokenOnceEventLoop(_EventLoop):
    """An event loop of asyncio's own kind that is woken once for all that other threads bring meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._mailbox = Mailbox(self, super().call_soon_threadsafe)

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self._mailbox.post(callback, *args, context=context)
