"""Conducts a run: starts servers, workers and load generators, and asks each variant the same, round by round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from performance import calls, services
from performance.place import Place, calls_made
from performance.processes import BenchmarkError, LoadProcess, WorkerProcess, cpu_seconds, environment, memory
from performance.registry import BASE, OURS, VARIANTS, Variant
from performance.results import Results, machine, versions
from performance.services import SERVICES, Service, UnavailableError
from performance.variants import base
from performance.variants.ours import has_standalone

_TEMPORAL_STARTS = {"workflow": BASE, "standalone": "floor-standalone"}
"""What `submit` is held against: the SDK's own start call for the same thing."""
_LONGEST_PEERS = (*OURS, BASE, "dbos-postgres", "restate")
_DRAINED = (*OURS, BASE, "queue")
_KB = 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rounds: int = 5
    tasks: int = 300
    in_flight: int = 50
    one_by_one: int = 40
    submits: int = 100
    asks: int = 30
    long: int = 500
    longest: int = 5000
    fan: int = 500
    waiting: int = 300
    wait: int = 12
    """Seconds that the tasks wait whose memory is measured."""
    drained: int = 10_000
    drained_by: tuple[int, ...] = (1, 2, 4)
    """Worker processes."""
    engine: int = 400


QUICK = Sizes(
    rounds=2,
    tasks=60,
    one_by_one=10,
    submits=15,
    asks=8,
    long=50,
    longest=500,
    fan=50,
    waiting=50,
    wait=6,
    drained=300,
    engine=60,
)
TINY = Sizes(
    rounds=1,
    tasks=12,
    in_flight=6,
    one_by_one=3,
    submits=3,
    asks=2,
    long=10,
    longest=20,
    fan=5,
    waiting=5,
    wait=1,
    drained=40,
    drained_by=(1,),
    engine=10,
)


class Running:
    """One variant with its processes."""

    def __init__(self, variant: Variant, place: Place, service: Service) -> None:
        self.variant = variant
        self.name = variant.name
        self.place = place
        self.service = service
        self.load = LoadProcess(place)
        self.worker = WorkerProcess(place)
        self.kinds: list[str] = []
        self.has_status = False

    async def start(self) -> None:
        await self.load.start()
        if self.variant.server == "restate":
            await services.register_with_restate(self.service, self.place.extra)
        abilities = await self.load.tell("abilities")
        self.kinds, self.has_status = abilities["kinds"], abilities["has_status"]
        for kind, n in ((base.CALL, 1), (base.CHAIN, 5)):
            await self.load.tell("throughput", 120, kind=kind, n=n, tasks=30, in_flight=10)

    async def stop(self) -> None:
        await self.load.stop()
        await asyncio.to_thread(self.worker.stop)

    def restart_worker(self) -> None:
        self.worker = WorkerProcess(self.place)


class Benchmark:
    """One run."""

    def __init__(self, sizes: Sizes, folder: Path, variants: Iterable[str], questions: Iterable[str]) -> None:
        self.sizes = sizes
        self.results = Results(machine=machine(), sizes=asdict(sizes), versions=versions())
        self._folder = folder
        self._wanted = [VARIANTS[name] for name in variants]
        self._questions = set(questions)
        self._running: list[Running] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s  {text}", file=sys.stderr, flush=True)

    async def run(self) -> Results:
        """Measure everything that was asked for."""
        async with contextlib.AsyncExitStack() as stack:
            await self._set_up(stack)
            for number in range(1, self.sizes.rounds + 1):
                self.say(f"round {number} of {self.sizes.rounds}")
                await self._round()
            for question in ("longest", "memory", "drain"):
                if question in self._questions:
                    self.say(question)
                    await getattr(self, f"_{question}")()
        self.results.add_p99()
        return self.results

    async def _round(self) -> None:
        """Each question of each variant in turn, so that what the machine does meanwhile meets all alike."""
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
                for running in self._running:
                    await self._ask(question, running, ask)
        if "submit" in self._questions:
            await self._submit_pairs()
        if "engine" in self._questions:
            await self._engine()
        if "resume" in self._questions:
            await asyncio.gather(*(self._ask("resume", running, self._resume) for running in self._running))

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
                    found[variant.server] = await stack.enter_async_context(SERVICES[variant.server](folder))
                except UnavailableError as error:
                    found[variant.server] = str(error)
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
            used[figure] = [
                (cpu_seconds(pid) - earlier) / tasks * 1e3 for pid, earlier in zip(pids, before, strict=True)
            ]
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
                times = await _python(
                    "performance.pairs", places[name].to_json(), places[other].to_json(), str(self.sizes.submits)
                )
                ratio = statistics.median(times[0]) / statistics.median(times[1])
                self.results.add("submit-ratio", name, ratio)

    async def _status(self, running: Running) -> None:
        if running.has_status:
            answer = await running.load.tell("status", asks=self.sizes.asks, hold=2)
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
        return base.FAN in running.kinds or running.name.startswith("floor")

    async def _longest(self) -> None:
        for running in self._running:
            if running.name in _LONGEST_PEERS:
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
            figures = await _python("performance.engine", "--count", str(self.sizes.engine))
            for figure, value in figures.items():
                self.results.add(figure, "workflow", value)

    async def _resume(self, running: Running) -> None:
        """Kill the worker in the middle of a step, and start another at once, as a supervisor would."""
        if base.CRASH not in running.kinds:
            return
        task = (await running.load.tell("crash", 60))["task"]
        await asyncio.to_thread(running.worker.kill)
        killed = time.time()
        running.restart_worker()
        while len(made := calls.times_made(running.place.folder, task)) < 2:  # noqa: PLR2004 - the second call
            if time.time() - killed > 90:  # noqa: PLR2004 - seconds
                raise BenchmarkError("its step was not called again in 90 s")
            await asyncio.sleep(0.02)
        self.results.add("resume", running.name, made[1] - killed)
        await running.load.tell("finish", 60)

    async def _memory(self) -> None:
        figures = {
            "memory-in-flight": base.HOLD,
            "memory-sleep": base.SLEEP,
            "memory-backoff": base.BACKOFF,
            "memory-poll": base.POLL,
        }
        for figure, kind in figures.items():
            await asyncio.gather(
                *(
                    self._ask("memory", running, lambda running: self._memory_of(running, figure, kind))  # noqa: B023
                    for running in self._running
                    if kind in running.kinds
                )
            )

    async def _memory_of(self, running: Running, figure: str, kind: str) -> None:
        """What a worker's memory grows by, while as many tasks are held as have been held before."""
        tasks, seconds = self.sizes.waiting, self.sizes.wait
        if figure != "memory-in-flight":  # the allocator has grown before; what is measured is what stays occupied
            await self._held(running, kind, tasks, 1)
        before = memory(running.worker.pid)
        await running.load.tell("begin", kind=kind, n=seconds, tasks=tasks)
        await asyncio.sleep(seconds * 0.6)
        grown = memory(running.worker.pid) - before
        await running.load.tell("finish")
        self.results.add(figure, running.name, grown / tasks / _KB)

    @staticmethod
    async def _held(running: Running, kind: str, tasks: int, seconds: int) -> None:
        await running.load.tell("begin", kind=kind, n=seconds, tasks=tasks)
        await running.load.tell("finish")

    async def _drain(self) -> None:
        for workers in self.sizes.drained_by:
            for running in self._running:
                if running.name in _DRAINED:
                    await self._ask("drain", running, lambda running: self._drain_by(running, workers))  # noqa: B023

    async def _drain_by(self, running: Running, count: int) -> None:
        """Queue tasks that nobody works on yet, start workers, and time the middle of what they do."""
        place = self._place(running.variant, running.service, f"-drain-{count}")
        load = LoadProcess(place)
        workers: list[WorkerProcess] = []
        await load.start()
        try:
            await load.tell("begin", kind=base.CALL, n=1, tasks=self.sizes.drained)
            workers += [WorkerProcess(place) for _ in range(count)]
            marks = [await _when(place, int(self.sizes.drained * part)) for part in (0.1, 0.95)]
            (calls_first, first), (calls_last, last) = marks
            self.results.add(f"drain-{count}", running.name, (calls_last - calls_first) / (last - first))
        finally:
            for worker in workers:
                await asyncio.to_thread(worker.stop)
            await load.stop()


async def _when(place: Place, calls_wanted: int) -> tuple[int, float]:
    """Wait for so many calls; how many there are then, and when."""
    deadline = time.monotonic() + 300
    while (made := calls_made(place.folder)) < calls_wanted:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"only {made} of {calls_wanted} tasks were run in 300 s")
        await asyncio.sleep(0.02)
    return made, time.monotonic()


async def _python(module: str, *arguments: str) -> Any:
    """What a module prints as JSON, run as a program of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, env=environment(), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise BenchmarkError(f"{module} has failed, with exit status {process.returncode}")
    return json.loads(output)
