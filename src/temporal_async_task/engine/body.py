"""The four shapes of a task's body, made into one: an async function of the params that asks the runner for steps."""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import TYPE_CHECKING, Any

from temporal_async_task.engine.signatures import is_async
from temporal_async_task.errors import AsyncTaskError, StepUsageError
from temporal_async_task.steps import Result, Step

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    from temporal_async_task.engine.runner import Runner


def bind_body(function: Callable[..., Any], args: tuple[Any, ...], runner: Runner) -> Callable[[], Awaitable[Any]]:
    """The body of one run, ready for ``Runner.run``."""
    if inspect.isasyncgenfunction(function):
        return lambda: _run_async_generator(function(*args), runner)
    if inspect.isgeneratorfunction(function):
        return lambda: _run_generator(function(*args), runner)
    if is_async(function):
        runner.returns_after(function)
        return functools.partial(function, *args)
    return lambda: runner.invoke(functools.partial(function, *args), runner.body_limit)


async def _run_generator(generator: Generator[Any, Any, Any], runner: Runner) -> Any:
    """Drive a plain generator. Its code may block, so every stretch of it runs in a thread."""
    resume: Callable[[], Any] = functools.partial(next, generator)
    stretch: asyncio.Future[tuple[bool, Any]] | None = None
    try:
        while True:
            with runner.busy():
                stretch = runner.in_thread(runner.body_limit.counted_from_begin(functools.partial(_advance, resume)))
                try:
                    done, value = await asyncio.shield(stretch)
                except asyncio.CancelledError as error:
                    await stretch  # it cannot be stopped; the cancellation is raised at the `yield` that it comes to
                    resume = functools.partial(generator.throw, error)
                    continue
            if done:
                return value
            if isinstance(value, Result):
                return value.value  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            try:
                result = await runner.step(_step_of(value).spec)
            except (AsyncTaskError, asyncio.CancelledError) as error:
                resume = functools.partial(generator.throw, error)
            else:
                resume = functools.partial(generator.send, result)
    finally:
        if stretch is not None:
            stretch.cancel()
        if not getattr(generator, "gi_running", False):  # else it is in its thread, and out of reach
            generator.close()


def _advance(resume: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return False, resume()
    except StopIteration as stop:
        return True, stop.value


async def _run_async_generator(generator: AsyncGenerator[Any, Any], runner: Runner) -> Any:
    resume = generator.asend(None)
    try:
        while True:
            try:
                value = await resume
            except StopAsyncIteration:
                return None
            if isinstance(value, Result):
                return value.value  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            try:
                result = await runner.step(_step_of(value).spec)
            except (AsyncTaskError, asyncio.CancelledError) as error:
                resume = generator.athrow(error)
            else:
                resume = generator.asend(result)
    finally:
        await generator.aclose()


def _step_of(value: Any) -> Step:
    if isinstance(value, Step):
        return value
    raise StepUsageError(
        f"The task yielded {type(value).__name__}. Yield Step(key, call, ...) for each step, and "
        f"Result(value) at the end of an async generator."
    )
