"""Conducts a run: starts servers, workers and load generators, and asks each variant the same, round by round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from performance import calls, services
from performance.drain import drain
from performance.place import Place
from performance.processes import BenchmarkError, cpu_seconds, environment, memory, until
from performance.registry import BASE, OURS, VARIANTS, Variant
from performance.results import Results, machine, versions
from performance.running import Running
from performance.services import SERVICES, Service, UnavailableError
from performance.sizes import Sizes
from performance.variants import base
from performance.variants.ours import has_standalone
from performance.waiting import memory_of_waiting

_TEMPORAL_STARTS = {"workflow": BASE, "standalone": "floor-standalone"}
"""What `submit` is held against: the SDK's own start call for the same thing."""
_DRAINED = (*OURS, BASE, "dbos-postgres", "queue")
"""Not the floors, and not DBOS on SQLite, which is not for several workers. Restate pushes, and keeps no queue."""
_IDLE = 3.0  # seconds
_HOLD = 3.0  # seconds that a task runs of which the status is asked
_MB = 1024 * 1024


class Benchmark:
    """One run."""

    def __init__(self, sizes: Sizes, folder: Path, variants: Iterable[str], questions: Iterable[str]) -> None:
        self.sizes = sizes
        self.results = Results(machine=machine(), sizes=asdict(sizes), versions=versions())
        self._folder = folder
        self._wanted = [VARIANTS[name] for name in variants]
        self._questions = set(questions)
        self._running: list[Running] = []
        self._idle: dict[int, float] = {}
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s  {text}", file=sys.stderr, flush=True)

    async def run(self) -> Results:
        """Measure everything that was asked for."""
        async with contextlib.AsyncExitStack() as stack:
            await self._set_up(stack)
            for number in range(1, self.sizes.rounds + 1):
                self.say(f"round {number} of {self.sizes.rounds}")
                await self._round(random.Random(number))  # noqa: S311 - the same in each run
            for question in ("resume", "longest", "drain", "memory"):  # memory is last: its tasks are left behind
                if question in self._questions:
                    self.say(question)
                    with self._timed(question):
                        await getattr(self, f"_{question}")()
        self.results.add_p99()
        return self.results

    async def _round(self, chance: random.Random) -> None:
        """Each question of each variant in turn, so that what the machine does meanwhile meets all alike.

        They take turns in another order each time, so that none always comes after the same other one.
        """
        await self._look_at_idle()
        questions: dict[str, Callable[[Running], Awaitable[None]]] = {
            "throughput": self._throughput,
            "latency": self._latency,
            "submit": self._submit,
            "status": self._status,
            "steps": self._steps,
            "long": self._long,
            "fan": self._fan,
        }
        for question, ask in questions.items():
            if question in self._questions:
                with self._timed(question):
                    for running in chance.sample(self._running, len(self._running)):
                        await self._ask(question, running, ask)
        if "submit" in self._questions:
            with self._timed("submit"):
                await self._submit_pairs()
        if "engine" in self._questions:
            with self._timed("engine"):
                await self._engine()

    @contextlib.contextmanager
    def _timed(self, question: str) -> Generator[None]:
        """Note how long a question takes, of all variants and rounds."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.results.seconds[question] = self.results.seconds.get(question, 0) + time.monotonic() - began

    async def _look_at_idle(self) -> None:
        """What workers and servers use while none has anything to do."""
        if "throughput" not in self._questions:
            return
        pids = {running.worker.pid: running.name for running in self._running}
        servers = {running.service.pid for running in self._running if running.service.pid is not None}
        before = {pid: cpu_seconds(pid) for pid in (*pids, *servers)}
        began = time.monotonic()
        await asyncio.sleep(_IDLE)
        self._idle = {pid: (cpu_seconds(pid) - used) / (time.monotonic() - began) for pid, used in before.items()}
        for pid, name in pids.items():
            self.results.add("worker-cpu-idle", name, self._idle[pid] * 1e3)

    async def _ask(self, question: str, running: Running, ask: Callable[[Running], Awaitable[None]]) -> None:
        try:
            await ask(running)
        except BenchmarkError as error:
            self.say(f"{running.name}, {question}: {error}")
            self.results.left_out[f"{running.name}: {question}"] = str(error)

    # Set-up

    async def _set_up(self, stack: contextlib.AsyncExitStack) -> None:
        found: dict[str, Service | str] = {}
        for variant in self._wanted:
            if variant.name == "standalone" and not has_standalone():
                self.results.left_out[variant.name] = 'this version of the library has no execution="activity"'
                continue
            if variant.server not in found:
                folder = self._folder / f"server-{variant.server}"
                folder.mkdir()
                try:
                    service = await stack.enter_async_context(SERVICES[variant.server](folder))
                except UnavailableError as error:
                    found[variant.server] = str(error)
                else:
                    found[variant.server] = service
                    self.results.servers.append(service.version)
            service = found[variant.server]
            if isinstance(service, str):
                self.results.left_out[variant.name] = service
            else:
                await self._start(stack, variant, service)
        for name, reason in self.results.left_out.items():
            self.say(f"left out: {name}: {reason}")

    def _place(self, variant: Variant, service: Service, suffix: str = "") -> Place:
        folder = self._folder / (variant.name + suffix)
        folder.mkdir()
        extra = f"127.0.0.1:{services.free_port()}" if variant.server == "restate" else ""
        return Place(variant.name, str(folder), service.address, extra, queue=variant.name + suffix)

    async def _start(self, stack: contextlib.AsyncExitStack, variant: Variant, service: Service) -> None:
        running = Running(variant, self._place(variant, service), service)
        stack.push_async_callback(running.stop)
        try:
            await running.start()
        except BenchmarkError as error:
            self.results.left_out[variant.name] = str(error)
            return
        self._running.append(running)
        self.results.add("memory-worker", running.name, memory(running.worker.pid) / _MB)
        self.results.variants[variant.name] = {"title": variant.title, "durability": variant.durability}
        self.say(f"ready: {variant.name}")

    # The questions

    async def _throughput(self, running: Running) -> None:
        tasks = self.sizes.tasks
        runs = [("throughput-1", base.CALL, 1), ("throughput-1-step", base.CHAIN, 1), ("throughput-5", base.CHAIN, 5)]
        used: dict[str, list[float]] = {}
        for figure, kind, n in runs:
            pids = (running.worker.pid, running.service.pid, running.load.pid)
            before = [cpu_seconds(pid) for pid in pids]
            answer = await running.load.tell(
                "throughput", kind=kind, n=n, tasks=tasks, in_flight=min(self.sizes.in_flight, tasks)
            )
            seconds = [cpu_seconds(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
            # What the server does for the idle workers of the other variants is not for this one to pay.
            seconds[1] -= self._idle.get(running.service.pid or 0, 0.0) * answer["seconds"]
            used[figure] = [each / tasks * 1e3 for each in seconds]
            self.results.add(figure, running.name, tasks / answer["seconds"])
            if figure == "throughput-1":
                self.results.add_latencies("loaded", running.name, answer["latencies"])
        for at, who in enumerate(("worker", "server")):
            if who == "server" and running.service.pid is None:
                continue
            self.results.add(f"{who}-cpu-task", running.name, used["throughput-1"][at])
            step = (used["throughput-5"][at] - used["throughput-1-step"][at]) / 4
            self.results.add(f"{who}-cpu-step", running.name, step)
        self.results.add("client-cpu-task", running.name, used["throughput-1"][2])

    async def _latency(self, running: Running) -> None:
        answer = await running.load.tell("latency", kind=base.CALL, n=1, tasks=self.sizes.one_by_one)
        self.results.add_latencies("idle", running.name, answer["latencies"])
        answer = await running.load.tell("latency", kind=base.CHAIN, n=5, tasks=max(self.sizes.one_by_one // 2, 1))
        self.results.add_latencies("idle-5", running.name, answer["latencies"])

    async def _submit(self, running: Running) -> None:
        answer = await running.load.tell("submit", tasks=self.sizes.submits)
        self.results.add_latencies("submit", running.name, answer["latencies"])

    async def _submit_pairs(self) -> None:
        places = {running.name: running.place for running in self._running}
        for name, other in _TEMPORAL_STARTS.items():
            if name in places and other in places:
                ratio = await _python(
                    "performance.pairs", places[name].to_json(), places[other].to_json(), str(self.sizes.pairs)
                )
                self.results.add("submit-ratio", name, ratio)

    async def _status(self, running: Running) -> None:
        if running.has_status:
            answer = await running.load.tell("status", asks=self.sizes.asks, hold=_HOLD)
            for when in ("running", "finished"):
                self.results.add(f"status-{when}", running.name, statistics.median(answer[when]) * 1e3)

    async def _steps(self, running: Running) -> None:
        if self._has_steps(running):
            count = min(100, self.sizes.long)
            answer = await running.load.tell("latency", kind=base.CHAIN, n=count, tasks=1)
            self.results.add("steps-in-a-row", running.name, count / answer["latencies"][0])

    async def _long(self, running: Running) -> None:
        if self._has_steps(running):
            answer = await running.load.tell("latency", kind=base.CHAIN, n=self.sizes.long, tasks=1)
            self.results.add("task-500", running.name, answer["latencies"][0])

    async def _fan(self, running: Running) -> None:
        if base.FAN in running.kinds:
            answer = await running.load.tell("latency", kind=base.FAN, n=self.sizes.fan, tasks=1)
            self.results.add("fan-500", running.name, answer["latencies"][0])

    @staticmethod
    def _has_steps(running: Running) -> bool:
        return base.FAN in running.kinds

    async def _longest(self) -> None:
        for running in self._running:
            if self._has_steps(running):
                await self._ask("longest", running, self._longest_of)

    async def _longest_of(self, running: Running) -> None:
        answer = await running.load.tell("latency", kind=base.CHAIN, n=self.sizes.longest, tasks=1)
        seconds = answer["latencies"][0]
        self.results.add("task-5000", running.name, seconds)
        if (shorter := self.results.summary("task-500", running.name)) is not None:
            each = shorter.median / self.sizes.long
            self.results.add("growth", running.name, seconds / self.sizes.longest / each)

    async def _engine(self) -> None:
        if any(running.name in OURS for running in self._running):
            sizes = "--count", str(self.sizes.engine), "--rounds", "3"
            figures = await _python("performance.engine", *sizes)
            on_uvloop = await _python("performance.engine", *sizes, "--uvloop")
            figures |= {f"{figure}-uvloop": on_uvloop[figure] for figure in ("engine-task", "engine-step")}
            for figure, value in figures.items():
                self.results.add(figure, "workflow", value["median"])

    async def _resume(self) -> None:
        """One variant after the other: two workers that start at once would keep each other waiting."""
        for _ in range(self.sizes.rounds):
            for running in self._running:
                await self._ask("resume", running, self._resume_of)

    async def _resume_of(self, running: Running) -> None:
        """Kill the worker in the middle of a step, and start another at once, as a supervisor would."""
        if base.CRASH not in running.kinds:
            return
        task = (await running.load.tell("crash", 60))["task"]
        await asyncio.to_thread(running.worker.kill)
        killed = time.time()
        running.restart_worker()

        def made() -> list[float]:
            return calls.times_made(running.place.folder, task)

        await until(lambda: len(made()) > 1, f"the step of {running.name} was not called again", 90)
        self.results.add("resume", running.name, made()[1] - killed)
        await running.load.tell("finish", 60)

    async def _drain(self) -> None:
        # What the others leave queued on Temporal's server keeps that busy: first those that need none.
        for running in sorted(self._running, key=lambda one: one.variant.server == "temporal"):
            if running.name in _DRAINED:
                await self._ask("drain", running, self._drain_of)

    async def _drain_of(self, running: Running) -> None:
        place = self._place(running.variant, running.service, "-drain")
        async with contextlib.aclosing(drain(place, self.sizes)) as rates:
            async for workers, rate in rates:
                self.results.add(f"drain-{workers}", running.name, rate)

    async def _memory(self) -> None:
        """All variants at once: what is counted does not depend on how busy the machine is."""
        async with asyncio.TaskGroup() as group:
            for running in self._running:
                group.create_task(self._ask("memory", running, self._memory_of))

    async def _memory_of(self, running: Running) -> None:
        found = memory_of_waiting(running, self.sizes, cached=running.name == "workflow")
        async with contextlib.aclosing(found) as figures:
            async for figure, kilobytes in figures:
                self.results.add(figure, running.name, kilobytes)


async def _python(module: str, *arguments: str) -> Any:
    """What a module prints as JSON, run as a program of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, env=environment(), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise BenchmarkError(f"{module} has failed, with exit status {process.returncode}")
    return json.loads(output)
