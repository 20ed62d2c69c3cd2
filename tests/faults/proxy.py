"""A TCP proxy in front of the server, of the tests' own, that can fail as a network does."""

import asyncio
import contextlib
from typing import Self

_CHUNK = 65536


class Proxy:
    """Passes bytes on between a worker (below) and the server (above), each way until told otherwise.

    A way that is held loses nothing, as TCP does not: what was sent arrives when the network is mended, or never, if
    one of the ends has gone by then.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        self._refusing = False
        self.held_up = 0
        """Bytes that wait for the way up."""
        self.mend()

    @property
    def address(self) -> str:
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._drop()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def hold(self, *, up: bool = True, down: bool = True) -> None:
        """Pass on nothing any more, in these directions; connections stay open."""
        if up:
            self._up.clear()
        if down:
            self._down.clear()

    def cut(self) -> None:
        """Break all connections, and accept none."""
        self._refusing = True
        self._drop()

    def mend(self) -> None:
        self._refusing = False
        self._up.set()
        self._down.set()
        self.held_up = 0

    def _drop(self) -> None:
        for connection in self._connections:
            connection.cancel()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
                if self._refusing:
                    return
                above_reader, above_writer = await asyncio.open_connection(self._host, self._port)
                with contextlib.closing(above_writer):
                    await self._pass_both_ways(reader, writer, above_reader, above_writer)
        finally:
            self._connections.discard(task)

    async def _pass_both_ways(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        above_reader: asyncio.StreamReader,
        above_writer: asyncio.StreamWriter,
    ) -> None:
        ways = [
            asyncio.create_task(self._pass(reader, above_writer, self._up)),
            asyncio.create_task(self._pass(above_reader, writer, self._down)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event) -> None:
        while data := await reader.read(_CHUNK):
            if way is self._up and not way.is_set():
                self.held_up += len(data)
            await way.wait()
            writer.write(data)
            await writer.drain()
