"""What a stop leaves behind, because it does not end: it is waited for no longer than is told, and let go."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.converter import DataConverter, PayloadCodec

from support import NEVER_AGAIN, App, wait_until
from temporal_async_task import async_task, component, current_step, step
from temporal_async_task.engine.loops import UserLoop, UserLoops


class WithoutKeyFor(PayloadCodec):
    """It hands on everything but a certain value."""

    def __init__(self, value: bytes) -> None:
        self._value = value
        self.was_asked = threading.Event()

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        if any(self._value in payload.data for payload in payloads):
            self.was_asked.set()
            raise ConnectionError("no key")
        return list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)


@pytest.mark.slow
async def test_a_run_whose_code_blocks_beyond_a_stop_goes_to_another_worker(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(component, "STOP_MARGIN", 0.5)
    calls, told, let_go = [], [], threading.Event()

    async def block() -> int:
        calls.append(current_step().attempt)
        if len(calls) == 1:
            let_go.wait(20)
        return len(calls)

    @async_task(retry_policy=NEVER_AGAIN, heartbeat_timeout=2)
    async def shoot() -> int:
        try:
            return await step("block", block)
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    first = await app.start(shoot, graceful_shutdown_timeout=0.1)
    task_id = await shoot.submit()
    await wait_until(lambda: calls)
    await first.stop()
    assert "they are left behind" in caplog.text
    let_go.set()
    await app.start(shoot)
    assert await shoot.result(task_id, timeout=60) == 2
    assert (calls, told) == ([1, 1], [])
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_run_whose_result_waits_for_a_codec_beyond_a_stop_goes_to_another_worker(
    app: App, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(component, "STOP_MARGIN", 0.5)
    calls = []

    @async_task(heartbeat_timeout=2)
    async def shoot() -> str:
        calls.append(1)
        return ["the first", "the second"][len(calls) - 1]

    codec = WithoutKeyFor(b"the first")
    converter = replace(DataConverter.default, payload_codec=codec)
    first = await app.start(shoot, data_converter=converter, graceful_shutdown_timeout=0.1)
    task_id = await shoot.submit()
    await wait_until(codec.was_asked.is_set)
    await first.stop()
    await app.start(shoot, data_converter=converter)
    assert await shoot.result(task_id, timeout=60) == "the second"


async def test_many_event_loops_that_are_blocked_are_waited_for_no_longer_than_one():
    loops, let_go = UserLoops(shared=False), threading.Event()
    entered = []

    async def block(loop: UserLoop) -> None:
        entered.append(loop)
        let_go.wait(20)

    blocked = [asyncio.create_task(loops.run(block)) for _ in range(5)]
    await wait_until(lambda: len(entered) == len(blocked))
    began = time.monotonic()
    await asyncio.to_thread(loops.stop)
    assert time.monotonic() - began < 4
    let_go.set()
    await asyncio.gather(*blocked)
