"""Workers that are cut off, or frozen, and come back when another has taken over."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable

import pytest

from faults.conftest import EXECUTIONS, Report, Scale, StartWorker, polls
from faults.proxy import Proxy
from faults.vendor import Vendor, expected, order
from support import NEVER_AGAIN, App, WorkerProcess, status_when, work
from temporal_async_task import TaskStatus, TemporalAsyncTask, step
from temporal_async_task.task import Execution

pytestmark = pytest.mark.case(5, "network")
HEARTBEAT = 5.0
TAKEN_OVER = 300.0
"""Seconds: the server loses offers, of attempts and of workflow tasks, to each request for work that the cut worker has
left open; these live for a minute."""
STEPS = ("first", "second", "third", "fourth")


def fragile_task(name: str = "fragile") -> TemporalAsyncTask[str, list[str]]:
    """Four steps; ``params`` is the one that waits for the test."""

    async def fragile(held: str) -> list[str]:
        return [await step(held if held.startswith(key) else key, order) for key in STEPS]

    return TemporalAsyncTask(name, fragile, retry_policy=NEVER_AGAIN, heartbeat_timeout=HEARTBEAT)


class Cut:
    """What happens to the first worker, and its end."""

    def __init__(self, proxy: Proxy, worker: WorkerProcess) -> None:
        self.proxy = proxy
        self.worker = worker

    def both_ways(self) -> None:
        self.proxy.hold()

    def connections_broken(self) -> None:
        self.proxy.cut()

    def way_up(self) -> None:
        self.proxy.hold(down=False)

    def way_down(self) -> None:
        self.proxy.hold(up=False)

    def frozen(self) -> None:
        os.kill(self.worker.pid, signal.SIGSTOP)

    def mend(self) -> None:
        self.proxy.mend()
        os.kill(self.worker.pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def cut_off(
    app: App,
    vendor: Vendor,
    start_worker: StartWorker,
    chance: random.Random,
    how: Callable[[Cut], None],
    execution: Execution,
) -> AsyncIterator[tuple[Cut, TemporalAsyncTask[str, list[str]], str, str]]:
    """A run whose worker is cut off in a step at random: how, the task, the run's id and the step's key."""
    mine = App(app.address, f"{app.queue}-{chance.getrandbits(32):x}", execution)
    task = fragile_task()
    await mine.connect(task)
    async with Proxy(app.address) as proxy:
        worker = start_worker(__file__, App(proxy.address, mine.queue, execution))
        held = f"{chance.choice(STEPS)}-{mine.queue}"
        vendor.hold(held)
        task_id = await task.submit(held)
        await vendor.called(task_id, held)
        # The other is up before the cut: a machine that is busy with its start could miss heartbeats.
        await polls(mine, task, start_worker(__file__, mine))
        await asyncio.sleep(chance.uniform(0, 1))
        cut = Cut(proxy, worker)
        how(cut)
        try:
            yield cut, task, task_id, held
        finally:
            cut.mend()
            worker.kill()
            await mine.stop()


HOWS = (Cut.both_ways, Cut.connections_broken, Cut.way_up, Cut.frozen)


async def test_a_worker_that_is_back_after_another_took_over_writes_nothing_and_runs_no_further_step(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    async def one(how: Callable[[Cut], None], execution: Execution, *, late_first: bool) -> None:
        async with cut_off(app, vendor, start_worker, chance, how, execution) as (cut, task, task_id, held):
            again = await vendor.called(task_id, held, times=2, timeout=TAKEN_OVER)
            assert again.pid != cut.worker.pid
            before_late = len(vendor.calls(task_id))
            if late_first:
                cut.mend()
                vendor.release(held)  # both are answered: the late one, and the one that counts
            else:
                vendor.release(held)
                assert await task.result(task_id, timeout=TAKEN_OVER) == keys_of(task_id, held)
                cut.mend()
            assert await task.result(task_id, timeout=TAKEN_OVER) == keys_of(task_id, held)
            ended = await task.get_status(task_id)
            await asyncio.sleep(2 * HEARTBEAT)
            assert await task.get_status(task_id) == ended, "the late worker wrote something"
            assert ended.status is TaskStatus.COMPLETED
            calls = vendor.calls(task_id)
            assert [call.key for call in calls].count(held) == 2
            assert len(calls) == len(STEPS) + 1, "a step was repeated, or skipped"
            assert {call.pid for call in calls[before_late:]} <= {again.pid}, "the late worker ran another step"
            assert len({call.idempotency_key for call in vendor.calls(task_id, held)}) == 1

    rounds = scale.pick(1, 6)
    for number in range(rounds):
        # What the late worker sends may come while the run goes on, or when it has ended. After four rounds, each way
        # to be cut off has met both with either execution.
        kinds = [(EXECUTIONS[(number + place) % 2], (number // 2 + place // 2) % 2 == 0) for place in range(len(HOWS))]
        await asyncio.gather(
            *(one(how, execution, late_first=first) for how, (execution, first) in zip(HOWS, kinds, strict=True))
        )
    runs = rounds * len(HOWS)
    each = {how.__name__: rounds for how in HOWS}
    report(runs=runs, **each, calls=len(vendor.calls()), made_again=len(vendor.calls()) - runs * len(STEPS))


async def test_a_worker_that_hears_nothing_from_the_server_goes_on_when_it_does(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    """One way: the server hears what the worker says, and the worker does not know that."""

    async def one(execution: Execution) -> None:
        async with cut_off(app, vendor, start_worker, chance, Cut.way_down, execution) as (cut, task, task_id, held):
            await asyncio.sleep(3 * HEARTBEAT)
            vendor.release(held)
            await asyncio.sleep(HEARTBEAT)
            cut.mend()
            assert await task.result(task_id, timeout=TAKEN_OVER) == keys_of(task_id, held)
            made = vendor.count(task_id)
            assert made.pop(held) <= 2
            assert set(made.values()) <= {1}
            assert len(made) == len(STEPS) - 1
            await status_when(task, task_id, lambda run: run.status is TaskStatus.COMPLETED)

    rounds = scale.pick(1, 5)
    for _ in range(rounds):
        await asyncio.gather(*map(one, EXECUTIONS))
    report(runs=2 * rounds, calls=len(vendor.calls()), made_again=len(vendor.calls()) - 2 * rounds * len(STEPS))


def keys_of(task_id: str, held: str) -> list[str]:
    return expected(task_id, *(held if held.startswith(key) else key for key in STEPS))


if __name__ == "__main__":
    work([fragile_task()])
