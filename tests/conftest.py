"""One real Temporal server for the whole session, and one application for each test."""

import uuid
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest

from postgres import PrivatePostgres
from support import App, Meter
from temporal_async_task.devserver import DevServer
from temporal_async_task.task import Execution


@pytest.fixture(scope="session")
async def server() -> AsyncIterator[DevServer]:
    """A dev server that forgets everything when it stops."""
    async with DevServer() as server:
        yield server


@pytest.fixture(scope="session")
def execution() -> Execution:
    """What carries the test's runs; ``on_both`` (tests/support.py) runs a test on each."""
    return "workflow"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was logged may hold half of a surrogate pair, which the processes of xdist cannot send to each other."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
async def app(server: DevServer, execution: Execution) -> AsyncIterator[App]:
    """Components on a task queue of the test's own. Whatever the test started is stopped with it."""
    app = App(server.address, f"queue-{uuid.uuid4().hex[:8]}", execution)
    yield app
    await app.stop()


@pytest.fixture(scope="session")
def meter() -> Meter:
    """Counts calls to the server."""
    return Meter()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PrivatePostgres]:
    """A PostgreSQL of the tests' own."""
    with PrivatePostgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
    postgres: PrivatePostgres = request.getfixturevalue("postgres")
    return postgres.create(f"records_{uuid.uuid4().hex[:8]}")
