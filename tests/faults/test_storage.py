"""Case 17, large values: external storage carries them, through checkpoint, resume and status."""

import asyncio
import dataclasses
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.workflowservice.v1 import DescribeActivityExecutionRequest, DescribeWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.contrib.aws.s3driver import S3StorageDriver, S3StorageDriverClient
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import (
    DataConverter,
    ExternalStorage,
    StorageDriver,
    StorageDriverClaim,
    StorageDriverRetrieveContext,
)

from support import AT_ONCE, BY_TIMER, NEVER_AGAIN, App, backs_off, ended, on_both, status_when, wait_until
from temporal_async_task import (
    ResultError,
    StorageError,
    StoredValueLostError,
    TaskFailedError,
    TaskStatus,
    async_task,
    step,
    wait_for,
)
from temporal_async_task.encryption import AESGCMCodec, encrypted_data_converter, generate_key
from temporal_async_task.engine import runner
from temporal_async_task.storage import FolderStorageDriver
from temporal_async_task.task import Execution

pytestmark = pytest.mark.case(17, "storage")

MB = 1024 * 1024
CANARY = b"canary-large-7f3a"
LARGE = CANARY + bytes(20 * MB)


class CountingFolder(FolderStorageDriver):
    """Counts what is fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fetched = 0

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        self.fetched += len(claims)
        return await super().retrieve(context, claims)


class Bucket(S3StorageDriverClient):
    """A client of S3's interface over a dict. As a real one (of aiohttp) it works on the loop that made it alone."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self._loop = asyncio.get_running_loop()

    def _check_loop(self) -> None:
        assert asyncio.get_running_loop() is self._loop, "the client belongs to another event loop"
        assert threading.current_thread() is threading.main_thread()

    async def put_object(self, *, bucket: str, key: str, data: bytes) -> None:
        self._check_loop()
        self.objects[f"{bucket}/{key}"] = data

    async def object_exists(self, *, bucket: str, key: str) -> bool:
        self._check_loop()
        return f"{bucket}/{key}" in self.objects

    async def get_object(self, *, bucket: str, key: str) -> bytes:
        self._check_loop()
        try:
            return self.objects[f"{bucket}/{key}"]
        except KeyError:
            raise NoSuchKeyError from None


class NoSuchKeyError(Exception):
    """As botocore says it."""

    response = {"Error": {"Code": "NoSuchKey", "Message": "The specified key does not exist."}}  # noqa: RUF012


def storing(driver: StorageDriver, *, encrypted: bool = False, **options: Any) -> DataConverter:
    storage = ExternalStorage(drivers=[driver], **options)
    if encrypted:
        return encrypted_data_converter(CODEC, external_storage=storage)
    return dataclasses.replace(pydantic_data_converter, external_storage=storage)


CODEC = AESGCMCodec({"key": generate_key()})


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def bytes_on_the_server(client: Client, task_id: str, execution: Execution) -> int:
    if execution == "activity":
        found = await client.workflow_service.describe_activity_execution(
            DescribeActivityExecutionRequest(
                namespace=client.namespace,
                activity_id=task_id,
                include_input=True,
                include_outcome=True,
                include_heartbeat_details=True,
                include_last_failure=True,
            )
        )
        return len(found.SerializeToString())
    request = DescribeWorkflowExecutionRequest(
        namespace=client.namespace, execution=WorkflowExecution(workflow_id=task_id)
    )
    size = len((await client.workflow_service.describe_workflow_execution(request)).SerializeToString())
    async for event in client.get_workflow_handle(task_id).fetch_history_events():
        size += event.ByteSize()
    return size


@on_both
@pytest.mark.parametrize("encrypted", [False, True], ids=["in clear", "encrypted"])
async def test_20_mb_go_through_checkpoint_backoff_failure_and_resume_and_no_status_fetches_them(
    app: App, tmp_path: Path, encrypted: bool
):
    calls: list[str] = []

    async def render() -> bytes:
        calls.append("render")
        return LARGE

    async def upload(image: bytes) -> int:
        calls.append("upload")
        assert image == LARGE
        if calls.count("upload") == 1:
            raise ConnectionError("busy")
        if calls.count("upload") == 2:
            raise TypeError("a slip")
        return len(image)

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> int:
        image = await step("render", render)
        return await step("upload", upload, image)

    stored = CountingFolder(tmp_path)
    worker = await app.start(shoot, data_converter=storing(stored, encrypted=encrypted))
    web = CountingFolder(tmp_path)
    component = await app.connect(shoot, data_converter=storing(web, encrypted=encrypted))
    task_id = await shoot.submit()
    run = await status_when(shoot, task_id, backs_off, timeout=20)
    assert run.completed_steps == ("render",)
    await worker.stop()
    [file] = files(tmp_path)
    assert file.stat().st_size > len(LARGE)
    assert (CANARY in file.read_bytes()) is not encrypted

    fetching = CountingFolder(tmp_path)
    await app.start(shoot, data_converter=storing(fetching, encrypted=encrypted))
    await app.connect(shoot, data_converter=storing(web, encrypted=encrypted))
    run = await status_when(shoot, task_id, ended, timeout=20)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "StepFailedError")
    await shoot.resume(task_id)
    assert await shoot.result(task_id, timeout=20) == len(LARGE)
    run = await shoot.get_status(task_id)
    assert run.completed_steps == ("render", "upload")
    assert calls == ["render", "upload", "upload", "upload"]
    assert fetching.fetched == 2  # once for each of the later attempts
    assert web.fetched == stored.fetched == 0
    assert files(tmp_path) == [file]
    assert await bytes_on_the_server(component.client, task_id, app.execution) < 20_000


async def test_params_results_and_events_over_the_limit_go_through_storage_too(app: App, tmp_path: Path):
    large = "x" * 5 * MB

    @async_task
    async def shoot(prompt: str) -> dict[str, Any]:
        event = await wait_for("approval", result_type=str)
        parts = [await step(f"part-{n}", lambda: "y" * 3 * MB) for n in range(3)]
        return {"prompt": prompt, "event": event, "parts": parts}

    component = await app.start(shoot, data_converter=storing(FolderStorageDriver(tmp_path)))
    task_id = await shoot.submit(large)
    assert await shoot.submit(large, task_id=task_id) == task_id
    await shoot.send(task_id, "approval", "z" * MB)
    result = await shoot.result(task_id, timeout=40)
    assert result == {"prompt": large, "event": "z" * MB, "parts": ["y" * 3 * MB] * 3}
    assert (await shoot.get_status(task_id)).result == result
    assert await bytes_on_the_server(component.client, task_id, app.execution) < 60_000
    assert len(files(tmp_path)) == 4  # the parts are the same, and stored once


async def test_a_stored_result_that_is_gone_fails_the_run_naming_the_step_and_resume_does_it_again(
    app: App, tmp_path: Path
):
    calls: list[str] = []

    async def render() -> bytes:
        calls.append("render")
        return LARGE

    async def upload(image: bytes) -> int:
        calls.append("upload")
        if len(calls) == 2:
            raise TypeError("a slip")
        return len(image)

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> int:
        return await step("upload", upload, await step("render", render))

    await app.start(shoot, data_converter=storing(FolderStorageDriver(tmp_path)))
    task_id = await shoot.submit()
    await status_when(shoot, task_id, ended, timeout=20)
    [file] = files(tmp_path)
    file.unlink()
    await shoot.resume(task_id)
    run = await status_when(shoot, task_id, ended, timeout=20)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "StoredValueLostError")
    assert f"Step 'render': the value's file '{file}' was deleted" in str(run.error)
    assert calls == ["render", "upload"]
    await shoot.resume(task_id, redo=["render"])
    assert await shoot.result(task_id, timeout=20) == len(LARGE)
    assert calls == ["render", "upload", "render", "upload"]


async def test_params_that_are_gone_fail_the_run_and_say_so(app: App, tmp_path: Path):
    @async_task
    async def shoot(prompt: str) -> None: ...

    converter = storing(FolderStorageDriver(tmp_path))
    await app.connect(shoot, data_converter=converter)
    task_id = await shoot.submit("x" * 3 * MB)
    files(tmp_path)[0].unlink()
    await app.start(shoot, data_converter=converter)
    run = await status_when(shoot, task_id, ended, timeout=20)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "ParamsError")
    assert re.search(r"params of task 'shoot'.*was deleted", str(run.error))


@pytest.mark.parametrize("why", ["the file is gone", "the folder is not mounted"])
async def test_a_completed_run_whose_result_is_not_there_stays_completed_and_says_so(
    app: App, tmp_path: Path, why: str
):
    folder = tmp_path / "values"
    folder.mkdir()

    @async_task
    async def shoot() -> str:
        return "x" * 3 * MB

    await app.start(shoot, data_converter=storing(FolderStorageDriver(folder)))
    task_id = await shoot.submit()
    assert len(await shoot.result(task_id, timeout=20)) == 3 * MB
    if why == "the file is gone":
        files(folder)[0].unlink()
    else:
        folder.rename(tmp_path / "away")
    run = await shoot.get_status(task_id)
    assert (run.status, run.result) == (TaskStatus.COMPLETED, None)
    assert run.error_type == ("StoredValueLostError" if why == "the file is gone" else "StorageError")
    with pytest.raises(ResultError if why == "the file is gone" else StorageError, match="has completed, but"):
        await shoot.result(task_id)


@pytest.mark.parametrize("lacks", ["the storage", "the driver"])
async def test_a_worker_that_lacks_the_storage_leaves_the_run_to_one_that_has_it(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacks: str
):
    monkeypatch.setattr(runner, "UNREADABLE_DELAY", 1.0)
    monkeypatch.setattr(runner, "_READS", 2)
    calls: list[str] = []

    async def note(name: str) -> str:
        calls.append(name)
        if calls == ["first", "second"]:
            raise ConnectionError("busy")
        return name * MB

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> int:
        return len(await step("first", note, "first")) + len(await step("second", note, "second"))

    converter = storing(FolderStorageDriver(tmp_path))
    worker = await app.start(shoot, data_converter=converter)
    task_id = await shoot.submit()
    await status_when(shoot, task_id, backs_off)
    await worker.stop()
    other = storing(FolderStorageDriver(tmp_path, name="other"))
    stranger = await app.start(shoot, data_converter=pydantic_data_converter if lacks == "the storage" else other)
    unreadable = "StorageError: the result of step 'first' cannot be read: "
    run = await status_when(
        shoot, task_id, lambda run: run.attempt >= 4 and (run.last_error or "").startswith(unreadable)
    )
    assert run.status is TaskStatus.PROCESSING
    assert run.last_error.endswith(f"(worker {stranger.client.identity!r})")
    assert "an externally stored value cannot be fetched here" in caplog.text
    await stranger.stop()
    assert calls == ["first", "second"]
    await app.start(shoot, data_converter=converter)
    assert await shoot.result(task_id, timeout=20) == 11 * MB


async def test_a_folder_that_goes_away_while_a_result_is_stored_is_waited_for(app: App, tmp_path: Path):
    folder = tmp_path / "values"
    folder.mkdir()
    calls: list[int] = []

    async def render() -> bytes:
        calls.append(1)
        folder.rename(tmp_path / "away")
        return LARGE

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> int:
        return len(await step("render", render))

    await app.start(shoot, data_converter=storing(FolderStorageDriver(folder)))
    task_id = await shoot.submit()
    await wait_until(lambda: calls)
    await asyncio.sleep(1)
    (tmp_path / "away").rename(folder)
    assert await shoot.result(task_id, timeout=20) == len(LARGE)
    assert len(calls) == 1


# S3, by the SDK's own driver ------------------------------------------------------------------------------


async def test_the_s3_driver_is_called_on_its_own_event_loop_and_keeps_a_runs_values_together(app: App):
    objects: dict[str, bytes] = {}

    @async_task
    async def child(size: int) -> bytes:
        return bytes(size)

    @async_task
    async def shoot(prompt: str) -> int:
        image = await step("render", lambda: LARGE)
        of_child = await step("child", child.run, 3 * MB)
        return len(image) + len(prompt) + len(of_child)

    await app.start(shoot, child, data_converter=storing(S3StorageDriver(Bucket(objects), "values"), encrypted=True))
    task_id = await shoot.submit("x" * MB, task_id="order-1001/ü")
    assert await shoot.result(task_id, timeout=40) == len(LARGE) + 4 * MB
    assert (await shoot.get_status(task_id)).completed_steps == ("render", "child")
    own = [name for name in objects if name.startswith("values/v0/ns/default/wt/null/wi/order-1001%2F%C3%BC/")]
    assert len(own) == 3  # the params, the step's result, the child's result once more
    assert len(objects) == 4
    assert not any(CANARY in data for data in objects.values())


async def test_a_value_over_the_s3_drivers_own_limit_fails_the_step_and_an_object_that_is_gone_is_told(app: App):
    objects: dict[str, bytes] = {}
    sizes = iter([3 * MB, MB])

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> bytes:
        return await step("render", lambda: bytes(next(sizes)))

    driver = S3StorageDriver(Bucket(objects), "values", max_payload_size=2 * MB)
    await app.start(shoot, data_converter=storing(driver))
    task_id = await shoot.submit()
    with pytest.raises(
        TaskFailedError, match=r"PayloadTooLargeError: Step 'render': .*aws\.s3driver.*max_payload_size"
    ):
        await shoot.result(task_id, timeout=20)
    await shoot.resume(task_id)
    assert len(await shoot.result(task_id, timeout=20)) == MB
    objects.clear()
    run = await shoot.get_status(task_id)
    assert (run.status, run.error_type) == (TaskStatus.COMPLETED, StoredValueLostError.__name__)
