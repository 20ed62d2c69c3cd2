"""One real Temporal server for the whole session, and one application for each test."""

import uuid
from collections.abc import AsyncIterator

import pytest

from support import App, Meter
from temporal_async_task.devserver import DevServer


@pytest.fixture(scope="session")
async def server() -> AsyncIterator[DevServer]:
    """A dev server that forgets everything when it stops."""
    async with DevServer() as server:
        yield server


@pytest.fixture
async def app(server: DevServer) -> AsyncIterator[App]:
    """Components on a task queue of the test's own. Whatever the test started is stopped with it."""
    app = App(server.address, f"queue-{uuid.uuid4().hex[:8]}")
    yield app
    await app.stop()


@pytest.fixture(scope="session")
def meter() -> Meter:
    """Counts calls to the server."""
    return Meter()
