"""What the library itself costs a worker, on a server in memory that answers at once.

The whole way of an attempt is taken: the activity, both event loops, the runner, the writer, its protobuf messages.
Left out are the SDK's core, gRPC and the server. ``python -m performance.engine`` prints the figures as JSON, in
microseconds; ``--profile`` shows where the time of both event loops goes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import dataclasses
import functools
import gc
import json
import pstats
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import uvloop
from temporalio import activity
from temporalio.api.workflowservice.v1 import (
    RecordActivityTaskHeartbeatRequest,
    RecordActivityTaskHeartbeatResponse,
    RespondActivityTaskCompletedRequest,
    RespondActivityTaskCompletedResponse,
)
from temporalio.common import RawValue
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import ActivityEnvironment

from performance import calls
from temporal_async_task import TemporalAsyncTask, step
from temporal_async_task.engine import wire
from temporal_async_task.engine.activity import AttemptActivity
from temporal_async_task.engine.loops import UserLoops
from temporal_async_task.engine.threads import DaemonThreads
from temporal_async_task.registry import Registry

_STEPS = 5
_AT_ONCE = 50


class _Server:
    """Answers each request at once; as a client does, it serialises it."""

    namespace = "default"
    identity = "benchmark"

    def __init__(self) -> None:
        self.workflow_service = self

    async def record_activity_task_heartbeat(
        self, request: RecordActivityTaskHeartbeatRequest, **_: Any
    ) -> RecordActivityTaskHeartbeatResponse:
        request.SerializeToString()
        return RecordActivityTaskHeartbeatResponse()

    async def respond_activity_task_completed(
        self, request: RespondActivityTaskCompletedRequest, **_: Any
    ) -> RespondActivityTaskCompletedResponse:
        request.SerializeToString()
        return RespondActivityTaskCompletedResponse()


def sync_call(n: int) -> str:
    return f"{n:020d}"


async def chain(n: int) -> str:
    text = ""
    for i in range(n):
        text = await step(f"step-{i}", calls.call, i)
    return text


async def sync_chain(n: int) -> str:
    text = ""
    for i in range(n):
        text = await step(f"step-{i}", sync_call, i)
    return text


TASKS = {name: TemporalAsyncTask(name, function) for name, function in {"chain": chain, "sync": sync_chain}.items()}


class Worker:
    """A worker's activity, without the SDK's worker around it."""

    def __init__(self) -> None:
        registry = Registry()
        for task in TASKS.values():
            registry.add(task)
        self.loops = UserLoops()
        client: Any = _Server()
        self._activity = AttemptActivity(registry, client, pydantic_data_converter, self.loops, DaemonThreads(_AT_ONCE))

    async def attempt(self, task: str, steps: int) -> None:
        environment = ActivityEnvironment()
        environment.info = dataclasses.replace(
            environment.info,
            activity_type=task,
            workflow_id="run",
            workflow_run_id="run",
            heartbeat_timeout=timedelta(seconds=15),
        )
        [params] = pydantic_data_converter.payload_converter.to_payloads([steps])
        args = [RawValue(wire.AttemptInput(origin="0" * 32).to_payload()), RawValue(params)]
        try:
            await environment.run(self._activity.run, args)
        except activity._CompleteAsyncError:  # noqa: SLF001 - how an attempt always ends
            return
        raise AssertionError("an attempt's outcome goes by task token")


async def _cost(work: Callable[[], Awaitable[Any]], count: int) -> float:
    """Microseconds of this process's CPU, of all its threads, a call; many of them at once."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one() -> None:
        async with slots:
            await work()

    gc.collect()
    before = time.process_time()
    await asyncio.gather(*(one() for _ in range(count)))
    return (time.process_time() - before) / count * 1e6


def _works(worker: Worker) -> dict[tuple[str, int], Callable[[], Awaitable[Any]]]:
    """What is measured, without steps and with five: the difference is the steps'."""
    works: dict[tuple[str, int], Callable[[], Awaitable[Any]]] = {}
    for steps in (0, _STEPS):
        for task in TASKS:
            works[task, steps] = functools.partial(worker.attempt, task, steps)
        works["rules", steps] = functools.partial(TASKS["chain"], steps)
    return works


async def measure(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """The figures: median, lowest and highest of the rounds. In each, everything has its turn, in changing order."""
    worker = Worker()
    works = _works(worker)
    costs: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    for work in works.values():
        await _cost(work, max(count // 2, 5))
    for number in range(rounds):
        for key in list(works) if number % 2 else reversed(works):
            costs[key].append(await _cost(works[key], count))
    worker.loops.stop()

    def of_a_step(name: str) -> list[float]:
        return [(five - none) / _STEPS for none, five in zip(costs[name, 0], costs[name, _STEPS], strict=True)]

    found = {
        "engine-task": costs["chain", 0],
        "engine-step": of_a_step("chain"),
        "engine-sync-step": of_a_step("sync"),
        "rules-step": of_a_step("rules"),
    }
    return {
        figure: {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
        for figure, samples in found.items()
    }


async def profile(count: int) -> None:
    """Print where the time of the SDK's loop and of the users' loop goes."""
    worker = Worker()
    profiles = cProfile.Profile(), cProfile.Profile()
    await _cost(lambda: worker.attempt("chain", _STEPS), count)
    user_loop = worker.loops.pick()
    user_loop.call_soon(profiles[1].enable)
    profiles[0].enable()
    await _cost(lambda: worker.attempt("chain", _STEPS), count)
    profiles[0].disable()
    disabled = threading.Event()
    user_loop.call_soon(lambda: (profiles[1].disable(), disabled.set()))
    disabled.wait()
    for name, made in zip(("the SDK's loop", "the users' loop"), profiles, strict=True):
        print(f"\n===== {name}")
        pstats.Stats(made).sort_stats("tottime").print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="tasks of each kind in a round; default: 200")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--uvloop", action="store_true", help="have the worker's own loop be uvloop's")
    options = parser.parse_args()
    run = uvloop.run if options.uvloop else asyncio.run
    if options.profile:
        run(profile(options.count))
    else:
        print(json.dumps(run(measure(options.count, options.rounds)), indent=1))


if __name__ == "__main__":
    main()
