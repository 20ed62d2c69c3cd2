"""The command ``async-task``. Its modules need the extra ``cli``, which this one looks for."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich", "watchfiles")


def main() -> None:
    """Run the command, and exit with its status."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"The command async-task needs {', '.join(missing)}, which this environment does not have: "
            f"pip install 'temporal-async-task[cli]'"
        )
    from temporal_async_task.cli.application import command  # noqa: PLC0415 - needs what was looked for

    command()
