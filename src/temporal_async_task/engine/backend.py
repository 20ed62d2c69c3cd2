"""The seam between a task and what carries its runs: start, status, wait, list, resume, cancel and send.

Needs no worker: all answers are the server's.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from temporalio.api.common.v1 import Payload
from temporalio.client import Client
from temporalio.common import Priority

from temporal_async_task.engine import wire
from temporal_async_task.engine.client import raw_client
from temporal_async_task.engine.digest import digest
from temporal_async_task.engine.journal import Journal
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.errors import (
    DecryptionError,
    ParamsError,
    PayloadTooLargeError,
    ResultError,
    TaskConflictError,
    TaskNotFoundError,
)
from temporal_async_task.status import TaskResult, TaskStatus

_REMEMBERED = 10_000  # runs that were started here, which ``wait`` need not look for
_UNQUOTABLE = re.compile(r"""['"\\]""")


@dataclass(frozen=True, slots=True)
class TaskAddress:
    """What the backend has to know of a task."""

    name: str
    workflow_type: str
    task_queue: str
    params_type: Any
    result_type: Any
    heartbeat_timeout: float
    timeout: float | None


@dataclass(frozen=True, slots=True)
class EncodedParams:
    """Params as the server gets them."""

    payload: Payload
    digest: str
    """Of the params, before any codec."""
    sealed_digest: str
    """What a run keeps of it, for the next submit to compare."""


class Backend(ABC):
    """Starts the runs of tasks and asks about them, in one of the ways in which Temporal can carry them."""

    def __init__(self, client: Client) -> None:
        self._converter = client.data_converter
        self._client = raw_client(client)
        try:
            self._home: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:  # a client that is set before any loop runs
            self._home = None
        self._started: OrderedDict[tuple[str, str], str] = OrderedDict()

    @property
    def client(self) -> Client:
        """The connection, for payloads as they are."""
        return self._client

    def _values(self, task_id: str) -> PayloadValues:
        return PayloadValues(self._converter, self._client.namespace, task_id, self._home)

    def _remember(self, task: TaskAddress, task_id: str, run_id: str) -> None:
        """Note the server's own id of a run that was started here. Called in any thread."""
        key = task.workflow_type, task_id
        self._started.pop(key, None)
        self._started[key] = run_id
        if len(self._started) > _REMEMBERED:
            self._started.popitem(last=False)

    @abstractmethod
    async def start(
        self,
        task: TaskAddress,
        task_id: str,
        params: Any,
        *,
        delay: float = 0.0,
        priority: Priority = Priority.default,
    ) -> None:
        """Start a run, or find that it was started before with the same params."""

    @abstractmethod
    async def status(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        """All that the server knows of a run."""

    async def wait(self, task: TaskAddress, task_id: str) -> TaskResult[Any]:
        """Wait until a run has ended, however long that takes; return its status, result and error."""
        run_id = self._started.get((task.workflow_type, task_id))
        if run_id is not None:
            try:
                return await self._wait_for(task, task_id, run_id)
            except TaskNotFoundError:  # its retention is over, and its id may be in use again
                self._started.pop((task.workflow_type, task_id), None)
        return await self._wait_for(task, task_id, await self._run_id(task, task_id))

    @abstractmethod
    async def _run_id(self, task: TaskAddress, task_id: str) -> str:
        """The server's own id of a run; of one that was resumed, the last."""

    @abstractmethod
    async def _wait_for(self, task: TaskAddress, task_id: str, run_id: str) -> TaskResult[Any]:
        """As ``wait``, given the server's own id of a run. Follows the run through resumes."""

    @abstractmethod
    def ids(self, task: TaskAddress, status: TaskStatus | None) -> AsyncIterator[str]:
        """The ids of a task's runs, newest first. The status filters only as far as visibility can tell: check each."""

    @abstractmethod
    async def resume(self, task: TaskAddress, task_id: str, redo: Collection[str]) -> None:
        """Start a run that has failed or was cancelled again, with its params and its journal."""

    @abstractmethod
    async def cancel(self, task: TaskAddress, task_id: str, reason: str) -> None:
        """Ask for a run's cancellation; nothing happens to one that has ended."""

    @abstractmethod
    async def send(self, task: TaskAddress, task_id: str, key: str, value: Any) -> None:
        """Send an event to a run."""

    async def encode_params(self, task: TaskAddress, task_id: str, params: Any) -> EncodedParams:
        """Params for a run with this id.

        Raises:
            ParamsError: They do not fit the task's annotation, or cannot be serialised.
            PayloadTooLargeError: They are larger than the server takes.
        """
        values = self._values(task_id)
        try:
            plain = values.check(params, task.params_type)
            ours = digest(plain, params)  # first: a codec may work in place
            payload = await values.stored(plain)
        except ResultError as error:
            raise ParamsError(f"The params of task {task.name!r} do not fit: {error}") from error
        except PayloadTooLargeError as error:
            raise PayloadTooLargeError(f"The params of task {task.name!r}: {error}") from None
        return EncodedParams(payload, ours, await values.seal_text(ours))

    async def _check_params(self, task_id: str, started_with: Sequence[Payload], ours: str) -> None:
        """Refuse an id whose run was started with other params than those whose digest is ``ours``."""
        try:
            sealed = wire.TaskInput.from_payload(started_with[0]).digest
        except (IndexError, TypeError, ValueError):  # started by hand
            sealed = ""
        if await self._values(task_id).unseal_digest(sealed) != ours:
            raise TaskConflictError(
                f"The task id {task_id!r} was submitted before with other params. A task id stands for one run with "
                f"one set of params: choose another id, or submit the same params."
            )

    async def _reopened(
        self, task: TaskAddress, task_id: str, journal: Sequence[Payload], redo: Collection[str]
    ) -> Journal:
        """The journal of a run that has ended, for another try."""
        try:
            return (await self._values(task_id).decode_journal(journal)).reopen(redo)
        except KeyError as error:
            raise TaskConflictError(
                f"Run {task_id!r} of task {task.name!r} has no step {error.args[0]!r} to do again."
            ) from None
        except ValueError as error:
            raise DecryptionError(
                f"The journal of run {task_id!r} of task {task.name!r} cannot be read here: {error}. This process "
                f"needs the workers' version of temporal-async-task, and their data_converter."
            ) from error


def of_type(attribute: str, workflow_type: str) -> str:
    """A visibility query's clause for the runs of a task, and perhaps of others whose names begin alike."""
    # The server's SQL stores find no text with quotes or backslashes, however they are escaped.
    plain = _UNQUOTABLE.split(workflow_type, maxsplit=1)[0]
    comparison = "=" if plain == workflow_type else "STARTS_WITH"
    return f"{attribute} {comparison} '{plain}'"


# Refusals that do not depend on what carries the task.


def is_anothers(task_id: str) -> TaskConflictError:
    return TaskConflictError(
        f"The task id {task_id!r} is in use, by a run of another task or workflow. Choose another id."
    )


def unknown(task: TaskAddress, task_id: str) -> TaskNotFoundError:
    return TaskNotFoundError(f"There is no run {task_id!r} of task {task.name!r}.")


def unknown_anywhere(task_id: str) -> TaskNotFoundError:
    return TaskNotFoundError(
        f"There is no task run {task_id!r}: it was never submitted, or the server's retention is over."
    )


def goes_on(task: TaskAddress, task_id: str) -> TaskConflictError:
    return TaskConflictError(f"Run {task_id!r} of task {task.name!r} is going on; there is nothing to resume.")


def has_completed(task: TaskAddress, task_id: str) -> TaskConflictError:
    return TaskConflictError(
        f"Run {task_id!r} of task {task.name!r} has completed; get its result, or submit another run."
    )


def resumed_elsewhere(task: TaskAddress, task_id: str) -> TaskConflictError:
    return TaskConflictError(f"Run {task_id!r} of task {task.name!r} was resumed by somebody else.")
