"""Encrypts all that is stored of a run: AES-256-GCM as a payload codec of Temporal's.

::

    converter = encrypted_data_converter(AESGCMCodec.from_env())
    component = AsyncTaskComponent(AsyncTaskComponentConfig.load(data_converter=converter))

Needs the extra ``encryption``.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import re
import secrets
from typing import TYPE_CHECKING, Self

from temporalio.api.common.v1 import Payload
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter, DefaultFailureConverterWithEncodedAttributes, PayloadCodec

from temporal_async_task.errors import ConfigError, DecryptionError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:  # an optional dependency
    raise ImportError(
        "Encryption needs the package 'cryptography': pip install 'temporal-async-task[encryption]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from temporalio.converter import ExternalStorage

KEYS_VARIABLE = "ASYNC_TASK_ENCRYPTION_KEYS"
"""The environment variable that ``AESGCMCodec.from_env`` reads."""
KEY_LENGTH = 32
"""Bytes of a key: AES-256."""

# What Temporal's own examples of encryption call them, so that tools find them.
_ENCODING = b"binary/encrypted"
_KEY_ID = "encryption-key-id"
_CIPHER_FIELD = "encryption-cipher"
_CIPHER = b"AES-256-GCM/HKDF-SHA256"

_SALT_LENGTH = 16
_NONCE_LENGTH = 12
_TAG_LENGTH = 16
_LAYOUT = b"temporal-async-task/payload/1\0"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AESGCMCodec(PayloadCodec):
    """Encrypts each payload as a whole, metadata included.

    Every payload has a key of its own, derived (HKDF-SHA256) from the active key and 16 random bytes, and a random
    nonce. So there is no number of payloads after which a key must be changed, as there is for AES-GCM alone (2^32).
    The name of this layout and the key's id are authenticated with it. The run's id is not: Temporal's UI does not
    tell it to a codec server, and a schedule's params are encrypted before its runs have ids.

    Args:
        keys: By id (letters, digits, ``. _ -``): 32 random bytes each, or base64 of them. All of them decrypt.
        active: The id of the key that encrypts. May be left out if there is one key.
        accept_unencrypted: Hand on payloads that are not encrypted, while runs go on that were begun before encryption
            was switched on. Without it they are refused, so that nobody can slip in values of their own.

    Raises:
        ConfigError: The keys cannot be used. The message never shows a key.
    """

    def __init__(
        self, keys: Mapping[str, bytes | str], *, active: str | None = None, accept_unencrypted: bool = False
    ) -> None:
        if not keys:
            raise ConfigError("Encryption needs at least one key. generate_key() makes one.")
        self._keys = {_checked_id(key_id): _checked_key(key_id, key) for key_id, key in keys.items()}
        if active is None:
            if len(keys) > 1:
                raise ConfigError(f"Which of the keys {_listed(keys)} is to encrypt? Say active=<its id>.")
            active = next(iter(keys))
        if active not in self._keys:
            raise ConfigError(f"The active key {active!r} is not among the keys: {_listed(keys)}.")
        self._active = active
        self._accept_unencrypted = accept_unencrypted

    @classmethod
    def from_env(
        cls,
        variable: str = KEYS_VARIABLE,
        *,
        env: Mapping[str, str] | None = None,
        accept_unencrypted: bool = False,
    ) -> Self:
        """The codec with the keys of an environment variable: ``id:base64 id:base64 ...``, the active one first.

        Args:
            variable: Its name.
            env: Instead of the process's environment.
            accept_unencrypted: As for the class.

        Raises:
            ConfigError: It is not set, or cannot be used.
        """
        text = (os.environ if env is None else env).get(variable, "")
        entries = text.replace(",", " ").split()
        if not entries:
            raise ConfigError(
                f"{variable} is not set. It holds the keys as 'id:base64 id:base64 ...', the one that encrypts first."
            )
        keys: dict[str, str] = {}
        for place, entry in enumerate(entries, 1):
            key_id, colon, key = entry.partition(":")
            if not colon:  # it may be a key: not to be shown
                raise ConfigError(f"Entry {place} of {variable} has no ':'. It must be 'id:base64'.")
            if key_id in keys:
                raise ConfigError(f"{variable} names the key {key_id!r} twice.")
            keys[key_id] = key
        return cls(keys, active=next(iter(keys)), accept_unencrypted=accept_unencrypted)

    def __repr__(self) -> str:
        return f"AESGCMCodec(keys={_listed(self._keys)}, active={self._active!r})"

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Encrypt, with the active key."""
        return [self._encrypt(payload) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Decrypt, each with its own key.

        Raises:
            DecryptionError: A key is not known here; or a payload is damaged, or was not encrypted.
        """
        return [self._decrypt(payload) for payload in payloads]

    # On the event loop: a thread would not help, as the cipher holds the interpreter's lock. It takes 1 ms a megabyte.

    def _encrypt(self, payload: Payload) -> Payload:
        salt, nonce = secrets.token_bytes(_SALT_LENGTH), secrets.token_bytes(_NONCE_LENGTH)
        cipher = self._cipher(self._active, salt)
        sealed = cipher.encrypt(nonce, payload.SerializeToString(), _authenticated(self._active))
        metadata = {"encoding": _ENCODING, _CIPHER_FIELD: _CIPHER, _KEY_ID: self._active.encode()}
        return Payload(metadata=metadata, data=salt + nonce + sealed)

    def _decrypt(self, payload: Payload) -> Payload:
        if payload.metadata.get("encoding") != _ENCODING:
            if self._accept_unencrypted:
                return payload
            raise DecryptionError(
                "A stored value is not encrypted. If it was stored before encryption was switched on, allow it with "
                "accept_unencrypted=True until the runs from then have ended."
            )
        if payload.metadata.get(_CIPHER_FIELD) != _CIPHER:
            raise DecryptionError("A stored value was encrypted by another codec.")
        key_id = payload.metadata.get(_KEY_ID, b"").decode("utf-8", "backslashreplace")
        if key_id not in self._keys:
            raise DecryptionError(
                f"A stored value was encrypted with the key {key_id!r}, which is not known here; known are "
                f"{_listed(self._keys)}. Keep a key until no run that it has encrypted is kept any more."
            )
        data = payload.data
        if len(data) < _SALT_LENGTH + _NONCE_LENGTH + _TAG_LENGTH:
            raise DecryptionError(f"A stored value, encrypted with the key {key_id!r}, is cut off.")
        salt, nonce = data[:_SALT_LENGTH], data[_SALT_LENGTH : _SALT_LENGTH + _NONCE_LENGTH]
        try:
            plain = self._cipher(key_id, salt).decrypt(
                nonce, data[_SALT_LENGTH + _NONCE_LENGTH :], _authenticated(key_id)
            )
        except InvalidTag:
            raise DecryptionError(
                f"A stored value is damaged, or was encrypted with another key that is named {key_id!r}, too."
            ) from None
        return Payload.FromString(plain)

    def _cipher(self, key_id: str, salt: bytes) -> AESGCM:
        derived = HKDF(algorithm=SHA256(), length=KEY_LENGTH, salt=salt, info=_LAYOUT).derive(self._keys[key_id])
        return AESGCM(derived)


def generate_key() -> str:
    """A new key: 32 random bytes, in base64."""
    return base64.b64encode(secrets.token_bytes(KEY_LENGTH)).decode()


def encrypted_data_converter(
    codec: PayloadCodec,
    *,
    external_storage: ExternalStorage | None = None,
    converter: DataConverter = pydantic_data_converter,
) -> DataConverter:
    """A data converter whose values, and the messages and stack traces of whose failures, go through the codec.

    Args:
        codec: As ``AESGCMCodec``.
        external_storage: Where large values go, encrypted; see ``temporal_async_task.storage``.
        converter: What makes payloads of values; Pydantic's by default. Its own codec and failure converter are
            replaced.
    """
    return dataclasses.replace(
        converter,
        payload_codec=codec,
        failure_converter_class=DefaultFailureConverterWithEncodedAttributes,
        external_storage=external_storage if external_storage is not None else converter.external_storage,
    )


def _authenticated(key_id: str) -> bytes:
    return _LAYOUT + key_id.encode()


def _checked_id(key_id: str) -> str:
    if not _ID.fullmatch(key_id):
        shown = repr(key_id) if len(key_id) < KEY_LENGTH else f"of {len(key_id)} characters"  # it may be a key
        raise ConfigError(f"The key id {shown} must be 1 to 64 letters, digits, '.', '_' or '-'.")
    return key_id


def _checked_key(key_id: str, key: bytes | str) -> bytes:
    if isinstance(key, str):
        try:
            key = base64.b64decode(key.strip().translate(_URL_SAFE), validate=True)
        except (binascii.Error, ValueError):
            raise ConfigError(f"The key {key_id!r} is not base64. generate_key() makes a key.") from None
    if len(key) != KEY_LENGTH:
        raise ConfigError(
            f"The key {key_id!r} has {len(key)} bytes; AES-256 takes {KEY_LENGTH}. generate_key() makes a key."
        )
    return bytes(key)


_URL_SAFE = str.maketrans("-_", "+/")


def _listed(keys: Mapping[str, object]) -> str:
    return ", ".join(repr(key_id) for key_id in keys)
