"""How the fault suite is scaled, what its tests are given, and the table that it ends with.

Each test belongs to a case (``pytest.mark.case(number, name)``), draws its moments from ``chance``, and tells what it
has counted to ``report``. ``scripts/faults`` runs all cases at full scale; in ``scripts/test --all`` they are short.
The environment and not options, which pytest would know only where this directory is named:

FAULTS_SCALE    ``short`` (the default) or ``full``
FAULTS_SEED     of every random moment; the default is another one each time
FAULTS_MINUTES  the load at full scale: a thousand tasks for each
FAULTS_CASES    numbers or names of cases, between spaces; the default is all
"""

import contextlib
import os
import random
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import pytest
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest

from faults.vendor import Vendor
from support import App, WorkerProcess, wait_until
from temporal_async_task import ServerUnavailableError, TemporalAsyncTask
from temporal_async_task.devserver import DevServer
from temporal_async_task.task import Execution

T = TypeVar("T")

EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
PATIENCE = 180.0
"""Seconds to wait for what takes some seconds, if the machine has time for it: Python starts, a worker polls."""
COUNTS = "counts"
CASE = "case"


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    full: bool
    minutes: float

    def pick(self, short: T, full: T) -> T:
        return full if self.full else short


@dataclass
class Report:
    """What a test has counted, for the table."""

    counts: dict[str, object] = field(default_factory=dict)

    def __call__(self, **counts: object) -> None:
        """Add counts: ``report(kills=100, repeated_calls=3)``. The same name again takes the later value."""
        self.counts.update(counts)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "case(number, name): the case of the fault suite that a test belongs to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of this directory whose case was not asked for."""
    wanted = set(os.environ.get("FAULTS_CASES", "").split())
    if not wanted:
        return
    here = Path(__file__).parent
    known = {str(word) for item in items if here in item.path.parents for word in case_of(item)}
    if unknown := wanted - known:
        raise pytest.UsageError(f"No such case: {' '.join(sorted(unknown))}. There are: {' '.join(sorted(known))}")
    out = [item for item in items if here in item.path.parents and not wanted & set(map(str, case_of(item)))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def case_of(item: pytest.Item) -> tuple[int, str]:
    marker = item.get_closest_marker("case")
    assert marker is not None, f"{item.nodeid} needs a pytest.mark.case(number, name)"
    number, name = marker.args
    return number, name


@pytest.fixture(scope="session")
def seed() -> int:
    return int(os.environ.get("FAULTS_SEED") or random.randrange(1_000_000))


@pytest.fixture(scope="session")
def scale() -> Scale:
    return Scale(os.environ.get("FAULTS_SCALE") == "full", float(os.environ.get("FAULTS_MINUTES") or 10))


@pytest.fixture
def chance(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of the test's own, the same for the same seed whatever else runs. A failure shows the seed."""
    sys.stderr.write(f"FAULTS_SEED={seed}\n")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Takes what the test has counted; shown for a test that failed, too."""
    report = Report()
    request.node.user_properties.append((COUNTS, report.counts))
    return report


@pytest.fixture(autouse=True)
def _case(request: pytest.FixtureRequest) -> None:
    request.node.user_properties.append((CASE, case_of(request.node)))


@pytest.fixture(scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DevServer]:
    """In place of the other tests' server: one with a database file, as `app` uses it here."""
    async with DevServer(db_path=tmp_path_factory.mktemp("server") / "runs.db") as server:
        yield server


@pytest.fixture
async def own_server(tmp_path: Path) -> AsyncIterator[DevServer]:
    """A server with a database file that the test may kill and start again."""
    async with DevServer(db_path=tmp_path / "runs.db", log_path=tmp_path / "server.log") as server:
        yield server


async def bring_back(server: DevServer) -> None:
    """Start a server that was killed. On a busy machine it may take more than the half minute that it is given."""
    for _ in range(3):
        try:
            return await server.start()
        except ServerUnavailableError as error:
            last = error
    raise last


@pytest.fixture
async def vendor(tmp_path: Path) -> AsyncIterator[Vendor]:
    """The API that the worker processes call: the judge."""
    async with Vendor(tmp_path / "calls") as vendor:
        yield vendor


async def polls(app: App, task: TemporalAsyncTask[Any, Any], worker: WorkerProcess) -> None:
    """Wait until a worker process asks the server for the task's runs: Python has started, and all is imported."""
    client = (await app.connect(task)).client
    request = DescribeTaskQueueRequest(
        namespace="default",
        task_queue=TaskQueue(name=task.task_queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
    )

    async def is_there() -> bool:
        pollers = (await client.workflow_service.describe_task_queue(request)).pollers
        return any(poller.identity.startswith(f"{worker.pid}@") for poller in pollers)

    await wait_until(is_there, timeout=PATIENCE, interval=0.1)


class StartWorker(Protocol):
    def __call__(self, program: str, app: App, **env: str) -> WorkerProcess: ...


@pytest.fixture
def start_worker(vendor: Vendor) -> Iterator[StartWorker]:
    """Starts worker processes that know where the API is; they end with the test."""
    with contextlib.ExitStack() as processes:

        def start(program: str, app: App, **env: str) -> WorkerProcess:
            return processes.enter_context(WorkerProcess(program, app, VENDOR_URL=vendor.url, **env))

        yield start


# The table ------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table: a line for each test, and what it has counted."""
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for result in terminalreporter.getreports(outcome):
            properties = dict(result.user_properties)
            if CASE in properties and (result.when == "call" or outcome != "passed"):
                rows.append((tuple(properties[CASE]), outcome, result, properties.get(COUNTS, {})))
    if not rows:
        return
    terminalreporter.section("faults")
    rows.sort(key=lambda row: row[0])
    for (number, name), outcome, result, counts in rows:
        held = "held" if outcome == "passed" else outcome.upper()
        sentence = result.nodeid.split("::")[-1].removeprefix("test_").replace("_", " ")
        terminalreporter.write_line(f"{number:>4}  {name:<10}  {held:<6}  {result.duration:>6.1f} s  {sentence}")
        told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts.items())
        for line in textwrap.wrap(told, 86):
            terminalreporter.write_line(" " * 34 + line)
