"""Large values in a folder: a driver for Temporal's external storage, local or mounted by every process.

::

    storage = ExternalStorage(drivers=[FolderStorageDriver("/mnt/shared/values")])
    converter = dataclasses.replace(pydantic_data_converter, external_storage=storage)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from temporalio.api.common.v1 import Payload
from temporalio.converter import StorageDriver, StorageDriverClaim

from temporal_async_task.errors import ConfigError, PayloadTooLargeError, StorageError, StoredValueLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporalio.converter import StorageDriverRetrieveContext, StorageDriverStoreContext

_DIGEST = "sha256"
_HEX = re.compile(r"[0-9a-f]{64}")


class FolderStorageDriver(StorageDriver):
    """Keeps each value in a file of its own, named by the SHA-256 of what is in it.

    What is in it is the payload as the codec has left it: encrypted, if the data converter's codec encrypts. A file is
    complete and on disk before its value counts as stored. Nothing is ever deleted: see docs/large-values.md.

    Args:
        folder: Where; it must be there. Of a mount take a folder below its root: it is not there while the mount is
            not, and so nothing is written beneath it.
        name: Tells drivers apart, where there are several. Stored with each value: it must stay the same.
        max_size: Bytes of the largest value.
        mode: The files' permissions, for where processes of several users share the folder.

    Raises:
        ConfigError: There is no such folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str = "folder",
        max_size: int = 256 * 1024 * 1024,
        mode: int = 0o600,
    ) -> None:
        self._folder = Path(folder).absolute()
        self._name = name
        self._max_size = max_size
        self._mode = mode
        if not self._folder.is_dir():
            raise ConfigError(f"There is no folder {str(self._folder)!r} to store values in. Make it, or mount it.")

    def __repr__(self) -> str:
        return f"FolderStorageDriver({str(self._folder)!r}, name={self._name!r})"

    def name(self) -> str:
        """What stored values know the driver by."""
        return self._name

    def type(self) -> str:
        """What workers tell the server that they use."""
        return "temporal-async-task.folder"

    async def store(
        self,
        context: StorageDriverStoreContext,  # noqa: ARG002 - a file is anybody's that knows its digest
        payloads: Sequence[Payload],
    ) -> list[StorageDriverClaim]:
        """Write payloads into files.

        Raises:
            PayloadTooLargeError: One is over ``max_size``.
            StorageError: The folder cannot be written.
        """
        return [await asyncio.to_thread(self._write, payload) for payload in payloads]

    async def retrieve(
        self,
        context: StorageDriverRetrieveContext,  # noqa: ARG002
        claims: Sequence[StorageDriverClaim],
    ) -> list[Payload]:
        """Read payloads back.

        Raises:
            StoredValueLostError: A file is not there, or not what was written.
            StorageError: The folder cannot be read.
        """
        return [await asyncio.to_thread(self._read, claim) for claim in claims]

    def _write(self, payload: Payload) -> StorageDriverClaim:
        data = payload.SerializeToString()
        if len(data) > self._max_size:
            raise PayloadTooLargeError(
                f"A value of {len(data):,} bytes is over the {self._max_size:,} that {self} takes (max_size)."
            )
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        try:
            if path.is_file() and path.stat().st_size == len(data):
                path.touch()  # who deletes by age is not to delete it
            else:
                self._write_new(path, data)
        except OSError as error:
            raise StorageError(f"A value cannot be stored in {str(self._folder)!r}: {error}") from error
        return StorageDriverClaim({_DIGEST: digest})

    def _write_new(self, path: Path, data: bytes) -> None:
        searchable = self._mode | (self._mode & 0o444) >> 2
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir()  # not its parents: without the mount there is no folder
            path.parent.chmod(searchable)
            _sync(self._folder)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), self._mode)
                os.fsync(file.fileno())
            os.replace(partial, path)  # noqa: PTH105 - as the rest, by name
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)  # noqa: PTH108
            raise
        _sync(path.parent)

    def _read(self, claim: StorageDriverClaim) -> Payload:
        digest = claim.claim_data.get(_DIGEST, "")
        if not _HEX.fullmatch(digest):  # it becomes a path
            raise StoredValueLostError(f"a reference to {self} is damaged: it names no digest")
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            if not self._folder.is_dir():
                raise StorageError(f"There is no folder {str(self._folder)!r}. Is it mounted?") from None
            raise StoredValueLostError(f"the value's file {str(self._path(digest))!r} was deleted") from None
        except OSError as error:
            raise StorageError(f"A value cannot be read from {str(self._folder)!r}: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoredValueLostError(f"the value's file {str(self._path(digest))!r} is damaged")
        return Payload.FromString(data)

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest


def _sync(folder: Path) -> None:
    """Have a folder's new entries outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
