"""How a run looks in a terminal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from temporal_async_task.cli.output import printable, styled, table, to_json
from temporal_async_task.errors import in_words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from temporal_async_task.status import StepStatus, TaskResult

_BAR = 20
"""Columns of the progress bar."""


def run_view(task_name: str, run: TaskResult[Any]) -> RenderableType:
    """All that is known of a run: a head, and a line for each step."""
    now = datetime.now(UTC)
    head = [("Run", run.task_id), ("Task", task_name), ("Status", str(run.status))]
    head += _times(run, now)
    if run.progress is not None:
        full = round(run.progress * _BAR)
        bar = "#" * full + "." * (_BAR - full)
        head.append(("Progress", f"{bar} {run.progress:.0%} {run.progress_message or ''}".rstrip()))
    if run.attempt > 1:
        head.append(("Attempt", str(run.attempt)))
    if run.last_error:
        head.append(("Last error", run.last_error))
    if run.next_retry_at:
        head.append(("Goes on", _in(run.next_retry_at, now)))
    if run.error_type is not None:
        head.append(("Error", in_words(run.error_type, run.error or "")))
    if run.completed_at and run.error is None:
        head.append(("Result", as_text(run.result)))
    parts: list[RenderableType] = [_line(label, value) for label, value in head]
    if run.steps:
        rows = [_row(step, now) for step in run.steps]
        parts += [Text(), table(["STEP", "STATE", "ATTEMPTS", "TIME", ""], rows)]
    return Group(*parts)


def summary(run: TaskResult[Any]) -> str:
    """A run on one line, for output that cannot be redrawn."""
    steps = " ".join(f"{step.key}={step.state}" for step in run.steps)
    told = in_words(run.error_type, run.error or "") if run.error_type else ""
    return printable(" ".join(part for part in (str(run.status), steps, told) if part))


def as_text(value: Any) -> str:
    """A result: text as it is, the rest as JSON."""
    if isinstance(value, str):
        return value
    return to_json(value)


def local_time(time: datetime) -> str:
    """A moment as people read it, by this machine's clock on the wall."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _line(label: str, value: str) -> Text:
    return Text.assemble((f"{label:<11}", "bold"), styled(value))


def _times(run: TaskResult[Any], now: datetime) -> list[tuple[str, str]]:
    if run.created_at is None:
        return []
    text = local_time(run.created_at)
    if run.completed_at:
        return [("Submitted", f"{text}, ended after {_length(run.completed_at - run.created_at)}")]
    return [("Submitted", f"{text}, {_length(now - run.created_at)} ago")]


def _row(step: StepStatus, now: datetime) -> tuple[str, ...]:
    took = _length((step.finished_at or now) - step.started_at) if step.started_at else ""
    told = [step.last_error] if step.last_error and step.state != "completed" else []
    if step.next_attempt_at:
        told.append(_in(step.next_attempt_at, now))
    if step.child_task_id:
        told.append(f"run {step.child_task_id}")
    return (step.key, str(step.state), str(step.attempts), took, "; ".join(told))


def _in(time: datetime, now: datetime) -> str:
    return f"in {_length(time - now)}" if time > now else "now"


def _length(length: timedelta) -> str:
    seconds = max(0.0, length.total_seconds())
    if seconds < 60:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))
