"""How a call's result gets to the journal without the users' event loop, which other code may be blocking.

A sync call's thread sends its result on its way by itself. When its step goes on, on the users' loop, the result is
durable, or on its way there.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future


class Landing:
    """What comes of one call of a step: a result on its way into the journal, or nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = False
        self.landed: Future[None] | None = None
        """Done when the result is durable; raises what makes it unfit. None as long as there is no result."""

    def begin(self, land: Callable[[], Future[None]]) -> None:
        """Begin to put the call's result into the journal, unless nobody waits for it any more. In any thread."""
        with self._lock:
            if not self._left:
                self.landed = land()

    def leave(self) -> Future[None] | None:
        """Do not wait for the call any more: a result that comes after this is dropped.

        Returns:
            ``landed``: there may have been one before.
        """
        with self._lock:
            self._left = True
            return self.landed
