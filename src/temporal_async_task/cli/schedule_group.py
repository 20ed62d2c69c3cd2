"""What can be typed after ``async-task schedule``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from temporal_async_task.cli.options import Address, AppOption, Common, Json, Namespace, Note, Params, ScheduleId

group = typer.Typer(help="Runs that begin by the clock.", no_args_is_help=True, rich_markup_mode=None)


class OverlapPolicy(StrEnum):
    """What happens when a run is due and the one before it goes on."""

    SKIP = "skip"
    BUFFER_ONE = "buffer_one"
    BUFFER_ALL = "buffer_all"
    CANCEL_OTHER = "cancel_other"
    TERMINATE_OTHER = "terminate_other"
    ALLOW_ALL = "allow_all"


@group.command("create")
def schedule_create(
    schedule_id: ScheduleId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")],
    params: Params = None,
    *,
    cron: Annotated[list[str] | None, typer.Option(help="When runs begin, as in '0 3 * * *'; may be repeated.")] = None,
    every: Annotated[float | None, typer.Option(metavar="SECONDS", help="Whole seconds between two runs.")] = None,
    overlap: Annotated[OverlapPolicy, typer.Option(help="If a run is due while another goes on.")] = OverlapPolicy.SKIP,
    time_zone: Annotated[str | None, typer.Option(help="Whose clock --cron means; default UTC.")] = None,
    jitter: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Begin later at random, by up to.")] = 0.0,
    paused: Annotated[bool, typer.Option("--paused", help="Start no runs yet.")] = False,
    note: Note = "",
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Have runs begin by the clock. Needs your tasks: --app, or ASYNC_TASK_APP."""
    from temporal_async_task.cli import schedules

    Common(app, address, namespace, as_json).run(
        lambda app, output: schedules.create(
            app,
            output,
            schedule_id,
            name,
            params,
            cron=cron,
            every=every,
            overlap=overlap.value,
            time_zone=time_zone,
            jitter=jitter,
            paused=paused,
            note=note,
        )
    )


@group.command("list")
def schedule_list(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Of this task only.")] = None,
    *,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List the schedules."""
    from temporal_async_task.cli import schedules

    Common(app, address, namespace, as_json).run(lambda app, output: schedules.list_schedules(app, output, name))


@group.command("pause")
def schedule_pause(
    schedule_id: ScheduleId,
    *,
    note: Note = "",
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Start no runs until the schedule is resumed. Those that it has started go on."""
    from temporal_async_task.cli import schedules

    Common(app, address, namespace, as_json).run(lambda app, output: schedules.pause(app, output, schedule_id, note))


@group.command("resume")
def schedule_resume(
    schedule_id: ScheduleId,
    *,
    note: Note = "",
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Start runs again when they are due."""
    from temporal_async_task.cli import schedules

    Common(app, address, namespace, as_json).run(lambda app, output: schedules.resume(app, output, schedule_id, note))


@group.command("trigger")
def schedule_trigger(
    schedule_id: ScheduleId,
    *,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Start a run now, too."""
    from temporal_async_task.cli import schedules

    Common(app, address, namespace, as_json).run(lambda app, output: schedules.trigger(app, output, schedule_id))


@group.command("delete")
def schedule_delete(
    schedule_id: ScheduleId,
    *,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Delete a schedule. The runs that it has started go on."""
    from temporal_async_task.cli import schedules

    Common(app, address, namespace, as_json).run(lambda app, output: schedules.delete(app, output, schedule_id))
