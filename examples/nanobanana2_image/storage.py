"""Where pictures and videos are kept: a folder, in place of a bucket."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from temporal_async_task import NonRetryableError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}\.(png|jpg|webp|mp4)")


class NotStoredError(NonRetryableError):
    """There is no such file."""


class Storage:
    """Files by name. Whoever reads one gets the whole of it or nothing, and writing it again replaces it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write to. It gets its name at the end, and only if all went well."""
        target = self._path(name)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).chmod(0o644)
                Path(file.name).replace(target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def write(self, name: str, data: bytes) -> str:
        """Keep data under a name. Returns the name."""
        with self.writing(name) as file:
            file.write(data)
        return name

    def read(self, name: str) -> bytes:
        """What is kept under a name.

        Raises:
            NotStoredError: There is nothing.
        """
        return self.path(name).read_bytes()

    def path(self, name: str) -> Path:
        """Where it is kept.

        Raises:
            NotStoredError: There is nothing.
        """
        path = self._path(name)
        if not path.is_file():
            raise NotStoredError(f"There is no {name}: it was deleted, or MEDIA_DIR is not shared by all processes.")
        return path

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise NotStoredError(f"{name!r:.100} cannot be a file's name.")
        return self._folder / name
