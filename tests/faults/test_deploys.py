"""New code while runs are in flight, and workers of the old and the new at work side by side."""

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict

import pytest

from faults.conftest import PATIENCE, Report, Scale, StartWorker
from faults.vendor import Vendor, order
from support import NEVER_AGAIN, App, ended, on_both, status_when, wait_until, work
from temporal_async_task import NonRetryableError, TaskResult, TaskStatus, TemporalAsyncTask, current_run, sleep, step

pytestmark = pytest.mark.case(11, "deploys")

OLD = ("prepare", "generate", "label", "pause-1", "upload", "pause-2", "notify")
NEW = ("plan", "generate", "moderate", "pause-1", "notify", "pause-2", "upload")
"""`prepare` is renamed, `label` removed, `moderate` inserted, `notify` and `upload` reordered."""
PAUSE = 10.0
"""Seconds: a run lasts for long enough that very many are in flight, in very few slots."""


def album_task(version: str) -> TemporalAsyncTask[float, dict[str, str]]:
    async def album(slowness: float) -> dict[str, str]:
        got = {}
        for key in {"old": OLD, "new": NEW}[version]:
            if key.startswith("pause"):
                await sleep(key, PAUSE)  # the attempt ends: a worker of either version goes on
                continue
            got[key] = await step(key, order, random.uniform(0, slowness))
            if got[key] != f"{current_run().task_id}/{key}":
                raise NonRetryableError(f"step {key} was given {got[key]}")
        return {"version": version, **got}

    return TemporalAsyncTask("album", album, retry_policy=NEVER_AGAIN, heartbeat_timeout=30)


@on_both
async def test_runs_in_flight_finish_while_workers_of_both_versions_are_at_work(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    album = album_task("old")
    await app.connect(album)
    # Few slots: so the runs are spread over the workers.
    slots = str(scale.pick(8, 15))
    workers = [start_worker(__file__, app, VERSION="old", SLOTS=slots, GRACE="10") for _ in range(2)]
    in_flight = scale.pick(30, 100)
    runs: dict[str, TaskResult[dict[str, str]] | None] = {}

    least_begun = in_flight

    async def enough_in_flight() -> bool:
        """Whether at least half of those in flight have begun; others are submitted in the place of those that end."""
        nonlocal least_begun
        unended = [task_id for task_id, run in runs.items() if run is None or not ended(run)]
        for run in await asyncio.gather(*map(album.get_status, unended)):
            runs[run.task_id] = run
        states = Counter(run.status if run else TaskStatus.PENDING for run in runs.values())
        begun = states[TaskStatus.PROCESSING]
        missing = in_flight - begun - states[TaskStatus.PENDING]
        runs.update(dict.fromkeys(await asyncio.gather(*(album.submit(0.6) for _ in range(missing)))))
        if begun < in_flight / 2:
            return False
        least_begun = min(least_begun, begun)
        return True

    versions = {worker.pid: "old" for worker in workers}
    swaps = scale.pick(3, 12)
    for number in range(swaps):  # now one of these, now one of those
        await wait_until(enough_in_flight, timeout=PATIENCE, interval=0.2)
        version = "new" if number % 2 == 0 else "old"
        worker = start_worker(__file__, app, VERSION=version, SLOTS=slots, GRACE="10")
        versions[worker.pid] = version
        await asyncio.sleep(chance.uniform(0.5, 2))
        leaver = workers.pop(chance.randrange(len(workers)))
        leaver.terminate()
        # On a busy machine it may be told so before Python has begun to listen to signals.
        assert await leaver.exit_status(timeout=30) in {0, -signal.SIGTERM}, leaver.errors()
        workers.append(worker)
    versions[start_worker(__file__, app, VERSION="new", SLOTS=slots).pid] = "new"
    finished = [await status_when(album, task_id, ended, timeout=PATIENCE) for task_id in runs]

    seen: dict[str, set[str]] = defaultdict(set)
    for call in vendor.calls():
        seen[call.task_id].add(versions[call.pid])
    made = Counter(call.step for call in vendor.calls())
    ended_by = Counter(run.result["version"] for run in finished if run.result)
    mixed = sum(len(by) == 2 for by in seen.values())
    report(
        runs=len(runs), in_flight_at_each_deploy=in_flight, of_these_begun=f">= {least_begun}", deploys=swaps,
        by_both_versions=mixed, ended_by_old=ended_by["old"], ended_by_new=ended_by["new"], calls=made.total(),
        made_again=made.total() - len(made),
    )  # fmt: skip
    for run in finished:
        assert run.status is TaskStatus.COMPLETED, run
        assert run.result is not None
        keys = {"old": OLD, "new": NEW}[run.result["version"]]
        wanted = {key: f"{run.task_id}/{key}" for key in keys if not key.startswith("pause")}
        assert run.result == {"version": run.result["version"], **wanted}
        called = {key for task_id, key in made if task_id == run.task_id}
        assert called == {key for key in run.completed_steps if not key.startswith("pause")}
    assert set(made.values()) == {1}, "a step was called again, though its worker let it finish"
    assert mixed > 0, "no run was carried by both versions"


if __name__ == "__main__":
    work([album_task(os.environ["VERSION"])])
