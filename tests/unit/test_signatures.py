"""What a function tells by its annotations: the types of a task's params and result, and of a step's result."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Self, TypeVar

import pytest
from pydantic import BaseModel

from temporal_async_task import ConfigError, Result, Step, StepUsageError, async_task, step
from temporal_async_task.engine.signatures import return_type, signature_types
from temporal_async_task.testing import TaskRun

T = TypeVar("T")


class Shot(BaseModel):
    url: str


@dataclass
class Copied:
    size: int = 0

    def copy(self) -> Self:
        return self

    @classmethod
    def make(cls) -> Self:
        return cls()

    @staticmethod
    def count() -> int:
        return 1


class Client:
    async def shoot(self) -> Shot: ...

    def __call__(self) -> Shot: ...


class AsyncClient:
    async def __call__(self) -> Shot: ...


def plain() -> Shot: ...
async def asynchronous() -> Shot: ...
def awaitable() -> Awaitable[Shot]: ...
def coroutine() -> Coroutine[Any, Any, Shot]: ...
def nothing() -> None: ...
def unannotated(): ...
def anything() -> Any: ...
def generic(value: T) -> T: ...
def listed() -> list[Shot]: ...
def optional() -> Shot | None: ...
def awaitable_of_anything() -> Awaitable[Any]: ...
def unresolvable() -> NotImported: ...  # type: ignore[name-defined]  # noqa: F821 - that is the point


def decorated_like(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class TestReturnType:
    @pytest.mark.parametrize(
        "call",
        [
            plain,
            asynchronous,
            awaitable,
            coroutine,
            functools.partial(plain),
            functools.partial(functools.partial(asynchronous)),
            Client().shoot,
            Client().__call__,
            functools.partial(Client().shoot),
            Client(),
            AsyncClient(),
            decorated_like(plain),
            Shot,
            functools.partial(Shot, url="u"),
        ],
        ids=[
            "function",
            "async function",
            "Awaitable",
            "Coroutine",
            "partial",
            "partial of a partial",
            "bound method",
            "bound __call__",
            "partial of a bound method",
            "callable object",
            "async callable object",
            "decorated",
            "class",
            "partial of a class",
        ],
    )
    def test_it_is_what_the_call_returns_in_the_end(self, call: Any):
        assert return_type(call) is Shot

    @pytest.mark.parametrize(
        "call",
        [
            unannotated,
            lambda: 1,
            len,
            str.upper,
            "".join,
            anything,
            generic,
            awaitable_of_anything,
            functools.partial(len),
        ],
        ids=[
            "no annotation",
            "lambda",
            "builtin",
            "slot",
            "builtin method",
            "Any",
            "TypeVar",
            "Awaitable[Any]",
            "partial",
        ],
    )
    def test_without_a_telling_annotation_there_is_none(self, call: Any):
        assert return_type(call) is None

    def test_a_type_with_arguments_is_kept_whole(self):
        assert return_type(listed) == list[Shot]
        assert return_type(optional) == Shot | None

    def test_an_annotation_of_none_is_one(self):
        assert return_type(nothing) is NoneType

    def test_a_static_method_tells_its_own(self):
        assert return_type(Copied.count) is int

    def test_self_is_the_class_to_which_the_method_is_bound(self):
        assert return_type(Copied().copy) is Copied
        assert return_type(Copied.make) is Copied

    def test_a_class_that_is_local_is_found_where_the_function_uses_it(self):
        @dataclass
        class Job:
            url: str

        def start() -> Job:
            return Job("u")

        assert return_type(start) is Job

    def test_an_annotation_that_cannot_be_resolved_is_refused_with_the_ways_out(self):
        with pytest.raises(StepUsageError) as refused:
            return_type(unresolvable)
        message = str(refused.value)
        assert "unresolvable cannot be resolved" in message
        assert "'NotImported'" in message
        assert "importable at run time" in message
        assert "step.with_options(result_type=...)" in message

    def test_the_same_is_told_the_second_time(self):
        assert [return_type(plain), return_type(plain)] == [Shot, Shot]

    def test_two_functions_of_one_name_are_told_apart(self):
        def make(kind: type) -> Callable[[], Any]:
            def call() -> Any: ...

            call.__annotations__["return"] = kind
            return call

        assert [return_type(make(int)), return_type(make(str))] == [int, str]

    def test_a_method_that_returns_its_own_kind_can_be_a_step(self):
        @async_task
        async def task() -> int:
            return (await step("copy", Copied(size=5).copy)).size

        assert TaskRun(task).execute() == 5


def one_param(params: Shot) -> int: ...
def no_params() -> int: ...
def optional_params(params: Shot | None = None) -> int: ...
def more_with_defaults(params: Shot, size: int = 1, *, fast: bool = False) -> int: ...
def unannotated_param(params): ...
def any_arguments(*args: Any, **kwargs: Any) -> int: ...
def two_params(params: Shot, size: int) -> int: ...
def keyword_only(*, params: Shot) -> int: ...
def generator(params: Shot) -> Generator[Step, Any, int]: ...
def iterator(params: Shot) -> Iterator[Step]: ...
async def async_generator(params: Shot) -> AsyncGenerator[Step | Result[int], Any]: ...
async def async_generator_of_steps(params: Shot) -> AsyncGenerator[Step, Any]: ...
async def async_generator_of_a_result(params: Shot) -> AsyncGenerator[Result[int], Any]: ...
async def async_generator_of_a_list(params: Shot) -> AsyncGenerator[Result[list[int]] | Step, Any]: ...
async def async_iterator(params: Shot) -> AsyncIterator[Step | Result[int]]: ...
async def asynchronous_task(params: Shot) -> int: ...
def annotated(params: Annotated[Shot, "told"]) -> Annotated[int, ["what cannot be hashed"]]: ...


class Service:
    def handle(self, params: Shot) -> int: ...

    def __call__(self, params: Shot) -> int: ...


class TestSignatures:
    @pytest.mark.parametrize(
        "function",
        [
            one_param,
            more_with_defaults,
            asynchronous_task,
            Service().handle,
            Service(),
            functools.partial(two_params, size=1),
            generator,
            async_generator,
        ],
        ids=[
            "function",
            "more with defaults",
            "async function",
            "bound method",
            "callable object",
            "partial",
            "generator",
            "async generator",
        ],
    )
    def test_a_task_of_one_parameter_takes_params_of_its_type_and_tells_its_result(self, function: Any):
        assert signature_types(function, {}) == (True, Shot, int)

    def test_a_task_of_no_parameter_takes_none(self):
        assert signature_types(no_params, {}) == (False, None, int)

    def test_params_may_have_a_default(self):
        assert signature_types(optional_params, {}) == (True, Shot | None, int)

    def test_without_annotations_anything_goes(self):
        assert signature_types(unannotated_param, {}) == (True, None, None)
        assert signature_types(lambda _: 1, {}) == (True, None, None)

    def test_a_function_of_any_arguments_takes_no_params(self):
        assert signature_types(any_arguments, {}) == (False, None, int)

    def test_two_parameters_are_refused_with_what_to_do(self):
        with pytest.raises(ConfigError, match=r"two_params takes 2 parameters\. A task takes one .* or none"):
            signature_types(two_params, {})

    def test_a_parameter_that_must_be_named_is_refused(self):
        with pytest.raises(ConfigError, match="keyword_only"):
            signature_types(keyword_only, {})

    def test_an_annotation_that_cannot_be_resolved_is_refused(self):
        with pytest.raises(ConfigError, match="unresolvable cannot be resolved"):
            signature_types(unresolvable, {})

    def test_a_class_that_is_local_where_the_task_is_defined_is_found_there(self):
        class Order: ...

        def task(params: Order) -> list[Order]: ...

        assert signature_types(task, {"Order": Order}) == (True, Order, list[Order])

    @pytest.mark.parametrize(
        ("function", "result"),
        [
            (generator, int),
            (async_generator, int),
            (async_generator_of_a_list, list[int]),
            (async_generator_of_a_result, int),
            (async_generator_of_steps, None),
            # Python's documentation lets a generator be annotated as what it is at least.
            (iterator, None),
            (async_iterator, int),
        ],
    )
    def test_a_generators_result_is_what_it_returns_or_yields_in_the_end(self, function: Any, result: Any):
        assert signature_types(function, {}) == (True, Shot, result)

    def test_what_is_annotated_may_be_annotated_with_anything(self):
        takes_params, params_type, result_type = signature_types(annotated, {})
        assert (takes_params, params_type) == (True, Annotated[Shot, "told"])
        assert result_type.__metadata__ == (["what cannot be hashed"],)

    async def test_a_generator_that_is_annotated_as_an_iterator_returns_its_result(self):
        @async_task
        async def task() -> AsyncIterator[Step | Result[int]]:
            yield Result(5)

        assert TaskRun(task).execute() == 5
