"""What an application holds: how tasks are defined, called without a server, and told apart by name."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import FrozenInstanceError, dataclass
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

import temporal_async_task
from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    ConfigError,
    DuplicateTaskError,
    InvalidKeyError,
    NonRetryableError,
    NotConnectedError,
    PollTimeoutError,
    Result,
    ResultError,
    RetryPolicy,
    Step,
    StepFailedError,
    StepUsageError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    WaitTimeoutError,
    async_task,
    current_run,
    current_step,
    poll,
    progress,
    sleep,
    step,
    wait_for,
)
from temporal_async_task.registry import Registry


async def waits_for_an_event() -> None:
    await wait_for("approval")


async def waits_by_the_module() -> None:
    await temporal_async_task.wait_for("approval")


async def waits_in_an_inner_function() -> None:
    async def approved() -> None:
        await wait_for("approval")

    await approved()


async def waits_for_something_else() -> None:
    await asyncio.wait_for(asyncio.sleep(0), 1)


QUICK = RetryPolicy(max_retries=3, initial_delay=0.01, max_delay=0.01, jitter=0)


class Order(BaseModel):
    prompt: str


@dataclass
class Shot:
    url: str


async def product_shot(order: Order) -> Shot:
    """Make a picture of a product."""
    return Shot(url=order.prompt)


def plain(order: Order) -> Shot:
    return Shot(url=order.prompt)


def generator(order: Order) -> Generator[Step, Any, Shot]:
    return Shot(url=(yield Step("generate", str.upper, order.prompt)))


async def async_generator(order: Order) -> AsyncGenerator[Step | Result[Shot], Any]:
    yield Result(Shot(url=(yield Step("generate", str.upper, order.prompt))))


class Service:
    async def handle(self, order: Order) -> Shot:
        return Shot(url=order.prompt)


class TestDefinition:
    def test_a_decorated_function_is_named_after_itself(self):
        assert async_task(product_shot).name == "product_shot"

    def test_the_decorator_takes_a_name(self):
        assert async_task(name="shots.product")(product_shot).name == "shots.product"

    def test_the_decorator_may_be_written_with_empty_brackets(self):
        assert async_task()(product_shot).name == "product_shot"

    def test_the_decorator_and_the_class_make_the_same(self):
        options: dict[str, Any] = {"task_queue": "gpu", "timeout": 60, "step_timeout": timedelta(minutes=1)}
        decorated = async_task(name="shot", **options)(product_shot)
        made = TemporalAsyncTask("shot", product_shot, **options)
        for attribute in ("name", "workflow_type", "task_queue", "timeout", "step_timeout", "task_function"):
            assert getattr(decorated, attribute) == getattr(made, attribute)

    def test_its_workflow_type_is_its_name_behind_a_prefix(self):
        assert TemporalAsyncTask("shot", product_shot).workflow_type == "asyncTask_shot"

    def test_without_settings_the_documented_ones_hold(self):
        task = async_task(product_shot)
        assert task.task_queue == "async-tasks"
        assert task.step_timeout == 1800
        assert task.timeout is None
        assert task.heartbeat_timeout == 15
        assert task.execution == "workflow"
        assert AsyncTaskComponentConfig().execution == "workflow"
        policy = task.retry_policy
        assert (policy.max_retries, policy.initial_delay, policy.max_delay, policy.backoff_multiplier) == (3, 1, 30, 2)

    def test_what_carries_it_is_the_components_to_say_unless_it_says_so_itself(self):
        undecided, decided = (
            TemporalAsyncTask("a", product_shot),
            TemporalAsyncTask("b", product_shot, execution="workflow"),
        )
        component = AsyncTaskComponent(AsyncTaskComponentConfig(execution="activity"))
        component.register_all([undecided, decided])
        assert (undecided.execution, decided.execution) == ("activity", "workflow")

    def test_settings_are_kept_in_seconds(self):
        task = async_task(
            retry_policy=QUICK, step_timeout=timedelta(minutes=2), timeout=timedelta(days=1), heartbeat_timeout=5
        )(product_shot)
        assert task.retry_policy is QUICK
        assert (task.step_timeout, task.timeout, task.heartbeat_timeout) == (120, 86_400, 5)

    def test_the_function_is_there_as_it_was_written(self):
        assert async_task(product_shot).task_function is product_shot

    def test_it_is_documented_as_the_function_is(self):
        task = async_task(product_shot)
        assert task.__doc__ == "Make a picture of a product."
        assert task.__name__ == "product_shot"  # type: ignore[attr-defined]
        assert task.__module__ == __name__

    def test_it_shows_its_name_and_queue(self):
        assert (
            repr(async_task(task_queue="gpu")(product_shot)) == "<TemporalAsyncTask 'product_shot' on task queue 'gpu'>"
        )

    @pytest.mark.parametrize(
        ("function", "multi_step"),
        [(product_shot, False), (plain, False), (generator, True), (async_generator, True)],
    )
    def test_generators_are_multi_step(self, function: Any, multi_step: bool):
        assert async_task(function).is_multi_step is multi_step

    @pytest.mark.parametrize("function", [product_shot, plain, generator, async_generator, Service().handle])
    def test_params_and_result_are_of_the_annotated_types(self, function: Any):
        task = async_task(function)
        assert (task.takes_params, task.params_type, task.result_type) == (True, Order, Shot)

    def test_classes_that_are_local_where_the_task_is_defined_are_found(self):
        @dataclass
        class Local:
            n: int

        @async_task
        async def task(params: Local) -> list[Local]: ...

        assert (task.params_type, task.result_type) == (Local, list[Local])

    def test_they_are_found_whichever_way_it_is_defined(self):
        @dataclass
        class Local:
            n: int

        async def function(params: Local) -> None: ...

        for task in (async_task(name="a")(function), TemporalAsyncTask("b", function)):
            assert task.params_type is Local

    def test_it_takes_the_components_queue_unless_it_names_one(self):
        task, named = async_task(product_shot), async_task(task_queue="gpu")(product_shot)
        for each in (task, named):
            each.use_default_queue("of-the-component")
        assert (task.task_queue, named.task_queue) == ("of-the-component", "gpu")


class TestRefusedDefinitions:
    @pytest.mark.parametrize("name", ["", "  ", "a\0b", "line\nbreak", "\ud800", "x" * 256, "é" * 128, 5, None, b"a"])
    def test_what_cannot_be_a_name(self, name: Any):
        with pytest.raises(InvalidKeyError):
            TemporalAsyncTask(name, product_shot)

    def test_a_name_that_leaves_no_room_for_the_prefix(self):
        assert TemporalAsyncTask("x" * 245, product_shot).workflow_type == "asyncTask_" + "x" * 245
        with pytest.raises(InvalidKeyError, match="workflow type"):
            TemporalAsyncTask("x" * 246, product_shot)

    @pytest.mark.parametrize("queue", ["", "a\0b", "x" * 256, None])
    def test_what_cannot_be_a_queue(self, queue: Any):
        with pytest.raises(InvalidKeyError, match="The task queue of task 'shot'"):
            TemporalAsyncTask("shot", product_shot, task_queue=queue)

    @pytest.mark.parametrize("setting", ["step_timeout", "timeout", "heartbeat_timeout"])
    @pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), timedelta(0), "soon", []])
    def test_a_number_that_makes_no_sense_by_the_settings_name(self, setting: str, value: Any):
        with pytest.raises(ConfigError, match=f"{setting} of task 'shot' must be"):
            TemporalAsyncTask("shot", product_shot, **{setting: value})

    @pytest.mark.parametrize("value", [3, {"max_retries": 3}, RetryPolicy])
    def test_what_is_no_retry_policy(self, value: Any):
        with pytest.raises(ConfigError, match="retry_policy"):
            TemporalAsyncTask("shot", product_shot, retry_policy=value)

    @pytest.mark.parametrize("function", [5, None, "product_shot", object()])
    def test_what_cannot_be_called(self, function: Any):
        with pytest.raises(ConfigError, match="The task 'shot' needs a function, not"):
            TemporalAsyncTask("shot", function)

    def test_a_name_in_the_place_of_the_function(self):
        with pytest.raises(ConfigError, match="needs a function, not str"):
            async_task("shot")  # type: ignore[call-overload]

    @pytest.mark.parametrize("execution", ["", "Workflow", "batch", 1])
    def test_an_execution_that_there_is_not(self, execution: Any):
        with pytest.raises(ConfigError, match="execution="):
            TemporalAsyncTask("shot", product_shot, execution=execution)

    @pytest.mark.parametrize("waits", [waits_for_an_event, waits_by_the_module, waits_in_an_inner_function])
    def test_a_wait_for_in_a_task_that_no_event_can_reach(self, waits: Callable[..., Any]):
        with pytest.raises(ConfigError, match=r"'shot' calls wait_for.*execution='workflow'"):
            TemporalAsyncTask("shot", waits, execution="activity")
        task = TemporalAsyncTask("shot", waits)
        component = AsyncTaskComponent(AsyncTaskComponentConfig(execution="activity"))
        with pytest.raises(ConfigError, match=r"'shot' calls wait_for.*execution='workflow'"):
            component.register(task)

    def test_another_wait_for_is_none_of_its_business(self):
        assert TemporalAsyncTask("shot", waits_for_something_else, execution="activity").execution == "activity"

    def test_a_function_of_two_parameters(self):
        def two(order: Order, size: int) -> Shot: ...

        with pytest.raises(ConfigError, match="takes 2 parameters"):
            async_task(two)  # type: ignore[type-var]

    def test_an_annotation_that_is_not_there_at_run_time(self):
        async def task(params: NotImported) -> None: ...  # type: ignore[name-defined]  # noqa: F821

        with pytest.raises(ConfigError, match="'NotImported'"):
            async_task(task)

    def test_a_setting_that_there_is_not(self):
        with pytest.raises(TypeError, match="retries"):
            async_task(retries=3)(product_shot)  # type: ignore[call-overload]


class Flaky:
    """Fails so many times, and then answers."""

    def __init__(self, failures: int) -> None:
        self.calls = 0
        self._failures = failures

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            raise OSError("down")
        return "up"


class TestCalledDirectly:
    @pytest.mark.parametrize("function", [product_shot, plain, Service().handle, functools.partial(plain)])
    async def test_it_runs_its_body_right_here(self, function: Any):
        assert await async_task(name="shot")(function)(Order(prompt="a cat")) == Shot(url="a cat")

    @pytest.mark.parametrize("function", [generator, async_generator])
    async def test_a_generator_runs_with_its_steps(self, function: Any):
        assert await async_task(function)(Order(prompt="a cat")) == Shot(url="A CAT")

    async def test_a_task_without_params_is_called_without(self):
        @async_task
        async def task() -> int:
            return 5

        assert await task() == 5

    async def test_a_step_that_fails_is_retried_in_place(self):
        flaky = Flaky(failures=3)

        @async_task(retry_policy=QUICK)
        async def task() -> str:
            return await step("flaky", flaky)

        assert await task() == "up"
        assert flaky.calls == 4

    async def test_a_step_out_of_retries_fails_as_it_would_on_a_worker(self):
        flaky = Flaky(failures=99)

        @async_task(retry_policy=QUICK)
        async def task() -> str:
            return await step("flaky", flaky)

        with pytest.raises(StepFailedError, match="'flaky' failed after 4 attempts: OSError: down"):
            await task()
        assert flaky.calls == 4

    async def test_a_body_that_fails_is_retried_in_place(self):
        flaky = Flaky(failures=2)

        @async_task(retry_policy=QUICK)
        async def task() -> str:
            return flaky()

        assert await task() == "up"

    async def test_a_finished_step_is_not_called_again_when_the_body_is_retried(self):
        paid, flaky = Flaky(failures=0), Flaky(failures=2)

        @async_task(retry_policy=QUICK)
        async def task() -> str:
            await step("pay", paid)
            return flaky()

        assert await task() == "up"
        assert paid.calls == 1

    async def test_its_error_is_raised_as_it_is(self):
        error = NonRetryableError("no such model")

        @async_task
        async def task() -> None:
            raise error

        with pytest.raises(NonRetryableError) as raised:
            await task()
        assert raised.value is error

    async def test_a_result_comes_back_as_a_worker_would_give_it(self):
        @async_task
        async def untyped():
            return Shot(url="u")

        @async_task
        async def typed() -> Shot:
            return Shot(url="u")

        assert await untyped() == {"url": "u"}
        assert await typed() == Shot(url="u")

    async def test_a_steps_result_does_too(self):
        @async_task
        async def task() -> str:
            return type(await step("shot", lambda: Shot(url="u"))).__name__

        assert await task() == "dict"

    async def test_a_result_that_cannot_be_serialised_is_refused(self):
        @async_task
        async def task() -> Any:
            return threading.Lock()

        with pytest.raises(ResultError, match="lock cannot be serialised"):
            await task()

    async def test_sync_calls_run_in_threads(self):
        @async_task
        async def task() -> bool:
            return await step("where", threading.get_ident) != threading.get_ident()

        assert await task()

    async def test_a_sync_body_runs_in_a_thread(self):
        here = threading.get_ident()

        @async_task
        def task() -> bool:
            return threading.get_ident() != here

        assert await task()

    async def test_steps_run_in_parallel(self):
        meet = threading.Barrier(2, timeout=5)

        @async_task
        async def task() -> int:
            return len(await asyncio.gather(step("a", meet.wait), step("b", meet.wait)))

        assert await task() == 2

    async def test_waits_are_spent_here(self):
        answers = [None, None, "ready"]

        def check() -> str | None:
            return answers.pop(0)

        @async_task
        async def task() -> list[Any]:
            return list(await asyncio.gather(sleep("nap", 0.02), poll("job", check, every=0.01)))

        assert await task() == [None, "ready"]

    async def test_a_poll_that_is_not_ready_in_time_fails(self):
        @async_task
        async def task() -> Any:
            return await poll("job", lambda: None, every=0.01, timeout=0.03)

        with pytest.raises(PollTimeoutError):
            await task()

    async def test_an_event_that_cannot_come_here_is_told(self):
        @async_task
        async def task() -> Any:
            return await wait_for("approval", timeout=0.02)

        with pytest.raises((StepUsageError, WaitTimeoutError), match="approval"):
            await task()

    async def test_the_body_sees_its_run_its_step_and_the_callers_context(self):
        tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
        tenant.set("acme")

        @async_task
        async def task(params: str) -> list[Any]:
            progress(0.5, "half")
            run = current_run()
            inner = await step("who", lambda: current_step().key)
            return [run.task_name, run.attempt, run.params, inner, tenant.get()]

        assert await task("p") == ["task", 1, "p", "who", "acme"]

    async def test_two_calls_are_two_runs(self):
        @async_task
        async def task() -> str:
            return current_run().task_id

        assert await task() != await task()

    async def test_the_same_task_may_run_many_times_at_once(self):
        @async_task
        async def task(n: int) -> int:
            await step("nap", asyncio.sleep, 0.001)
            return n

        assert await asyncio.gather(*(task(n) for n in range(20))) == list(range(20))

    async def test_one_task_may_call_another(self):
        @async_task
        async def inner(n: int) -> int:
            return await step("double", lambda: n * 2)

        @async_task
        async def outer(n: int) -> int:
            return await inner(n) + await step("double", lambda: n * 10)

        assert await outer(1) == 12

    async def test_cancelling_the_call_stops_its_body(self):
        told: list[str] = []

        @async_task
        async def task() -> None:
            try:
                await step("slow", asyncio.sleep, 5)
            except asyncio.CancelledError:
                told.append("cancelled")
                raise

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task(), 0.02)
        assert told == ["cancelled"]

    async def test_nothing_is_left_running_after_it(self):
        before = asyncio.all_tasks()

        @async_task(retry_policy=QUICK)
        async def task() -> str:
            return await step("flaky", Flaky(failures=1))

        await task()
        assert asyncio.all_tasks() == before


async def listed(task: TemporalAsyncTask[Any, Any]) -> list[Any]:
    return [run async for run in task.list()]


class TestNotConnected:
    @pytest.mark.parametrize(
        "use",
        [
            lambda task: task.submit(Order(prompt="a cat")),
            lambda task: task.run(Order(prompt="a cat")),
            lambda task: task.get_status("run-7"),
            lambda task: task.result("run-7"),
            lambda task: task.cancel("run-7"),
            lambda task: task.resume("run-7"),
            lambda task: task.send("run-7", "approval", True),
            listed,
        ],
        ids=["submit", "run", "get_status", "result", "cancel", "resume", "send", "list"],
    )
    async def test_a_task_without_a_client_says_how_to_give_it_one(self, use: Callable[[Any], Any]):
        task = async_task(name="shot")(product_shot)
        with pytest.raises(NotConnectedError) as refused:
            await use(task)
        message = str(refused.value)
        assert "'shot'" in message
        assert "AsyncTaskComponent" in message
        assert "await component.connect()" in message

    async def test_calling_it_directly_needs_none(self):
        assert await async_task(product_shot)(Order(prompt="a cat")) == Shot(url="a cat")


class TestRegistry:
    def test_a_task_is_found_by_its_name(self):
        registry = Registry()
        task = async_task(product_shot)
        registry.add(task)
        assert registry.find("product_shot") is task
        assert registry.find("another") is None

    def test_tasks_are_listed_in_the_order_in_which_they_were_added(self):
        registry = Registry()
        tasks = [async_task(name=name)(product_shot) for name in ("c", "a", "b")]
        for task in tasks:
            registry.add(task)
        assert list(registry) == tasks
        assert len(registry) == 3

    def test_the_same_task_twice_is_once(self):
        registry = Registry()
        task = async_task(product_shot)
        registry.add(task)
        registry.add(task)
        assert list(registry) == [task]

    def test_another_task_of_the_same_name_is_refused_naming_both_functions(self):
        registry = Registry()
        registry.add(async_task(name="shot")(product_shot))
        with pytest.raises(DuplicateTaskError) as refused:
            registry.add(async_task(name="shot")(Service().handle))
        message = str(refused.value)
        assert "Two tasks are named 'shot'" in message
        assert f"{__name__}.product_shot" in message
        assert f"{__name__}.Service.handle" in message
        assert "rename one" in message

    def test_the_first_stays(self):
        registry = Registry()
        first = async_task(name="shot")(product_shot)
        registry.add(first)
        with pytest.raises(DuplicateTaskError):
            registry.add(async_task(name="shot")(plain))
        assert registry.find("shot") is first

    def test_names_are_told_apart_by_their_case(self):
        registry = Registry()
        for name in ("shot", "Shot"):
            registry.add(async_task(name=name)(product_shot))
        assert len(registry) == 2


def test_a_result_can_be_made_with_its_type_named_as_a_test_double_would():
    run = TaskResult[str](task_id="a", status=TaskStatus.COMPLETED, result="done")
    assert run.result == "done"
    with pytest.raises(FrozenInstanceError):
        run.result = "changed"  # type: ignore[misc]
