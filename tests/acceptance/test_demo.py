"""The demo, as a newcomer runs it, but for the making of its virtual environment."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "picture_demo"
sys.path.insert(0, str(DEMO))  # the demo is a folder of scripts and not a package

import png  # noqa: E402
from verdict import Call, Kill, complaints, cut_off  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = ["generate", "download", "upload"]


@contextlib.contextmanager
def demo(state: Path) -> Iterator[subprocess.Popen[str]]:
    """A small demo. It is asked to stop in the end, for it has processes of its own to stop."""
    command = [sys.executable, str(DEMO / "demo.py"), "--pictures", "3", "--state", str(state)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    # A shell has its background jobs ignore Ctrl-C, and these tests may run in one.
    terminal = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=terminal,  # noqa: PLW1509 - there are no other threads here
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_the_demo_survives_the_kill_and_its_table_agrees_with_the_log_of_the_api(tmp_path: Path) -> None:
    """Exit 0; each picture's three steps with the calls that the API has logged; whole pictures in the folder."""
    state = tmp_path / "state"
    with demo(state) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "killed with SIGKILL in the middle of its calls" in output
    assert "Worker 2 stopped, exit status 0" in output

    calls = [json.loads(line) for line in (state / "calls.jsonl").read_text().splitlines()]
    logged = Counter((call["task_id"], call["step"]) for call in calls)
    busy = Counter((call["task_id"], call["step"]) for call in calls if call["status"] == 503)
    header, *lines = output.partition("\npicture ")[2].split("\n\n")[0].splitlines()
    assert header.split() == ["step", "attempts", "API", "calls", "answered", "503", "cut", "off", "by", "the", "kill"]
    rows = {(name, step): [int(n) for n in numbers] for name, step, *numbers in map(str.split, lines)}
    assert list(rows) == [(f"picture-{n}", step) for n in (1, 2, 3) for step in STEPS]
    assert {step: numbers[1] for step, numbers in rows.items()} == logged
    assert {step: numbers[2] for step, numbers in rows.items() if numbers[2]} == busy
    assert len(busy) == 1, "one in three pictures has to wait for a busy API"
    assert any(numbers[3] for numbers in rows.values()), "the kill has cut off a call"
    assert all(attempts >= 1 and extra <= 1 for attempts, _, _, extra in rows.values())

    pictures = [(state / "pictures" / f"picture-{n}.png").read_bytes() for n in (1, 2, 3)]
    assert len(set(pictures)) == 3
    for picture in pictures:
        png.check(picture)


def test_an_interrupted_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    """Ctrl-C in the middle stops the worker and the server."""
    with demo(tmp_path / "state") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Submitted" in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("child processes can be listed on Linux only")
        pids = [int(pid) for pid in children.read_text().split()]
        assert len(pids) >= 2, "the server and a worker"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Stopped." in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# The verdict can be "no".

KILL = Kill(pid=1, at=100.0, replaced_at=101.0)


def call(step: str, began_at: float, seconds: float = 1.0, status: int = 200) -> Call:
    return Call("picture-1", step, f"key-of-{step}", began_at, began_at + seconds, status)


def judge(*calls: Call, finished: dict[str, float] | None = None) -> list[str]:
    """The complaints about one picture, whose steps were seen finished at these times."""
    seen_finished = {("picture-1", step): time for step, time in (finished or {}).items()}
    return complaints(["picture-1"], calls, seen_finished, KILL)


GENERATE, UPLOAD = call("generate", 97.0), call("upload", 108.0)
DOWNLOAD_CUT_OFF, DOWNLOAD = call("download", 99.5), call("download", 106.0)


def test_a_call_that_the_kill_has_cut_off_may_be_made_again() -> None:
    assert judge(GENERATE, DOWNLOAD_CUT_OFF, DOWNLOAD, UPLOAD, finished={"generate": 98.5, "download": 107.5}) == []
    assert cut_off(DOWNLOAD_CUT_OFF, {("picture-1", "download"): 107.5}, KILL)


def test_a_call_that_the_api_has_refused_may_be_made_again() -> None:
    busy = call("upload", 107.5, 0.01, status=503)
    assert judge(GENERATE, DOWNLOAD_CUT_OFF, DOWNLOAD, busy, UPLOAD) == []


def test_a_finished_step_that_is_called_again_is_refused() -> None:
    """Whatever the second call brought, and whether the kill came between or not."""
    told = "Step 'generate' of picture-1 was called again after it had finished."
    for again in (call("generate", 106.0), call("generate", 99.0), call("generate", 106.0, status=503)):
        finished = {"generate": 98.5}
        assert told in judge(GENERATE, again, DOWNLOAD_CUT_OFF, DOWNLOAD, UPLOAD, finished=finished)


def test_a_second_success_without_a_kill_between_is_refused() -> None:
    """Though no status has shown the step finished between the two."""
    twice = judge(GENERATE, DOWNLOAD_CUT_OFF, DOWNLOAD, UPLOAD, call("upload", 109.0))
    assert twice == ["Step 'upload' of picture-1 was called with success 2 times."]


def test_two_successes_of_the_killed_worker_are_refused() -> None:
    hasty = judge(GENERATE, call("download", 99.2, 0.1), DOWNLOAD_CUT_OFF, UPLOAD)
    assert hasty == ["Step 'download' of picture-1 was called with success 2 times."]


def test_a_result_that_was_answered_long_before_the_kill_must_have_been_kept() -> None:
    lost = judge(GENERATE, call("generate", 106.0), DOWNLOAD_CUT_OFF, DOWNLOAD, UPLOAD)
    assert lost == ["Step 'generate' of picture-1 was called with success 2 times."]


def test_a_third_success_is_refused_even_after_a_kill() -> None:
    thrice = judge(GENERATE, DOWNLOAD_CUT_OFF, DOWNLOAD, call("download", 107.2), UPLOAD)
    assert thrice == ["Step 'download' of picture-1 was called with success 3 times."]


def test_a_step_without_success_is_refused() -> None:
    assert judge(GENERATE, DOWNLOAD_CUT_OFF) == ["Step 'upload' of picture-1 was never called with success."]


def test_idempotency_keys_must_be_stable_and_different() -> None:
    unstable = judge(GENERATE, DOWNLOAD_CUT_OFF, replace(DOWNLOAD, idempotency_key="another"), UPLOAD)
    assert unstable == ["Step 'download' of picture-1 was called with different idempotency keys."]
    shared = judge(GENERATE, DOWNLOAD_CUT_OFF, replace(UPLOAD, idempotency_key=GENERATE.idempotency_key))
    assert shared == ["Different steps were called with the same idempotency key."]


def test_a_kill_that_hit_nothing_proves_nothing() -> None:
    assert judge(GENERATE, DOWNLOAD, UPLOAD) == [
        "The worker was killed while the API was answering no call: that proves nothing."
    ]


def test_damaged_pictures_are_noticed() -> None:
    picture = png.gradient("a red fox")
    png.check(picture)
    for damaged in (b"", picture[:-1], picture[:200], picture.replace(b"IDAT", b"IDAX"), picture[:40] + picture[41:]):
        with pytest.raises(ValueError, match=r"^it"):
            png.check(damaged)


# scripts/demo


@pytest.mark.parametrize(
    ("python", "advice"),
    [
        ("exit 1", "The demo needs Python 3.11 or newer"),
        ('case "$2" in *version_info*) exit 0 ;; *) exit 1 ;; esac', "apt install python3-venv"),
    ],
    ids=["too old", "without venv"],
)
def test_without_a_usable_python_the_script_says_what_to_do(tmp_path: Path, python: str, advice: str) -> None:
    """On a copy, so that no environment that is there already is used or lost."""
    for name in ("bin", "scripts"):
        (tmp_path / name).mkdir()
    (tmp_path / "pyproject.toml").touch()
    script = tmp_path / "scripts" / "demo"
    script.write_bytes((ROOT / "scripts" / "demo").read_bytes())
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{python}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    ran = subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert advice in ran.stderr
    assert not (tmp_path / ".venv-demo").exists()
