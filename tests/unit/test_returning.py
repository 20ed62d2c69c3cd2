"""Where a task returns at once after a step: no code of its own comes between, so one write saves both."""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from temporal_async_task import RetryPolicy, StepFailedError, async_task, step
from temporal_async_task.engine.returning import returning_lines
from temporal_async_task.testing import TaskRun


@dataclass
class Shot:
    url: str
    size: int = 0


def enlarge(shot: Any) -> Any:
    return shot


async def plainly() -> str:
    return await step("last", str, 1)


async def as_an_object() -> Shot:
    return Shot(
        url=await step(
            "last",
            str,
            1,
        ),
        size=1,
    )


async def in_a_display() -> dict[str, Any]:
    return {"text": f"{await step('last', str, 1)}", "list": [1, "two"]}


async def in_a_branch() -> str:
    for number in range(3):
        match number:
            case 1:
                return await step("last", str, 1)
    return "never"


async def after_a_call() -> Any:
    return enlarge(await step("last", str, 1))


async def with_an_operator() -> str:
    return "a" + await step("last", str, 1)


async def with_an_attribute() -> Any:
    return (await step("last", Shot, "u")).url


async def with_two() -> tuple[str, str]:
    return await step("first", str, 1), await step("last", str, 1)


async def of_a_gather() -> list[str]:
    return await asyncio.gather(step("one", str, 1), step("two", str, 2))


async def in_a_try() -> str:
    try:
        return await step("last", str, 1)
    finally:
        enlarge(None)


async def in_a_with() -> str:
    with contextlib.suppress(ValueError):
        return await step("last", str, 1)


async def in_another_function() -> str:
    async def inner() -> str:
        return await step("last", str, 1)

    result = await inner()
    return result  # noqa: RET504 - it is the point


async def and_another_on_its_line() -> str: return await step("first", str, 1) if await step("last", str, 1) else ""  # fmt: skip  # noqa: E501


@functools.wraps(plainly)
async def around_another() -> str:
    result = await step("last", str, 1)
    enlarge(None)
    return result


def no_coroutine() -> None: ...


@pytest.mark.parametrize("body", [plainly, as_an_object, in_a_display, in_a_branch])
def test_an_await_is_found_where_nothing_but_the_return_comes_after_it(body: Callable[..., Any]):
    assert returning_lines(body)


@pytest.mark.parametrize(
    "body",
    [
        after_a_call,
        with_an_operator,
        with_an_attribute,
        with_two,
        in_a_try,
        in_a_with,
        in_another_function,
        and_another_on_its_line,
        around_another,
        no_coroutine,
    ],
)
def test_an_await_is_left_alone_where_other_code_comes_after_it(body: Callable[..., Any]):
    assert not returning_lines(body)


def test_the_lines_are_those_of_the_file():
    [line] = returning_lines(plainly)
    assert line == plainly.__code__.co_firstlineno + 1


def test_a_function_without_its_source_has_none():
    scope: dict[str, Any] = {"step": step}
    exec("async def made() -> str:\n    return await step('last', str, 1)", scope)  # noqa: S102
    assert returning_lines(scope["made"]) == frozenset()


def test_a_function_with_a_name_that_has_no_value_yet_has_none():
    async def early() -> str:
        return await step("last", later, 1)

    lines = returning_lines(early)
    later = str
    assert lines == frozenset()


@pytest.mark.parametrize(
    ("body", "writes"),
    [
        (plainly, 0),
        (as_an_object, 0),
        (in_a_display, 0),
        (in_a_branch, 0),
        (after_a_call, 1),
        (with_two, 2),
        (of_a_gather, 2),
        (in_a_try, 1),
        (in_another_function, 1),
    ],
)
def test_a_step_after_which_the_task_returns_is_saved_with_its_outcome(body: Callable[..., Any], writes: int):
    run = TaskRun(async_task(name="task")(body))
    run.execute()
    assert run.writes == writes
    assert len(run.journal.done()) == max(writes, 1)


def test_a_step_that_may_be_called_once_is_saved_by_itself():
    @async_task
    async def task() -> str:
        return await step.with_options(at_most_once=True)("pay", str, 1)

    run = TaskRun(task)
    run.execute()
    assert run.writes == 2, "the start, and the result"


def test_a_step_whose_task_fails_after_it_is_in_the_journal_and_is_not_called_again():
    class Refused:
        def __init__(self, text: str) -> None:
            raise ConnectionError(text)

    @async_task(retry_policy=RetryPolicy(max_retries=1, initial_delay=60, jitter=0))
    async def task() -> Refused:
        return Refused(await step("pay", str, 1))

    run = TaskRun(task)
    with pytest.raises(ConnectionError):
        run.execute()
    assert len(run.attempts) == 2
    assert run.calls_of("pay") == 1


def test_a_step_whose_task_fails_after_it_is_saved_before_the_next_is_asked_for():
    tries = []

    class Shaky:
        def __init__(self, text: str) -> None:
            tries.append(text)
            if len(tries) == 1:
                raise ConnectionError(text)

    @async_task(retry_policy=RetryPolicy(max_retries=1, initial_delay=0, jitter=0))
    async def task() -> str:
        if not tries:
            return Shaky(await step("pay", str, 1))  # type: ignore[return-value]
        await step("next", str, 2)
        return "done"

    run = TaskRun(task)
    run.on("next").loses_worker()
    assert run.execute() == "done"
    assert run.calls_of("pay") == 1
    assert len(run.attempts) == 2


def test_a_last_step_that_fails_fails_the_task_as_ever():
    @async_task(retry_policy=RetryPolicy(max_retries=0))
    async def task() -> str:
        return await step("last", str, 1)

    run = TaskRun(task)
    run.on("last").raises(ConnectionError("down"))
    with pytest.raises(StepFailedError):
        run.execute()
    assert run.writes == 1


def test_a_worker_that_is_lost_before_the_outcome_costs_one_more_call_with_the_same_key():
    @async_task
    async def task() -> str:
        await step("first", str, 0)
        return await step("last", str, 1)

    run = TaskRun(task)
    run.on("last").loses_worker(when="after")
    run.execute()
    assert (run.calls_of("first"), run.calls_of("last")) == (1, 2)
