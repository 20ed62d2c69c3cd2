"""Params as they are typed, what doctor thinks of a clock and a version, and what a terminal gets to see."""

import io
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

import temporal_async_task
from temporal_async_task import AsyncTaskComponentConfig, ConfigError, StepState, StepStatus, TaskResult, TaskStatus
from temporal_async_task.cli.doctor import clock_check, server_check
from temporal_async_task.cli.exits import CommandError, ExitStatus
from temporal_async_task.cli.params import read_params
from temporal_async_task.cli.view import as_text, run_view, summary
from temporal_async_task.config import misspelt_variables

# Params


def test_params_are_json_from_the_command_a_file_or_stdin(tmp_path, monkeypatch):
    path = tmp_path / "params.json"
    path.write_text('\ufeff{"a": [1, null]}', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO('"text"'))
    assert read_params(None) is None
    assert read_params('{"a": 1.5}') == {"a": 1.5}
    assert read_params(f"@{path}") == {"a": [1, None]}
    assert read_params("-") == "text"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"a": 1',
            "The params: not valid JSON at line 1, column 8: Expecting ',' delimiter.\n  {\"a\": 1\n         ^",
        ),
        ("hello", "Text is JSON with its quotes: '\"hello\"'."),
        ('{"a": 1,\n "b": }', 'not valid JSON at line 2, column 7: Expecting value.\n   "b": }\n        ^'),
        ("", "not valid JSON at line 1, column 1"),
        ("NaN", "NaN is Python's, and not JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("@/no/such/file", "Cannot read the params"),
    ],
)
def test_params_that_are_not_json_are_told_by_their_place(text, said):
    with pytest.raises(CommandError) as caught:
        read_params(text)
    assert said in str(caught.value)
    assert caught.value.status is ExitStatus.USAGE


# Doctor


@pytest.mark.parametrize(
    ("difference", "state", "said"),
    [
        (0.01, "ok", "agree"),
        (0.5, "ok", "0.5 s ahead of"),
        (-2.0, "warning", "2.0 s behind"),
        (7.0, "problem", "7.0 s ahead of"),
    ],
)
def test_clocks_that_differ_are_a_problem_from_where_it_matters(difference, state, said):
    check = clock_check(difference)
    assert check.state == state
    assert said in check.found
    assert bool(check.advice) == (state != "ok")


@pytest.mark.parametrize(
    ("version", "state"), [("1.32.0", "ok"), ("1.28.1", "ok"), ("1.27.4", "problem"), ("0.9", "problem"), ("", "ok")]
)
def test_a_server_that_cannot_pause_activities_is_a_problem(version, state):
    assert server_check("answers", version).state == state


# Configuration


def test_a_misspelt_variable_is_found_with_what_was_meant():
    found = misspelt_variables(
        {
            "TEMPORAL_ADRESS": "a:1",
            "TEMPORAL_TASKQUEUE": "q",
            "ASYNC_TASK_AP": "shop:component",
            "TEMPORAL_ADDRESS": "a:1",
            "TEMPORAL_GRPC_META_X": "y",
            "TEMPORAL_SOMETHING_ELSE": "1",
            "PATH": "/bin",
        }
    )
    assert found == {
        "TEMPORAL_ADRESS": "TEMPORAL_ADDRESS",
        "TEMPORAL_TASKQUEUE": "TEMPORAL_TASK_QUEUE",
        "ASYNC_TASK_AP": "ASYNC_TASK_APP",
    }


def test_every_variable_that_the_library_reads_is_meant_by_what_is_near_it():
    sources = Path(temporal_async_task.__file__).parent.rglob("*.py")
    read = {name for source in sources for name in re.findall(r"\bASYNC_TASK_[A-Z_]+\b", source.read_text())}
    assert len(read) >= 5
    assert misspelt_variables({f"{name}S": "" for name in read}) == {f"{name}S": name for name in read}
    assert misspelt_variables(dict.fromkeys(read, "")) == {}


def test_no_credential_is_shown():
    config = AsyncTaskComponentConfig(api_key="key-1", rpc_metadata={"authorization": "key-2"}, tls=True)
    assert config.shown("api_key") == config.shown("rpc_metadata") == "set, not shown"
    assert config.shown("tls") == "True"
    assert config.shown("temporal_address") == "localhost:7233"
    assert AsyncTaskComponentConfig().shown("api_key") == "none"


def test_arguments_are_checked_as_in_a_configuration_of_its_own():
    config = AsyncTaskComponentConfig(api_key="key")
    assert config.with_arguments("code", namespace="shop").api_key == "key"
    with pytest.raises(ConfigError, match="temporal_address is 'http://a'"):
        config.with_arguments("code", temporal_address="http://a")


# What is shown

RUN: TaskResult[object] = TaskResult(
    task_id="order-1",
    status=TaskStatus.PROCESSING,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    steps=(
        StepStatus("generate", StepState.COMPLETED, 1),
        StepStatus("up[red]load", StepState.RETRYING, 2, last_error="Err: [/] \x1b[2J:smile:"),
    ),
    attempt=2,
    progress=0.5,
    progress_message="[bold]half",
)


def drawn(run: TaskResult[object]) -> str:
    out = io.StringIO()
    Console(file=out, width=200, markup=False, emoji=False, highlight=False).print(run_view("picture", run))
    return out.getvalue()


def test_other_people_s_text_is_shown_as_it_is_and_steers_no_terminal():
    text = drawn(RUN)
    assert "up[red]load" in text
    assert "Err: [/] \\x1b[2J:smile:" in text
    assert "50% [bold]half" in text
    assert "\x1b" not in text + summary(RUN)


def test_a_run_on_one_line_names_its_steps():
    assert summary(RUN) == "processing generate=completed up[red]load=retrying"


@pytest.mark.parametrize(
    ("value", "text"), [("text", "text"), ({"a": 1}, '{"a":1}'), (b"\xff", '"_w=="'), (None, "null")]
)
def test_a_result_is_text_as_it_is_or_json(value, text):
    assert as_text(value) == text
