"""Durable background tasks for slow, paid, unreliable external APIs, on Temporal.

The public names stand in ``names.py``, and are imported when the first of them is used. So what needs none of them
(``async-task --help``, the shell's completion) does not wait for the Temporal SDK.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from temporal_async_task.names import *  # noqa: F403 - all of them, and nothing else
else:

    def __getattr__(name: str) -> object:
        if name != "__all__" and name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        names = import_module(f"{__name__}.names")
        globals().update({public: getattr(names, public) for public in names.__all__}, __all__=names.__all__)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
