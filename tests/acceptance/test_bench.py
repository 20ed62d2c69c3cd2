"""The benchmark works: at its smallest size it measures every figure. What they are is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
OURS = ("workflow", "standalone")
LIMIT = 400  # seconds; on an idle machine they take about 20 and 50


def bench(results: Path, *only: str) -> dict[str, Any]:
    """What ``scripts/bench --tiny`` measures, by this environment's Python."""
    command = [sys.executable, "-m", "performance", "--tiny", "--json", str(results), "--only", *only]
    done = subprocess.run(
        command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=LIMIT, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())


def test_every_question_is_answered_for_this_library_and_a_workflow_by_hand(tmp_path: Path):
    """And the library's standalone execution, once this version has it."""
    questions = ("throughput", "latency", "submit", "status", "steps", "long", "longest", "fan", "engine")
    found = bench(tmp_path / "results.json", *questions, "workflow", "standalone", "by-hand")
    ours = [name for name in OURS if name in found["variants"]]
    assert "workflow" in ours
    assert set(found["left_out"]) == set(OURS) - set(ours)
    for figure in (
        "throughput-1",
        "throughput-1-step",
        "throughput-5",
        "loaded-p50",
        "loaded-p99",
        "worker-cpu-task",
        "worker-cpu-step",
        "server-cpu-task",
        "server-cpu-step",
        "client-cpu-task",
        "worker-cpu-idle",
        "idle-p50",
        "idle-p99",
        "idle-5-p50",
        "submit-p50",
        "status-running",
        "status-finished",
        "steps-in-a-row",
        "task-500",
        "task-5000",
        "growth",
        "fan-500",
    ):
        assert set(found["samples"][figure]) == {*ours, "by-hand"}, figure
    assert found["samples"]["submit-ratio"]["workflow"][0] > 0
    for figure in ("engine-task", "engine-step", "engine-sync-step", "engine-step-uvloop", "rules-step"):
        assert found["samples"][figure]["workflow"][0] > 0, figure
    assert found["samples"]["throughput-1"]["workflow"][0] > 0
    assert found["samples"]["server-cpu-task"]["workflow"][0] > 0


def test_memory_and_what_happens_without_a_worker_are_measured(tmp_path: Path):
    """A drained queue, and a killed worker's task: its step is begun again, after the heartbeat timeout of 5 s."""
    found = bench(tmp_path / "results.json", "memory", "drain", "resume", "workflow")
    assert found["left_out"] == {}
    for figure in (
        "memory-worker",
        "memory-in-flight",
        "memory-ended",
        "memory-sleep",
        "memory-backoff",
        "memory-poll",
        "drain-1",
    ):
        assert set(found["samples"][figure]) == {"workflow"}, figure
    assert found["samples"]["drain-1"]["workflow"][0] > 0
    assert found["samples"]["resume"]["workflow"][0] > 1
