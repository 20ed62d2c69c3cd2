"""Which tasks a process knows, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol

from typing_extensions import TypeVar

from temporal_async_task.errors import DuplicateTaskError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from temporal_async_task.retry import RetryPolicy


class TaskDefinition(Protocol):
    """A task, as the engine needs it."""

    @property
    def name(self) -> str: ...

    @property
    def function(self) -> Callable[..., Any]: ...

    @property
    def takes_params(self) -> bool: ...

    @property
    def params_type(self) -> Any: ...

    @property
    def result_type(self) -> Any: ...

    @property
    def retry_policy(self) -> RetryPolicy: ...

    @property
    def step_timeout(self) -> float: ...

    @property
    def task_queue(self) -> str: ...


T = TypeVar("T", bound=TaskDefinition, default=TaskDefinition)


class Registry(Generic[T]):
    """Tasks, each with a name of its own. Of a component: a payload can choose only among these."""

    def __init__(self) -> None:
        self._tasks: dict[str, T] = {}

    def add(self, task: T) -> None:
        """Add a task.

        Raises:
            DuplicateTaskError: Another task has its name.
        """
        known = self._tasks.setdefault(task.name, task)
        if known is not task:
            raise DuplicateTaskError(
                f"Two tasks are named {task.name!r}: {_origin(known)} and {_origin(task)}. A task's name is unique in "
                f"the application: rename one with @async_task(name=...)."
            )

    def find(self, name: str) -> T | None:
        return self._tasks.get(name)

    def __iter__(self) -> Iterator[T]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)


def _origin(task: TaskDefinition) -> str:
    function = getattr(task, "__wrapped__", task.function)  # of one that reports, what was written
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
