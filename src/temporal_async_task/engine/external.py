"""The application's external storage, as the engine uses it (Temporal's ``ExternalStorage``, for large values).

Its drivers are told whose values they are given, are called on the event loop that their clients belong to, and what
they raise is sorted: try again, or give up.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from temporalio.api.common.v1 import Payload
from temporalio.converter import (
    ExternalStorage,
    StorageDriver,
    StorageDriverSelectContext,
    StorageDriverStoreContext,
    StorageDriverWorkflowInfo,
)

from temporal_async_task.errors import AsyncTaskError, PayloadTooLargeError, StorageError, StoredValueLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from temporalio.converter import StorageDriverClaim, StorageDriverRetrieveContext

T = TypeVar("T")

_REFERENCE = b"binary/temporal-async-task-reference"


def of_run(
    storage: ExternalStorage, namespace: str, task_id: str, home: asyncio.AbstractEventLoop | None
) -> ExternalStorage:
    """The storage, for the values of one run.

    Args:
        storage: The application's.
        namespace: The run's.
        task_id: The run's. Without type and run id, so that all values of a run, resumed or not, are in one place.
        home: The event loop on which the drivers are to be called; where an S3 client was made, say.
    """
    target = StorageDriverWorkflowInfo(namespace=namespace, id=task_id)
    context = StorageDriverStoreContext(target)
    drivers = {driver.name(): _Driver(driver, context, home) for driver in storage.drivers}
    selector = storage.driver_selector

    def select(_: StorageDriverSelectContext, payload: Payload) -> StorageDriver | None:
        chosen = selector(StorageDriverSelectContext(target), payload) if selector else None
        # Of one that is not registered, the SDK complains.
        return drivers.get(chosen.name(), chosen) if chosen else None

    return ExternalStorage(
        drivers=list(drivers.values()),
        driver_selector=select if selector else None,
        payload_size_threshold=storage.payload_size_threshold,
    )


def opaque(payload: Payload) -> Payload:
    """A payload, wrapped if it is a reference to one that was stored.

    The engine's own connection has no external storage, and the SDK refuses references where there is none.
    """
    if not payload.external_payloads:
        return payload
    wrapped = Payload(metadata={"encoding": _REFERENCE}, data=payload.SerializeToString())
    wrapped.external_payloads.extend(payload.external_payloads)
    return wrapped


def is_reference(payload: Payload) -> bool:
    """Whether a payload only says where the value is."""
    return payload.metadata.get("encoding") == _REFERENCE


def transparent(payload: Payload) -> Payload:
    """The payload that ``opaque`` was given."""
    return Payload.FromString(payload.data) if is_reference(payload) else payload


class _Driver(StorageDriver):
    def __init__(
        self, inner: StorageDriver, context: StorageDriverStoreContext, home: asyncio.AbstractEventLoop | None
    ) -> None:
        self._inner = inner
        self._context = context
        self._home = home

    def name(self) -> str:
        return self._inner.name()

    def type(self) -> str:
        return self._inner.type()

    async def store(self, context: StorageDriverStoreContext, payloads: Sequence[Payload]) -> list[StorageDriverClaim]:  # noqa: ARG002 - the SDK binds its own context elsewhere only
        try:
            return await self._at_home(lambda: self._inner.store(self._context, payloads))
        except AsyncTaskError:
            raise
        except Exception as error:
            # A plain ValueError is a driver's way to refuse a value (the S3 driver's: its size). Others may pass.
            if type(error) is ValueError:
                raise PayloadTooLargeError(f"External storage {self.name()!r} refuses the value: {error}") from error
            raise self._failed("store", error) from error

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        try:
            return await self._at_home(lambda: self._inner.retrieve(context, claims))
        except AsyncTaskError:
            raise
        except Exception as error:
            if type(error) is ValueError or _is_gone(error):
                raise StoredValueLostError(
                    f"the value is not in external storage {self.name()!r} any more, or not as it was stored: {error}"
                ) from error
            raise self._failed("fetch", error) from error

    def _failed(self, what: str, error: Exception) -> StorageError:
        return StorageError(f"External storage {self.name()!r} cannot {what} a value: {type(error).__name__}: {error}")

    async def _at_home(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._home is None or self._home is asyncio.get_running_loop() or not self._home.is_running():
            return await call()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), self._home))


def _is_gone(error: BaseException | None) -> bool:
    """Whether an error, or what has caused it, says that there is no such object (of S3: by its clients' errors)."""
    while error is not None:
        if isinstance(error, FileNotFoundError):
            return True
        with contextlib.suppress(Exception):  # botocore's, without importing it
            details: Any = getattr(error, "response", None)
            if details["Error"]["Code"] in {"NoSuchKey", "404"}:
                return True
        error = error.__cause__
    return False
