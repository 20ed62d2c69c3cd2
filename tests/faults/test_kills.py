"""Workers that are killed: at random moments, and at the moments that matter, around a checkpoint."""

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from faults.conftest import EXECUTIONS, PATIENCE, Report, Scale, StartWorker
from faults.proxy import Proxy
from faults.vendor import Call, Vendor, expected, order
from support import NEVER_AGAIN, App, ended, on_both, status_when, wait_until, work
from temporal_async_task import TaskResult, TaskStatus, TemporalAsyncTask, step

T = TypeVar("T")
STEPS = ("generate", "download", "upload")
HEARTBEAT = 4.0
"""Seconds: long enough that a worker which nobody has killed does not miss it, however busy the machine is."""


def shot_task() -> TemporalAsyncTask[float, list[str]]:
    """Three steps, none of which may be retried."""

    async def product_shot(slowness: float) -> list[str]:
        return [await step(key, order, slowness * random.uniform(0.1, 0.7)) for key in STEPS]

    return TemporalAsyncTask("product_shot", product_shot, retry_policy=NEVER_AGAIN, heartbeat_timeout=HEARTBEAT)


# 1. At random moments --------------------------------------------------------------------------------------


@pytest.mark.case(1, "kills")
@on_both
async def test_workers_that_are_killed_at_random_moments_lose_nothing_and_repeat_no_finished_step(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    kills, open_runs = scale.pick(5, 100), 30
    product_shot = shot_task()
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
        victim = chance.choice(await wait_until(at_work, timeout=PATIENCE))
        workers[victim].kill()
        killed[workers[victim].pid] = time.time()
        workers[victim] = start_worker(__file__, app, SLOTS="3")
        await look()
        await top_up()
    for task_id in runs:
        runs[task_id] = await status_when(product_shot, task_id, ended, timeout=PATIENCE)

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
    mine: App, vendor: Vendor, start_worker: StartWorker, *, cut: str | None = None, delay: float | None = None
) -> tuple[TaskResult[list[str]], dict[str, int]]:
    """A run whose worker is killed when the API has answered its second call: where it stood then, and its calls.

    The worker's way "up" to the server, or "down" from there, is held since before that answer. Without either, it is
    killed after a delay; or else when it has begun the third step, which waits until then. The keys of the second and
    the third are told without the number of the round.
    """
    number = f"{random.getrandbits(32):x}"
    held, last = f"held-{number}", f"last-{number}"
    # By the way down an answer may be on its way: it is missed for five seconds, then the writer goes on.
    task = held_task(heartbeat_timeout=10.0 if cut == "down" else HEARTBEAT)
    await mine.connect(task)
    try:
        async with Proxy(mine.address) as proxy:
            worker = start_worker(__file__, App(proxy.address, mine.queue, mine.execution))
            vendor.hold(held)
            vendor.hold(last)
            task_id = await task.submit(number)
            call = await vendor.called(task_id, held)
            await status_when(task, task_id, lambda run: "generate" in run.completed_steps, timeout=PATIENCE)
            if cut is not None:
                proxy.hold(up=cut == "up", down=cut == "down")
            vendor.release(held)
            if cut == "up":
                await vendor.answered(call)
                await wait_until(lambda: proxy.held_up)
                await asyncio.sleep(0.2)
            elif cut == "down":
                await status_when(task, task_id, lambda run: held in run.completed_steps, timeout=PATIENCE)
            elif delay is not None:
                await asyncio.sleep(delay)
            else:
                await vendor.called(task_id, last)
            worker.kill()
        # From then on, nothing that it has sent is on its way: the server would refuse it.
        stood = await status_when(task, task_id, knows_of_the_loss, timeout=PATIENCE)
        vendor.release(last)
        start_worker(__file__, mine)
        assert await task.result(task_id, timeout=PATIENCE) == expected(task_id, "generate", held, last)
        assert all(len({call.idempotency_key for call in vendor.calls(task_id, key)}) == 1 for key in (held, last))
        return stood, {key.partition("-")[0]: times for key, times in vendor.count(task_id).items()}
    finally:
        await mine.stop()


def knows_of_the_loss(run: TaskResult[list[str]]) -> bool:
    return (run.last_error or "").startswith("WorkerLostError")


def held_task(heartbeat_timeout: float = HEARTBEAT) -> TemporalAsyncTask[str, list[str]]:
    async def held_order(number: str) -> list[str]:
        return [await step(key, order) for key in ("generate", f"held-{number}", f"last-{number}")]

    return TemporalAsyncTask("held_order", held_order, retry_policy=NEVER_AGAIN, heartbeat_timeout=heartbeat_timeout)


async def in_groups(app: App, rounds: int, make: Callable[[App], Awaitable[T]], size: int = 4) -> list[T]:
    """The results of so many rounds, some of them at a time, each with a queue of its own, in either execution."""
    slots = asyncio.Semaphore(size)

    async def one(number: int) -> T:
        async with slots:
            return await make(App(app.address, f"{app.queue}-{number}", EXECUTIONS[number % len(EXECUTIONS)]))

    return await asyncio.gather(*map(one, range(rounds)))


@pytest.mark.case(2, "checkpoint")
async def test_a_step_whose_reply_was_lost_with_its_worker_is_repeated_alone_under_the_same_key(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, report: Report
):
    rounds = scale.pick(2, 20)
    done = await in_groups(app, rounds, lambda mine: killed_around_a_checkpoint(mine, vendor, start_worker, cut="up"))
    report(kills=rounds, calls=len(vendor.calls()), made_again=len(vendor.calls()) - 3 * rounds)
    for stood, made in done:
        assert stood.completed_steps == ("generate",)
        assert made == {"generate": 1, "held": 2, "last": 1}


@pytest.mark.case(2, "checkpoint")
async def test_a_step_that_was_saved_is_not_repeated_though_its_worker_never_learned_of_it(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, report: Report
):
    rounds = scale.pick(2, 20)
    done = await in_groups(app, rounds, lambda mine: killed_around_a_checkpoint(mine, vendor, start_worker, cut="down"))
    report(kills=rounds, calls=len(vendor.calls()), made_again=len(vendor.calls()) - 3 * rounds)
    for stood, made in done:
        assert len(stood.completed_steps) == 2
        assert made == {"generate": 1, "held": 1, "last": 1}


@pytest.mark.case(2, "checkpoint")
async def test_a_worker_that_is_killed_right_after_it_learned_that_a_step_is_saved_does_not_repeat_it(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, report: Report
):
    rounds = scale.pick(2, 20)
    done = await in_groups(app, rounds, lambda mine: killed_around_a_checkpoint(mine, vendor, start_worker))
    report(kills=rounds, calls=len(vendor.calls()), made_again=len(vendor.calls()) - 3 * rounds)
    for stood, made in done:
        assert len(stood.completed_steps) == 2
        assert made == {"generate": 1, "held": 1, "last": 2}


@pytest.mark.case(2, "checkpoint")
async def test_killed_within_milliseconds_of_the_reply_a_step_is_repeated_if_and_only_if_it_was_not_saved(
    app: App, vendor: Vendor, start_worker: StartWorker, scale: Scale, chance: random.Random, report: Report
):
    rounds = scale.pick(4, 40)
    done = await in_groups(
        app,
        rounds,
        lambda mine: killed_around_a_checkpoint(mine, vendor, start_worker, delay=chance.uniform(0, 0.03)),
    )
    saved = sum(len(stood.completed_steps) == 2 for stood, _ in done)
    report(kills=rounds, saved=saved, not_saved=rounds - saved, calls=len(vendor.calls()))
    for stood, made in done:
        assert made["generate"] == 1
        assert made["held"] == (1 if len(stood.completed_steps) == 2 else 2)
        assert made["last"] <= made["held"] % 2 + 1, "it is called by the worker that is killed only if held is saved"


if __name__ == "__main__":
    work([shot_task(), held_task()])
