"""What can be a name, an id, a key or a duration."""

from __future__ import annotations

import unicodedata
from datetime import timedelta

from temporal_async_task.errors import ConfigError, InvalidKeyError

MAX_TEXT_BYTES = 255
"""Longest name, id or key: MySQL, one of Temporal's databases, indexes 255 characters."""
MAX_DURATION = 10 * 365 * 86400.0
"""Seconds; longer waits are mistakes."""


def check_text(text: object, what: str) -> str:
    """``text`` as it is, if it can be a name, an id or a key.

    Raises:
        InvalidKeyError: It is not text, empty, over 255 bytes of UTF-8, or has characters that cannot be stored
            or shown (control characters, lone surrogates).
    """
    if not isinstance(text, str):
        raise InvalidKeyError(f"{what} must be text (str), not {type(text).__name__}: {text!r:.100}")
    if not text or text.isspace():
        raise InvalidKeyError(f"{what} is empty. Give it a short, telling text.")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidKeyError(f"{what} {text!r:.100} has lone surrogates, which UTF-8 cannot store.") from None
    if size > MAX_TEXT_BYTES:
        raise InvalidKeyError(
            f"{what} {text[:40]!r}… is {size} bytes long; the limit is {MAX_TEXT_BYTES}. Use a digest of it."
        )
    if bad := next((char for char in text if unicodedata.category(char) == "Cc"), None):
        raise InvalidKeyError(f"{what} {text!r:.100} has the control character {bad!r}.")
    return text


def seconds(value: float | timedelta) -> float:
    """A duration, given in seconds or as a ``timedelta``, in seconds."""
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


def check_seconds(value: float | timedelta, what: str) -> float:
    """``seconds`` of what an application gives for a duration.

    Raises:
        ConfigError: It is neither a number nor a ``timedelta``.
    """
    try:
        return seconds(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{what} must be seconds or a timedelta, not {value!r}.") from None
