"""Which task a run belongs to: the application's, or one that only the server knows of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DescribeActivityExecutionRequest, DescribeWorkflowExecutionRequest
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.cli.exits import CommandError, ExitStatus
from temporal_async_task.engine import wire
from temporal_async_task.engine.backend import of_type
from temporal_async_task.engine.client import raw_client, translated
from temporal_async_task.engine.resume import find_remains
from temporal_async_task.engine.standalone import ServerTooOldError, StandaloneBackend
from temporal_async_task.engine.workflow_backend import WorkflowBackend
from temporal_async_task.errors import TaskNotFoundError
from temporal_async_task.task import Execution, TemporalAsyncTask

if TYPE_CHECKING:
    from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionResponse

    from temporal_async_task.cli.reference import AnyTask, Application
    from temporal_async_task.status import TaskResult, TaskStatus

    Run = tuple[AnyTask, TaskResult[Any]]

_AT_ONCE = 10
"""So many statuses are asked for at the same time."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A run, as the server's list has it."""

    begun: datetime
    name: str
    task_id: str
    execution: Execution


def task_of_app(app: Application, name: str, command: str) -> AnyTask:
    """A task of the application.

    Raises:
        CommandError: There is no application, or it has no such task.
    """
    if not app.tasks:
        raise CommandError(
            f"{command} needs your tasks, for the types of their params and their task queues. Name them with "
            f"--app module:attribute, or set ASYNC_TASK_APP."
        )
    task = app.task(name)
    if task is None:
        known = ", ".join(sorted(repr(task.name) for task in app.tasks))
        raise CommandError(f"{app.reference} has no task {name!r}. It has {known}.", ExitStatus.NOT_FOUND)
    return task


def known_task(app: Application, name: str, *, execution: Execution = "workflow", **options: Any) -> AnyTask:
    """The application's task of this name, or else one whose params and result are plain JSON."""
    task = app.task(name)
    if task is None or task.execution != execution:
        task = TemporalAsyncTask(name, _of_another_process, execution=execution, **options)
        task.set_client(app.component.client)
    return task


def _of_another_process(params: Any) -> Any:
    """The function of a task that this process does not have: it is asked about, and not run."""
    raise NotImplementedError(params)


async def find_task(app: Application, task_id: str, *, for_resume: bool = False) -> AnyTask:
    """The task that a run belongs to, by what the server says.

    Args:
        app: The application.
        task_id: The run's id.
        for_resume: With queue and times as the run itself had them, if it is not the application that has them.

    Raises:
        TaskNotFoundError: There is no such run, or it is a workflow of another kind.
    """
    try:
        found = await _described(app, task_id)
    except TaskNotFoundError:
        if (task := await _of_activity(app, task_id)) is None:
            raise
        return task
    info = found.workflow_execution_info
    name = task_name(info.type.name)
    if name is None:
        raise TaskNotFoundError(f"{task_id!r} is no task's run, but a workflow of type {info.type.name!r}.")
    task = app.task(name)
    if not for_resume or (task is not None and task.execution == "workflow"):
        return known_task(app, name)
    start = (await find_remains(raw_client(app.component.client), found)).start
    return known_task(
        app, name, task_queue=info.task_queue, heartbeat_timeout=start.heartbeat_timeout, timeout=start.timeout
    )


async def _of_activity(app: Application, task_id: str) -> AnyTask | None:
    """The task of a run that a standalone activity carries."""
    client = app.component.client
    request = DescribeActivityExecutionRequest(namespace=client.namespace, activity_id=task_id, include_input=True)
    try:
        found = await client.workflow_service.describe_activity_execution(request, retry=True)
    except RPCError as error:
        if error.status in {RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.UNIMPLEMENTED}:
            return None
        raise translated(error, client) from error
    name = task_name(found.info.activity_type.name)
    if name is None:
        return None
    options: dict[str, Any] = {"task_queue": found.info.task_queue, "execution": "activity"}
    with contextlib.suppress(IndexError, TypeError, ValueError):  # started by hand: it can be asked about, no more
        start = wire.TaskInput.from_payload(found.input.payloads[0])
        options |= {"heartbeat_timeout": start.heartbeat_timeout, "timeout": start.timeout}
    return known_task(app, name, **options)


async def _described(app: Application, task_id: str) -> DescribeWorkflowExecutionResponse:
    client = app.component.client
    request = DescribeWorkflowExecutionRequest(
        namespace=client.namespace, execution=WorkflowExecution(workflow_id=task_id)
    )
    try:
        return await client.workflow_service.describe_workflow_execution(request, retry=True)
    except RPCError as error:
        if error.status in {RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT}:
            raise TaskNotFoundError(
                f"There is no run {task_id!r} in namespace {client.namespace!r}: it was never submitted, or the "
                f"server's retention is over. `async-task list` tells which there are."
            ) from None
        raise translated(error, client) from error


def task_name(workflow_type: str) -> str | None:
    """The name of the task that a workflow type stands for; None for other people's workflows."""
    name = workflow_type.removeprefix(wire.WORKFLOW_PREFIX)
    return name if name and name != workflow_type else None


async def newest(app: Application, name: str | None, status: TaskStatus | None) -> AsyncGenerator[Run]:
    """Runs, newest first, a resumed one by its resume; of more than a thousand, those that go on come first.

    Args:
        app: The application. Both ways in which runs can be carried are looked at.
        name: Only runs of this task.
        status: Only runs with this status.
    """
    sources = [_told(app, found, status) for found in (_workflows(app, name, status), _activities(app, name, status))]
    try:
        heads = {source: await anext(source, None) for source in sources}
        while left := {source: head for source, head in heads.items() if head is not None}:
            source = max(left, key=lambda source: left[source][0])
            _, task, run = left[source]
            yield task, run
            heads[source] = await anext(source, None)
    finally:
        for source in sources:
            await source.aclose()


async def _told(
    app: Application, found: AsyncIterator[_Found], status: TaskStatus | None
) -> AsyncGenerator[tuple[datetime, AnyTask, TaskResult[Any]]]:
    """The statuses of the runs that are found."""
    while some := await _some_of(found):
        tasks = [known_task(app, one.name, execution=one.execution) for one in some]
        runs = await asyncio.gather(
            *(_status_or_none(task, one.task_id) for task, one in zip(tasks, some, strict=True))
        )
        for task, one, run in zip(tasks, some, runs, strict=True):
            # The server's list does not tell whether a run has begun, nor that one was resumed since.
            if run is not None and status in {None, run.status}:
                yield one.begun, task, run


async def _some_of(found: AsyncIterator[_Found]) -> list[_Found]:
    some: list[_Found] = []
    async for one in found:
        some.append(one)
        if len(some) == _AT_ONCE:
            break
    return some


async def _workflows(app: Application, name: str | None, status: TaskStatus | None) -> AsyncIterator[_Found]:
    async for one in WorkflowBackend(app.component.client).runs(_of_tasks("WorkflowType", name), status):
        of = task_name(one.workflow_type) or ""
        if name in {None, of}:
            yield _Found(one.start_time, of, one.id, "workflow")


async def _activities(app: Application, name: str | None, status: TaskStatus | None) -> AsyncIterator[_Found]:
    with contextlib.suppress(ServerTooOldError):  # then there are none
        async for one in StandaloneBackend(app.component.client).runs(_of_tasks("ActivityType", name), status):
            of = task_name(one.activity_type.name) or ""
            if name in {None, of}:
                yield _Found(one.schedule_time.ToDatetime(UTC), of, one.activity_id, "activity")


def _of_tasks(attribute: str, name: str | None) -> str:
    """A query's clause for the runs of a task, or of all."""
    if name is None:
        return f"{attribute} STARTS_WITH '{wire.WORKFLOW_PREFIX}'"
    return of_type(attribute, wire.WORKFLOW_PREFIX + name)


async def _status_or_none(task: AnyTask, task_id: str) -> TaskResult[Any] | None:
    try:
        return await task.get_status(task_id)
    except TaskNotFoundError:  # its retention is over, just now
        return None
