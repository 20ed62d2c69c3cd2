"""What a process that lacks the codec's key is told, and that the calls which tell it say so."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from support import App, ended, on_both, status_when
from temporal_async_task import DecryptionError, NonRetryableError, TemporalAsyncTask, step
from temporal_async_task.encryption import AESGCMCodec, encrypted_data_converter, generate_key


async def shoot(fails: bool) -> str:
    picture = await step("paint", str, "a cup")
    if fails:
        raise NonRetryableError("no")
    return picture


@on_both
async def test_each_call_that_may_lack_a_key_raises_what_its_documentation_says(app: App):
    known, unknown = TemporalAsyncTask("shoot", shoot), TemporalAsyncTask("shoot", shoot)
    await app.start(known, data_converter=encrypted_data_converter(AESGCMCodec({"one": generate_key()})))
    await app.connect(unknown, data_converter=encrypted_data_converter(AESGCMCodec({"two": generate_key()})))
    done, failed = await known.submit(False), await known.submit(True)
    for task_id in (done, failed):
        await status_when(known, task_id, ended)

    async def listed(task: TemporalAsyncTask[Any, Any]) -> None:
        async for run in task.list(limit=None):
            assert run.task_id

    calls: list[tuple[Any, Callable[[TemporalAsyncTask[bool, str]], Awaitable[Any]]]] = [
        (TemporalAsyncTask.submit, lambda task: task.submit(False, task_id=done)),
        (TemporalAsyncTask.get_status, lambda task: task.get_status(done)),
        (TemporalAsyncTask.result, lambda task: task.result(done)),
        (TemporalAsyncTask.list, listed),
        (TemporalAsyncTask.resume, lambda task: task.resume(failed)),
    ]
    for method, call in calls:
        with pytest.raises(DecryptionError, match="'one'"):
            await call(unknown)
        assert "DecryptionError: " in method.__doc__, method
    await unknown.cancel(done)
