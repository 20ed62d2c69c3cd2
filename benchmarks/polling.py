"""Many video jobs at once, polled durably by one small worker that is killed twice.

    python benchmarks/polling.py [--tasks 500] [--job 300] [--every 5] [--slots 20]

Each task starts a job (a paid call, counted) and polls it until it is done. Meanwhile the worker is killed with SIGKILL
twice and started again. In the end: all tasks have completed, every job was started once, a fresh task was not kept
waiting, and neither the histories nor the worker's memory have grown with the polls. Exits 0 only if all of it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from temporal_async_task import AsyncTaskComponent, AsyncTaskComponentConfig, async_task, poll, progress, step
from temporal_async_task.devserver import DevServer

STARTS = Path(os.environ.get("STARTS", "/dev/null"))
JOB = float(os.environ.get("JOB", "300"))
EVERY = float(os.environ.get("EVERY", "5"))


def start_job(n: int) -> float:
    with STARTS.open("a") as log:  # appended to by one write a line, whatever becomes of this process
        log.write(f"{n}\n")
    return time.time()


def look(started: float) -> str | None:
    return "video.mp4" if time.time() - started > JOB else None


@async_task(heartbeat_timeout=5)
async def video(n: int) -> str:
    started = await step("start", start_job, n)
    progress(0.1, "rendering")
    return await poll("render", look, started, every=EVERY, timeout=JOB * 3)


@async_task
async def fresh() -> str:
    return await step("call", str, "done")


def component(address: str, slots: int) -> AsyncTaskComponent:
    made = AsyncTaskComponent(AsyncTaskComponentConfig(temporal_address=address, max_concurrent_tasks=slots))
    made.register_all([video, fresh])
    return made


def memory(pid: int) -> float:
    """Resident memory in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def conduct(options: argparse.Namespace) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="polling-"))
    starts = folder / "starts"
    starts.touch()
    env = {**os.environ, "STARTS": str(starts), "JOB": str(options.job), "EVERY": str(options.every)}
    async with DevServer(folder / "temporal.db") as server:
        web = component(server.address, options.slots)
        await web.connect()

        def worker() -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, "--worker", server.address, "--slots", str(options.slots)]
            return subprocess.Popen(command, env=env)

        process = worker()
        began = time.time()
        ids = [await video.submit(n) for n in range(options.tasks)]
        print(f"{len(ids)} submitted in {time.time() - began:.1f} s")
        used: list[float] = []
        latencies: list[float] = []
        kills = [began + options.job * 0.2, began + options.job * 0.5]
        while time.time() < began + options.job * 0.9:
            if kills and time.time() > kills[0]:
                kills.pop(0)
                process.kill()
                process.wait()
                process = worker()
                print(f"{time.time() - began:5.0f} s  worker killed and started again")
                await asyncio.sleep(15)
            asked = time.time()
            await fresh.run(timeout=60)
            latencies.append(time.time() - asked)
            used.append(memory(process.pid))
            await asyncio.sleep(min(10, options.job / 10))
        for task_id in ids:
            await video.result(task_id, timeout=options.job * 3)
        print(f"{time.time() - began:5.0f} s  all have completed")
        handle = web.client.get_workflow_handle(ids[0])
        events = [event.event_id async for event in handle.fetch_history_events()]
        process.terminate()
        process.wait()
    started = starts.read_text().split()
    once = sorted(map(int, started)) == list(range(options.tasks))
    print(f"jobs started: {len(started)} for {options.tasks} tasks")
    print(f"a fresh task meanwhile: median {statistics.median(latencies):.2f} s, longest {max(latencies):.2f} s")
    print(f"events in a history: {len(events)}; worker's memory: {used[0]:.0f} MB at first, {used[-1]:.0f} MB at last")
    return once and max(latencies) < 2 and len(events) < 20  # noqa: PLR2004 - what is claimed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--job", type=float, default=300, help="seconds that a job takes")
    parser.add_argument("--every", type=float, default=5, help="seconds between two polls")
    parser.add_argument("--slots", type=int, default=20)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(component(options.worker, options.slots).run())
        return 0
    return 0 if asyncio.run(conduct(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
