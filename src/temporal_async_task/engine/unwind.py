"""How an attempt's code is stopped in the middle of it, without being told that it was cancelled.

An attempt that ends early (a step backs off for ten minutes, the worker shuts down) has to leave a body that waits
somewhere. ``Task.cancel()`` would raise ``CancelledError`` there, and a body's ``except CancelledError: refund()``
would run though nobody cancelled anything. So every asyncio task of an attempt runs in a thin coroutine around the
user's own, which turns the ``CancelledError`` that asyncio throws into an ``Unwind`` while the attempt is unwound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, Protocol
from weakref import WeakKeyDictionary


class Unwind(BaseException):
    """Leaves the attempt's code. Not an ``Exception``: code that handles errors must not see it."""


class TaskScope(Protocol):
    """What owns the asyncio tasks of one attempt."""

    @property
    def unwinding(self) -> bool: ...

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """A task was created by this scope's code."""


scope: ContextVar[TaskScope | None] = ContextVar("scope", default=None)
"""The attempt to which the running code belongs."""


doing: WeakKeyDictionary[asyncio.Task[Any], str] = WeakKeyDictionary()
"""A label for each asyncio task of an attempt, for messages in the log."""


def apart() -> Context:
    """The context for work that is not the body's, and is not unwound with it."""
    context = copy_context()
    context.run(scope.set, None)
    return context


EXITS = (SystemExit, KeyboardInterrupt)
"""Errors that asyncio raises through the event loop, from whatever runs on it."""


def exit_refused(error: BaseException) -> RuntimeError:
    """What is raised, or told, in the place of an exit: it would end every other task on the loop."""
    return RuntimeError(f"The task's code raised {type(error).__name__}; it cannot end the worker.")


class _Unwindable(Coroutine[Any, Any, Any]):
    """A coroutine that receives ``Unwind`` where asyncio throws ``CancelledError`` to stop it, and does not exit."""

    __slots__ = ("_coro", "_scope")

    def __init__(self, coro: Coroutine[Any, Any, Any], scope: TaskScope | None) -> None:
        self._coro = coro
        self._scope = scope

    def send(self, value: Any) -> Any:
        try:
            return self._coro.send(value)
        except EXITS as error:
            raise exit_refused(error) from error

    def throw(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
        error = typ if val is None else val
        if self._scope is not None and self._scope.unwinding and isinstance(error, asyncio.CancelledError):
            error = Unwind()
        try:
            return self._coro.throw(error if tb is None else error.with_traceback(tb))
        except EXITS as exit_error:
            raise exit_refused(exit_error) from exit_error

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        return self._coro.__await__()

    def __getattr__(self, name: str) -> Any:
        """For asyncio's debugging output (``cr_frame``, ``__qualname__``): the user's coroutine shows."""
        return getattr(self._coro, name)


def _new_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
    """Create a task; one that an attempt's code creates (``gather``, ``TaskGroup``) belongs to the attempt."""
    context = options.get("context")
    owner = context.get(scope) if context is not None else scope.get()
    task = asyncio.Task(_Unwindable(coro, owner), loop=loop, **options)
    if owner is not None:
        owner.adopt(task)
    return task


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # A TaskGroup that is unwound leaves before its children, and asyncio would complain of each.
    if not isinstance(context.get("exception"), Unwind):
        loop.default_exception_handler(context)


def prepare(loop: asyncio.AbstractEventLoop) -> None:
    """Make an event loop fit to run attempts."""
    loop.set_task_factory(_new_task)  # type: ignore[arg-type]  # typeshed wants its own Protocol
    loop.set_exception_handler(_report)
