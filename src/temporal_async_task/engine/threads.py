"""Where the user's sync code runs: daemon threads, which cannot hold the process at its exit."""

from __future__ import annotations

import concurrent.futures
import itertools
import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_numbers = itertools.count(1)
T = TypeVar("T")


class _Call(concurrent.futures.Future[T]):
    """A call to be made in a thread. Cancelled while it is being made, it is left, and goes on."""

    def __init__(self, leave: Callable[[], None]) -> None:
        super().__init__()
        self._leave = leave
        self._once = threading.Lock()
        self._is_left = False

    def cancel(self) -> bool:
        if super().cancel():
            return True
        with self._once:
            if self.running() and not self._is_left:
                self._is_left = True
                self._leave()
        return False

    def make(self, call: Callable[[], T]) -> bool:
        """Make the call. Returns whether it was left meanwhile."""
        if not self.set_running_or_notify_cancel():
            return False
        try:
            result = call()
        except BaseException as error:  # it is raised where the call is awaited
            with self._once:
                self.set_exception(error)
        else:
            with self._once:
                self.set_result(result)
        return self._is_left


class DaemonThreads(concurrent.futures.Executor):
    """A pool of daemon threads for sync calls.

    The standard pool's threads are joined when the interpreter exits, so one call that hangs would hold the process
    past its grace period. An idle thread stays for the next call. A call that nobody waits for any more, and that goes
    on all the same, does not count: however many hang, there are threads for the others.
    """

    def __init__(self, max_workers: int) -> None:
        self._max_workers = max_workers
        self._work: queue.SimpleQueue[tuple[_Call[Any], Callable[[], Any]] | None]
        self._work = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._count = 0
        self._free = 0  # of the count: threads that are idle or starting, each spoken for by one queued call
        self._left = 0  # of the count: threads whose call was left
        self._is_shut_down = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        if self._is_shut_down:
            raise RuntimeError("The worker has stopped; it makes no more calls.")
        future: _Call[T] = _Call(self._leave)
        self._work.put((future, lambda: fn(*args, **kwargs)))
        with self._lock:
            self._add_thread_if_short()
        return future

    def _add_thread_if_short(self) -> None:
        if self._work.qsize() > self._free and self._count - self._left < self._max_workers:
            self._count += 1
            self._free += 1
            name = f"async-task-call-{next(_numbers)}"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def _leave(self) -> None:
        """A call that is being made is not waited for any more: its thread may never be free again."""
        with self._lock:
            self._left += 1
            self._add_thread_if_short()

    def _begin(self) -> None:
        """A thread has a call."""
        with self._lock:
            self._free -= 1
            self._add_thread_if_short()  # a call that came just now may have counted on this thread

    def _end(self, was_left: bool) -> bool:  # noqa: FBT001 - what a call has returned
        """A thread's call has ended. Whether the thread stays: after a call that was left it may be one too many."""
        with self._lock:
            self._left -= was_left
            stays = self._count - self._left <= self._max_workers
            self._free += stays
            self._count -= not stays
            return stays

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            self._begin()
            future, call = item
            del item
            was_left = future.make(call)
            del future, call
            if not self._end(was_left):
                return
        self._work.put(None)  # for the others

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002
        """Let the threads go once they are done; nothing is waited for."""
        self._is_shut_down = True
        self._work.put(None)
