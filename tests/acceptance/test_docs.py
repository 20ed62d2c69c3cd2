"""The documentation: its examples run as they stand, its links lead somewhere, and it leaves nothing public out.

What is done with a fenced block is said by the comment in front of it, which the rendered page does not show:

================================  =====================================================================================
``<!-- test: memory -->``         a program that needs no server
``<!-- test: server -->``         a program that finds a Temporal server where the environment says
``<!-- test: worker -->``         such a program that runs until SIGTERM, while the examples below it on its page run
``<!-- test: memory as x.py -->`` the same, and the examples of the page can import it (so with the others)
``<!-- file: x.json -->``         a file beside the examples of its page
``<!-- output -->``               what the program before it prints; ``...`` stands for anything
``<!-- no test: why -->``         a fragment, of which only the syntax is checked
================================  =====================================================================================

A Python block without such a comment fails.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import dataclasses
import doctest
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import temporal_async_task
from temporal_async_task import devserver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from temporal_async_task.devserver import DevServer

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "temporal_async_task"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TIME_LIMIT = 60.0

_MARKER = re.compile(
    r"<!-- (?:test: (?P<kind>memory|server|worker)(?: as (?P<name>\S+))?(?P<logs>, logs an error)?|file: (?P<file>\S+)"
    r"|no test: (?P<why>.+)|(?P<output>output)) -->"
)
_LINK = re.compile(r"\[([^\]\n]+)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block, and what the comment in front of it says."""

    page: Path
    line: int
    language: str
    text: str
    kind: str
    """``memory``, ``server``, ``worker``, ``file``, ``output``, ``fragment``; empty without a comment."""
    name: str
    logs: bool
    """Whether it logs an error: a run fails in it."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, from top to bottom."""
    comment, fence, start, lines = "", "", 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence:
            if line.strip() == "```":
                yield _block(page, start, fence, lines, comment)
                comment, fence, lines = "", "", []
            else:
                lines.append(line)
        elif line.lstrip().startswith("```"):
            fence, start = line.strip().removeprefix("```") or "plain", number
        elif line.strip():
            comment = line.strip()


def _block(page: Path, line: int, language: str, lines: list[str], comment: str) -> Block:
    said = _MARKER.fullmatch(comment)
    kind, name, logs = "", "", False
    if said is not None:
        kind = said["kind"] or said["output"] or ("file" if said["file"] else "fragment")
        name = said["name"] or said["file"] or f"example_{line}.py"
        logs = said["logs"] is not None
    return Block(page, line, language, "\n".join(lines) + "\n", kind, name, logs)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def examples(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


# Examples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_says_how_it_is_tested(page: Path):
    silent = [str(block) for block in BLOCKS if block.page == page and block.language == "python" and not block.kind]
    assert silent == []


@pytest.mark.parametrize("block", examples("fragment"), ids=str)
def test_a_fragment_is_at_least_python(block: Block):
    compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", examples("memory"), ids=str)
def test_an_example_without_a_server_runs_as_it_stands(block: Block, tmp_path: Path):
    run(block, tmp_path, TEMPORAL_ADDRESS="127.0.0.1:1")


@pytest.mark.parametrize("block", examples("server"), ids=str)
async def test_an_example_with_a_server_runs_as_it_stands(block: Block, server: DevServer, tmp_path: Path):
    where = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_TASK_QUEUE": f"docs-{uuid.uuid4().hex[:8]}"}
    with contextlib.ExitStack() as workers:
        for one in workers_above(block):
            workers.enter_context(working(one, tmp_path, **where))
        await asyncio.to_thread(run, block, tmp_path, **where)


async def test_the_readmes_fastapi_application_takes_an_order_and_shows_its_result(server: DevServer, tmp_path: Path):
    [api] = [one for one in examples("memory") if one.name == "api.py"]
    (tmp_path / "customer.py").write_text(CUSTOMER)
    where = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_TASK_QUEUE": f"docs-{uuid.uuid4().hex[:8]}"}
    with contextlib.ExitStack() as workers:
        for one in workers_above(api):
            workers.enter_context(working(one, tmp_path, **where))
        await asyncio.to_thread(run, dataclasses.replace(api, name="customer.py"), tmp_path, **where)


CUSTOMER = """
import asyncio

import httpx
from api import app


async def main() -> None:
    shop = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")
    async with app.router.lifespan_context(app), shop:
        assert (await shop.get("/shots/unknown")).status_code == 404
        ordered = await shop.post("/shots", json={"prompt": "cup"})
        assert ordered.status_code == 202
        while (shot := (await shop.get(f"/shots/{ordered.json()['task_id']}")).json())["status"] != "completed":
            assert shot["error"] is None
            await asyncio.sleep(0.05)
        assert shot["url"] == "https://bucket.example/26.png"


asyncio.run(main())
"""


def test_every_worker_works_for_an_example_below_it():
    used = {one for block in examples("server") for one in workers_above(block)}
    assert used == set(examples("worker"))


def workers_above(block: Block) -> list[Block]:
    return [one for one in examples("worker") if one.page == block.page and one.line < block.line]


def run(block: Block, folder: Path, **env: str) -> None:
    """Run an example as its reader does, in a process of its own; its output is what the page says."""
    command, environment = program(block, folder, env)
    ran = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert ran.returncode == 0, f"{block}:\n{ran.stdout}{ran.stderr}"
    assert bool(ran.stderr) == block.logs, f"{block}:\n{ran.stderr}"
    assert ran.stderr.startswith("Task run ") == block.logs, f"{block}:\n{ran.stderr}"
    wanted = expected_output(block)
    if wanted is not None:
        same = doctest.OutputChecker().check_output(wanted, ran.stdout, doctest.ELLIPSIS)
        assert same, f"{block} prints:\n{ran.stdout}\nbut its page says:\n{wanted}"


@contextlib.contextmanager
def working(block: Block, folder: Path, **env: str) -> Iterator[None]:
    """Have a worker example run meanwhile. Told to stop, it must do so with exit status 0."""
    command, environment = program(block, folder, env)
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output) as process,
    ):
        try:
            yield
        finally:
            until_it_heeds(signal.SIGTERM, process)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TIME_LIMIT)
            finally:
                process.kill()
        output.seek(0)
        printed = output.read().decode()
    assert process.returncode == 0, f"{block} ended with exit status {process.returncode}:\n{printed}"


def until_it_heeds(number: signal.Signals, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has a handler of its own for a signal: an example may be done before its worker is up."""
    status = Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + TIME_LIMIT
    while status.exists() and process.poll() is None and time.monotonic() < deadline:  # not there: not on Linux
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
        if caught and int(caught[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.05)


def program(block: Block, folder: Path, env: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command that runs an example, with its page's files beside it, and its environment."""
    for one in BLOCKS:
        if one.page == block.page and one.kind in {"memory", "server", "worker", "file"}:
            path = folder / one.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(one.text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TEMPORAL_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HOME": str(folder)} | env  # not the developer's own profile
    return [sys.executable, "-W", "error", block.name], environment


def expected_output(block: Block) -> str | None:
    following = next((one for one in BLOCKS if one.page == block.page and one.line > block.line), None)
    return following.text if following is not None and following.kind == "output" else None


@pytest.mark.parametrize("block", examples("output"), ids=str)
def test_every_output_belongs_to_an_example(block: Block):
    before = [one for one in BLOCKS if one.page == block.page and one.line < block.line]
    assert before
    assert before[-1].kind in {"memory", "server"}


# Extras ---------------------------------------------------------------------------------------------------


def test_the_extra_server_brings_the_command_that_starts_a_server():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [requirement] = extras["server"]
    files = metadata.files(re.split(r"[^\w-]", requirement)[0]) or []
    [command] = [file.locate() for file in files if file.name == "temporal"]
    assert Path(devserver._find_binary()).samefile(str(command))


# Links ----------------------------------------------------------------------------------------------------

LINKS = [
    pytest.param(page, text, target, id=f"{page.name}:{target}")
    for page in PAGES
    for text, target in sorted(set(_LINK.findall(re.sub(r"(?s)```.*?```", "", page.read_text()))))
    if not target.startswith("http")
]


@pytest.mark.parametrize(("page", "text", "target"), LINKS)
def test_a_link_leads_somewhere(page: Path, text: str, target: str):
    """To a file that exists; to a heading that it has; for a test's name, to a file that has this test."""
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    assert path.exists()
    if anchor:
        assert anchor in anchors(path)
    if path.suffix == ".py" and (test := re.fullmatch(r"`((?:Test|test_)\w+)`", text)):
        assert test[1] in definitions(path)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"(?s)```.*?```", "", page.read_text())
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def definitions(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


# Nothing is left out --------------------------------------------------------------------------------------

ALL_TEXT = "\n".join(page.read_text() for page in PAGES)


def test_the_readme_links_every_page():
    linked = {target for _, target in _LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("name", sorted(temporal_async_task.__all__))
def test_every_public_name_is_documented(name: str):
    assert re.search(rf"\b{name}\b", ALL_TEXT)


def test_the_architecture_names_every_module_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE))
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")} - {"engine/__init__.py"}
    assert named == modules


def test_every_error_that_is_named_exists():
    told = set(re.findall(r"`(\w+Error)\b", ALL_TEXT))
    # Of others: the builtins', the examples' own, and those that only stand in a status.
    others = {"CancelledError", "TerminatedError", "VendorError"}
    assert told <= {*dir(temporal_async_task), *dir(builtins), *others}
