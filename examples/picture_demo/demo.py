"""The conductor: starts everything, kills a worker in the middle of a step, and shows that nothing is paid for twice.

Run it by ``scripts/demo``. Exits 0 only if every picture was made and no finished step was called again.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import png
from image_api import ImageApi
from tasks import Order, picture
from verdict import STEPS, Kill, complaints, cut_off, read_calls
from view import LiveView, as_table

from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    AsyncTaskError,
    StepState,
    TaskResult,
    TaskStatus,
)
from temporal_async_task.devserver import DevServer

HERE = Path(__file__).resolve().parent
TIME_LIMIT = 90.0
"""Seconds after which the demo gives up. It takes about 20."""
PAUSE_WITHOUT_WORKER = 1.0
"""Seconds between the end of one worker and the start of the next."""
ENDED = {TaskStatus.COMPLETED, TaskStatus.FAILED}
SUBJECTS = ("a lighthouse", "a red fox", "a paper boat", "a green teapot", "an old tram", "the moon", "a heron")

Run = TaskResult[str]


class DemoError(Exception):
    """The demo cannot go on."""


class Worker:
    """A worker process: `async-task worker`. Its output goes to a file."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "temporal_async_task.cli", "worker", "tasks:picture"],
                cwd=HERE,
                # Nothing of a Temporal server that the user of this machine works with.
                env={k: v for k, v in os.environ.items() if not k.startswith("TEMPORAL_")} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # a Ctrl-C in the terminal is for the conductor, which then stops the worker
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """As a crash would: the worker gets no chance to save or to tell anything."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """As a deploy would."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Watch:
    """Looks at the runs, as a web page would, and remembers when each step was first seen finished."""

    def __init__(self, task_ids: Sequence[str], view: LiveView) -> None:
        self._task_ids = task_ids
        self._view = view
        self.seen_finished: dict[tuple[str, str], float] = {}

    async def look(self) -> list[Run]:
        runs = await asyncio.gather(*map(picture.get_status, self._task_ids))
        for run in runs:
            for step in run.completed_steps:
                self.seen_finished.setdefault((run.task_id, step), time.time())
        self._view.show(runs)
        return runs

    async def until(self, condition: Callable[[Sequence[Run]], bool], worker: Worker) -> list[Run]:
        while not condition(runs := await self.look()):
            if worker.exit_status is not None:
                raise DemoError(f"The worker ended by itself, with exit status {worker.exit_status}.")
            await asyncio.sleep(0.1)
        return runs


def in_the_middle(runs: Sequence[Run]) -> bool:
    """Whether some step has finished, and some slow call is being made: the worst moment for a worker to die."""
    finished = any(run.completed_steps for run in runs)
    steps = [step for run in runs for step in run.steps]
    return finished and any(step.state is StepState.RUNNING and step.key in {"generate", "download"} for step in steps)


def all_ended(runs: Sequence[Run]) -> bool:
    return all(run.status in ENDED for run in runs)


async def perform(orders: Sequence[Order], state: Path, view: LiveView) -> tuple[list[Run], Watch, Kill]:
    """The demo itself."""
    async with DevServer(state / "runs.db", log_path=state / "server.log") as server:
        view.say(f"Temporal dev server at {server.address}, its database in {state / 'runs.db'}")
        with ImageApi(state / "pictures", state / "calls.jsonl") as api, contextlib.ExitStack() as workers:
            view.say(f"Image API at {api.url}")
            # no_proxy: the API is on this machine, even where the environment names a proxy.
            environment = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_CONFIG_FILE": os.devnull}
            environment |= {"IMAGE_API": api.url, "no_proxy": "127.0.0.1"}
            first = workers.enter_context(Worker(environment, state / "worker-1.log"))
            view.say(f"Worker 1 started, process {first.pid}")

            # This process only submits and asks, as a web application would.
            component = AsyncTaskComponent(AsyncTaskComponentConfig(temporal_address=server.address))
            component.register(picture)
            await component.connect()
            for order in orders:
                await picture.submit(order, task_id=order.name)
            view.say(f"Submitted {len(orders)} pictures")
            watch = Watch([order.name for order in orders], view)

            await watch.until(in_the_middle, first)
            first.kill()
            killed_at = time.time()
            view.say(view.bold(f"Worker 1, process {first.pid}, killed with SIGKILL in the middle of its calls"))
            await asyncio.sleep(PAUSE_WITHOUT_WORKER)
            await watch.look()  # no worker is there, yet the server knows all that had been finished
            kill = Kill(first.pid, killed_at, replaced_at=time.time())

            second = workers.enter_context(Worker(environment, state / "worker-2.log"))
            view.say(f"Worker 2 started, process {second.pid}: it takes over once the server misses worker 1")
            runs = await watch.until(all_ended, second)
            view.leave()
            second.stop()
            view.say(f"All ended. Worker 2 stopped, exit status {second.exit_status}")
    return runs, watch, kill


def report(runs: Sequence[Run], watch: Watch, kill: Kill, state: Path, view: LiveView) -> bool:
    """The table and the verdict. Whether all is well."""
    calls = read_calls(state / "calls.jsonl")
    rows: list[tuple[object, ...]] = [
        ("picture", "step", "attempts", "API calls", "answered 503", "cut off by the kill")
    ]
    for run in runs:
        attempts = {step.key: step.attempts for step in run.steps}
        for step in STEPS:
            made = [call for call in calls if (call.task_id, call.step) == (run.task_id, step)]
            busy = [call for call in made if not call.succeeded]
            lost = [call for call in made if call.succeeded and cut_off(call, watch.seen_finished, kill)]
            rows.append((run.task_id, step, attempts.get(step, 0), len(made), len(busy), len(lost)))
    view.print()
    for line in as_table(rows):
        view.print(line)
    killed_at = time.strftime("%H:%M:%S", time.localtime(kill.at))
    view.print("\nAttempts are counted by the library, API calls by the API.")
    view.print(f"Worker 1 (process {kill.pid}) was killed with SIGKILL at {killed_at}.")

    problems = [f"{run.task_id} {run.status}: {run.error}" for run in runs if run.status is not TaskStatus.COMPLETED]
    problems += complaints([run.task_id for run in runs], calls, watch.seen_finished, kill)
    for run in runs:
        try:
            png.check((state / "pictures" / f"{run.task_id}.png").read_bytes())
        except (OSError, ValueError) as error:
            problems.append(f"The uploaded picture of {run.task_id} cannot be used: {error}")
    for problem in problems:
        view.print(f"PROBLEM: {problem}")
    if not problems:
        view.print(view.bold(f"OK: {len(runs)} pictures completed; no finished step was called twice."))
    return not problems


def show_logs(state: Path, view: LiveView) -> None:
    for log in sorted(state.glob("*.log")):
        view.print(f"\nThe end of {log}:")
        view.print("\n".join(log.read_text(errors="replace").splitlines()[-20:]))


async def conduct(pictures: int, state: Path) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: through the exits of all that was started
        asyncio.get_running_loop().add_signal_handler(number, os.kill, os.getpid(), signal.SIGINT)
    view = LiveView(sys.stdout)
    orders = [Order(f"picture-{n}", f"{SUBJECTS[n % len(SUBJECTS)]}, no. {n}") for n in range(1, pictures + 1)]
    well = False
    try:
        async with asyncio.timeout(TIME_LIMIT):
            well = report(*await perform(orders, state, view), state, view)
    except TimeoutError:
        view.print(f"PROBLEM: The pictures were not done after {TIME_LIMIT:.0f} s.")
    except (AsyncTaskError, DemoError) as error:
        view.print(f"PROBLEM: {error}")
    if not well:
        show_logs(state, view)
    view.print(f"Pictures, logs and database: {state}")
    return 0 if well else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Make pictures, kill a worker, and count what the API was asked.")
    parser.add_argument("--pictures", type=int, default=6, help="how many, from 3 on (default: 6)")
    parser.add_argument("--state", type=Path, help="a new folder for all files (default: a temporary one)")
    arguments = parser.parse_args()
    if arguments.pictures < 3:  # noqa: PLR2004
        parser.error("--pictures must be 3 or more: the API is busy for every third one")
    if arguments.state:
        arguments.state.mkdir(parents=True)
    state = arguments.state or Path(tempfile.mkdtemp(prefix="picture-demo-"))
    try:
        return asyncio.run(conduct(arguments.pictures, state.resolve()))
    except KeyboardInterrupt:
        print("\nStopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
