"""The user's values, to and from payloads: the one place where the data converter and its codec are applied.

Everything else in the engine, and the worker's own connection, passes payloads on as they are. So a value that
cannot be decoded (a rotated key, a changed class) is the engine's to deal with, and never fails a run on its way.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from google.protobuf.message import DecodeError
from pydantic import TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.common import RawValue
from temporalio.contrib.pydantic import PydanticPayloadConverter
from temporalio.converter import CompositePayloadConverter, DataConverter, WorkflowSerializationContext
from temporalio.exceptions import ApplicationError, FailureError

from temporal_async_task.engine import external, wire
from temporal_async_task.engine.exact import exact_json
from temporal_async_task.engine.journal import Journal, Snapshot
from temporal_async_task.engine.signatures import name_of
from temporal_async_task.errors import (
    AsyncTaskError,
    DecryptionError,
    PayloadTooLargeError,
    ResultError,
    StorageError,
)

MAX_PAYLOAD = 2 * 1024 * 1024 - 16 * 1024
"""Bytes. The server refuses payloads over 2 MB; the margin is for what is sent around it."""

_PLAIN = {b"binary/null", b"binary/plain", b"binary/protobuf"}
"""Encodings that are no codec's, and known to each converter."""
_NO_CODEC = (
    "this process does not have its codec. Give its component the data_converter of the others (and the command "
    "async-task your application, by --app)."
)
_SEALED = "asyncTaskSealed:"
"""How a short text of the engine's begins that went through the codec."""


class PayloadValues:
    """Encodes and decodes values for one run, with the application's data converter.

    Args:
        converter: The application's.
        namespace: The run's.
        task_id: The run's.
        home: The event loop on which external storage is called; by default, the one that asks.
    """

    def __init__(
        self,
        converter: DataConverter,
        namespace: str = "default",
        task_id: str = "",
        home: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        context = WorkflowSerializationContext(namespace=namespace, workflow_id=task_id)
        self._task_id = task_id
        self._stored: dict[bytes, Payload] = {}
        """What was just stored externally, by its reference: a step's result is asked for once more at once."""
        # Else JSON is written and read by a converter of the application's own.
        self._by_pydantic = issubclass(converter.payload_converter_class, PydanticPayloadConverter)
        storage = converter.external_storage
        if storage is None:
            self._inline = self._converter = converter.with_context(context)
            return
        bound = external.of_run(storage, namespace, task_id, home)
        self._converter = dataclasses.replace(converter, external_storage=bound).with_context(context)
        self._inline = dataclasses.replace(converter, external_storage=None).with_context(context)
        """For what the status needs: it is kept where the run is, however large."""

    @property
    def has_codec(self) -> bool:
        """Whether payloads go through a codec or an external storage."""
        return self.encrypts or self._converter.external_storage is not None

    @property
    def encrypts(self) -> bool:
        """Whether what is stored is not in clear: there is a codec, which mostly encrypts."""
        return self._converter.payload_codec is not None

    async def to_payload(self, value: Any) -> Payload:
        """The payload of a value, as it is stored; of one in external storage, the payload that says where it is.

        Raises:
            ResultError: It cannot be serialised.
            PayloadTooLargeError: It is larger than the server, or the external storage, takes.
            Exception: What the codec or the external storage raises; it says nothing of the value.
        """
        return await self.stored(self.serialise(value))

    def serialise(self, value: Any) -> Payload:
        """The payload of a value, before codec and external storage.

        Raises:
            ResultError: It cannot be serialised, or nobody could read it afterwards.
        """
        try:
            [plain] = self._converter.payload_converter.to_payloads([value])
            if self._by_pydantic and plain.metadata.get("encoding") == b"json/plain":
                plain.data = exact_json(value, plain.data)
        except Exception as error:
            raise ResultError(
                f"a value of type {name_of(type(value))} cannot be serialised: {type(error).__name__}: {error}"
            ) from error
        return plain

    def pack(self, plain: Payload) -> bytes:
        """What ``serialise`` has made, in bytes; where there is neither codec nor external storage.

        Raises:
            PayloadTooLargeError: It is larger than the server takes.
        """
        return _within_limit(plain).SerializeToString()

    async def seal(self, plain: Payload) -> bytes:
        """What ``serialise`` has made, by codec and external storage, in bytes.

        Raises:
            PayloadTooLargeError: It is larger than the server, or the external storage, takes.
            Exception: What the codec or the external storage raises; it says nothing of the value.
        """
        payload = await self.stored(plain)
        data = payload.SerializeToString()
        if external.is_reference(payload):
            self._stored[data] = plain
        return data

    async def stored(self, plain: Payload) -> Payload:
        """What ``serialise`` has made, by codec and external storage.

        Raises:
            PayloadTooLargeError: It is larger than the server, or the external storage, takes.
            Exception: What the codec or the external storage raises; it says nothing of the value.
        """
        if not self.has_codec:
            return _within_limit(plain)
        [encoded] = await self._converter.encode([RawValue(plain)])
        return _within_limit(external.opaque(encoded))

    async def from_payload(self, payload: Payload, type_hint: Any = None) -> Any:
        """The value of a payload, fetched if it is in external storage.

        Raises:
            ResultError: It does not fit ``type_hint``; or it was stored externally, and is not there any more.
            Exception: What the codec or the external storage raises.
        """
        return self.convert(await self.readable(payload), type_hint)

    async def readable(self, payload: Payload) -> Payload:
        """The payload as it was before codec and external storage.

        Raises:
            DecryptionError: It went through a codec that is not here.
            Exception: What they raise, as for a key that is not there. It says nothing of the value.
        """
        if not self.has_codec and not external.is_reference(payload):
            return self._decoded(payload)
        try:
            [raw] = await self._converter.decode([external.transparent(payload)], [RawValue])
        except AsyncTaskError:
            raise
        except Exception as error:
            if not external.is_reference(payload):
                raise
            # Without the storage at all, or without the driver, the SDK's own error.
            raise StorageError(f"an externally stored value cannot be fetched here: {error}") from error
        return self._decoded(cast("RawValue", raw).payload)

    def _decoded(self, payload: Payload) -> Payload:
        """Refuse what is still encoded, by the name that codecs give to that: ``binary/`` and something."""
        encoding = payload.metadata.get("encoding", b"")
        if encoding.startswith(b"binary/") and encoding not in _PLAIN:
            converter = self._converter.payload_converter_class()  # the instance has a wrapper around it
            if isinstance(converter, CompositePayloadConverter) and encoding not in converter.converters:
                raise DecryptionError(
                    f"A stored value has the encoding {encoding.decode(errors='replace')!r}, and {_NO_CODEC}"
                )
        return payload

    def convert(self, readable: Payload, type_hint: Any = None) -> Any:
        """The value of a readable payload.

        Raises:
            ResultError: It does not fit ``type_hint``.
        """
        try:
            [value] = self._converter.payload_converter.from_payloads([readable], _hint(type_hint))
            _check_fit(readable, value, type_hint)
        except Exception as error:
            raise ResultError(
                f"the stored value does not fit {name_of(type_hint)}: {type(error).__name__}: {error}"
            ) from error
        return value

    async def unseal(self, data: bytes) -> Payload:
        """What ``seal`` was given.

        Raises:
            Exception: What the codec or the external storage raises.
        """
        plain = self._stored.pop(data, None)
        return await self.readable(Payload.FromString(data)) if plain is None else plain

    async def encode_journal(self, snapshot: Snapshot) -> list[Payload]:
        """A journal's two payloads. The results were encoded one by one, so only the header goes through the codec."""
        [header] = await self.encode_raw([Payload(metadata={"encoding": b"json/plain"}, data=snapshot.header)])
        return [header, Payload(metadata={"encoding": b"binary/plain"}, data=snapshot.results)]

    async def decode_journal(self, payloads: Sequence[Payload]) -> Journal:
        """The journal of ``encode_journal``'s payloads; an empty one of none."""
        if not payloads or wire.is_nothing_begun(payloads[0]):
            return Journal()
        header, results = payloads
        return Journal.restore(Snapshot(await self.decode_header(header), results.data))

    async def decode_header(self, header: Payload) -> bytes:
        """A journal's header.

        Raises:
            DecryptionError: It went through a codec that is not here.
            Exception: What the codec raises.
        """
        [plain] = await self.decode_raw([header])
        return self._decoded(plain).data

    async def encode_raw(self, payloads: list[Payload]) -> list[Payload]:
        """Payloads of the engine's own, through the application's codec."""
        codec = self._converter.payload_codec
        return await codec.encode(payloads) if codec else payloads

    async def decode_raw(self, payloads: list[Payload]) -> list[Payload]:
        codec = self._converter.payload_codec
        return await codec.decode(payloads) if codec else payloads

    async def seal_text(self, text: str) -> str:
        """A text that the engine hands on as text (why a run is cancelled), through the codec if there is one."""
        if not text or not self.encrypts:
            return text
        [payload] = await self.encode_raw([Payload(metadata={"encoding": b"text/plain"}, data=text.encode())])
        return _SEALED + base64.b64encode(payload.SerializeToString()).decode()

    async def unseal_text(self, text: str) -> str:
        """The text that ``seal_text`` was given; another is returned as it is."""
        if not text.startswith(_SEALED) or not self.encrypts:
            return text
        try:
            payload = Payload.FromString(base64.b64decode(text.removeprefix(_SEALED), validate=True))
        except (binascii.Error, DecodeError):  # written by hand
            return text
        [plain] = await self.decode_raw([payload])
        return self._decoded(plain).data.decode()

    async def unseal_digest(self, text: str) -> str:
        """The digest that ``seal_text`` was given.

        Raises:
            DecryptionError: It went through a codec that is not here.
            Exception: What the codec raises.
        """
        digest = await self.unseal_text(text)
        if digest.startswith(_SEALED):
            raise DecryptionError(f"What the params of a run were is encoded, and {_NO_CODEC}")
        return digest

    def event_name(self, key: str) -> str:
        """What the server calls an event. With a codec it is a digest, as the workflow compares names in clear."""
        if not self.encrypts:
            return key
        return "event-" + hashlib.sha256(f"{self._task_id}\0{key}".encode()).hexdigest()

    async def to_failure(self, error: ApplicationError, journal: Sequence[Payload] = ()) -> Failure:
        """A failure, by the application's failure converter and codec.

        Args:
            error: What is to be said.
            journal: The payloads of ``encode_journal``, which become the failure's details as they are.
        """
        failure = Failure()
        await self._inline.encode_failure(error, failure)
        failure.application_failure_info.details.payloads.extend(journal)
        return failure

    async def plain_failure(self, failure: Failure) -> Failure:
        """A failure with its message in clear, where the failure converter has encoded it; without details."""
        copy = Failure()
        copy.CopyFrom(failure)
        if copy.WhichOneof("failure_info") == "application_failure_info":
            copy.application_failure_info.ClearField("details")
        error = await self._inline.decode_failure(copy)
        if isinstance(error, FailureError) and error.failure is not None:
            return error.failure
        return copy

    def check(self, value: Any, type_hint: Any) -> Payload:
        """The payload of a value that a worker will be able to decode, before any codec.

        Raises:
            ResultError: It cannot be serialised, or what a worker would decode does not fit ``type_hint``.
        """
        payload = self.serialise(value)
        try:
            [decoded] = self._converter.payload_converter.from_payloads([payload], _hint(type_hint))
            _check_fit(payload, decoded, type_hint)
        except Exception as error:
            raise ResultError(f"{type(error).__name__}: {error}") from error
        return payload


class NamedEvents(Mapping[str, bytes]):
    """Events by their keys, as they came by the server's names for them.

    Args:
        values: Tells the names.
        events: By name; or by key, if they were sent before there was a codec.
    """

    def __init__(self, values: PayloadValues, events: Mapping[str, bytes]) -> None:
        self._values = values
        self._events = events

    def __getitem__(self, key: str) -> bytes:
        name = self._values.event_name(key)
        return self._events[name if name in self._events else key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)


def _within_limit(payload: Payload) -> Payload:
    if payload.ByteSize() > MAX_PAYLOAD:
        raise PayloadTooLargeError(
            f"A value of {payload.ByteSize():,} bytes is over the limit of {MAX_PAYLOAD:,} bytes (2 MB). Store "
            f"large values elsewhere (external storage), and pass on a reference."
        )
    return payload


def _hint(type_hint: Any) -> list[type]:
    return [cast("type", Any if type_hint is None else type_hint)]


def _check_fit(payload: Payload, value: Any, type_hint: Any) -> None:
    """Refuse what a converter lets pass: it looks at the type of JSON only, not of None and bytes."""
    if type_hint is not None and payload.metadata.get("encoding") in (b"binary/null", b"binary/plain"):
        try:
            adapter = TypeAdapter[Any](type_hint)
        except PydanticSchemaGenerationError:  # a type of the application's own converter
            return
        adapter.validate_python(value, strict=True)
