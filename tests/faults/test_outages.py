"""The server is killed while steps run: for moments and for a minute, over a checkpoint and over a completion."""

import asyncio
import time
from typing import Any

import pytest

from faults.conftest import PATIENCE, Report, Scale, StartWorker, bring_back
from faults.vendor import Vendor, expected, order
from support import NEVER_AGAIN, App, on_both, status_when, work
from temporal_async_task import TemporalAsyncTask, step
from temporal_async_task.devserver import DevServer
from temporal_async_task.task import Execution

pytestmark = pytest.mark.case(4, "outages")


async def over_a_checkpoint(_: None) -> list[str]:
    return [await step(key, order) for key in ("generate", "hold", "upload")]


async def over_a_completion(_: None) -> list[str]:
    return [await step(key, order) for key in ("generate", "hold")]


async def single_step(_: None) -> str:
    return await order()


def all_tasks(heartbeat_timeout: float = 15) -> list[TemporalAsyncTask[None, Any]]:
    bodies = [over_a_checkpoint, over_a_completion, single_step]
    return [
        TemporalAsyncTask(body.__name__, body, retry_policy=NEVER_AGAIN, heartbeat_timeout=heartbeat_timeout)
        for body in bodies
    ]


@on_both
@pytest.mark.parametrize("down", [2, 60])
async def test_a_server_that_is_killed_in_a_step_loses_no_acknowledged_step(
    own_server: DevServer,
    vendor: Vendor,
    start_worker: StartWorker,
    scale: Scale,
    report: Report,
    down: int,
    execution: Execution,
):
    heartbeat, seconds = scale.pick((5, min(down, 7)), (15, down))
    app = App(own_server.address, "outages", execution)
    checkpoint, completion, single = all_tasks(heartbeat)
    await app.connect(checkpoint, completion, single)
    start_worker(__file__, app)
    vendor.hold("hold")
    vendor.hold("single_step")
    stepped = [(task, await task.submit(None)) for task in (checkpoint, completion) for _ in range(3)]
    single_ids = [await single.submit(None) for _ in range(3)]
    for task, task_id in stepped:
        await vendor.called(task_id, "hold")
        await status_when(task, task_id, lambda run: run.completed_steps == ("generate",), timeout=PATIENCE)
    for task_id in single_ids:
        await vendor.called(task_id, "single_step")
    own_server.kill()
    killed = time.monotonic()
    await asyncio.sleep(min(1.0, seconds / 2))
    vendor.release("hold")
    vendor.release("single_step")
    await asyncio.sleep(seconds - min(1.0, seconds / 2))
    await bring_back(own_server)
    back = time.monotonic()
    within = heartbeat + 30
    for task, task_id in stepped:
        keys = ("generate", "hold", "upload") if task is checkpoint else ("generate", "hold")
        assert await task.result(task_id, timeout=within) == expected(task_id, *keys)
    for task_id in single_ids:
        assert await single.result(task_id, timeout=within) == f"{task_id}/single_step"
    took = time.monotonic() - back
    made = [vendor.count(task_id) for _, task_id in stepped]
    made_again = len(vendor.calls()) - 3 * (3 + 2 + 1)
    report(down=f"{seconds} s", runs=9, ended_after=f"{took:.1f} s", calls=len(vendor.calls()), made_again=made_again)
    assert took < within
    for counts in made:
        assert counts["generate"] == 1
        assert counts["hold"] <= 2
        assert counts.get("upload", 1) == 1
    if back - killed < heartbeat / 2:
        assert made_again == 0, "within the heartbeat timeout nothing is repeated"
    await app.stop()


if __name__ == "__main__":
    work(all_tasks())
