"""How a task runs. ``docs/architecture.md`` is the page to read first."""
