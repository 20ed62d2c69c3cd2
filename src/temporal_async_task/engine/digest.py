"""A digest of params: tells a submit that is repeated from one with other params, in whichever process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from temporalio.api.common.v1 import Payload

_text = json.JSONEncoder(sort_keys=True).encode


def digest(payload: Payload, value: Any = None) -> str:
    """A digest of a value, the same for the same JSON document whatever the order of its keys and of its sets.

    Args:
        payload: The value's, before any codec.
        value: The value itself. It tells which of the JSON's lists are sets: their order differs from process to
            process.
    """
    data = payload.data
    encoding = payload.metadata.get("encoding", b"")
    if encoding.startswith(b"json/"):
        document = json.loads(data)
        if b"[" in data:  # else there is no set in it
            document = _sorted_sets(value, document)
        data = _text(document).encode()
    return hashlib.sha256(encoding + b"\0" + data).hexdigest()


def _sorted_sets(value: Any, document: Any) -> Any:
    """The JSON document of a value, each set in it sorted. What does not look like the value is left as it is."""
    if _is(document, list):
        if _is(value, AbstractSet, Sequence) and not _is(value, str, bytes) and len(value) == len(document):
            # A set's order stays the same as long as nobody changes it.
            found = [_sorted_sets(*pair) for pair in zip(value, document, strict=True)]
            return sorted(found, key=_text) if _is(value, AbstractSet) else found
    elif _is(document, dict):
        members = dict(_members(value, document))
        return {key: _sorted_sets(members.get(key), item) for key, item in document.items()}
    return document


def _members(value: Any, document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What stands behind each key of a JSON object."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            for key in (name, field.alias, field.serialization_alias):
                if key in document:
                    yield key, getattr(value, name, None)
        yield from (value.__pydantic_extra__ or {}).items()
        yield from ((name, getattr(value, name)) for name in type(value).model_computed_fields if name in document)
    elif is_dataclass(value):
        yield from ((field.name, getattr(value, field.name, None)) for field in fields(value))
    elif _is(value, Mapping) and len(value) == len(document):
        yield from zip(document, value.values(), strict=True)


def _is(value: Any, *types: type) -> bool:
    """``isinstance``, without narrowing: the caller goes on with ``Any``."""
    return isinstance(value, types)
