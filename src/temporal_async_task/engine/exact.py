"""A value's JSON as pydantic writes it, exact: what would be lost is kept, and what nobody could read is refused."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

_MAX_DEPTH = 200  # pydantic's reader's, as is the next; its writer goes further
_MAX_DIGITS = 4_300


def exact_json(value: Any, data: bytes) -> bytes:
    """The JSON that stands for a value, for which pydantic has written ``data``.

    Raises:
        ValueError: It could not be read again.
    """
    exact = _with_numbers_kept(value, data)
    if len(exact) > _MAX_DEPTH:  # else it is neither too deep nor has it too long a number
        try:
            from_json(exact)
        except ValueError as error:
            raise ValueError(
                f"it could not be read again: {error} (lists and objects may be nested {_MAX_DEPTH} deep, whole "
                f"numbers may have {_MAX_DIGITS:,} digits)"
            ) from None
    return exact


def _with_numbers_kept(value: Any, data: bytes) -> bytes:
    """The JSON with NaN and the infinities in it; pydantic writes null in their place where they are a model's.

    In a list, say, it writes ``NaN``; it reads that everywhere, though JSON does not know it.
    """
    if b"null" not in data:
        return data
    try:
        exact = to_json(to_jsonable_python(value))
        # Options of the application's converter (`exclude_unset`) make a difference, too, which is to stay.
        return exact if exact != data and to_json(value) == data else data
    except PydanticSerializationError:  # of a kind that Temporal's SDK writes by itself
        return data
