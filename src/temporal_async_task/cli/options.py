"""The options that commands share, and what each command begins with."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from temporal_async_task.cli.exits import ExitStatus
    from temporal_async_task.cli.output import Output
    from temporal_async_task.cli.reference import Application

_APP_VARIABLE = "ASYNC_TASK_APP"
App = Annotated[
    str,
    typer.Argument(
        metavar="APP",
        envvar=_APP_VARIABLE,
        help="module:attribute of a component, a task, a list of tasks or an integration.",
    ),
]
AppOption = Annotated[
    str | None,
    typer.Option("--app", metavar="APP", envvar=_APP_VARIABLE, help="module:attribute of your tasks, as for worker."),
]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="The Temporal server. Before the environment and the files.")
]
Namespace = Annotated[str | None, typer.Option(help="Temporal's namespace. Before the environment and the files.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
TaskId = Annotated[str, typer.Argument(metavar="ID", help="The run's id.")]
ScheduleId = Annotated[str, typer.Argument(metavar="ID", help="The schedule's id.")]
Params = Annotated[
    str | None, typer.Argument(metavar="PARAMS", help="JSON; '-' reads it from stdin, '@FILE' from a file.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Await the run's end, and print its result.")]
Timeout = Annotated[
    float | None, typer.Option(min=0, metavar="SECONDS", help="How long to wait for the end. The run goes on after it.")
]
Note = Annotated[str, typer.Option(help="Shown with the schedule.")]


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    app: str | None
    address: str | None
    namespace: str | None
    as_json: bool

    def load(self, **arguments: Any) -> Application:
        from temporal_async_task.cli.reference import load_application

        return load_application(self.app, temporal_address=self.address, namespace=self.namespace, **arguments)

    def output(self) -> Output:
        from temporal_async_task.cli.output import Output

        return Output(as_json=self.as_json)

    def run(self, act: Callable[[Application, Output], Coroutine[Any, Any, ExitStatus]], **arguments: Any) -> None:
        output = self.output()
        output.run(lambda: act(self.load(**arguments), output))
