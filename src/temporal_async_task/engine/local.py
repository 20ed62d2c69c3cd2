"""Runs a task's body right here, with no server: what ``await task(params)`` does."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from temporalio.contrib.pydantic import pydantic_data_converter

from temporal_async_task.engine.body import bind_body
from temporal_async_task.engine.carrier import RunSettings
from temporal_async_task.engine.journal import Journal
from temporal_async_task.engine.outcome import Completed, Failed
from temporal_async_task.engine.runner import Runner
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.steps import step_var

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from temporal_async_task.registry import TaskDefinition

T = TypeVar("T")


class Memory:
    """A carrier that keeps nothing: there is no attempt after this one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._offset = time.time() - self._loop.time()

    def now(self) -> float:
        return self._offset + self._loop.time()  # in a test, that of a run in memory, whose time is virtual

    def apart(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            work(*args).send(None)
        except StopIteration as end:
            done.set_result(end.value)
        except Exception as error:
            done.set_exception(error)
        else:
            raise RuntimeError("There is nothing to wait for here: no codec, no store and no server.")
        return done

    def checkpoint(self) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    async def find_event(self, key: str, until: float) -> bytes | None:  # noqa: ARG002
        return None

    def note(self) -> None:
        pass


async def run_here(task: TaskDefinition, params: Any) -> Any:
    """Run the body to its end; its own error is raised as it is."""
    values = PayloadValues(pydantic_data_converter)
    settings = RunSettings(
        task_id=f"local-{uuid.uuid4()}",
        task_name=task.name,
        origin=uuid.uuid4().hex,
        retry_policy=task.retry_policy,
        step_timeout=task.step_timeout,
        in_place=float("inf"),  # every wait is spent here
        local=True,
        events=False,
        params=params,
    )
    step_var.set(None)  # a child of a step, in memory
    runner = Runner(settings, Journal(), values, Memory())
    outcome = await runner.run(bind_body(task.function, (params,) if task.takes_params else (), runner))
    match outcome:
        case Completed(result):
            return values.convert(await values.unseal(result), task.result_type)
        case Failed(error):
            raise error
        case _:
            raise RuntimeError(f"A body with no server cannot end as {outcome}")
