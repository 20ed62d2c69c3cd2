"""The writer of an attempt's journal: heartbeats in order, whatever becomes of the codec."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.api.workflowservice.v1 import (
    RecordActivityTaskHeartbeatRequest,
    RecordActivityTaskHeartbeatResponse,
)
from temporalio.service import RPCError, RPCStatusCode

from support import wait_until
from temporal_async_task.engine.journal import Snapshot
from temporal_async_task.engine.writer import JournalWriter

INTERVAL = 0.02
OLD = [Payload(data=b"old")]


class Server:
    """Takes heartbeats, and listens to what the writer makes of its answers."""

    def __init__(self) -> None:
        self.beats: list[bytes] = []
        self.heard: list[object] = []
        self.answer = RecordActivityTaskHeartbeatResponse()
        self.is_gone = False
        self.workflow_service = self
        self.namespace = self.identity = "test"

    async def record_activity_task_heartbeat(
        self, request: RecordActivityTaskHeartbeatRequest, **_: Any
    ) -> RecordActivityTaskHeartbeatResponse:
        await asyncio.sleep(0)
        if self.is_gone:
            raise RPCError("not found", RPCStatusCode.NOT_FOUND, b"")
        self.beats.append(b"".join(payload.data for payload in request.details.payloads))
        return self.answer

    def saved(self, snapshot: Snapshot) -> None:
        self.heard.append(snapshot.header)

    def flagged(self, answer: RecordActivityTaskHeartbeatResponse) -> None:
        self.heard.append(answer)


class KeyService:
    """A codec's, which may be away, or slow."""

    def __init__(self) -> None:
        self.is_there = asyncio.Event()
        self.calls = 0
        self.fails = False

    async def encode(self, snapshot: Snapshot) -> Sequence[Payload]:
        self.calls += 1
        if self.fails and not self.is_there.is_set():
            raise ConnectionError("the key service is away")
        await self.is_there.wait()
        return [Payload(data=snapshot.header)]


@contextlib.asynccontextmanager
async def writing(
    server: Any, encode: Callable[[Snapshot], Awaitable[Sequence[Payload]]], *, has_codec: bool = True
) -> AsyncIterator[tuple[JournalWriter, asyncio.Task[None]]]:
    def journal() -> Snapshot:
        return Snapshot(b"new", b"")

    writer = JournalWriter(server, b"token", journal, encode, has_codec=has_codec, interval=INTERVAL, listener=server)
    running = asyncio.create_task(writer.run(OLD))
    try:
        yield writer, running
    finally:
        running.cancel()
        await asyncio.wait((running,))


async def test_without_a_codec_a_checkpoint_is_one_write():
    async def encode(snapshot: Snapshot) -> Sequence[Payload]:
        return [Payload(data=snapshot.header)]

    server = Server()
    async with writing(server, encode, has_codec=False) as (writer, _):
        writer.checkpoint(saved := Future[None]())
        await asyncio.wrap_future(saved)
        assert server.beats == [b"new"]
        assert server.heard == [b"new"]


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "hangs"])
async def test_while_the_codec_fails_the_attempt_is_kept_alive_and_nothing_is_acknowledged(fails: bool):
    server, keys = Server(), KeyService()
    keys.fails = fails
    async with writing(server, keys.encode) as (writer, _):
        writer.checkpoint(saved := Future[None]())
        await wait_until(lambda: len(server.beats) >= 3 and keys.calls >= (2 if fails else 1))
        assert set(server.beats) == {b"old"}
        assert not saved.done()
        assert server.heard == []
        assert fails or keys.calls == 1  # a slow one is not asked anew
        keys.is_there.set()
        await asyncio.wrap_future(saved)
        assert server.beats[-1] == b"new"
        assert server.heard == [b"new"]
        beats = len(server.beats)
        await wait_until(lambda: len(server.beats) >= beats + 2)
        assert set(server.beats[beats:]) == {b"new"}


async def test_while_the_codec_fails_the_servers_requests_are_heard():
    server, keys = Server(), KeyService()
    server.answer = RecordActivityTaskHeartbeatResponse(activity_paused=True)
    async with writing(server, keys.encode) as (writer, _):
        writer.note()
        await wait_until(lambda: server.answer in server.heard)


async def test_while_the_codec_fails_it_is_noticed_that_another_attempt_has_begun():
    server, keys = Server(), KeyService()
    async with writing(server, keys.encode) as (writer, running):
        writer.note()
        await wait_until(lambda: len(server.beats) >= 1)
        server.is_gone = True
        await asyncio.wait_for(running, 10)
