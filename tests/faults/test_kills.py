"""Workers that are killed: at random moments, and at the moments that matter, around a checkpoint."""

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from faults.conftest import Report, Scale, StartWorker
from faults.proxy import Proxy
from faults.vendor import Call, Vendor, expected, order
from support import NEVER_AGAIN, App, ended, status_when, wait_until, work
from temporal_async_task import TaskResult, TaskStatus, TemporalAsyncTask, async_task, step

T = TypeVar("T")
STEPS = ("generate", "download", "upload")


@async_task(retry_policy=NEVER_AGAIN, heartbeat_timeout=1)
async def product_shot(slowness: float) -> list[str]:
    """Three steps, none of which may be retried."""
    return [await step(key, order, slowness * random.uniform(0.1, 0.7)) for key in STEPS]


# 1. At random moments --------------------------------------------------------------------------------------


@pytest.mark.case(1, "kills")
async def test_workers_that_are_killed_at_random_moments_lose_nothing_and_repeat_no_finished_step(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    kills, open_runs = scale.pick(10, 100), 20
    await app.connect(product_shot)
    workers = [start_worker(__file__, app, SLOTS="3") for _ in range(3)]
    runs: dict[str, TaskResult[list[str]] | None] = {}
    killed: dict[int, float] = {}
    calls_by_then: dict[tuple[str, str], int] = {}  # of finished steps, when the server first told them to be so

    async def top_up() -> None:
        missing = open_runs - sum(run is None or not ended(run) for run in runs.values())
        runs.update(dict.fromkeys(await asyncio.gather(*(product_shot.submit(1.0) for _ in range(missing)))))

    async def look() -> None:
        unfinished = [task_id for task_id, run in runs.items() if run is None or not ended(run)]
        statuses = await asyncio.gather(*map(product_shot.get_status, unfinished))
        made = Counter(call.step for call in vendor.calls())
        for run in statuses:
            runs[run.task_id] = run
            for key in run.completed_steps:
                calls_by_then.setdefault((run.task_id, key), made[run.task_id, key])

    def at_work() -> list[int]:
        """The workers that have made a call: to kill one while Python starts would be no feat."""
        callers = {call.pid for call in vendor.calls()}
        return [number for number, worker in enumerate(workers) if worker.pid in callers]

    await top_up()
    for _ in range(kills):
        await asyncio.sleep(chance.uniform(0.2, 1.5))
        victim = chance.choice(await wait_until(at_work, timeout=60))
        workers[victim].kill()
        killed[workers[victim].pid] = time.time()
        workers[victim] = start_worker(__file__, app, SLOTS="3")
        await look()
        await top_up()
    for task_id in runs:
        runs[task_id] = await status_when(product_shot, task_id, ended, timeout=60)

    calls = vendor.calls()
    made = Counter(call.step for call in calls)
    lost = made.total() - len(runs) * len(STEPS)
    report(kills=kills, runs=len(runs), calls=len(calls), made_again=lost)
    for task_id, run in runs.items():
        assert run is not None
        assert (run.status, run.result) == (TaskStatus.COMPLETED, expected(task_id, *STEPS)), run
    for finished, before in calls_by_then.items():
        assert made[finished] == before, f"{finished} was called again after the server knew it to be finished"
    assert_in_order(calls)
    assert_repeated_by_kills_only(calls, killed)
    assert lost > 0, "the kills came at moments that do not matter"


def assert_in_order(calls: list[Call]) -> None:
    """No step is called once a later one of its run has begun: it was finished by then."""
    furthest: dict[str, int] = {}
    for call in calls:
        assert STEPS.index(call.key) >= furthest.get(call.task_id, 0), f"{call} was made again"
        furthest[call.task_id] = STEPS.index(call.key)


def assert_repeated_by_kills_only(calls: list[Call], killed: dict[int, float]) -> None:
    """Each kill costs each step in flight one more call, under the same key; nothing else costs any."""
    by_step: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in calls:
        by_step[call.step].append(call)
    for made in by_step.values():
        assert len({call.idempotency_key for call in made}) == 1
        for lost, again in itertools.pairwise(made):
            assert lost.pid in killed, f"{lost} was made again by {again}, though its worker was not killed"
            assert killed[lost.pid] < again.begun, f"{lost} was made again by {again} before its worker was killed"
    assert all(number == 1 for number in Counter((*call.step, call.pid) for call in calls).values())


# 2. Around a checkpoint ------------------------------------------------------------------------------------


async def killed_around_a_checkpoint(
    app: App, vendor: Vendor, start_worker: StartWorker, *, up: bool, down: bool, delay: float | None = None
) -> tuple[str, TaskResult[list[str]]]:
    """A run whose worker is killed when the API has answered its second call, and where the run stood then.

    Its way to the server, or back, is held since before that answer; without either, it is killed after a delay.
    """
    held = f"held-{random.getrandbits(32):x}"
    task = held_task()
    mine = App(app.address, f"{app.queue}-{held}")
    await mine.connect(task)
    try:
        async with Proxy(app.address) as proxy:
            worker = start_worker(__file__, App(proxy.address, mine.queue))
            vendor.hold(held)
            task_id = await task.submit(held)
            call = await vendor.called(task_id, held, timeout=60)
            await status_when(task, task_id, lambda run: "generate" in run.completed_steps)
            if up or down:
                proxy.hold(up=up, down=down)
            vendor.release(held)
            if delay is None:
                await vendor.answered(call)
            if up:
                await wait_until(lambda: proxy.held_up)
                await asyncio.sleep(0.2)
            elif down:
                await status_when(task, task_id, lambda run: held in run.completed_steps)
            else:
                await asyncio.sleep(delay or 0)
            worker.kill()
        await asyncio.sleep(0.5)  # what it had sent has arrived
        stood = await task.get_status(task_id)
        start_worker(__file__, mine)
        assert await task.result(task_id, timeout=30) == expected(task_id, "generate", held, "upload")
        return held, stood
    finally:
        await mine.stop()


def held_task() -> TemporalAsyncTask[str, list[str]]:
    async def held_order(held: str) -> list[str]:
        return [await step(key, order) for key in ("generate", held, "upload")]

    return TemporalAsyncTask("held_order", held_order, retry_policy=NEVER_AGAIN, heartbeat_timeout=1)


async def in_groups(rounds: int, make: Callable[[], Awaitable[T]], size: int = 4) -> list[T]:
    """The results of so many rounds, some of them at a time."""
    slots = asyncio.Semaphore(size)

    async def one() -> T:
        async with slots:
            return await make()

    return await asyncio.gather(*(one() for _ in range(rounds)))


@pytest.mark.case(2, "checkpoint")
async def test_a_step_whose_reply_was_lost_with_its_worker_is_repeated_alone_under_the_same_key(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, report: Report
):
    rounds = scale.pick(2, 20)
    done = await in_groups(rounds, lambda: killed_around_a_checkpoint(app, vendor, start_worker, up=True, down=True))
    report(kills=rounds, calls=len(vendor.calls()), made_again=len(vendor.calls()) - 3 * rounds)
    for held, stood in done:
        assert stood.completed_steps == ("generate",)
        assert vendor.count(stood.task_id) == {"generate": 1, held: 2, "upload": 1}
        first, second = vendor.calls(stood.task_id, held)
        assert first.answered is not None
        assert first.idempotency_key == second.idempotency_key


@pytest.mark.case(2, "checkpoint")
async def test_a_step_that_was_saved_is_not_repeated_though_its_worker_never_learned_of_it(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, report: Report
):
    rounds = scale.pick(2, 20)
    done = await in_groups(rounds, lambda: killed_around_a_checkpoint(app, vendor, start_worker, up=False, down=True))
    report(kills=rounds, calls=len(vendor.calls()), made_again=len(vendor.calls()) - 3 * rounds)
    for held, stood in done:
        assert stood.completed_steps == ("generate", held)
        assert vendor.count(stood.task_id) == {"generate": 1, held: 1, "upload": 1}


@pytest.mark.case(2, "checkpoint")
async def test_killed_within_milliseconds_of_the_reply_a_step_is_repeated_if_and_only_if_it_was_not_saved(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    rounds = scale.pick(4, 40)
    done = await in_groups(
        rounds,
        lambda: killed_around_a_checkpoint(
            app, vendor, start_worker, up=False, down=False, delay=chance.uniform(0, 0.03)
        ),
    )
    saved = sum(held in stood.completed_steps for held, stood in done)
    report(kills=rounds, saved=saved, not_saved=rounds - saved, calls=len(vendor.calls()))
    for held, stood in done:
        made = vendor.count(stood.task_id)
        assert made["generate"] == 1
        assert made[held] == (1 if held in stood.completed_steps else 2)
        if "upload" in stood.completed_steps:
            assert made["upload"] == 1


if __name__ == "__main__":
    work([product_shot, held_task()])
