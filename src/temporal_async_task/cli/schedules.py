"""The commands for runs that begin by the clock. Only ``create`` needs the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.cli.exits import ExitStatus
from temporal_async_task.cli.lookup import known_task, task_name, task_of_app
from temporal_async_task.cli.output import table
from temporal_async_task.cli.params import fitted, read_params
from temporal_async_task.cli.view import local_time
from temporal_async_task.engine.client import translated
from temporal_async_task.errors import TaskNotFoundError

if TYPE_CHECKING:
    from temporal_async_task.cli.output import Output
    from temporal_async_task.cli.reference import Application
    from temporal_async_task.schedules import ScheduleHandle, TaskSchedule


async def create(
    app: Application, output: Output, schedule_id: str, name: str, params: str | None, **options: Any
) -> ExitStatus:
    """Have runs begin by the clock."""
    task = task_of_app(app, name, "schedule create")
    given = read_params(params)
    await app.component.connect()
    handle = await task.schedule(schedule_id, fitted(app, task, given), **options)
    return await _tell(output, handle, "created")


async def list_schedules(app: Application, output: Output, name: str | None) -> ExitStatus:
    """Tell of the schedules of one task or of all."""
    await app.component.connect()
    names = [name] if name is not None else await _scheduled_names(app)
    found = [schedule for one in names async for schedule in known_task(app, one).schedules()]
    found.sort(key=lambda schedule: schedule.id)
    if output.as_json:
        output.document(found)
    elif found:
        rows = [
            (
                schedule.id,
                schedule.task_name,
                _when(schedule),
                "paused" if schedule.paused else "",
                "" if schedule.paused else _next(schedule),
                schedule.note,
            )
            for schedule in found
        ]
        output.show(table(["ID", "TASK", "WHEN", "", "NEXT", "NOTE"], rows))
    else:
        output.say("No schedules.")
    return ExitStatus.SUCCESS


async def pause(app: Application, output: Output, schedule_id: str, note: str) -> ExitStatus:
    """Start no runs until it is resumed."""
    handle = await _find(app, schedule_id)
    await handle.pause(note)
    return await _tell(output, handle, "paused")


async def resume(app: Application, output: Output, schedule_id: str, note: str) -> ExitStatus:
    """Start runs again when they are due."""
    handle = await _find(app, schedule_id)
    await handle.unpause(note)
    return await _tell(output, handle, "resumed")


async def trigger(app: Application, output: Output, schedule_id: str) -> ExitStatus:
    """Start a run now."""
    handle = await _find(app, schedule_id)
    await handle.trigger()
    return await _tell(output, handle, "triggered")


async def delete(app: Application, output: Output, schedule_id: str) -> ExitStatus:
    """Delete a schedule; its runs go on."""
    handle = await _find(app, schedule_id)
    before = await handle.describe()
    await handle.delete()
    if output.as_json:
        output.document(before)
    else:
        output.text(f"{schedule_id}: deleted.")
    return ExitStatus.SUCCESS


async def _find(app: Application, schedule_id: str) -> ScheduleHandle:
    """A schedule's handle, of the task that the server says it has."""
    await app.component.connect()
    client = app.component.client
    try:
        found = (await client.get_schedule_handle(schedule_id).describe()).raw_description
    except RPCError as error:
        if error.status in {RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT}:
            raise TaskNotFoundError(
                f"There is no schedule {schedule_id!r} in namespace {client.namespace!r}. `async-task schedule list` "
                f"tells which there are."
            ) from None
        raise translated(error, client) from error
    workflow_type = found.schedule.action.start_workflow.workflow_type.name
    name = task_name(workflow_type)
    if name is None:
        raise TaskNotFoundError(f"Schedule {schedule_id!r} is no task's: it starts {workflow_type!r}.")
    return await known_task(app, name).get_schedule(schedule_id)


async def _scheduled_names(app: Application) -> list[str]:
    client = app.component.client
    names: set[str] = set()
    try:
        async for found in await client.list_schedules():
            if name := task_name(found.raw_entry.info.workflow_type.name):
                names.add(name)
    except RPCError as error:
        raise translated(error, client) from error
    return sorted(names)


async def _tell(output: Output, handle: ScheduleHandle, done: str) -> ExitStatus:
    if output.as_json:
        output.document(await handle.describe())
    else:
        output.text(f"{handle.id}: {done}.")
    return ExitStatus.SUCCESS


def _when(schedule: TaskSchedule) -> str:
    if schedule.every is not None:
        return f"every {schedule.every:g} s"
    return "; ".join(schedule.cron) + (f" ({schedule.time_zone})" if schedule.time_zone else "")


def _next(schedule: TaskSchedule) -> str:
    return local_time(schedule.next_runs[0]) if schedule.next_runs else ""
