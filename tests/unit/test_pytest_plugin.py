"""The pytest plugin, in a project of its own that has the package installed."""

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Pytest = Callable[..., str]

OTHERS = [option for name in ("schemathesis", "hypothesispytest", "xdist", "anyio") for option in ("-p", f"no:{name}")]
"""Plugins that are installed for other tests: not to be loaded is quicker."""
WITHOUT_ASYNCIO = ("-p", "no:asyncio")
WITH_ASYNCIO = ("-o", "asyncio_default_fixture_loop_scope=function")  # unset, it warns


@pytest.fixture
def project(tmp_path: Path) -> Pytest:
    """A project beside which the package lies as an installer would leave it: with its entry points."""
    installed = tmp_path / "site-packages" / "temporal_async_task-0.dist-info"
    installed.mkdir(parents=True)
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    lines = ["[pytest11]", *(f"{name} = {target}" for name, target in entry_points.items())]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    (installed / "METADATA").write_text("Name: temporal-async-task\nVersion: 0\n")
    folder = tmp_path / "project"
    folder.mkdir()

    def run(tests: str, plugins: tuple[str, ...] = WITHOUT_ASYNCIO, conftest: str = "") -> str:
        (folder / "test_project.py").write_text(textwrap.dedent(tests))
        (folder / "conftest.py").write_text(textwrap.dedent(conftest))
        paths = [str(ROOT / "src"), str(installed.parent)]
        command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *OTHERS, *plugins]
        ran = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ran.stdout + ran.stderr

    return run


def passed(output: str, count: int) -> bool:
    return re.search(rf"^{count} passed in ", output, re.MULTILINE) is not None


def test_task_run_makes_runs_in_memory_each_with_keys_of_its_own(project: Pytest):
    output = project(
        """
    from temporal_async_task import async_task, current_step, step

    @async_task
    async def greet(name: str) -> str:
        return await step("greet", "hello {}".format, name)

    @async_task
    async def charge() -> str:
        return current_step().idempotency_key

    def test_it(task_run):
        run = task_run(greet, "Ada")
        run.on("greet").loses_worker()
        assert (run.execute(), run.calls_of("greet")) == ("hello Ada", 2)
        assert task_run(charge).execute() != task_run(charge).execute()
        named = [task_run(charge, task_id="order-1").execute() for _ in range(2)]
        assert named[0] == named[1]
    """
    )
    assert passed(output, 1), output


ON_THE_SERVER = """
    import asyncio
    import pytest
    from pathlib import Path
    from temporalio.client import Client

    addresses = set()

    async def answers(server) -> None:
        addresses.add(server.address)
        client = await Client.connect(server.address)
        assert await client.service_client.check_health()
        assert len(addresses) == 1
"""


def test_dev_server_is_one_server_for_the_session_and_gone_after_it(project: Pytest, tmp_path: Path):
    output = project(
        ON_THE_SERVER
        + f"""
    def test_it(dev_server):
        asyncio.run(answers(dev_server))

    def test_it_again(dev_server):
        asyncio.run(answers(dev_server))
        Path({str(tmp_path / "pid")!r}).write_text(str(dev_server.pid))
    """
    )
    assert passed(output, 2), output
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_dev_server_can_be_asked_for_in_an_event_loop_and_used_in_another(project: Pytest):
    output = project(
        ON_THE_SERVER
        + """
    @pytest.mark.asyncio
    async def test_first_asked_for_in_a_loop(request):
        await answers(request.getfixturevalue("dev_server"))

    @pytest.mark.asyncio(loop_scope="session")
    async def test_used_in_another(dev_server):
        await answers(dev_server)

    def test_used_in_none(dev_server):
        asyncio.run(answers(dev_server))
    """,
        plugins=WITH_ASYNCIO,
    )
    assert passed(output, 3), output


def test_nothing_is_started_or_imported_before_a_fixture_is_asked_for(project: Pytest):
    """But the package itself: its own module is Python's first stop on the way to the plugin."""
    output = project(
        """
    import sys
    import threading

    def test_it(pytestconfig):
        assert pytestconfig.pluginmanager.has_plugin("temporal_async_task")
        ours = {name for name in sys.modules if name.startswith("temporal_async_task.")}
        assert not ours & {"temporal_async_task.testing", "temporal_async_task.devserver"}
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    """
    )
    assert passed(output, 1), output


def test_a_projects_own_fixture_takes_precedence(project: Pytest):
    output = project(
        """
    def test_it(dev_server):
        assert dev_server == "my own"
    """,
        conftest="""
    import pytest

    @pytest.fixture(scope="session")
    def dev_server():
        return "my own"
    """,
    )
    assert passed(output, 1), output


def test_the_example_of_the_documentation_passes(project: Pytest):
    page = (ROOT / "docs" / "testing.md").read_text()
    [example] = re.findall(r"runs it with pytest -->\n```python\n(.*?)```", page, re.DOTALL)
    output = project(example)
    assert passed(output, 2), output
