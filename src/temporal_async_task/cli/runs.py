"""The commands that submit a run, or ask about one.

Only ``submit`` needs the application. The others find out from the server which task a run belongs to, and work with
or without it: with it, results have the application's types, its codec is used, and its configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.live import Live

from temporal_async_task.cli.exits import ExitStatus
from temporal_async_task.cli.lookup import find_task, newest, task_of_app
from temporal_async_task.cli.output import table
from temporal_async_task.cli.params import fitted, read_params
from temporal_async_task.cli.view import as_text, local_time, run_view, summary
from temporal_async_task.errors import ResultError, TaskFailedError, in_words
from temporal_async_task.status import TaskResult, TaskStatus

if TYPE_CHECKING:
    from temporal_async_task.cli.output import Output
    from temporal_async_task.cli.reference import AnyTask, Application

_WATCH_INTERVAL = 0.5
"""Seconds between two looks at a run."""


async def submit(
    app: Application,
    output: Output,
    name: str,
    params: str | None,
    *,
    wait: bool,
    timeout: float | None,
    **options: Any,
) -> ExitStatus:
    """Submit a run, and with ``wait`` await its end."""
    task = task_of_app(app, name, "submit")
    given = read_params(params)
    await app.component.connect()
    task_id = await task.submit(fitted(app, task, given), **options)
    if wait:
        output.say(f"Submitted {task_id}")
        return await _await_end(output, task, task_id, timeout)
    if output.as_json:
        output.document({"task_id": task_id, "task": task.name})
    else:
        output.text(task_id)
    return ExitStatus.SUCCESS


async def status(app: Application, output: Output, task_id: str, *, watch: bool) -> ExitStatus:
    """Tell all about a run, once or until it ends."""
    await app.component.connect()
    task = await find_task(app, task_id)
    if not watch:
        run = await task.get_status(task_id)
        _print_run(output, task, run)
        return ExitStatus.SUCCESS
    if output.is_live:
        run = await task.get_status(task_id)
        with Live(run_view(task.name, run), console=output.console, auto_refresh=False) as live:
            while not _has_ended(run):
                await asyncio.sleep(_WATCH_INTERVAL)
                run = await task.get_status(task_id)
                live.update(run_view(task.name, run), refresh=True)
        return _status_of_end(run)
    told = ""
    while True:
        run = await task.get_status(task_id)
        if not output.as_json and (now := summary(run)) != told:
            told = now
            output.text(told)
        if _has_ended(run):
            break
        await asyncio.sleep(_WATCH_INTERVAL)
    if output.as_json:
        _print_run(output, task, run)
    return _status_of_end(run)


async def result(app: Application, output: Output, task_id: str, *, timeout: float | None) -> ExitStatus:
    """Await a run's end, and print its result."""
    await app.component.connect()
    return await _await_end(output, await find_task(app, task_id), task_id, timeout)


async def list_runs(
    app: Application, output: Output, name: str | None, *, only: TaskStatus | None, limit: int
) -> ExitStatus:
    """Tell of the newest runs, of one task or of all."""
    await app.component.connect()
    if name is not None and app.tasks:
        task_of_app(app, name, "list")
    found: list[tuple[AnyTask, TaskResult[Any]]] = []
    async with contextlib.aclosing(newest(app, name, only)) as every:
        async for one in every:
            found.append(one)
            if len(found) > limit:
                break
    shown = found[:limit]
    if output.as_json:
        output.document([_document(task, run) for task, run in shown])
    elif shown:
        rows = [
            (
                run.task_id,
                task.name,
                run.status,
                local_time(run.created_at) if run.created_at else "",
                run.attempt or "",
                _in_short(run),
            )
            for task, run in shown
        ]
        output.show(table(["ID", "TASK", "STATUS", "SUBMITTED", "ATTEMPT", ""], rows))
    else:
        output.say("No runs.")
    if len(found) > limit:
        output.say(f"There are more: --limit {limit} has cut the list.")
    return ExitStatus.SUCCESS


async def cancel(app: Application, output: Output, task_id: str, *, reason: str) -> ExitStatus:
    """Ask for a run's cancellation."""
    await app.component.connect()
    task = await find_task(app, task_id)
    before = await task.get_status(task_id)
    if not _has_ended(before):
        await task.cancel(task_id, reason)
    if output.as_json:
        output.document({"task_id": task_id, "task": task.name, "requested": not _has_ended(before)})
    elif _has_ended(before):
        output.text(f"{task_id} had ended before ({before.status}); nothing to cancel.")
    else:
        output.text(f"{task_id}: cancellation requested.")
    return ExitStatus.SUCCESS


async def resume(
    app: Application, output: Output, task_id: str, *, redo: Collection[str], wait: bool, timeout: float | None
) -> ExitStatus:
    """Have a failed or cancelled run go on, and with ``wait`` await its end."""
    await app.component.connect()
    task = await find_task(app, task_id, for_resume=True)
    await task.resume(task_id, redo=redo)
    if wait:
        output.say(f"Resumed {task_id}")
        return await _await_end(output, task, task_id, timeout)
    if output.as_json:
        output.document({"task_id": task_id, "task": task.name})
    else:
        output.text(f"{task_id}: goes on.")
    return ExitStatus.SUCCESS


async def _await_end(output: Output, task: AnyTask, task_id: str, timeout: float | None) -> ExitStatus:
    with contextlib.suppress(TaskFailedError, ResultError):  # which the status tells, too
        await task.result(task_id, timeout=timeout)
    run = await task.get_status(task_id)
    if output.as_json:
        output.document(_document(task, run))
    elif run.status is TaskStatus.COMPLETED and run.error is None:
        output.text(as_text(run.result))
    else:
        output.say(f"Run {task_id!r} {run.status}: {in_words(run.error_type or 'Error', run.error or '')}")
    return _status_of_end(run)


def _print_run(output: Output, task: AnyTask, run: TaskResult[Any]) -> None:
    if output.as_json:
        output.document(_document(task, run))
    else:
        output.show(run_view(task.name, run))


def _document(task: AnyTask, run: TaskResult[Any]) -> dict[str, Any]:
    return {"task": task.name} | {field.name: getattr(run, field.name) for field in fields(run)}


def _has_ended(run: TaskResult[Any]) -> bool:
    return run.status in {TaskStatus.COMPLETED, TaskStatus.FAILED}


def _status_of_end(run: TaskResult[Any]) -> ExitStatus:
    done = run.status is TaskStatus.COMPLETED and run.error is None
    return ExitStatus.SUCCESS if done else ExitStatus.FAILED


def _in_short(run: TaskResult[Any]) -> str:
    """What there is to say of a run, on one line."""
    text = run.last_error or run.current_step or ""
    if run.status is TaskStatus.FAILED:
        text = in_words(run.error_type or "Error", run.error or "")
    return text.splitlines()[0][:120] if text else ""
