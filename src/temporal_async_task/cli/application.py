"""What can be typed: every command, its arguments and its help.

What the commands do is in modules that are imported when a command runs, and not before: ``--help`` and the shell's
completion need not wait for the Temporal SDK.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from temporal_async_task.cli import exits, schedule_group
from temporal_async_task.cli.options import (
    Address,
    App,
    AppOption,
    Common,
    Json,
    Namespace,
    Params,
    TaskId,
    Timeout,
    Wait,
)
from temporal_async_task.status import TaskStatus

# Plain help: what the terminal shows is what a pipe gets, and Rich need not be loaded for it.
command = typer.Typer(
    name="async-task",
    help="Run durable tasks on Temporal, submit them, and ask about their runs.",
    epilog=exits.HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command.add_typer(schedule_group.group, name="schedule")


def _version(wanted: bool) -> None:  # noqa: FBT001 - Typer's way to call it
    if wanted:
        from importlib.metadata import version

        typer.echo(version("temporal-async-task"))
        raise typer.Exit


@command.callback()
def _options(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    pass


# Processes


@command.command()
def dev(
    app: App,
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The server's; 0 for a free one.")] = 7233,
    ui_port: Annotated[int, typer.Option(min=0, max=65535, help="The web UI's; 0 for a free one.")] = 8233,
    db: Annotated[Path, typer.Option(help="The server's file.")] = Path(".async-task/dev.db"),
    in_memory: Annotated[bool, typer.Option("--in-memory", help="Keep no file: all is forgotten in the end.")] = False,
    reload: Annotated[bool, typer.Option(help="Start the worker anew when code changes.")] = True,
    watch: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", exists=True, help="Whose Python files are watched; may be repeated. Default: ."),
    ] = None,
    address: Annotated[str | None, typer.Option(metavar="127.0.0.1:PORT", help="The same as --port.")] = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Run everything for development: a Temporal server with its web UI, and a worker.

    The worker is started anew when Python files change, and everything stops together at Ctrl-C. The server listens
    where programs look for it by default, so `async-task submit` and your web application find it with no setting.
    """
    from temporal_async_task.cli import dev as server

    common = Common(app, address, namespace, as_json)
    output = common.output()
    output.run(
        lambda: server.serve(
            app,
            output,
            port=server.port_of(address, port),
            ui_port=ui_port,
            database=None if in_memory else db,
            namespace=namespace,
            watched=(watch or [Path()]) if reload else None,
        )
    )


@command.command()
def worker(
    app: App,
    *,
    max_concurrent_tasks: Annotated[int | None, typer.Option(min=1, help="How many tasks to run at once.")] = None,
    grace: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long running steps may take to finish at the end.")
    ] = None,
    tls: Annotated[bool | None, typer.Option(hidden=True)] = None,
    stop_with_stdin: Annotated[bool, typer.Option("--stop-with-stdin", hidden=True)] = False,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Work on tasks, until SIGTERM or Ctrl-C: then finish the running steps, hand over, and exit with 0.

    A second signal ends it without waiting for the running steps, which another worker makes again.
    """
    from temporal_async_task.cli import worker as process

    process.log_to_stderr()
    if stop_with_stdin:
        process.stop_with_stdin()
    common = Common(app, address, namespace, as_json)
    common.run(process.work, max_concurrent_tasks=max_concurrent_tasks, graceful_shutdown_timeout=grace, tls=tls)


# Runs


@command.command()
def submit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")],
    params: Params = None,
    *,
    task_id: Annotated[
        str | None, typer.Option("--id", help="The run's id. The same id and params twice is one run.")
    ] = None,
    delay: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Before the run begins.")] = None,
    priority: Annotated[int | None, typer.Option(min=1, max=5, help="1 is the soonest.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Submit a run, and print its id. Needs your tasks: --app, or ASYNC_TASK_APP."""
    from temporal_async_task.cli import runs

    Common(app, address, namespace, as_json).run(
        lambda app, output: runs.submit(
            app, output, name, params, wait=wait, timeout=timeout, task_id=task_id, delay=delay, priority=priority
        )
    )


@command.command()
def status(
    task_id: TaskId,
    *,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Live, until the run ends; exits with 1 if it fails.")
    ] = False,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Tell all about a run: status, steps, attempts, errors, progress. No worker need be up."""
    from temporal_async_task.cli import runs

    Common(app, address, namespace, as_json).run(lambda app, output: runs.status(app, output, task_id, watch=watch))


@command.command()
def result(
    task_id: TaskId,
    *,
    timeout: Timeout = None,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Await a run's end, and print its result: text as it is, anything else as JSON."""
    from temporal_async_task.cli import runs

    Common(app, address, namespace, as_json).run(lambda app, output: runs.result(app, output, task_id, timeout=timeout))


@command.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Of this task only.")] = None,
    *,
    only: Annotated[TaskStatus | None, typer.Option("--status", help="With this status only.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List the runs, newest first. The server's list is some moments behind."""
    from temporal_async_task.cli import runs

    Common(app, address, namespace, as_json).run(
        lambda app, output: runs.list_runs(app, output, name, only=only, limit=limit)
    )


@command.command()
def cancel(
    task_id: TaskId,
    *,
    reason: Annotated[str, typer.Option(help="Shown as the run's error.")] = "",
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Cancel a run: its code may clean up, and then it has failed. It can be resumed."""
    from temporal_async_task.cli import runs

    Common(app, address, namespace, as_json).run(lambda app, output: runs.cancel(app, output, task_id, reason=reason))


@command.command()
def resume(
    task_id: TaskId,
    *,
    redo: Annotated[list[str] | None, typer.Option(metavar="KEY", help="A step to do again; may be repeated.")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Have a failed or cancelled run go on from its last finished step."""
    from temporal_async_task.cli import runs

    Common(app, address, namespace, as_json).run(
        lambda app, output: runs.resume(app, output, task_id, redo=redo or (), wait=wait, timeout=timeout)
    )


# The rest


@command.command()
def doctor(
    *,
    app: AppOption = None,
    address: Address = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Look at settings, server, namespace, clock and queues; say what is wrong and what to do. Exits with 1 then."""
    from temporal_async_task.cli import doctor as diagnosis

    common = Common(app, address, namespace, as_json)
    output = common.output()
    output.run(lambda: diagnosis.diagnose(common.load, output))
