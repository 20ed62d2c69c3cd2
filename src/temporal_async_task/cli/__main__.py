"""``python -m temporal_async_task.cli``: the same as the command ``async-task``."""

from temporal_async_task.cli import main

main()
