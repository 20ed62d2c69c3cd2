"""The one writer of an attempt's journal: heartbeats by task token, in order, each awaited.

``activity.heartbeat()`` is never called. The SDK's core would remember its details and send them late, over a journal
that was acknowledged meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Protocol, TypeVar

from temporalio.api.common.v1 import Payloads
from temporalio.api.workflowservice.v1 import (
    RecordActivityTaskHeartbeatRequest,
    RecordActivityTaskHeartbeatResponse,
)

from temporal_async_task.engine.client import RPC_TIMEOUT, AttemptGoneError, insist

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from concurrent.futures import Future

    from temporalio.api.common.v1 import Payload
    from temporalio.client import Client

    from temporal_async_task.engine.journal import Snapshot

logger = logging.getLogger("temporal_async_task")
T = TypeVar("T")


class Listener(Protocol):
    """What the writer tells of the server's answers."""

    def saved(self, snapshot: Snapshot) -> None: ...

    def flagged(self, answer: RecordActivityTaskHeartbeatResponse) -> None: ...


class JournalWriter:
    """Writes for one attempt, on the event loop of the SDK.

    Args:
        client: The connection.
        task_token: The attempt's.
        journal: Tells what is to be written.
        encode: Makes payloads of it.
        has_codec: Whether ``encode`` may take its time, or fail.
        interval: Seconds between two heartbeats, at most.
        listener: Is told of the answers.
    """

    def __init__(
        self,
        client: Client,
        task_token: bytes,
        journal: Callable[[], Snapshot],
        encode: Callable[[Snapshot], Awaitable[Sequence[Payload]]],
        *,
        has_codec: bool,
        interval: float,
        listener: Listener,
    ) -> None:
        self._client = client
        self._token = task_token
        self._journal = journal
        self._encode = encode
        self._has_codec = has_codec
        self._interval = interval
        self._listener = listener
        self._changed = False
        self._waiters: list[Future[None]] = []
        self._wake = asyncio.Event()
        self._last: Sequence[Payload] = ()

    def note(self) -> None:
        """Write the journal next. What changes while a write is under way goes with the next one."""
        self._changed = True
        self._wake.set()

    def checkpoint(self, saved: Future[None]) -> None:
        """Write the journal; all that is in it now is durable when ``saved`` is done."""
        self._waiters.append(saved)
        self.note()

    async def run(self, resume_with: Sequence[Payload]) -> None:
        """Write what has changed, and in between the last again, to show that the attempt is alive.

        Returns when the server knows the attempt no more.
        """
        self._last = resume_with
        with contextlib.suppress(AttemptGoneError):
            while True:
                keep_alive = asyncio.get_running_loop().call_later(self._interval, self._wake.set)
                await self._wake.wait()
                keep_alive.cancel()
                await self._write()

    async def _write(self) -> None:
        self._wake.clear()
        changed, self._changed = self._changed, False
        waiters, self._waiters = self._waiters, []
        snapshot = self._journal() if changed else None
        if snapshot is not None:
            self._last = await (self._encoded(snapshot) if self._has_codec else self._encode(snapshot))
        answer = await self._heartbeat()
        for waiter in waiters:
            waiter.set_result(None)
        if snapshot is not None:
            self._listener.saved(snapshot)
        self._heed(answer)

    async def _encoded(self, snapshot: Snapshot) -> Sequence[Payload]:
        """A journal's payloads, however long they take. Meanwhile the last are repeated: the attempt is alive."""
        encoding = asyncio.ensure_future(insist(functools.partial(self._encode, snapshot), "encode the journal"))
        try:
            while not (await asyncio.wait((encoding,), timeout=self._interval))[0]:
                self._heed(await self._heartbeat())
            return encoding.result()
        finally:
            encoding.cancel()

    async def _heartbeat(self) -> RecordActivityTaskHeartbeatResponse:
        details = Payloads(payloads=self._last) if self._last else None
        request = RecordActivityTaskHeartbeatRequest(
            task_token=self._token,
            namespace=self._client.namespace,
            identity=self._client.identity,
            details=details,
        )
        service = self._client.workflow_service
        return await insist(
            lambda: service.record_activity_task_heartbeat(request, timeout=RPC_TIMEOUT), "save the journal"
        )

    def _heed(self, answer: RecordActivityTaskHeartbeatResponse) -> None:
        if answer.cancel_requested or answer.activity_paused or answer.activity_reset:
            self._listener.flagged(answer)
