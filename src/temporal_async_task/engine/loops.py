"""Where the user's async code runs: an event loop of its own, apart from the one that talks to the server.

So a blocking call in a task's async code stops neither the heartbeats nor the polling of its worker, nor what the
engine does by itself. It does stop the other async code on that loop; the watch finds it, and says which task, and
where; what has not begun there yet begins elsewhere.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import itertools
import logging
import sys
import sysconfig
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from temporalio import activity

from temporal_async_task.engine.mailbox import WokenOnceEventLoop
from temporal_async_task.engine.unwind import EXITS, doing, exit_refused, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

logger = logging.getLogger("temporal_async_task")

STALL = 0.25
"""Seconds for which code may hold an event loop before it is reported, and nothing more is begun there."""
_SLOW = 1.0  # seconds after which a loop counts as blocked, though no line of the application's is seen to do it
_WATCH_INTERVAL = 0.1
_STOP_TIMEOUT = 2.0
_NOT_USERS = (str(Path(__file__).parents[1]), *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_numbers = itertools.count(1)
T = TypeVar("T")


class UserLoop:
    """An event loop in a daemon thread: code that does not come back cannot hold the process at its exit."""

    def __init__(self) -> None:
        self._loop = WokenOnceEventLoop()
        prepare(self._loop)
        self._thread = threading.Thread(target=self._run, name=f"async-task-loop-{next(_numbers)}", daemon=True)
        self._beat = time.monotonic()
        self._asked = False
        self._reported = False
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        while True:
            try:
                self._loop.run_forever()
            except EXITS as error:  # of a callback; a task's is refused in the task
                refused = exit_refused(error)
                logger.exception("%s", refused)
                self.call_soon(_nothing)  # brings what was posted with it
            else:
                self._loop.close()  # here, for whoever stops it may not have waited for so long
                return

    def run(self, coro: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on this loop, with the caller's context variables but for the SDK's activity."""
        context = contextvars.copy_context()
        # Not in an activity: its heartbeat() would overwrite the journal, on a loop that is not the activity's.
        context.run(activity._current_context.set, None)  # type: ignore[arg-type]  # noqa: SLF001
        return context.run(asyncio.run_coroutine_threadsafe, coro, self._loop)

    def call_soon(self, call: Callable[..., object], *args: object) -> None:
        """Call something on this loop; nothing happens once it is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def check(self) -> float:
        """For how many seconds the loop has not answered; reported once when it is too long."""
        if not self._asked:
            self._asked, self._beat = True, time.monotonic()
            self.call_soon(self._answer)
            return 0.0
        stalled = time.monotonic() - self._beat
        if stalled > STALL and not self._reported and (where := self._where()) is not None:
            self._reported = True
            logger.warning(
                "Blocking code in async code of %s: %s. It holds up the other tasks of this worker; make the call in a "
                "sync function (a step runs it in a thread), or use an async client.",
                self._current_task(),
                where,
            )
        return stalled

    def is_blocked(self) -> bool:
        """Whether code holds the loop, and it is not just the machine that is slow."""
        stalled = self.check()
        return stalled > STALL and (self._reported or stalled > _SLOW)

    def _answer(self) -> None:
        self._asked = self._reported = False

    def _current_task(self) -> str:
        try:
            task = asyncio.current_task(self._loop)
        except RuntimeError:
            task = None
        return doing.get(task, task.get_name()) if task else "a callback"

    def _where(self) -> str | None:
        """The innermost source line of the application's own, not of a library; None if there is none.

        Without one, it is the machine that is slow.
        """
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]  # noqa: SLF001 - documented for this use
        frame = frames.get(self._thread.ident or 0)
        own = [line for line in traceback.extract_stack(frame) if not line.filename.startswith(_NOT_USERS)]
        return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if frame and own else None

    def ask_to_stop(self) -> None:
        """Have the loop stop as soon as its code lets it."""
        self.call_soon(self._loop.stop)

    def stop(self, timeout: float = _STOP_TIMEOUT) -> None:
        """Stop the loop, if its code lets it; waits for at most ``timeout`` seconds."""
        self.ask_to_stop()
        self._thread.join(timeout)


def _nothing() -> None:
    """Wakes a loop."""


class UserLoops:
    """The event loop for the users' code; and another while that one is blocked, for what begins meanwhile.

    All code shares one loop as long as it can, so that a client that is made once (``httpx.AsyncClient``) serves all.

    Args:
        shared: Or else each attempt has a loop of its own, where no other code can hold it up.
    """

    def __init__(self, *, shared: bool = True) -> None:
        self._loops = [UserLoop()]
        self._sync = UserLoop()
        self._shared = shared
        self._taken: set[UserLoop] = set()

    def for_sync_code(self) -> UserLoop:
        """A loop for attempts whose code runs in threads alone: nobody's async code can hold them up there."""
        return self._sync

    def pick(self) -> UserLoop:
        """A loop that answers."""
        for loop in self._loops:
            if loop not in self._taken and not loop.is_blocked():
                return loop
        self._loops.append(UserLoop())
        return self._loops[-1]

    async def run(self, make: Callable[[UserLoop], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine, made for its loop, on one that answers; on another if that is blocked before it begins."""
        while True:
            loop = self.pick()
            start = _Start(make, loop)
            if not self._shared:
                self._taken.add(loop)
            try:
                running = asyncio.wrap_future(loop.run(start.run()))
                while not running.done() and not start.is_taken:
                    await asyncio.wait((running,), timeout=STALL)
                    if not start.is_taken and loop.is_blocked() and start.take():
                        break
                else:
                    return cast("T", await asyncio.shield(running))
            finally:
                self._taken.discard(loop)

    async def watch(self) -> None:
        """Report code that blocks a loop. Runs on the SDK's loop, for as long as there is something to watch."""
        while True:
            for loop in (*self._loops, self._sync):
                loop.check()
            await asyncio.sleep(_WATCH_INTERVAL)

    def stop(self) -> None:
        """Stop all loops; waits no longer for many than for one."""
        loops = (*self._loops, self._sync)
        for loop in loops:
            loop.ask_to_stop()
        deadline = time.monotonic() + _STOP_TIMEOUT
        for loop in loops:
            loop.stop(max(deadline - time.monotonic(), 0.0))


class _Start(Generic[T]):
    """Something to be begun once: on the loop to which it was given, or elsewhere."""

    def __init__(self, make: Callable[[UserLoop], Coroutine[Any, Any, T]], loop: UserLoop) -> None:
        self._make = make
        self._loop = loop
        self._once = threading.Lock()

    @property
    def is_taken(self) -> bool:
        return self._once.locked()

    def take(self) -> bool:
        """Whether it is the caller's to begin."""
        return self._once.acquire(blocking=False)

    async def run(self) -> T | None:
        return await self._make(self._loop) if self.take() else None
