"""Waiting for a run's result."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.converter import DataConverter, PayloadCodec

from support import App
from temporal_async_task import async_task


class WithoutAnswer(PayloadCodec):
    """Its key service does not answer when a result is to be read."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        if any(b"a result" in payload.data for payload in payloads):
            raise TimeoutError("the key service does not answer")
        return list(payloads)


@pytest.mark.parametrize("timeout", [None, 20])
async def test_the_codecs_own_timeout_is_not_taken_for_the_waits(app: App, timeout: float | None):
    @async_task
    async def shoot() -> str:
        return "a result"

    converter = replace(DataConverter.default, payload_codec=WithoutAnswer())
    await app.start(shoot, data_converter=converter)
    task_id = await shoot.submit()
    with pytest.raises(TimeoutError, match="the key service does not answer"):
        await shoot.result(task_id, timeout=timeout)
