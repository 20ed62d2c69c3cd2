"""Results on their way into a run's journal, and out of it: by the converter, the codec and the store of large values.

A codec or a store, if there is one, is used on the engine's event loop: it may hold a client of that loop, which no
user's code blocks.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from temporal_async_task.engine.unwind import apart
from temporal_async_task.errors import PayloadTooLargeError, ResultError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from temporal_async_task.engine.carrier import Carrier, Values
    from temporal_async_task.engine.journal import Journal, StepRecord

logger = logging.getLogger("temporal_async_task")
T = TypeVar("T")

_CODEC_DELAYS = (0.1, 0.5, 1.0, 2.0, 5.0)


async def shielded(work: Future[T]) -> T:
    """Wait for work of the engine's, which goes on whatever becomes of who waits."""
    return work.result() if work.done() else await asyncio.shield(asyncio.wrap_future(work))


class Results:
    """The results of one attempt at a run."""

    def __init__(self, journal: Journal, values: Values, carrier: Carrier, task_id: str) -> None:
        self._journal = journal
        self._values = values
        self._carrier = carrier
        self._task_id = task_id
        self._followed: set[asyncio.Future[None]] = set()

    async def seal(self, plain: Any) -> bytes:
        """The run's own result as it is stored.

        Raises:
            PayloadTooLargeError, ResultError: It is unfit.
        """
        return await self._through_codec(self._values.seal, plain)

    async def unseal(self, result: bytes, tries: int) -> Any:
        """A result from the journal, as ``Values.convert`` takes it.

        Raises:
            ResultError: It is not in external storage any more.
            Exception: What the codec or the store has raised after so many tries.
        """
        return await self._through_codec(self._values.unseal, result, tries)

    def prepare(self, record: StepRecord, value: Any, *, save: bool) -> Callable[[], Future[None]]:
        """Serialise a call's result, in the thread of the call.

        Args:
            record: Of its step.
            value: The result.
            save: Whether a checkpoint follows.

        Returns:
            What sends it on its way into the journal. The future is done when it is there, and durable; it raises what
            makes the result unfit.
        """
        try:
            plain = self._values.serialise(value)
        except ResultError as unfit:
            record.calls += 1
            return functools.partial(_unfit, unfit)
        if self._values.has_codec:
            return functools.partial(self._apart, self._seal_and_record, record, plain, save)
        return functools.partial(self._pack_and_record, record, plain, save=save)

    def _pack_and_record(self, record: StepRecord, plain: Any, *, save: bool) -> Future[None]:
        record.calls += 1
        try:
            self._journal.complete(record, self._values.pack(plain), self._carrier.now())
        except PayloadTooLargeError as unfit:
            return _unfit(unfit)
        return self._carrier.checkpoint() if save else _done()

    async def _seal_and_record(self, record: StepRecord, plain: Any, save: bool) -> None:  # noqa: FBT001 - for a partial
        record.calls += 1
        result = await self._patiently(lambda: self._values.seal(plain))
        self._journal.complete(record, result, self._carrier.now())
        if save:
            await asyncio.wrap_future(self._carrier.checkpoint())

    def follow(self, landed: Future[None]) -> asyncio.Future[None]:
        """See to it that the attempt does not end before this result is in the journal. On the users' event loop."""
        here = asyncio.wrap_future(landed)
        self._followed.add(here)
        here.add_done_callback(self._forget)
        return here

    def _forget(self, landed: asyncio.Future[None]) -> None:
        self._followed.discard(landed)
        if not landed.cancelled():
            landed.exception()  # seen: its step may be gone

    async def settle(self, timeout: float) -> None:
        """Wait for results that a codec is still encoding. Without one, they are in the journal already."""
        if self._followed and self._values.has_codec:
            await asyncio.wait(set(self._followed), timeout=max(timeout, 0.0))

    async def _through_codec(
        self, use: Callable[[Any], Coroutine[Any, Any, T]], value: Any, tries: int | None = None
    ) -> T:
        if not self._values.has_codec:
            return await use(value)
        work = functools.partial(self._patiently, functools.partial(use, value), tries)
        return await shielded(self._apart(work))

    async def _patiently(self, use: Callable[[], Awaitable[T]], tries: int | None = None) -> T:
        """Seal or unseal, however often a codec or a store fails on the way: a paid result is at stake.

        Args:
            use: What to do.
            tries: Give up after so many, where what is at stake is stored.
        """
        failures = 0
        while True:
            try:
                return await use()
            except (ResultError, PayloadTooLargeError):
                raise
            except Exception as error:
                if failures % 10 == 0:
                    logger.warning(
                        "Task run %s: the codec or the store of values fails (%s: %s); trying again",
                        self._task_id,
                        type(error).__name__,
                        error,
                    )
                failures += 1
                if failures == tries:
                    raise
                await asyncio.sleep(_CODEC_DELAYS[min(failures, len(_CODEC_DELAYS)) - 1])

    def _apart(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        return apart().run(self._carrier.apart, work, *args)


def _done() -> Future[None]:
    landed: Future[None] = Future()
    landed.set_result(None)
    return landed


def _unfit(error: Exception) -> Future[None]:
    landed: Future[None] = Future()
    landed.set_exception(error)
    return landed
