"""The shapes that a task's function may have, and the values that may go in and out."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, TypedDict
from uuid import UUID

import pytest
import typing_extensions
from pydantic import BaseModel

from support import App
from temporal_async_task import (
    Result,
    RetryPolicy,
    Step,
    StepFailedError,
    TaskFailedError,
    TemporalAsyncTask,
    async_task,
    step,
)


class Size(BaseModel):
    width: int
    height: int


class Order(BaseModel):
    prompt: str
    size: Size
    due: datetime
    tags: list[str] = []


@dataclass
class Shot:
    url: str
    sizes: dict[str, int]


class Colour(StrEnum):
    RED = "red"


class Job(TypedDict):
    id: str
    urgent: bool


class ExtendedJob(typing_extensions.TypedDict):
    id: str
    urgent: bool


async def fetch(number: int) -> int:
    return number * 10


def fetch_blocking(number: int) -> int:
    return number * 10


async def refuse() -> int:
    raise ValueError("no")


# Shapes ---------------------------------------------------------------------------------------------------


async def test_a_coroutine_may_be_a_single_step(app: App):
    @async_task
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return number * 2

    await app.start(double)
    assert await double.run(21) == 42


async def test_a_coroutine_may_ask_for_steps(app: App):
    @async_task
    async def total(number: int) -> int:
        return await step("first", fetch, number) + await step("second", fetch_blocking, number + 1)

    await app.start(total)
    assert await total.run(1) == 30
    assert not total.is_multi_step


async def test_a_plain_function_runs_in_a_thread(app: App):
    threads = []

    @async_task
    def double(number: int) -> int:
        threads.append(threading.current_thread())
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return number * 2

    await app.start(double)
    assert await double.run(21) == 42
    assert threading.current_thread() not in threads


async def test_a_generator_receives_the_results_of_its_steps_and_returns_its_own(app: App):
    @async_task
    def total(number: int) -> Generator[Step, Any, int]:
        first = yield Step("first", fetch, number)
        second = yield Step("second", fetch_blocking, first)
        return first + second

    await app.start(total)
    task_id = await total.submit(1)
    assert await total.result(task_id) == 110
    assert (await total.get_status(task_id)).completed_steps == ("first", "second")
    assert total.is_multi_step


async def test_an_async_generator_ends_with_a_result(app: App):
    @async_task
    async def total(number: int) -> AsyncGenerator[Step | Result[int], Any]:
        first = yield Step("first", fetch, number)
        second = yield Step("second", fetch_blocking, first)
        yield Result(first + second)

    await app.start(total)
    task_id = await total.submit(1)
    assert await total.result(task_id) == 110
    assert (await total.get_status(task_id)).completed_steps == ("first", "second")
    assert total.is_multi_step


async def test_nothing_of_an_async_generator_runs_after_its_result(app: App):
    after = []

    @async_task
    async def answer() -> AsyncGenerator[Step | Result[str], Any]:
        yield Result("this")
        after.append(1)
        yield Result("not this")

    await app.start(answer)
    assert await answer.run() == "this"
    assert after == []


@pytest.mark.parametrize("shape", ["generator", "async generator"])
async def test_a_generator_may_catch_the_failure_of_a_step(app: App, shape: str):
    def plain() -> Generator[Step, Any, str]:
        try:
            yield Step("pay", refuse)
        except StepFailedError as error:
            refund = yield Step("refund", fetch, 7)
            return f"{error.key} {refund}"
        return "paid"

    async def asynchronous() -> AsyncGenerator[Step | Result[str], Any]:
        try:
            yield Step("pay", refuse)
        except StepFailedError as error:
            refund = yield Step("refund", fetch, 7)
            yield Result(f"{error.key} {refund}")

    body = plain if shape == "generator" else asynchronous
    task = TemporalAsyncTask[None, str]("order", body, retry_policy=RetryPolicy(max_retries=0))
    await app.start(task)
    assert await task.run() == "pay 70"


async def test_a_generator_that_yields_something_else_is_told_what_to_yield(app: App):
    @async_task
    def total() -> Generator[Any, Any, int]:
        yield fetch(1).close()
        return 1

    await app.start(total)
    run = await total.get_status(await failed_run(total))
    assert run.error_type == "StepUsageError"
    assert "yielded NoneType" in str(run.error)
    assert "Step(key, call, ...)" in str(run.error)


async def test_a_task_is_made_without_the_decorator_as_well(app: App):
    async def double(number: int) -> int:
        return number * 2

    task = TemporalAsyncTask("doubling", double)
    await app.start(task)
    assert await task.run(4) == 8
    assert (task.name, task.workflow_type) == ("doubling", "asyncTask_doubling")
    assert task.task_function is double


async def test_a_task_that_is_called_runs_right_here_without_a_server():
    @async_task
    async def total(number: int) -> int:
        return await step("first", fetch, number) + await step("second", fetch_blocking, number + 1)

    assert await total(1) == 30


# Values ---------------------------------------------------------------------------------------------------

VALUES: list[tuple[Any, Any]] = [
    (Order, Order(prompt="a cup", size=Size(width=1, height=2), due=datetime(2026, 1, 2, 3, 4, 5, 678, UTC))),
    (Shot, Shot(url="https://example.org/ü", sizes={"small": 1})),
    (Job, Job(id="7", urgent=True)),
    (ExtendedJob, ExtendedJob(id="7", urgent=True)),
    (list[Shot], [Shot("a", {}), Shot("b", {"c": 1})]),
    (dict[str, Size], {"big": Size(width=9, height=9)}),
    (Order | Shot, Shot("union", {})),
    (bytes, b"\x00\xff raw"),
    (datetime, datetime(2026, 1, 2, 3, 4, 5, 678, UTC)),
    (date, date(2026, 1, 2)),
    (timedelta, timedelta(seconds=90)),
    (UUID, UUID("12345678-1234-5678-1234-567812345678")),
    (Decimal, Decimal("0.10")),
    (Colour, Colour.RED),
    (tuple[int, str], (1, "two")),
    (set[int], {1, 2}),
    (str, "ü 漢字 🎈 \x00 \n"),
    (int, 2**60),
    (float, 0.1),
    (bool, False),
    (str | None, None),
    (dict[str, Any], {"nested": [1, {"two": None}]}),
]


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=[str(annotation) for annotation, _ in VALUES])
async def test_params_step_results_and_results_arrive_as_what_they_are_annotated_to_be(
    app: App, annotation: Any, value: Any
):
    arrived = []

    async def pass_on(given: Any) -> Any:
        arrived.append(given)
        return given

    async def body(params: Any) -> Any:
        arrived.append(params)
        arrived.append(await step("pass-on", pass_on, params))
        return params

    pass_on.__annotations__ = {"given": annotation, "return": annotation}
    body.__annotations__ = {"params": annotation, "return": annotation}
    task = TemporalAsyncTask[Any, Any]("echo", body)
    await app.start(task)
    task_id = await task.submit(value)
    results = [await task.result(task_id), (await task.get_status(task_id)).result]
    assert [*arrived, *results] == [value] * 5
    assert {type(one) for one in [*arrived, *results]} == {type(value)}


async def test_a_task_without_annotations_gets_plain_json_values(app: App):
    arrived = []

    @async_task
    async def untyped(params):
        arrived.append(params)
        return params

    await app.start(untyped)
    order = Order(prompt="a cup", size=Size(width=1, height=2), due=datetime(2026, 1, 2, tzinfo=UTC))
    result = await untyped.run(order)
    assert result == {"prompt": "a cup", "size": {"width": 1, "height": 2}, "due": "2026-01-02T00:00:00Z", "tags": []}
    assert arrived == [result]


async def test_a_task_may_take_no_params_and_return_nothing(app: App):
    calls = []

    @async_task
    async def tidy_up() -> None:
        calls.append(1)

    await app.start(tidy_up)
    assert await tidy_up.run() is None
    assert calls == [1]


async def test_a_method_may_be_a_task(app: App):
    class Vendor:
        def __init__(self, secret: str) -> None:
            self.secret = secret

        async def generate(self, prompt: str) -> str:
            return f"{prompt} with {self.secret}"

    task = TemporalAsyncTask("generate", Vendor("s3").generate)
    await app.start(task)
    assert await task.run("cup") == "cup with s3"


async def failed_run(task: TemporalAsyncTask[None, Any]) -> str:
    task_id = await task.submit()
    with pytest.raises(TaskFailedError):
        await task.result(task_id)
    return task_id
