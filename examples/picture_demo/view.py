"""What the demo shows while it runs: one line for each picture, redrawn in a terminal, else printed when it changes."""

import os
import shutil
import time
from collections.abc import Sequence
from typing import Any, TextIO

from verdict import STEPS

from temporal_async_task import TaskResult

# Of runs and of steps: TaskStatus and StepState are strings.
_COLOURS = {"completed": "32", "failed": "31", "running": "36", "retrying": "33"}  # green, red, cyan, yellow
_WIDTH = 18  # of a step: "generate completed"


class LiveView:
    """Writes to a terminal, or to a log."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._redraws = terminal
        self._colours = terminal and not os.environ.get("NO_COLOR")  # https://no-color.org
        self._began = time.monotonic()
        self._lines: list[str] = []

    def say(self, text: str) -> None:
        """Something that happened, with the seconds since the beginning. It stays above the pictures' lines."""
        self._erase()
        self.print(f"{time.monotonic() - self._began:5.1f} s  {text}")
        self._draw()

    def show(self, runs: Sequence[TaskResult[Any]]) -> None:
        """Where the pictures stand now."""
        lines = [self._line(run) for run in runs]
        if lines == self._lines:
            return
        if self._redraws:
            self._erase()
            self._lines = lines[: shutil.get_terminal_size().lines - 1]  # what has scrolled away cannot be redrawn
            self._draw()
        else:
            changed = [line for line in lines if line not in self._lines]
            self._lines = lines
            for line in changed:
                self.say(line)

    def leave(self) -> None:
        """Let the pictures' lines stand as they are, and go on below them."""
        self._lines = []

    def print(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def bold(self, text: str) -> str:
        return self._painted(text, "1")

    def _line(self, run: TaskResult[Any]) -> str:
        cells = [f"{run.task_id:<11}", self._painted(f"{run.status:<11}", _COLOURS.get(run.status))]
        states = {step.key: step.state for step in run.steps}
        for key in STEPS:
            state = states.get(key)
            cells.append(self._painted(f"{key} {state or '-':<{_WIDTH - len(key)}}", state and _COLOURS.get(state)))
        return " ".join(cells).rstrip()

    def _painted(self, text: str, colour: str | None) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colour and self._colours else text

    def _draw(self) -> None:
        if self._redraws:
            for line in self._lines:
                # A line that wraps would take two rows, and _erase would miss one: the terminal is not to wrap.
                self._out.write(f"\x1b[?7l{line}\x1b[?7h\n")
            self._out.flush()

    def _erase(self) -> None:
        if self._redraws and self._lines:
            self._out.write(f"\x1b[{len(self._lines)}A\x1b[J")


def as_table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of aligned columns; a number stands to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(f"{cell:>{w}}" if isinstance(cell, int) else f"{cell:<{w}}" for cell, w in cells))
    return [line.rstrip() for line in lines]
