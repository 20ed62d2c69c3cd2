"""Very many tasks, while workers are killed and the server is restarted."""

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from faults.conftest import PATIENCE, Report, Scale, StartWorker, bring_back
from faults.vendor import Vendor, expected, order
from support import NEVER_AGAIN, App, ended, wait_until, work
from temporal_async_task import ServerUnavailableError, TaskResult, TaskStatus, TemporalAsyncTask, step
from temporal_async_task.devserver import DevServer

pytestmark = pytest.mark.case(14, "load")
TASKS_A_MINUTE = 1000
STEPS = ("generate", "upload")
WORKERS = 4
"""One of them is never killed: its memory is looked at."""
STUCK = 300.0
"""Seconds without any progress after which the rest of the tasks counts as lost."""


def pair_task(heartbeat_timeout: float = 15) -> TemporalAsyncTask[int, list[str]]:
    async def pair(_: int) -> list[str]:
        return [await step(key, order, random.uniform(0.05, 0.2)) for key in STEPS]

    return TemporalAsyncTask("pair", pair, retry_policy=NEVER_AGAIN, heartbeat_timeout=heartbeat_timeout)


def resident(pid: int) -> float:
    """Megabytes of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def test_of_very_many_queued_tasks_none_is_lost_while_workers_are_killed_and_the_server_restarted(
    own_server: DevServer,
    vendor: Vendor,
    start_worker: StartWorker,
    scale: Scale,
    chance: random.Random,
    report: Report,
):
    count = scale.pick(100, int(TASKS_A_MINUTE * scale.minutes))
    kill_every, restart_every = scale.pick((3.0, 5.0), (10.0, 60.0))
    app = App(own_server.address, "load")
    # A server that is restarted is away for some seconds, and nobody's heartbeats are to be missed by that.
    task = pair_task(scale.pick(10, 30))
    await app.connect(task)
    ids = await submitted(task, count)
    begun = time.monotonic()
    slots = scale.pick("10", "50")
    workers = [start_worker(__file__, app, SLOTS=slots) for _ in range(WORKERS)]
    steady, *others = workers
    killed: dict[int, float] = {}
    restarts = 0
    memory: list[float] = []
    runs: dict[str, TaskResult[list[str]]] = {}

    def at_work() -> list[int]:
        """Of the workers that may be killed those that have made calls: the others still start."""
        callers = {call.pid for call in vendor.calls()}
        return [number for number, worker in enumerate(others) if worker.pid in callers]

    async def kill_now_and_then() -> None:
        while True:
            await asyncio.sleep(kill_every)
            victim = chance.choice(await wait_until(at_work, timeout=PATIENCE, interval=0.5))
            others[victim].kill()
            killed[others[victim].pid] = time.time()
            others[victim] = start_worker(__file__, app, SLOTS=slots)

    async def restart_now_and_then() -> None:
        nonlocal restarts
        while True:
            await asyncio.sleep(restart_every)
            own_server.kill()
            await bring_back(own_server)
            restarts += 1

    async def watch_memory() -> None:
        while True:
            memory.append(resident(steady.pid))
            await asyncio.sleep(1)

    async def look() -> bool:
        """Whether all have ended; asks for those of which it is not known."""
        for some in batched([task_id for task_id in ids if task_id not in runs], 200):
            with contextlib.suppress(ServerUnavailableError):
                for run in await asyncio.gather(*map(task.get_status, some)):
                    if ended(run):
                        runs[run.task_id] = run
        return len(runs) == count

    async def all_called() -> bool:
        """Whether the API has been asked for each task's last step. The server is not: that would be a load, too."""
        last_steps = {call.task_id for call in vendor.calls(key=STEPS[-1])}
        progress.append((len(last_steps), time.monotonic()))
        since = next(at for number, at in progress if number == len(last_steps))
        assert time.monotonic() - since < STUCK, f"no progress: {len(last_steps)} of {count} tasks are done"
        return len(last_steps) == count

    progress: list[tuple[int, float]] = []
    trouble = [asyncio.create_task(make()) for make in (kill_now_and_then, restart_now_and_then, watch_memory)]
    try:
        await wait_until(all_called, timeout=STUCK + count, interval=scale.pick(0.5, 5.0))
        await wait_until(look, timeout=STUCK + count / 10, interval=1)
    finally:
        for one in trouble:
            one.cancel()
        outcomes = await asyncio.gather(*trouble, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes
    took = time.monotonic() - begun

    calls = vendor.calls()
    made = Counter(call.step for call in calls)
    early, late = memory[len(memory) // 3], memory[-1]
    report(
        tasks=count, ended=len(runs), completed=sum(run.status is TaskStatus.COMPLETED for run in runs.values()),
        lost=count - len(runs), kills=len(killed), server_restarts=restarts, calls=len(calls),
        made_again=len(calls) - len(made), seconds=round(took), tasks_per_second=f"{count / took:.1f}",
        worker_MB_after_a_third=round(early), worker_MB_at_the_end=round(late), worker_MB_at_most=round(max(memory)),
    )  # fmt: skip
    for task_id in ids:
        run = runs[task_id]
        assert (run.status, run.result) == (TaskStatus.COMPLETED, expected(task_id, *STEPS)), run
    assert len(made) == count * len(STEPS)
    by_step = defaultdict(list)
    for call in calls:
        by_step[call.step].append(call)
    for several in by_step.values():
        for lost, again in itertools.pairwise(several):
            assert lost.pid in killed, f"{lost} was made again by {again}, though its worker was not killed"
    assert killed
    assert restarts
    assert late < early * 1.15 + 5, f"the worker's memory grows: {[round(one) for one in memory[:: len(memory) // 20]]}"
    await app.stop()


async def submitted(task: TemporalAsyncTask[int, list[str]], count: int) -> list[str]:
    ids: list[str] = []
    for numbers in batched(list(range(count)), 100):
        ids += await asyncio.gather(*map(task.submit, numbers))
    return ids


def batched(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


if __name__ == "__main__":
    work([pair_task()])
