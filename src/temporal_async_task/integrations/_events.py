"""The state of runs as it changes, for any number of listeners: one poll of a run serves them all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from temporal_async_task.errors import AsyncTaskError, ServerUnavailableError, TaskNotFoundError
from temporal_async_task.status import TaskResult, TaskStatus

logger = logging.getLogger("temporal_async_task")

POLL_INTERVAL = 1.0
"""Seconds between two looks at a run that somebody listens to."""
KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent, so that no proxy takes the connection for dead."""
MAX_STREAM = 1800.0
"""Seconds after which a stream ends: the client comes back by itself, and has to be let in anew."""
_STOP_CHECK = 0.25
_ENDED = {TaskStatus.COMPLETED, TaskStatus.FAILED}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment."""

    id: str
    """A digest of the document: the same state has the same id in every process, now and after a restart."""
    document: bytes
    status: TaskStatus

    @classmethod
    def of(cls, run: TaskResult[Any], document: bytes) -> Snapshot:
        return cls(hashlib.sha256(document).hexdigest()[:24], document, run.status)

    @property
    def ended(self) -> bool:
        return self.status in _ENDED


Read = Callable[[], Awaitable[Snapshot]]


class StreamsClosedError(Exception):
    """The web server is stopping."""


class Watch:
    """One run, polled while somebody listens."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._changed = asyncio.Event()
        self._snapshot: Snapshot | None = None
        self._error: Exception | None = None
        self.listeners = 0
        self.over = False
        """Whether it polls no more: who comes now needs another."""

    async def changed(self, seen: str | None = None) -> Snapshot:
        """The run's state, as soon as it is not the one with the id ``seen``.

        Raises:
            StreamsClosedError: The web server is stopping.
            AsyncTaskError: The run cannot be looked at.
        """
        while True:
            if self._snapshot is not None and self._snapshot.id != seen:
                return self._snapshot
            if self._error is not None:
                # One error for all of its listeners: without this, each would add to its traceback.
                raise self._error.with_traceback(None)
            await self._changed.wait()

    async def poll(self) -> None:
        """Look at the run until it ends, or nobody listens any more."""
        while not self.over:
            try:
                snapshot = await self._read()
            except Exception as error:
                # A stream outlives a server that is away for a while; one that has not begun is refused instead.
                if self._snapshot is None or isinstance(error, TaskNotFoundError):
                    self.close(error)
                elif not isinstance(error, ServerUnavailableError):
                    logger.warning("A run could not be looked at; its listeners wait: %s", error)
            else:
                if self._snapshot is None or snapshot.id != self._snapshot.id:
                    self._snapshot = snapshot
                    self._wake()
                self.over = snapshot.ended  # and never shown to who comes later: it may be resumed meanwhile
            if not self.over:
                await asyncio.sleep(POLL_INTERVAL)
                # Not before: who leaves and comes back within the second must not cause a second look.
                self.over = self.over or not self.listeners

    def close(self, error: Exception) -> None:
        """Tell those who wait that there is nothing more to wait for."""
        self.over, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Watches:
    """The watched runs of a router. An entry lives as long as somebody listens, and at most a second longer."""

    def __init__(self) -> None:
        self._watches: dict[tuple[asyncio.AbstractEventLoop, str, str], tuple[Watch, asyncio.Task[None]]] = {}
        self._guards: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._watches)

    @contextlib.contextmanager
    def listen(self, task: str, task_id: str, read: Read) -> Generator[Watch]:
        """Listen to a run.

        Args:
            task: The task's name.
            task_id: The run's id.
            read: Looks at the run, once.
        """
        loop = asyncio.get_running_loop()
        key = (loop, task, task_id)
        known = self._watches.get(key)
        if known is None or known[0].over:
            watch = Watch(read)
            polling = loop.create_task(watch.poll(), name=f"watch {task} {task_id}")
            self._watches[key] = (watch, polling)
            polling.add_done_callback(lambda done: self._forget(key, done))
        else:
            watch = known[0]
        if loop not in self._guards:
            guard = self._guards[loop] = loop.create_task(self._guard(loop), name="watch for the server's end")
            guard.add_done_callback(lambda _: self._guards.pop(loop, None))
        watch.listeners += 1
        try:
            yield watch
        finally:
            watch.listeners -= 1

    def _forget(self, key: tuple[asyncio.AbstractEventLoop, str, str], done: asyncio.Task[None]) -> None:
        if key in self._watches and self._watches[key][1] is done:
            del self._watches[key]

    async def _guard(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the streams when the web server stops: it would wait for them, and never come to its shutdown hooks."""
        while here := [entry for key, entry in self._watches.items() if key[0] is loop]:
            if _server_stops():
                for watch, polling in here:
                    watch.close(StreamsClosedError())
                    polling.cancel()
                return
            await asyncio.sleep(_STOP_CHECK)


def _server_stops() -> bool:
    """Whether uvicorn was told to stop. It says so nowhere else, and it waits for open responses before it says more.

    See https://github.com/sysid/sse-starlette/issues/132 for the ways to find out.
    """
    handlers = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    return any(getattr(getattr(handler, "__self__", None), "should_exit", False) is True for handler in handlers)


Listen = Callable[[], contextlib.AbstractContextManager[Watch]]


async def events(listen: Listen, first: Snapshot, last_seen: str | None) -> AsyncGenerator[bytes]:
    """The stream of a run: its state now, then each change, then an event ``end``.

    Each event tells all, so that one that was missed is no loss.

    Args:
        listen: Listens to the run.
        first: What is known of it.
        last_seen: The id of the last event that the client got; not sent again.
    """
    # Not all at once, when a thousand clients lose their server.
    yield f"retry: {random.randint(1000, 4000)}\n\n".encode()  # noqa: S311 - a delay, not a secret
    clock = asyncio.get_running_loop().time
    deadline = clock() + MAX_STREAM
    seen, snapshot = last_seen, first
    with contextlib.nullcontext() if first.ended else listen() as watch:
        while True:
            if snapshot.id != seen:
                seen = snapshot.id
                yield b"id: %s\nevent: run\ndata: %s\n\n" % (seen.encode(), snapshot.document)
            if snapshot.ended or watch is None:
                told = (snapshot.id.encode(), snapshot.status.encode())
                yield b'id: %s\nevent: end\ndata: {"status":"%s"}\n\n' % told
                return
            if clock() > deadline:
                return
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    snapshot = await watch.changed(seen)
            except TimeoutError:
                yield b": keep-alive\n\n"
            except (StreamsClosedError, AsyncTaskError):
                return  # the client comes back, and is told then


class EventStream(Response):
    """Sends a run's events until they end or the client goes away, and leaves nothing behind."""

    media_type = "text/event-stream"

    def __init__(self, stream: AsyncGenerator[bytes]) -> None:
        self._stream = stream
        self.status_code = 200
        self.background = None
        # X-Accel-Buffering: nginx would keep the events back otherwise. no-transform: so would compression.
        self.init_headers({"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI has it
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            gone.cancel()
            [outcome, _] = await asyncio.gather(sending, gone, return_exceptions=True)
        if isinstance(outcome, Exception) and not isinstance(outcome, OSError):  # which says that the client is gone
            raise outcome

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._stream) as stream:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in stream:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Wait for the client to go away."""
    while (await receive())["type"] != "http.disconnect":
        pass
