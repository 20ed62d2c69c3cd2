"""Every command that asks, as a subprocess against a real server, by what it prints and its exit status."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import socket
import subprocess
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from temporalio.client import Client

import support
from command_line import COMMAND, SHOP, Shell, python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from temporal_async_task.devserver import DevServer

APP = ("--app", "shop:component")


@pytest.fixture(scope="module")
def shop(server: DevServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A folder with an application, and a worker that works for it."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(SHOP)
    queue = f"shop-{uuid.uuid4().hex[:8]}"
    shell = Shell(folder, TEMPORAL_ADDRESS=server.address, TEMPORAL_TASK_QUEUE=queue)
    with shell.start("worker", "shop:component", "--grace", "1") as worker:
        worker.until("Started:")
        yield shell
    assert worker.wait() == 0, worker.err


def new_id() -> str:
    return f"order-{uuid.uuid4().hex[:8]}"


# Submit, status, result


async def test_submit_prints_the_id_and_result_the_result(shop: Shell):
    submitted = await shop.runs("submit", "picture", '{"prompt": "cup"}', *APP)
    assert (submitted.status, submitted.err) == (0, "")
    task_id = submitted.out.strip()
    uuid.UUID(task_id)
    result = await shop.runs("result", task_id)
    assert (result.status, result.out, result.err) == (0, "cup-1.png\n", "")


async def test_submit_may_wait_and_the_same_id_is_one_run(shop: Shell):
    """What the command line submits is the same run as the application's own, defaults included."""
    task_id = new_id()
    submit = ("submit", "picture", *APP, "--id", task_id)
    first = await shop.runs(*submit, "-", "--wait", stdin='{"prompt": "cup"}')
    explicit, other = await asyncio.gather(
        shop.runs(*submit, '{"size": 1, "prompt": "cup"}', "--json"),
        shop.runs(*submit, '{"size": 2, "prompt": "cup"}'),
    )
    assert (first.status, first.out) == (0, "cup-1.png\n")
    assert (explicit.status, explicit.document) == (0, {"task_id": task_id, "task": "picture"})
    assert (other.status, other.out) == (6, "")
    assert "was submitted before with other params" in other.err


async def test_the_status_of_a_run_needs_neither_application_nor_worker(shop: Shell):
    task_id = new_id()
    await shop.runs("submit", "picture", '{"prompt": "[b]cup"}', "--id", task_id, "--wait", *APP)
    told, document = await asyncio.gather(
        shop.runs("status", task_id), shop.runs("status", task_id, "--json", ASYNC_TASK_APP="shop:component")
    )
    assert (told.status, told.err) == (0, "")
    lines = [line.split() for line in told.out.splitlines()]
    assert ["Status", "completed"] in lines
    assert ["Result", "[b]cup-1.png"] in lines
    assert lines[-1][:3] == ["upload", "completed", "1"]
    run = document.document
    assert (run["task"], run["status"], run["result"]) == ("picture", "completed", "[b]cup-1.png")
    assert run["completed_steps"] == ["generate", "upload"]
    assert run["progress_message"] == "half [bold]done[/bold]"


async def test_a_run_that_an_activity_carries_is_found_without_the_application_too(shop: Shell):
    task_id = new_id()
    submit = ("submit", "picture", '{"prompt": "cup"}', "--id", task_id, "--wait", *APP)
    submitted = await shop.runs(*submit, ASYNC_TASK_EXECUTION="activity")
    assert (submitted.status, submitted.out) == (0, "cup-1.png\n")
    told = await shop.runs("status", task_id)
    assert (told.status, told.err) == (0, "")
    assert ["Status", "completed"] in [line.split() for line in told.out.splitlines()]


async def test_a_run_is_watched_until_its_end(shop: Shell):
    task_id = new_id()
    await shop.runs("submit", "picture", '{"prompt": "slow"}', "--id", task_id, *APP)
    with shop.start("status", task_id, "--watch") as watch:
        await support.wait_until(lambda: "upload=running" in watch.out)
        (shop.folder / "go-on").touch()
        assert await asyncio.to_thread(watch.wait) == 0
    assert watch.out.splitlines()[-1] == "completed generate=completed upload=completed"


async def test_a_run_that_fails_is_told_and_resumed(shop: Shell):
    task_id = new_id()
    waited = await shop.runs("submit", "picture", '{"prompt": "bad"}', "--id", task_id, "--wait", *APP)
    assert (waited.status, waited.out) == (1, "")
    assert "StepFailedError: Step 'upload' failed after 1 attempt: ValueError: cannot [red]upload[/red]" in waited.err
    status, watched, result = await asyncio.gather(
        shop.runs("status", task_id), shop.runs("status", task_id, "--watch"), shop.runs("result", task_id, "--json")
    )
    assert status.status == 0
    assert "ValueError: cannot [red]upload[/red]" in status.out
    assert watched.status == 1
    assert (result.status, result.document["error_type"]) == (1, "StepFailedError")

    (shop.folder / "mended").touch()
    # With no application named: the run's own queue and times are used.
    resumed = await shop.runs("resume", task_id, "--redo", "generate", "--wait")
    assert (resumed.status, resumed.out) == (0, "bad-1.png\n")
    again, redone = await asyncio.gather(shop.runs("resume", task_id), shop.runs("status", task_id, "--json"))
    assert (again.status, again.out) == (6, "")
    assert "has completed" in again.err
    assert [step["attempts"] for step in redone.document["steps"]] == [1, 1]


async def test_a_run_is_cancelled_and_the_wait_for_it_is_bounded(shop: Shell):
    task_id = new_id()
    late = await shop.runs("submit", "wait", '"guest"', "--id", task_id, "--wait", "--timeout", "0.2", "--json", *APP)
    assert late.status == 7
    assert late.document["error"]["type"] == "TimeoutError"
    assert "has not ended within 0.2 s; it goes on" in late.err
    cancelled = await shop.runs("cancel", task_id, "--reason", "the guest left")
    assert (cancelled.status, cancelled.out) == (0, f"{task_id}: cancellation requested.\n")
    result = await shop.runs("result", task_id)
    assert result.status == 1
    assert "TaskCancelledError: the guest left" in result.err
    assert (shop.folder / "left-guest").exists()
    again = await shop.runs("cancel", task_id, "--json")
    assert (again.status, again.document["requested"]) == (0, False)


async def test_runs_are_listed_newest_first_of_one_task_or_of_all(shop: Shell):
    ids = [new_id(), new_id()]
    for task_id in ids:
        await shop.runs("submit", "report", "--id", task_id, *APP)

    async def listed() -> bool:
        seen = (await shop.runs("list", "report", "--json")).document
        return [run["task_id"] for run in seen][:2] == ids[::-1]

    await support.wait_until(listed, timeout=30)
    table, everything, completed, failed, unknown, one = await asyncio.gather(
        shop.runs("list", "report"),
        shop.runs("list", "--json", "--limit", "100"),
        shop.runs("list", "report", "--status", "completed", "--json", "--limit", "1"),
        shop.runs("list", "report", "--status", "failed"),
        shop.runs("list", "nonsense", *APP),
        shop.runs("list", "--limit", "1"),
    )
    assert table.out.splitlines()[1].split()[:3] == [ids[1], "report", "completed"]
    assert set(ids) <= {run["task_id"] for run in everything.document}
    assert everything.err == ""
    assert [run["task_id"] for run in completed.document] == ids[1:]
    assert (failed.status, failed.out, failed.err) == (0, "", "No runs.\n")
    assert unknown.status == 4
    assert len(one.out.splitlines()) == 2
    assert one.err == completed.err == "There are more: --limit 1 has cut the list.\n"


async def test_runs_that_an_activity_carries_are_listed_with_the_others(shop: Shell):
    ids = [new_id() for _ in range(3)]
    for task, task_id in zip(("report", "stamp", "report"), ids, strict=True):
        await shop.runs("submit", task, "--id", task_id, "--wait", *APP)

    async def listed() -> bool:
        seen = (await shop.runs("list", "--json", "--limit", "300")).document
        return [run["task_id"] for run in seen if run["task_id"] in ids] == ids[::-1]

    await support.wait_until(listed, timeout=30)
    for options in ((), APP):
        seen = (await shop.runs("list", "stamp", "--json", *options)).document
        assert (ids[1], "completed") in [(run["task_id"], run["status"]) for run in seen]


# Schedules


async def test_a_schedule_is_made_told_paused_triggered_and_deleted(shop: Shell):
    name = f"nightly-{uuid.uuid4().hex[:8]}"
    params = '{"prompt": "moon"}'
    made = await shop.runs("schedule", "create", name, "picture", params, "--cron", "0 3 * * *", "--note", "n", *APP)
    assert (made.status, made.out) == (0, f"{name}: created.\n")
    twice, neither = await asyncio.gather(
        shop.runs("schedule", "create", name, "picture", params, "--every", "60", *APP),
        shop.runs("schedule", "create", name, "picture", params, *APP),
    )
    assert (twice.status, neither.status) == (6, 2)
    paused = await shop.runs("schedule", "pause", name, "--note", "holidays", "--json")
    assert (paused.status, paused.document["paused"], paused.document["note"]) == (0, True, "holidays")
    assert (await shop.runs("schedule", "trigger", name)).status == 0
    resumed = await shop.runs("schedule", "resume", name, "--json")
    assert (resumed.status, resumed.document["paused"]) == (0, False)
    [task_id] = resumed.document["last_task_ids"]
    assert (await shop.runs("result", task_id)).out == "moon-1.png\n"

    async def listed() -> bool:
        told = await shop.runs("schedule", "list")
        return any(line.split()[:3] == [name, "picture", "0"] for line in told.out.splitlines())

    await support.wait_until(listed, timeout=30)
    deleted = await shop.runs("schedule", "delete", name)
    assert (deleted.status, deleted.out) == (0, f"{name}: deleted.\n")
    gone = await shop.runs("schedule", "pause", name)
    assert (gone.status, gone.out) == (4, "")
    assert f"There is no schedule '{name}'" in gone.err


# Bad input


BAD_INPUT = [
    (("submit", "picture", '{"prompt": "cup"', *APP), 2, "not valid JSON at line 1, column 17"),
    (("submit", "picture", "cup", *APP), 2, "Text is JSON with its quotes: '\"cup\"'."),
    (("submit", "picture", '{"prompt": 7}', *APP), 2, "The params of task 'picture' do not fit"),
    (("submit", "report", "7", *APP), 2, "Task 'report' takes no params"),
    (("submit", "pictures", "{}", *APP), 4, "It has 'picture', 'report', 'stamp', 'wait'."),
    (("submit", "picture", "{}"), 2, "Name them with --app module:attribute, or set ASYNC_TASK_APP."),
    (("submit", "picture", "{}", "--app", "shp:component"), 3, "There is no module 'shp'"),
    (("submit", "picture", '{"prompt": "x"}', "--id", "a\nb", *APP), 2, "A task id"),
    (("worker", "shop:compnent"), 3, "Did you mean 'component'?"),
    (("worker",), 2, "Missing argument 'APP'"),
    (("list", "--status", "done"), 2, "'done' is not one of 'pending', 'processing', 'completed', 'failed'"),
    (("list", "--address", "http://localhost"), 2, "temporal_address is 'http://localhost' (argument)"),
    (("list", "--namespace", "nowhere"), 2, "has no namespace 'nowhere'"),
]


async def test_what_cannot_be_used_is_told(shop: Shell):
    ran = await asyncio.gather(*(shop.runs(*arguments) for arguments, _, _ in BAD_INPUT))
    for one, (arguments, status, said) in zip(ran, BAD_INPUT, strict=True):
        assert (one.status, one.out) == (status, ""), arguments
        assert said in one.err


async def test_a_run_that_is_not_there_is_told_by_each_command_and_so_is_other_people_s(shop: Shell, server: DevServer):
    client = await Client.connect(server.address)
    foreign = f"payroll-{uuid.uuid4().hex}"
    await client.start_workflow("Payroll", id=foreign, task_queue="none", execution_timeout=timedelta(minutes=1))
    commands = [(command, "nope") for command in ("status", "result", "cancel", "resume")]
    ran = await asyncio.gather(
        *(shop.runs(*command) for command in commands), shop.runs("status", foreign), shop.runs("cancel", foreign)
    )
    assert {(one.status, one.out) for one in ran} == {(4, "")}
    assert all("There is no run 'nope' in namespace 'default'" in one.err for one in ran[:4])
    assert all("is no task's run, but a workflow of type 'Payroll'" in one.err for one in ran[4:])


async def test_with_json_an_error_is_the_document(shop: Shell):
    ran = await shop.runs("status", "nope", "--json")
    assert (ran.status, ran.document["error"]["type"]) == (4, "TaskNotFoundError")
    assert ran.document["error"]["exit_status"] == 4
    assert ran.err == f"Error: {ran.document['error']['message']}\n"


async def test_a_server_that_is_away_is_told_with_how_to_start_one(shop: Shell):
    """Whether it refuses the connection, or takes it and says nothing: after ten seconds at most, and some for us."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        begin = time.monotonic()
        refusing, silent = await asyncio.gather(
            shop.runs("list", "--address", "127.0.0.1:1"),
            shop.runs("status", "a", "--address", f"127.0.0.1:{mute.getsockname()[1]}"),
        )
        took = time.monotonic() - begin
    assert (refusing.status, silent.status) == (5, 5)
    for ran in (refusing, silent):
        assert "temporal server start-dev" in ran.err
    assert "127.0.0.1:1" in refusing.err
    assert took < 20


async def test_a_misspelt_key_of_a_file_is_told_with_its_near_miss(shop: Shell, tmp_path: Path):
    deploy = tmp_path / "deploy.test.json"
    deploy.write_text(json.dumps({"components": {"asyncTask": {"maxConcurentTasks": 5}}}))
    toml = tmp_path / "temporal.toml"
    toml.write_text('[profile.default]\nadress = "a:1"\n')
    by_deploy, by_toml, by_doctor = await asyncio.gather(
        shop.runs("list", ASYNC_TASK_CONFIG=str(deploy)),
        shop.runs("list", TEMPORAL_CONFIG_FILE=str(toml)),
        shop.runs("doctor", ASYNC_TASK_CONFIG=str(deploy)),
    )
    assert (by_deploy.status, by_toml.status, by_doctor.status) == (2, 2, 1)
    assert "unknown key components.asyncTask.maxConcurentTasks. Did you mean 'maxConcurrentTasks'?" in by_deploy.err
    assert "line 2, column 1: unknown field `adress`" in by_toml.err
    assert "Did you mean 'address'?" in by_toml.err
    assert "Did you mean 'maxConcurrentTasks'?" in by_doctor.out


# Doctor


async def test_doctor_finds_all_well_and_tells_where_each_setting_comes_from(shop: Shell, server: DevServer):
    told, document = await asyncio.gather(
        shop.runs("doctor", *APP, "--address", server.address, TEMPORAL_GRPC_META_AUTHORIZATION="secret-1"),
        shop.runs("doctor", *APP, "--json", TEMPORAL_ADRESS="a:1"),
    )
    assert (told.status, told.err) == (0, "")
    lines = [line.split() for line in told.out.splitlines()]
    assert ["temporal_address", server.address, "argument"] in lines
    queue = shop.env["TEMPORAL_TASK_QUEUE"]
    assert ["task_queue", queue, "environment", "variable", "TEMPORAL_TASK_QUEUE"] in lines
    assert ["namespace", "default", "default"] in lines
    assert "secret-1" not in told.out
    assert "set, not shown" in told.out

    assert document.status == 0
    found = {check["name"]: check for check in document.document["checks"]}
    assert document.document["ok"] is True
    assert {name for name, check in found.items() if check["state"] != "ok"} == {"environment"}
    assert "TEMPORAL_ADRESS" in found["environment"]["found"]
    assert f"picture on {queue}" in found["application"]["found"]
    assert "1 worker" in found["queue"]["found"]
    assert "version 1." in found["server"]["found"]
    assert "agree" in found["clock"]["found"]


async def test_doctor_finds_what_is_wrong_and_says_what_to_do(shop: Shell):
    idle, away, broken = await asyncio.gather(
        shop.runs("doctor", TEMPORAL_TASK_QUEUE="nobody-is-here", TEMPORAL_API_KEY="", TEMPORAL_TLS="false"),
        shop.runs("doctor", "--address", "127.0.0.1:1", "--json", TEMPORAL_API_KEY="secret-2", TEMPORAL_TLS="false"),
        shop.runs("doctor", "--app", "shop:nothing"),
    )
    assert idle.status == 1
    assert "nobody-is-here: no worker polls it." in idle.out
    assert "Start one with `async-task worker" in idle.out
    assert (away.status, away.document["ok"]) == (1, False)
    assert "No Temporal server answers at 127.0.0.1:1" in away.out
    assert "secret-2" not in away.out + away.err
    assert broken.status == 1
    assert "has no attribute 'nothing'" in broken.out


# The terminal


def test_stdout_has_the_answer_alone_whatever_the_application_prints(shop: Shell):
    ran = shop.run("submit", "report", "--json", *APP, CHATTY="1")
    assert (ran.status, ran.document["task"]) == (0, "report")
    assert "from the application" in ran.err
    assert "from a child" in ran.err


def test_a_reader_that_leaves_is_no_error_of_ours(shop: Shell):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(
            [COMMAND, "list", "--json"],
            cwd=shop.folder,
            env=shop.env,
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


async def test_a_terminal_gets_colours_and_redrawing_unless_it_asks_for_none(shop: Shell):
    task_id = new_id()
    await shop.runs("submit", "report", "--id", task_id, "--wait", *APP)
    coloured, plain, watched = await asyncio.gather(
        asyncio.to_thread(in_terminal, shop, "status", task_id),
        asyncio.to_thread(in_terminal, shop, "status", task_id, NO_COLOR="1"),
        asyncio.to_thread(in_terminal, shop, "status", task_id, "--watch"),
    )
    assert "\x1b[32mcompleted" in coloured
    assert "\x1b[32m" not in plain
    assert "completed" in plain
    assert "\x1b[32mcompleted" in watched
    assert "\x1b" not in (await shop.runs("status", task_id)).out


def in_terminal(shop: Shell, *arguments: str, **env: str) -> str:
    """What a command prints in a terminal."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [COMMAND, *arguments],
        cwd=shop.folder,
        env=shop.env | {"TERM": "xterm-256color"} | env,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    ) as process:
        os.close(follower)
        parts = []
        try:
            while part := os.read(leader, 65536):
                parts.append(part)
        except OSError:  # Linux: the terminal's other side is closed
            pass
        assert process.wait(60) == 0
    os.close(leader)
    return b"".join(parts).decode()


def test_help_and_completion_do_not_wait_for_the_temporal_sdk(tmp_path: Path):
    program = (
        "import sys\nfrom temporal_async_task.cli import main\nsys.argv = ['async-task', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end\n"
        "slow = {'temporalio', 'rich'} & set(sys.modules)\nassert not slow, slow\n"
    )
    shown = python("-c", program, "--help")
    assert (shown.status, shown.err) == (0, "")
    assert "141 the reader" in shown.out
    completing = {
        **os.environ,
        "_ASYNC_TASK_COMPLETE": "complete_bash",
        "COMP_WORDS": "async-task st",
        "COMP_CWORD": "1",
    }
    completed = python("-c", program, env=completing)
    assert (completed.status, completed.out.split()) == (0, ["status"]), completed.err


def test_without_the_extra_the_command_says_what_to_install():
    program = (
        "import importlib.util, sys\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name in {'typer', 'watchfiles'} else "
        "found(name, package)\n"
        "from temporal_async_task.cli import main\nmain()\n"
    )
    ran = python("-c", program)
    assert ran.status == 1
    assert "needs typer, watchfiles" in ran.err
    assert "pip install 'temporal-async-task[cli]'" in ran.err
