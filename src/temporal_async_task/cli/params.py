"""Params as they are typed: read from JSON, and made what the task takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temporalio.api.common.v1 import Payload

from temporal_async_task.cli.exits import CommandError
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.errors import ResultError

if TYPE_CHECKING:
    from temporal_async_task.cli.reference import AnyTask, Application


def read_params(text: str | None) -> Any:
    """Params as they were typed: JSON, ``-`` for JSON on stdin, ``@file`` for JSON in a file.

    Raises:
        CommandError: It is not JSON, or there is no such file.
    """
    if text is None:
        return None
    source, document = _source(text)
    try:
        return json.loads(document, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CommandError(_malformed(document, source, error)) from error


def _source(text: str) -> tuple[str, str]:
    if text == "-":
        return "Stdin", sys.stdin.read()
    if not text.startswith("@"):
        return "The params", text
    try:
        return text[1:], Path(text[1:]).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CommandError(f"Cannot read the params: {error}.") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, and not JSON")


def _malformed(text: str, source: str, error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"{source}: not valid JSON: {error}."
    lines = text.splitlines() or [""]
    line = lines[min(error.lineno, len(lines)) - 1]
    begin = max(0, error.colno - 40)  # so that a long line shows its place, too
    excerpt = f"  {line[begin : begin + 78]}\n  {' ' * (error.colno - 1 - begin)}^"
    hint = ""
    if len(lines) == 1 and text.strip()[:1] not in {"{", "[", '"', "-"} and not text.strip()[:1].isdigit():
        hint = f"\nText is JSON with its quotes: '{json.dumps(text)}'."
    return f"{source}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.\n{excerpt}{hint}"


def fitted(app: Application, task: AnyTask, given: Any) -> Any:
    """Params from JSON as a worker would see them.

    So the run is the same one that the application submits with an object of its own, defaults included.
    """
    if not task.takes_params or given is None:
        return given
    values = PayloadValues(app.component.config.data_converter)
    payload = Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(given).encode())
    try:
        return values.convert(payload, task.params_type)
    except ResultError:
        return given  # submit says what does not fit
