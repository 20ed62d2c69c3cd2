"""The same id, submitted from very many processes at once."""

import asyncio
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from temporalio.client import Client

from faults.conftest import PATIENCE, Report, Scale, StartWorker
from faults.vendor import Vendor, order
from support import App, WorkerProcess, on_both, wait_until, work
from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    TaskConflictError,
    TaskStatus,
    TemporalAsyncTask,
    step,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.task import Execution

pytestmark = pytest.mark.case(8, "ids")
TASK_ID = "order-1001"


def paid_task() -> TemporalAsyncTask[int, str]:
    async def paid(amount: int) -> str:
        await step("pay", order)
        return f"paid {amount}"

    return TemporalAsyncTask("paid", paid)


async def submit(amount: int) -> dict[str, object]:
    component = AsyncTaskComponent(AsyncTaskComponentConfig.load())
    task = paid_task()
    component.register(task)
    await component.connect()
    try:
        return {"amount": amount, "id": await task.submit(amount, task_id=TASK_ID)}
    except Exception as error:
        return {"amount": amount, "error": type(error).__name__, "text": str(error)}


def submit_in_many_processes() -> None:
    """Fork first, and connect then: each process has a client of its own. All submit when the pipe is closed."""
    out, count, amounts = Path(os.environ["OUT"]), int(os.environ["COUNT"]), json.loads(os.environ["AMOUNTS"])
    ready, gun = os.pipe()
    children = []
    for number in range(count):
        if (child := os.fork()) == 0:
            os.close(gun)
            os.read(ready, 1)
            answer = asyncio.run(submit(amounts[number % len(amounts)]))
            with out.open("a") as file:
                file.write(json.dumps(answer) + "\n")
            os._exit(0)
        children.append(child)
    os.close(gun)
    for child in children:
        os.waitpid(child, 0)


def told(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


async def answers(app: App, out: Path, count: int, *amounts: int) -> list[dict[str, str]]:
    env = {"OUT": str(out), "COUNT": str(count), "AMOUNTS": json.dumps(amounts), "SUBMIT": "1"}
    with WorkerProcess(__file__, app, **env) as submitters:
        assert await submitters.exit_status(timeout=600) == 0, submitters.errors()
    found = told(out)
    assert len(found) == count
    return found


async def executions(client: Client, execution: Execution) -> int:
    """How many there are by the server's own count, whatever this library says."""
    if execution == "activity":
        return len([one async for one in client.list_activities(f"ActivityId = '{TASK_ID}'")])
    return len([one async for one in client.list_workflows(f"WorkflowId = '{TASK_ID}'")])


@on_both
async def test_the_same_id_from_very_many_processes_at_once_is_one_run(
    own_server: DevServer,
    vendor: Vendor,
    start_worker: StartWorker,
    scale: Scale,
    tmp_path: Path,
    report: Report,
    execution: Execution,
):
    app = App(own_server.address, "same-id", execution)
    count = scale.pick(12, 100)
    found = await answers(app, tmp_path / "submitted", count, 5)
    assert Counter(answer.get("id") for answer in found) == {TASK_ID: count}, found
    start_worker(__file__, app)
    task = paid_task()
    client = (await app.connect(task)).client
    assert await task.result(TASK_ID, timeout=PATIENCE) == "paid 5"
    assert vendor.count(TASK_ID) == {"pay": 1}
    made = await wait_until(lambda: executions(client, execution))
    report(processes=count, executions=made, calls=len(vendor.calls()))
    assert made == 1
    await app.stop()


@on_both
async def test_of_the_same_id_with_other_params_one_wins_and_the_others_are_conflicts_while_it_runs_and_after(
    own_server: DevServer,
    vendor: Vendor,
    start_worker: StartWorker,
    scale: Scale,
    tmp_path: Path,
    report: Report,
    execution: Execution,
):
    app = App(own_server.address, "conflicts", execution)
    count = scale.pick(8, 100)
    vendor.hold("pay")
    start_worker(__file__, app)
    at_once = await answers(app, tmp_path / "at-once", count, 5, 6)
    [winner] = {answer["amount"] for answer in at_once if "id" in answer}
    loser = 11 - int(winner)
    await vendor.called(TASK_ID, "pay")
    while_running = await answers(app, tmp_path / "while-running", scale.pick(2, 10), loser)
    vendor.release("pay")
    task = paid_task()
    client = (await app.connect(task)).client
    assert await task.result(TASK_ID, timeout=PATIENCE) == f"paid {winner}"
    after = await answers(app, tmp_path / "after", scale.pick(2, 10), loser)
    same_after = await answers(app, tmp_path / "same-after", scale.pick(2, 10), int(winner))
    refused = [answer for answer in (*at_once, *while_running, *after) if answer["amount"] == loser]
    made = await wait_until(lambda: executions(client, execution))
    report(processes=count, conflicts=len(refused), executions=made, calls=len(vendor.calls()))
    assert {answer.get("error") for answer in refused} == {TaskConflictError.__name__}, refused
    assert all(TASK_ID in str(answer["text"]) for answer in refused)
    assert {answer.get("id") for answer in same_after} == {TASK_ID}
    assert vendor.count(TASK_ID) == {"pay": 1}
    assert made == 1
    assert (await task.get_status(TASK_ID)).status is TaskStatus.COMPLETED
    await app.stop()


if __name__ == "__main__":
    if os.environ.get("SUBMIT"):
        submit_in_many_processes()
    else:
        work([paid_task()])
