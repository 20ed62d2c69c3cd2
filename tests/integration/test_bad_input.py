"""What is refused, with a message that says what to do: before anything is sent, or without losing what was done."""

import asyncio
import contextlib
import re
import uuid
from datetime import datetime
from typing import Any

import pytest
from pydantic import BaseModel

from support import AT_ONCE, App, ended, on_both, status_when, wait_until
from temporal_async_task import (
    AsyncTaskError,
    ConfigError,
    InvalidKeyError,
    NotConnectedError,
    ParamsError,
    PayloadTooLargeError,
    ResultError,
    StepFailedError,
    TaskNotFoundError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    step,
)

MB = 1024 * 1024


class Order(BaseModel):
    prompt: str
    count: int


class Opaque:
    """A value that no converter knows."""


async def generate() -> str:
    return "image"


async def outcome(app: App, task: TemporalAsyncTask[None, Any]) -> TaskResult[Any]:
    """Run a task on a worker of its own, to its end."""
    await app.start(task)
    task_id = await task.submit()
    return await status_when(task, task_id, ended, timeout=60)


# Params ---------------------------------------------------------------------------------------------------


def task_for(annotation: Any) -> TemporalAsyncTask[Any, Any]:
    async def shoot(params: Any) -> None: ...

    shoot.__annotations__ = {"params": annotation, "return": None}
    return TemporalAsyncTask[Any, Any]("shoot", shoot)


@pytest.mark.parametrize(
    ("annotation", "params", "says"),
    [
        (Order, {"prompt": "a cup"}, "count"),
        (Order, {"prompt": "a cup", "count": "many"}, "count"),
        (Order, "a cup", "Order"),
        (Order, None, "Order"),
        (int, "seven", "int"),
        (list[int], [1, "two"], "int"),
        (datetime, "yesterday", "datetime"),
        (bytes, 7, "bytes"),
    ],
)
async def test_params_that_do_not_fit_are_refused_before_anything_is_sent(
    app: App, annotation: Any, params: Any, says: str
):
    shoot = task_for(annotation)
    await app.connect(shoot)
    task_id = str(uuid.uuid4())
    with pytest.raises(ParamsError, match=rf"(?s)The params of task 'shoot' do not fit.*{says}"):
        await shoot.submit(params, task_id=task_id)
    with pytest.raises(TaskNotFoundError):
        await shoot.get_status(task_id)


@pytest.mark.parametrize("params", [Opaque(), {"nested": [Opaque()]}, lambda: None], ids=["object", "nested", "lambda"])
@pytest.mark.parametrize("annotation", [Any, dict[str, Any]])
async def test_params_that_cannot_be_serialised_are_refused_before_anything_is_sent(
    app: App, annotation: Any, params: Any
):
    shoot = task_for(annotation)
    await app.connect(shoot)
    task_id = str(uuid.uuid4())
    with pytest.raises(ParamsError, match=r"(?s)The params of task 'shoot'.*(Opaque|function)"):
        await shoot.submit(params, task_id=task_id)
    with pytest.raises(TaskNotFoundError):
        await shoot.get_status(task_id)


async def test_params_for_a_task_that_takes_none_are_refused(app: App):
    @async_task
    async def tidy_up() -> None: ...

    await app.connect(tidy_up)
    with pytest.raises(ParamsError, match="Task 'tidy_up' takes no params; it was given str"):
        await tidy_up.submit("something")  # type: ignore[arg-type]


@on_both
async def test_params_over_the_servers_limit_are_refused_with_their_size(app: App):
    shoot = task_for(str)
    await app.connect(shoot)
    task_id = str(uuid.uuid4())
    with pytest.raises(PayloadTooLargeError, match=r"(?s)params of task 'shoot'.*3,145,\d{3} bytes.*reference"):
        await shoot.submit("x" * 3 * MB, task_id=task_id)
    with pytest.raises(TaskNotFoundError):
        await shoot.get_status(task_id)


@on_both
async def test_params_just_below_the_limit_are_taken(app: App):
    @async_task
    async def measure(text: str) -> int:
        return len(text)

    await app.start(measure)
    assert await measure.run("x" * 1_900_000, timeout=60) == 1_900_000


@on_both
async def test_params_that_a_worker_cannot_read_fail_the_run_and_say_why(app: App):
    @async_task(name="shoot")
    async def submitted(params: dict[str, Any]) -> None: ...

    @async_task(name="shoot")
    async def deployed(order: Order) -> None: ...

    await app.connect(submitted)
    task_id = await submitted.submit({"prompt": "a cup"})
    await app.start(deployed)
    run = await status_when(deployed, task_id, ended)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "ParamsError")
    assert "The params of task 'shoot'" in str(run.error)
    assert "count" in str(run.error)


# Results --------------------------------------------------------------------------------------------------


async def test_a_step_result_over_the_limit_fails_the_task_with_step_and_size_and_keeps_what_was_done(app: App):
    calls = []

    async def huge() -> str:
        calls.append(1)
        return "x" * 3 * MB

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        await step("generate", generate)
        await step("download", huge)

    run = await outcome(app, shoot)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "PayloadTooLargeError")
    assert re.search(r"'download'.*3,145,\d{3} bytes.*reference", str(run.error))
    assert run.completed_steps == ("generate",)
    assert len(calls) == 1


@on_both
async def test_step_results_over_the_limit_together_fail_the_task_and_keep_what_was_done(app: App):
    async def large() -> str:
        return "x" * 900_000

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        for number in range(4):
            await step(f"page-{number}", large)

    run = await outcome(app, shoot)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "PayloadTooLargeError")
    assert "'page-2'" in str(run.error)
    assert run.completed_steps == ("page-0", "page-1")


async def test_a_body_may_go_on_without_a_result_that_was_too_large(app: App):
    async def huge() -> str:
        return "x" * 3 * MB

    @async_task
    async def shoot() -> str:
        try:
            await step("download", huge)
        except PayloadTooLargeError:
            return await step("link", generate)
        return "not refused"

    run = await outcome(app, shoot)
    assert (run.status, run.result) == (TaskStatus.COMPLETED, "image")


@on_both
async def test_a_task_result_over_the_limit_fails_the_task_and_keeps_what_was_done(app: App):
    bodies = []

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> str:
        bodies.append(1)
        await step("generate", generate)
        return "x" * 3 * MB

    run = await outcome(app, shoot)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "PayloadTooLargeError")
    assert re.search(r"3,145,\d{3} bytes.*reference", str(run.error))
    assert run.completed_steps == ("generate",)
    assert len(bodies) == 1


@on_both
async def test_results_just_below_the_limit_are_taken(app: App):
    async def large() -> str:
        return "x" * 1_900_000

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> str:
        return await step("download", large)

    run = await outcome(app, shoot)
    assert run.result == "x" * 1_900_000
    assert run.completed_steps == ("download",)


async def test_a_step_result_that_cannot_be_serialised_fails_the_task_and_the_step_is_not_called_again(app: App):
    calls = []

    async def opaque() -> Any:
        calls.append(1)
        return Opaque()

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        await step("generate", generate)
        await step("wrap", opaque)

    run = await outcome(app, shoot)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "ResultError")
    assert re.search(r"'wrap'.*Opaque.* cannot be serialised", str(run.error))
    assert run.completed_steps == ("generate",)
    assert len(calls) == 1


async def test_a_task_result_that_cannot_be_serialised_fails_the_task_without_another_try(app: App):
    bodies = []

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> Any:
        bodies.append(1)
        return Opaque()

    run = await outcome(app, shoot)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "ResultError")
    assert "Opaque" in str(run.error)
    assert len(bodies) == 1


async def test_a_step_result_that_does_not_fit_its_annotation_is_told_and_not_called_for_again(app: App):
    calls = []

    async def wrong() -> Any:
        calls.append(1)
        return {"prompt": "a cup"}

    wrong.__annotations__ = {"return": Order}

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        await step("fetch", wrong)

    run = await outcome(app, shoot)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "ResultError")
    assert re.search(r"(?s)'fetch'.*does not fit Order.*count", str(run.error))
    assert len(calls) == 1


async def test_an_annotation_that_is_not_there_at_run_time_is_told_with_the_ways_out(app: App):
    async def fetch() -> Any: ...

    fetch.__annotations__ = {"return": "NotImported"}

    @async_task
    async def shoot() -> None:
        await step("fetch", fetch)

    run = await outcome(app, shoot)
    assert run.error_type == "StepUsageError"
    assert "NotImported" in str(run.error)
    assert "result_type" in str(run.error)


# Names, ids and keys --------------------------------------------------------------------------------------

BAD_TEXTS = [
    ("", "is empty"),
    ("  ", "is empty"),
    ("x" * 256, "is 256 bytes long; the limit is 255"),
    ("ü" * 128, "is 256 bytes long; the limit is 255"),
    ("line\nbreak", "has the control character"),
    ("nul\0", "has the control character"),
    ("\ud800", "lone surrogates"),
    (7, "must be text (str), not int"),
    (None, "must be text (str), not NoneType"),
    (b"bytes", "must be text (str), not bytes"),
]
bad_texts = pytest.mark.parametrize(("text", "says"), BAD_TEXTS, ids=[repr(text)[:12] for text, _ in BAD_TEXTS])


@bad_texts
async def test_a_step_key_that_cannot_be_one_fails_the_task_and_makes_no_call(app: App, text: Any, says: str):
    calls = []

    async def count() -> None:
        calls.append(1)

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        await step(text, count)

    run = await outcome(app, shoot)
    assert run.error_type == "InvalidKeyError"
    assert says in str(run.error)
    assert calls == []


@bad_texts
async def test_a_task_id_that_cannot_be_one_is_refused(app: App, text: Any, says: str):
    shoot = task_for(str)
    await app.connect(shoot)
    if text is not None:
        with pytest.raises(InvalidKeyError, match=re.escape(says)):
            await shoot.submit("a cup", task_id=text)
    with pytest.raises(InvalidKeyError, match=re.escape(says)):
        await shoot.get_status(text)
    with pytest.raises(InvalidKeyError, match=re.escape(says)):
        await shoot.result(text)


@bad_texts
async def test_a_name_that_cannot_be_one_is_refused(text: Any, says: str):
    with pytest.raises(InvalidKeyError, match=re.escape(says)):
        TemporalAsyncTask(text, generate)


@on_both
async def test_the_longest_texts_are_taken(app: App):
    @async_task(name="n" * (255 - len("asyncTask_")))
    async def shoot() -> str:
        return await step("k" * 255, generate)

    await app.start(shoot)
    task_id = await shoot.submit(task_id=uuid.uuid4().hex + "i" * 223)
    assert await shoot.result(task_id) == "image"
    assert (await shoot.get_status(task_id)).completed_steps == ("k" * 255,)


# Options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"step_timeout": 0},
        {"heartbeat_timeout": 0},
        {"heartbeat_timeout": "soon"},
        {"step_timeout": float("nan")},
        {"execution": "elsewhere"},
    ],
    ids=str,
)
async def test_an_option_that_makes_no_sense_is_refused_and_named(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TemporalAsyncTask("shoot", generate, **options)


async def test_a_function_of_two_params_is_refused():
    async def shoot(prompt: str, count: int) -> None: ...

    with pytest.raises(ConfigError, match="takes 2 parameters"):
        async_task(shoot)  # type: ignore[arg-type]


@pytest.mark.parametrize("delay", [-1, float("inf"), "soon"])
async def test_a_delay_that_makes_no_sense_is_refused(app: App, delay: Any):
    shoot = task_for(str)
    await app.connect(shoot)
    with pytest.raises(AsyncTaskError, match="delay of task 'shoot'"):
        await shoot.submit("a cup", delay=delay)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("", "empty"),
        (" ", "empty"),
        (7, "must be text"),
        ("\ud800", "lone surrogates"),
        ("x" * 65, "65 bytes long; Temporal's limit is 64"),
        ("é" * 33, "66 bytes long"),
        ("x" * 300, "300 bytes long"),
    ],
    ids=lambda value: repr(value)[:20],
)
@on_both
async def test_a_fairness_key_that_cannot_be_one_is_refused(app: App, key: Any, says: str):
    shoot = TemporalAsyncTask("shoot", generate)
    await app.connect(shoot)
    with pytest.raises(ParamsError, match=rf"fairness_key .*{says}"):
        await shoot.submit(fairness_key=key)


@on_both
async def test_the_longest_fairness_key_is_taken(app: App):
    shoot = TemporalAsyncTask("shoot", generate)
    await app.connect(shoot)
    assert await shoot.submit(fairness_key="é" * 32)


# The wrong moment -----------------------------------------------------------------------------------------


async def test_a_task_that_is_not_connected_says_how_to_connect_it():
    shoot = task_for(str)
    for call in (
        lambda: shoot.submit("a cup"),
        lambda: shoot.run("a cup"),
        lambda: shoot.get_status("id"),
        lambda: shoot.result("id"),
        lambda: anext(aiter(shoot.list())),
    ):
        with pytest.raises(NotConnectedError, match=r"Task 'shoot'.*component\.connect\(\) or component\.start\(\)"):
            await call()


async def test_a_task_that_was_registered_before_the_connect_is_not_connected_yet(app: App):
    shoot = task_for(str)
    app.component(shoot)
    with pytest.raises(NotConnectedError):
        await shoot.submit("a cup")


# Code that behaves badly ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
@pytest.mark.parametrize("where", ["async step", "sync step", "body"])
async def test_code_that_wants_to_end_the_process_ends_only_its_own_task(app: App, error: BaseException, where: str):
    async def leave() -> None:
        raise error

    def leave_sync() -> None:
        raise error

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        if where == "body":
            raise error
        await step("leave", leave if where == "async step" else leave_sync)

    @async_task
    async def other() -> str:
        return "still here"

    await app.start(shoot, other)
    task_id = await shoot.submit()
    run = await status_when(shoot, task_id, ended)
    assert run.status is TaskStatus.FAILED
    assert type(error).__name__ in str(run.error)
    assert await other.run(timeout=60) == "still here"


async def test_an_error_with_a_message_that_is_huge_or_no_utf8_is_told(app: App):
    async def fail(text: str) -> None:
        raise ValueError(text)

    @async_task(retry_policy=AT_ONCE)
    async def shoot(text: str) -> None:
        try:
            await step("fail", fail, text)
        except StepFailedError:
            raise TypeError(("\ud800" if text == "surrogate" else "x") * 3 * MB) from None

    await app.start(shoot)
    for text, says in (("huge", "xxx"), ("surrogate", "\\ud800")):
        task_id = await shoot.submit(text)
        run = await status_when(shoot, task_id, ended)
        assert run.error_type == "TypeError"
        assert says in str(run.error)
        assert run.steps[0].last_error == f"ValueError: {text}"


async def test_a_result_that_does_not_fit_the_code_of_today_is_told_by_result_and_status(app: App):
    @async_task(name="shoot")
    async def before() -> dict[str, Any]:
        return {"prompt": "a cup"}

    @async_task(name="shoot")
    async def after() -> Order:
        return Order(prompt="a cup", count=1)

    await app.start(before)
    task_id = await before.submit()
    await before.result(task_id)
    await app.connect(after)
    with pytest.raises(ResultError, match=r"(?s)does not fit Order.*count"):
        await after.result(task_id)
    run = await after.get_status(task_id)
    assert (run.status, run.result, run.error_type) == (TaskStatus.COMPLETED, None, "ResultError")
    assert re.search(r"(?s)does not fit Order.*count", str(run.error))


async def test_a_coroutine_that_swallows_every_request_to_stop_does_not_keep_the_worker_from_stopping(app: App):
    begun = []
    let_go = []

    @async_task
    async def stubborn() -> None:
        begun.append(1)
        while not let_go:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(0.05)

    worker = await app.start(stubborn)
    await stubborn.submit()
    await wait_until(lambda: begun)
    try:
        async with asyncio.timeout(8):
            await worker.stop()
    finally:
        let_go.append(1)
