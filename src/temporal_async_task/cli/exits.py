"""How a command ends: its exit status, and which error leads to it. Imports nothing that takes time."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """What the shell sees."""

    SUCCESS = 0
    FAILED = 1
    """The run failed or was cancelled, doctor has found something wrong, or an error that no other status names."""
    USAGE = 2
    """Arguments, params or configuration that cannot be used."""
    APP = 3
    """The application cannot be loaded."""
    NOT_FOUND = 4
    """There is no such run, task or schedule."""
    UNAVAILABLE = 5
    """No server answers."""
    CONFLICT = 6
    """The id is taken, or the run's state forbids it."""
    TIMEOUT = 7
    """``--timeout`` is over; the run goes on."""
    INTERRUPTED = 130
    """Ctrl-C."""
    BROKEN_PIPE = 141
    """Whoever read the output has left."""


HELP = """Exit status: 0 success · 1 the run failed or was cancelled, doctor found something wrong, or another error ·
2 arguments, params or configuration that cannot be used · 3 the application cannot be loaded · 4 no such run, task or
schedule · 5 no server answers · 6 the id is taken, or the run's state forbids it · 7 --timeout is over ·
130 Ctrl-C · 141 the reader of the output has left."""
"""The same, for the end of ``--help``."""


class CommandError(Exception):
    """A command cannot do what it was asked.

    Args:
        message: What is wrong, and what to do.
        status: The command's exit status.
    """

    def __init__(self, message: str, status: ExitStatus = ExitStatus.USAGE) -> None:
        super().__init__(message)
        self.status = status


class AppError(CommandError):
    """The application that a command was given cannot be loaded."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitStatus.APP)
