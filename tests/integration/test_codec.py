"""With a codec on the data converter, what the user's values and errors say is nowhere in clear on the server."""

import asyncio
import base64
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.workflowservice.v1 import (
    DescribeActivityExecutionRequest,
    DescribeWorkflowExecutionRequest,
    GetWorkflowExecutionHistoryRequest,
)
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter, DefaultFailureConverterWithEncodedAttributes, PayloadCodec

from support import FOR_AN_HOUR, App, backs_off, ended, on_both, status_when, wait_until
from temporal_async_task import (
    AsyncTaskComponent,
    DecryptionError,
    RetryPolicy,
    StepState,
    TaskConflictError,
    TaskResult,
    TaskStatus,
    async_task,
    progress,
    sleep,
    step,
)
from temporal_async_task.engine import attempt_end
from temporal_async_task.task import Execution

CANARY = "canary-4b1d"
POLICY = RetryPolicy(max_retries=2, initial_delay=1.05, max_delay=1.05, jitter=0)


class Masking(PayloadCodec):
    """A toy: it masks each payload as a whole with a key."""

    def __init__(self, key: int = 0x5A) -> None:
        self._key = key

    def _mask(self, data: bytes) -> bytes:
        return bytes(byte ^ self._key for byte in data)

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [
            Payload(
                metadata={"encoding": b"binary/masked"},
                data=base64.b64encode(self._mask(payload.SerializeToString())),
            )
            for payload in payloads
        ]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        decoded = []
        for payload in payloads:
            if payload.metadata.get("encoding") != b"binary/masked":
                raise ValueError("a payload that this codec has not encoded")
            decoded.append(Payload.FromString(self._mask(base64.b64decode(payload.data))))
        return decoded


MASKED = dataclasses.replace(
    pydantic_data_converter,
    payload_codec=Masking(),
    failure_converter_class=DefaultFailureConverterWithEncodedAttributes,
)


async def on_the_server(client: Client, execution: Execution, task_id: str) -> bytes:
    """All that the server has of a run, as it has it."""
    service = client.workflow_service
    if execution == "activity":
        found = await service.describe_activity_execution(
            DescribeActivityExecutionRequest(
                namespace=client.namespace,
                activity_id=task_id,
                include_input=True,
                include_outcome=True,
                include_heartbeat_details=True,
                include_last_failure=True,
            )
        )
        return found.SerializeToString()
    workflow = WorkflowExecution(workflow_id=task_id)
    described = await service.describe_workflow_execution(
        DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=workflow)
    )
    history = await service.get_workflow_execution_history(
        GetWorkflowExecutionHistoryRequest(namespace=client.namespace, execution=workflow)
    )
    return described.SerializeToString() + history.SerializeToString()


@dataclasses.dataclass
class Journey:
    """A run that meets all that there is: steps, progress, a retry, a sleep, and its end."""

    task_id: str
    in_backoff: TaskResult[Any]
    asleep: TaskResult[Any]
    at_the_end: TaskResult[Any]
    seen: bytes


async def travel(app: App, ends: str, converter: DataConverter) -> Journey:
    calls = []

    async def generate(prompt: str) -> str:
        return f"image of {prompt}"

    async def flaky(image: str) -> str:
        calls.append(image)
        if len(calls) == 1:
            raise ConnectionError(f"cannot upload {image}")
        return f"url of {image}"

    @async_task(retry_policy=POLICY)
    async def shoot(prompt: str) -> str:
        progress(0.5, f"halfway to {prompt}")
        image = await step("generate", generate, prompt)
        url = await step("upload", flaky, image)
        await sleep("pause", 1.05)
        if ends == "fails":
            raise TypeError(f"nobody wants {url}")
        return url

    component: AsyncTaskComponent = await app.start(shoot, data_converter=converter)
    task_id = await shoot.submit(CANARY)
    pictures, seen = [], b""
    for condition in (
        backs_off,
        lambda run: backs_off(run) and run.current_step == "pause",
        ended,
    ):
        pictures.append(await status_when(shoot, task_id, condition))
        seen += await on_the_server(component.client, app.execution, task_id)
    return Journey(task_id, *pictures, seen)


@on_both
@pytest.mark.parametrize("ends", ["completes", "fails"])
async def test_a_run_and_its_status_work_with_a_codec_and_nothing_of_it_is_in_clear(app: App, ends: str):
    journey = await travel(app, ends, MASKED)
    assert CANARY.encode() not in journey.seen
    assert journey.in_backoff.last_error == f"ConnectionError: cannot upload image of {CANARY}"
    assert journey.in_backoff.completed_steps == ("generate",)
    assert journey.in_backoff.progress_message == f"halfway to {CANARY}"
    assert journey.asleep.completed_steps == ("generate", "upload")
    assert journey.asleep.steps[2].state is StepState.WAITING
    end = journey.at_the_end
    assert end.completed_steps == ("generate", "upload", "pause")
    if ends == "completes":
        assert (end.status, end.result) == (TaskStatus.COMPLETED, f"url of image of {CANARY}")
    else:
        assert (end.status, end.error_type) == (TaskStatus.FAILED, "TypeError")
        assert end.error == f"nobody wants url of image of {CANARY}"


async def test_without_a_codec_it_is_in_clear(app: App):
    journey = await travel(app, "fails", pydantic_data_converter)
    assert CANARY.encode() in journey.seen


@on_both
async def test_duplicates_and_conflicts_are_told_apart_with_a_codec(app: App):
    @async_task
    async def shoot(prompt: str) -> str:
        return prompt

    await app.connect(shoot, data_converter=MASKED)
    task_id = await shoot.submit(CANARY)
    assert await shoot.submit(CANARY, task_id=task_id) == task_id
    with pytest.raises(TaskConflictError):
        await shoot.submit("something else", task_id=task_id)


@on_both
@pytest.mark.parametrize("codec", [Masking(0x33), None], ids=["another key", "no codec"])
@pytest.mark.parametrize("begun", [False, True], ids=["before its first attempt", "in backoff"])
async def test_a_worker_that_cannot_decode_a_run_leaves_it_to_one_that_can(
    app: App, monkeypatch: pytest.MonkeyPatch, begun: bool, codec: Masking | None
):
    monkeypatch.setattr(attempt_end, "UNREADABLE_DELAY", 1.0)
    calls = []

    async def flaky(prompt: str) -> str:
        calls.append(prompt)
        if begun and len(calls) == 1:
            raise ConnectionError("not now")
        return f"image of {prompt}"

    @async_task(retry_policy=POLICY)
    async def shoot(prompt: str) -> str:
        first = await step("first", str.upper, prompt)
        return await step("generate", flaky, first)

    if begun:
        worker = await app.start(shoot, data_converter=MASKED)
        task_id = await shoot.submit(CANARY)
        await status_when(shoot, task_id, backs_off)
        await worker.stop()
    else:
        await app.connect(shoot, data_converter=MASKED)
        task_id = await shoot.submit(CANARY)
    stranger = await app.start(shoot, data_converter=dataclasses.replace(MASKED, payload_codec=codec))
    await app.connect(shoot, data_converter=MASKED)  # whoever asks has the key
    run = await status_when(shoot, task_id, lambda run: "another worker" in (run.last_error or "") or ended(run))
    assert run.status is (TaskStatus.PROCESSING if begun else TaskStatus.PENDING)
    assert run.completed_steps == (("first",) if begun else ())
    await stranger.stop()
    await app.start(shoot, data_converter=MASKED)
    assert await shoot.result(task_id, timeout=60) == f"image of {CANARY.upper()}"


@on_both
@pytest.mark.parametrize("ends", [False, True], ids=["in backoff", "ended"])
async def test_whoever_asks_without_the_codec_is_told_so(app: App, ends: bool):
    async def generate(prompt: str) -> str:
        if not ends:
            raise ConnectionError("not now")
        return prompt

    @async_task(retry_policy=FOR_AN_HOUR)
    async def shoot(prompt: str) -> str:
        return await step("generate", generate, prompt)

    await app.start(shoot, data_converter=MASKED)
    task_id = await shoot.submit(CANARY)
    await status_when(shoot, task_id, ended if ends else backs_off)
    await app.connect(shoot)
    with pytest.raises(DecryptionError, match=r"encoding 'binary/masked'.*data_converter.*--app"):
        await shoot.get_status(task_id)
    with pytest.raises(DecryptionError, match="data_converter"):
        await shoot.submit(CANARY, task_id=task_id)
    if ends:
        with pytest.raises(DecryptionError, match="data_converter"):
            await shoot.result(task_id)


async def test_a_codec_is_used_on_the_event_loop_of_its_component_alone(app: App):
    loops = set()

    class OfOneLoop(Masking):
        """As one that asks a key service would be: its client belongs to the loop on which it was made."""

        async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
            loops.add(asyncio.get_running_loop())
            return await super().encode(payloads)

        async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
            loops.add(asyncio.get_running_loop())
            return await super().decode(payloads)

    async def draw(prompt: str) -> str:
        return f"picture of {prompt}"

    def store(picture: str) -> str:
        return f"{picture}.png"

    @async_task
    async def picture(prompt: str) -> str:
        return await step("store", store, await step("draw", draw, prompt))

    await app.start(picture, data_converter=dataclasses.replace(MASKED, payload_codec=OfOneLoop()))
    assert await picture.run("a lamp") == "picture of a lamp.png"
    assert loops == {asyncio.get_running_loop()}


@on_both
async def test_a_call_in_flight_is_not_made_again_though_the_codec_fails_longer_than_the_heartbeat_timeout(app: App):
    calls, release = [], asyncio.Event()

    class KeyService(Masking):
        """A codec whose keys are away for a while."""

        failures = 0
        is_away = False

        async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
            if self.is_away:
                self.failures += 1
                raise ConnectionError("the key service is away")
            return await super().encode(payloads)

    async def render(prompt: str) -> str:
        calls.append(prompt)
        await release.wait()
        return f"picture of {prompt}"

    @async_task(heartbeat_timeout=1.0)
    async def picture(prompt: str) -> str:
        image = await step("render", render, prompt)
        return image.upper()

    keys = KeyService()
    await app.start(picture, data_converter=dataclasses.replace(MASKED, payload_codec=keys))
    task_id = await picture.submit("a lamp")
    await wait_until(lambda: calls)
    keys.is_away = True
    await wait_until(lambda: keys.failures)  # of the journal that tells which step is running
    since = time.monotonic()
    await wait_until(lambda: time.monotonic() - since > 3)
    keys.is_away = False
    release.set()
    assert await picture.result(task_id, timeout=60) == "PICTURE OF A LAMP"
    assert calls == ["a lamp"]
    assert (await picture.get_status(task_id)).attempt == 1
