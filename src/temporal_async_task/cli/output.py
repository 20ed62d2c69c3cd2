"""What a command prints: its answer on stdout, for people or as one JSON document; messages on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import pydantic_core
from rich.console import Console
from rich.table import Table
from rich.text import Text

from temporal_async_task import errors
from temporal_async_task.cli.exits import CommandError, ExitStatus

if TYPE_CHECKING:
    from rich.console import RenderableType

_STATUSES: tuple[tuple[type[BaseException], ExitStatus], ...] = (
    (errors.ConfigError, ExitStatus.USAGE),
    (errors.ParamsError, ExitStatus.USAGE),
    (errors.PayloadTooLargeError, ExitStatus.USAGE),
    (errors.InvalidKeyError, ExitStatus.USAGE),
    (errors.TaskNotFoundError, ExitStatus.NOT_FOUND),
    (errors.TaskConflictError, ExitStatus.CONFLICT),
    (errors.ServerUnavailableError, ExitStatus.UNAVAILABLE),
    (TimeoutError, ExitStatus.TIMEOUT),
)
_UNBOUNDED = 100_000
"""Columns: output that goes into a pipe is for other programs, and is not cut to a terminal's width."""
_STYLES = {
    "completed": "green",
    "ok": "green",
    "failed": "red",
    "problem": "red",
    "running": "cyan",
    "processing": "cyan",
    "retrying": "yellow",
    "warning": "yellow",
}


class Output:
    """Where one command's answer goes. Stdout is its own from then on; what others print goes to stderr.

    Args:
        as_json: Print one JSON document and nothing else on stdout.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = _claimed_stdout()
        # Names, errors and results are other people's text: no markup, no emoji codes. NO_COLOR is Rich's own.
        width = None if self._stdout.isatty() else _UNBOUNDED
        self.console = Console(file=self._stdout, width=width, markup=False, emoji=False, highlight=False)

    @property
    def is_live(self) -> bool:
        """Whether what was printed can be redrawn."""
        return self.console.is_terminal and not self.console.is_dumb_terminal and not self.as_json

    def document(self, value: Any) -> None:
        """The answer as JSON."""
        self._write(to_json(value, indent=2))

    def text(self, text: str) -> None:
        """A part of the answer, on lines of its own: into a pipe as it is."""
        self._write(printable(text) if self.console.is_terminal else text)

    def show(self, renderable: RenderableType) -> None:
        """A part of the answer as Rich draws it."""
        with self.console.capture() as drawn:
            self.console.print(renderable)
        self._write("\n".join(line.rstrip() for line in drawn.get().splitlines()))

    def say(self, message: str) -> None:
        """A message, which is no part of the answer."""
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(f"{printable(message)}\n")
            sys.stderr.flush()

    def run(self, begin: Callable[[], Coroutine[Any, Any, ExitStatus]]) -> None:
        """Carry out a command and end the process with its exit status.

        Args:
            begin: Reads what the command needs, before any event loop runs, and gives the command.

        Raises:
            SystemExit: Always.
        """
        sys.exit(self._status_of(begin))

    def _status_of(self, begin: Callable[[], Coroutine[Any, Any, ExitStatus]]) -> ExitStatus:
        try:
            return asyncio.run(begin())
        except KeyboardInterrupt:
            return ExitStatus.INTERRUPTED
        except BrokenPipeError:
            return ExitStatus.BROKEN_PIPE
        except Exception as error:
            return self._tell(error)
        finally:
            with contextlib.suppress(BrokenPipeError):
                self._stdout.close()

    def _tell(self, error: Exception) -> ExitStatus:
        message = str(error)
        status = error.status if isinstance(error, CommandError) else _status_of(error)
        if not isinstance(error, CommandError | errors.AsyncTaskError | TimeoutError):
            message = f"Unexpected {type(error).__name__}: {error}. ASYNC_TASK_DEBUG=1 shows where."
        if os.environ.get("ASYNC_TASK_DEBUG"):
            traceback.print_exception(error)
        self.say(f"Error: {message}")
        if self.as_json:
            kind = type(error.__cause__ if isinstance(error, CommandError) and error.__cause__ else error).__name__
            with contextlib.suppress(BrokenPipeError):
                self.document({"error": {"type": kind, "message": message, "exit_status": status}})
        return status

    def _write(self, text: str) -> None:
        self._stdout.write(f"{text}\n")
        self._stdout.flush()


def _claimed_stdout() -> TextIO:
    """Stdout for the answer alone: what the application prints goes where messages go."""
    sys.stdout.flush()
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Where the locale's encoding lacks a letter, it is told by its number.
    return os.fdopen(answer, "w", encoding=sys.stdout.encoding, errors="backslashreplace")


def _status_of(error: Exception) -> ExitStatus:
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), ExitStatus.FAILED)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Whatever a task gives as JSON: models and dataclasses as objects, bytes as URL-safe base64, the rest as text."""
    return pydantic_core.to_json(
        value, indent=indent, bytes_mode="base64", inf_nan_mode="strings", fallback=str
    ).decode()


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Aligned columns. A cell that is a state of a run, a step or a check has its colour."""
    drawn = Table(*headings, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in drawn.columns:
        column.overflow = "fold"
    for row in rows:
        drawn.add_row(*(styled(str(cell)) for cell in row))
    return drawn


def styled(text: str) -> Text:
    """Text in the colour of the state that it names, if it does."""
    return Text(printable(text), style=_STYLES.get(text, ""))


def printable(text: str) -> str:
    """Other people's text without what would steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
