"""The command that works on tasks, until a signal."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

from temporal_async_task.cli.exits import CommandError, ExitStatus

if TYPE_CHECKING:
    from temporal_async_task.cli.output import Output
    from temporal_async_task.cli.reference import Application


async def work(app: Application, output: Output) -> ExitStatus:
    """Work on the application's tasks until SIGTERM or SIGINT, then drain."""
    if not app.tasks:
        raise CommandError("worker needs your tasks. Name them, as in `async-task worker shop:component`.")
    component = app.component
    # Before the component's own handlers are there: a signal while nothing is at work ends the process as usual.
    await component.connect()
    names = sorted(task.name for task in app.tasks)
    queues = sorted({task.task_queue for task in app.tasks})
    address, namespace = component.config.temporal_address, component.config.namespace
    if output.as_json:
        output.document(
            {
                "address": address,
                "namespace": namespace,
                "tasks": names,
                "task_queues": queues,
                "pid": os.getpid(),
            }
        )
    output.say(
        f"Worker {os.getpid()}: {', '.join(names)} on {', '.join(queues)} at {address}, namespace {namespace}. "
        f"Ctrl-C or SIGTERM stops it; a second one at once."
    )
    await component.run()
    output.say(f"Worker {os.getpid()}: stopped.")
    return ExitStatus.SUCCESS


def log_to_stderr() -> None:
    """Show the library's log, and the application's, unless the application has its own way with it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def stop_with_stdin() -> None:
    """Stop as at SIGTERM when stdin is closed: the process at its other end is gone."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="stdin", daemon=True).start()
