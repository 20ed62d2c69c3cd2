"""A task as a step of another: its run is submitted once, and looked at until it has ended."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from temporal_async_task.errors import TaskConflictError, TaskFailedError, TaskNotFoundError, unreadable_result
from temporal_async_task.status import TaskResult, TaskStatus

if TYPE_CHECKING:
    from temporal_async_task.engine.journal import StepRecord
    from temporal_async_task.steps import ChildTask


@dataclass(frozen=True, slots=True)
class Ready:
    """A child's result, which may be None."""

    value: Any


def pause_after(looks: int) -> float:
    """Seconds until a child is looked at again: soon at first, for those that are quick."""
    return float(min(0.25 * 2 ** min(looks, 10), 15.0))


class Child:
    """The run that a step stands for.

    Args:
        task: The task that it is a run of.
        args: What ``submit`` is called with, and its keywords.
        options: Those of ``submit``, but for ``task_id``.
        own_id: The id that the parent's code gives it.
        step_id: The id that it has of its step, if there is no such.
    """

    def __init__(
        self, task: ChildTask, args: tuple[Any, ...], options: dict[str, Any], own_id: str | None, step_id: str
    ) -> None:
        self._task = task
        self._args = args
        self._options = options
        self._own_id = own_id
        self._id = own_id or step_id

    async def look(self, record: StepRecord) -> Ready | None:
        """Submit the run if that was not done yet (which ``record.child`` tells), and look whether it has ended.

        Raises:
            TaskFailedError: It has failed.
            TaskConflictError: Its id is another's.
            ResultError, StorageError: It has completed, and its result cannot be read.
        """
        run = await self._find() if record.child is not None else None
        if run is None:
            await self._submit(record)
        elif record.calls == 0 and run.status is TaskStatus.FAILED:
            # The first look since the parent was resumed. So is what made it fail; unless somebody else was quicker.
            with contextlib.suppress(TaskConflictError):
                await self._task.resume(self._id)
        run = await self._task.get_status(self._id)
        if run.status is TaskStatus.FAILED:
            raise TaskFailedError(self._id, run.error_type or "Error", run.error or "")
        if run.status is not TaskStatus.COMPLETED:
            return None
        if run.error is not None:  # its result cannot be read
            raise unreadable_result(run.error_type, f"the result of run {self._id!r}: {run.error}")
        return Ready(run.result)

    async def _find(self) -> TaskResult[Any] | None:
        try:
            return await self._task.get_status(self._id)
        except TaskNotFoundError:
            return None

    async def _submit(self, record: StepRecord) -> None:
        record.child = self._id  # before it is submitted, so that a cancellation meanwhile reaches it
        try:
            await self._task.submit(*self._args, **(self._options | {"task_id": self._id}))
        except TaskConflictError:
            # An attempt that was lost has submitted it, and the params were others then; or it is no child.
            if self._own_id is not None or await self._find() is None:
                record.child = None
                raise
