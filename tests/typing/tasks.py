"""What the type checkers make of a task, as the application holds it. See ``steps.py`` for how to read it."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import AsyncGenerator, Awaitable, Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type

from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    Result,
    RetryPolicy,
    Step,
    StepStatus,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    step,
)


@dataclass
class Order:
    prompt: str


@dataclass
class Shot:
    url: str


async def load(prompt: str) -> Shot:
    return Shot(prompt)


# The shapes, with the bare decorator.


@async_task
async def coroutine(order: Order) -> Shot:
    return await step("load", load, order.prompt)


@async_task
def function(order: Order) -> Shot:
    return Shot(order.prompt)


@async_task
def generator(order: Order) -> Generator[Step, Any, Shot]:
    shot: Shot = yield Step("load", load, order.prompt)
    return shot


@async_task
async def async_generator(order: Order) -> AsyncGenerator[Step | Result[Shot], Any]:
    shot: Shot = yield Step("load", load, order.prompt)
    yield Result(shot)


assert_type(coroutine, TemporalAsyncTask[Order, Shot])
assert_type(function, TemporalAsyncTask[Order, Shot])
assert_type(generator, TemporalAsyncTask[Order, Shot])
assert_type(async_generator, TemporalAsyncTask[Order, Shot])


# The same without params.


@async_task
async def bare_coroutine() -> Shot:
    return Shot("")


@async_task
def bare_function() -> Shot:
    return Shot("")


@async_task
def bare_generator() -> Generator[Step, Any, Shot]:
    yield Step("load", load, "")
    return Shot("")


@async_task
async def bare_async_generator() -> AsyncGenerator[Step | Result[Shot], Any]:
    yield Result(Shot(""))


assert_type(bare_coroutine, TemporalAsyncTask[None, Shot])
assert_type(bare_function, TemporalAsyncTask[None, Shot])
assert_type(bare_generator, TemporalAsyncTask[None, Shot])
assert_type(bare_async_generator, TemporalAsyncTask[None, Shot])


# The decorator with keywords, and none at all.


@async_task(
    name="shoot",
    task_queue="gpu",
    retry_policy=RetryPolicy(max_retries=5, initial_delay=timedelta(seconds=1)),
    step_timeout=60,
    timeout=timedelta(hours=1),
    heartbeat_timeout=5.0,
    execution="workflow",
)
async def with_keywords(order: Order) -> Shot:
    return Shot(order.prompt)


@async_task()
def with_parentheses(order: Order) -> Generator[Step, Any, Shot]:
    yield Step("load", load, order.prompt)
    return Shot("")


@async_task(timeout=5)
async def with_keywords_and_no_params() -> int:
    return 1


@async_task(timeout=5)
async def with_keywords_async_generator(order: Order) -> AsyncGenerator[Step | Result[Shot], Any]:
    yield Result(Shot(order.prompt))


async def some_coroutine(order: Order) -> Shot:
    return Shot(order.prompt)


assert_type(with_keywords, TemporalAsyncTask[Order, Shot])
assert_type(with_parentheses, TemporalAsyncTask[Order, Shot])
assert_type(with_keywords_and_no_params, TemporalAsyncTask[None, int])
assert_type(with_keywords_async_generator, TemporalAsyncTask[Order, Shot])
assert_type(TemporalAsyncTask("shoot", some_coroutine, timeout=5), TemporalAsyncTask[Order, Shot])

TemporalAsyncTask("shoot", some_coroutine, retries=3)  # type: ignore[call-overload]
async_task(retries=3)  # type: ignore[call-overload]
async_task(name="shoot", execution="elsewhere")  # type: ignore[call-overload]


@async_task  # type: ignore[arg-type]
async def with_two_params(order: Order, count: int) -> Shot:
    return Shot(order.prompt * count)


# Running.


async def a_task_takes_its_params_and_gives_its_result() -> None:
    assert_type(await coroutine.submit(Order("a cup")), str)
    assert_type(await coroutine.submit(Order("a cup"), task_id="1", delay=timedelta(days=1)), str)
    assert_type(await coroutine.result("1"), Shot)
    assert_type(await coroutine.result("1", timeout=5), Shot)
    assert_type(await coroutine.run(Order("a cup")), Shot)
    assert_type(await coroutine.run(Order("a cup"), task_id="1", timeout=timedelta(minutes=1)), Shot)
    assert_type(await coroutine(Order("a cup")), Shot)
    assert_type(await function.run(Order("a cup")), Shot)
    assert_type(await function(Order("a cup")), Shot)
    assert_type(await generator.run(Order("a cup")), Shot)
    assert_type(await async_generator.run(Order("a cup")), Shot)
    assert_type(await async_generator.result("1"), Shot)
    assert_type(await with_keywords.result("1"), Shot)


async def a_task_without_params_is_run_without() -> None:
    assert_type(await bare_coroutine.submit(), str)
    assert_type(await bare_coroutine.submit(task_id="1"), str)
    assert_type(await bare_coroutine.run(), Shot)
    assert_type(await bare_coroutine(), Shot)
    assert_type(await bare_function.run(), Shot)
    assert_type(await bare_generator.run(), Shot)
    assert_type(await bare_async_generator.run(), Shot)
    assert_type(await with_keywords_and_no_params.run(timeout=5), int)


async def wrong_params_are_errors() -> None:
    await coroutine.submit("a cup")  # type: ignore[arg-type]
    await coroutine.submit()  # type: ignore[call-arg]
    await coroutine.submit(Order("a cup"), id="1")  # type: ignore[call-arg]
    await coroutine.run("a cup")  # type: ignore[arg-type]
    await coroutine("a cup")  # type: ignore[arg-type]
    await generator.run("a cup")  # type: ignore[arg-type]
    await bare_coroutine.submit("a cup")  # type: ignore[call-overload]
    await coroutine.result(1)  # type: ignore[arg-type]


async def the_status_knows_the_result() -> None:
    run = await coroutine.get_status("1")
    assert_type(run, TaskResult[Shot])
    assert_type(run.result, Shot | None)
    assert_type(run.status, TaskStatus)
    assert_type(run.steps, tuple[StepStatus, ...])
    assert_type(run.completed_steps, tuple[str, ...])
    run.status = TaskStatus.FAILED  # type: ignore[misc]
    async for each in coroutine.list(status="failed", limit=None):
        assert_type(each, TaskResult[Shot])


async def a_task_may_be_a_step_of_another() -> None:
    assert_type(await step("child", coroutine.run, Order("a cup")), Shot)
    await step("child", coroutine.run, "a cup")  # type: ignore[call-overload]


# The component.


async def a_component_takes_any_tasks() -> None:
    config = AsyncTaskComponentConfig(temporal_address="localhost:7233", graceful_shutdown_timeout=timedelta(minutes=1))
    component = AsyncTaskComponent(config)
    component.register(coroutine)
    component.register_all([coroutine, bare_function, generator])
    component.register(load)  # type: ignore[arg-type]
    assert_type(component.is_started, bool)
    async with component as entered:
        assert_type(entered, AsyncTaskComponent)


def anything_that_returns_an_awaitable_may_be_a_task() -> None:
    def shoot(order: Order) -> Awaitable[Shot]:
        return load(order.prompt)

    assert_type(TemporalAsyncTask("shoot", shoot), TemporalAsyncTask[Order, Shot])
