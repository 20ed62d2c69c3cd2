"""The user's values: what they are decoded to, how they are told apart, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypeVar
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from pydantic_core import to_jsonable_python
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.contrib.pydantic import PydanticPayloadConverter, ToJsonOptions, pydantic_data_converter
from temporalio.converter import DataConverter, PayloadCodec
from typing_extensions import TypedDict

from temporal_async_task import (
    ConfigError,
    PayloadTooLargeError,
    Result,
    ResultError,
    Step,
    StepUsageError,
    async_task,
    step,
)
from temporal_async_task.engine.digest import digest
from temporal_async_task.engine.journal import Journal
from temporal_async_task.engine.values import PayloadValues, return_type, signature_types
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


def payload_of(value: Any) -> Payload:
    [payload] = pydantic_data_converter.payload_converter.to_payloads([value])
    return payload


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda values: st.lists(values) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values),
    max_leaves=10,
)


def reordered(value: Any) -> Any:
    """The same document, each object's keys the other way round."""
    if isinstance(value, dict):
        return {key: reordered(inner) for key, inner in reversed(value.items())}
    return [reordered(inner) for inner in value] if isinstance(value, list) else value


class TestDigest:
    @settings(deadline=None)
    @given(plain_values)
    def test_the_order_of_keys_does_not_matter(self, value: Any):
        assert digest(payload_of(value)) == digest(payload_of(reordered(value)))

    @settings(deadline=None)
    @given(plain_values, plain_values)
    def test_values_that_differ_have_digests_that_differ(self, value: Any, other: Any):
        same = repr(reordered(value)) == repr(reordered(other)) or value == other
        assert same or digest(payload_of(value)) != digest(payload_of(other))

    @pytest.mark.parametrize(
        ("value", "other"),
        [
            ([1, 2], [2, 1]),
            (1, True),
            (1, "1"),
            (None, ""),
            ({}, []),
            ({"a": None}, {}),
            (b"1", "1"),
            (b"1", 1),
            (b"a", b"b"),
            (b"", None),
            (b'{"a":1}', {"a": 1}),
        ],
    )
    def test_values_that_are_alike_and_not_the_same_are_told_apart(self, value: Any, other: Any):
        assert digest(payload_of(value)) != digest(payload_of(other))

    def test_the_order_of_keys_in_bytes_matters(self):
        assert digest(payload_of(b'{"a":1,"b":2}')) != digest(payload_of(b'{"b":2,"a":1}'))

    def test_a_model_and_what_it_is_in_json_are_the_same(self):
        assert digest(payload_of(Shot(url="u"))) == digest(payload_of({"url": "u"}))

    def test_it_is_the_same_in_every_process(self):
        # A digest is kept by the server for as long as the run is; it must not change with a release.
        assert digest(payload_of({"b": [1, None], "a": "ä"})) == (
            "1142d15bc2648f0a8e99d886cc3b0fbb756996384af67bef463c0eeb1b25639a"
        )


class Size(TypedDict):
    width: int


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


def values(converter: DataConverter = pydantic_data_converter) -> PayloadValues:
    return PayloadValues(converter, task_id="run-7")


class TestPayloads:
    @pytest.mark.parametrize(
        ("value", "hint"),
        [
            (None, None),
            (None, NoneType),
            (None, Shot | None),
            (b"u", bytes | None),
            (5, int),
            (1.5, float),
            ("Größe 🖼", str),
            (b"\x00\xff", bytes),
            ([1, 2], list[int]),
            ((1, "a"), tuple[int, str]),
            ({1, 2}, set[int]),
            ({1: "a"}, dict[int, str]),
            ({"width": 3}, Size),
            (Shot(url="u"), Shot),
            ([Shot(url="u")], list[Shot]),
            (Copied(3), Copied),
            (Dog(), Pet),
            (datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), datetime),
            (timedelta(seconds=90), timedelta),
            (UUID(int=7), UUID),
            ({"any": ["json", 1, None]}, None),
            ({"any": ["json", 1, None]}, Any),
        ],
    )
    async def test_a_value_comes_back_as_its_type_says(self, value: Any, hint: Any):
        payload = await values().to_payload(value)
        back = await values().from_payload(payload, hint)
        assert back == value
        assert type(back) is type(value)

    async def test_without_a_type_a_model_comes_back_as_json(self):
        assert await values().from_payload(await values().to_payload(Shot(url="u"))) == {"url": "u"}

    async def test_bytes_are_the_same_payload(self):
        data = await values().seal(values().serialise(Shot(url="u")))
        assert values().convert(await values().unseal(data), Shot) == Shot(url="u")

    async def test_what_cannot_be_serialised_is_told_by_its_type(self):
        with pytest.raises(ResultError, match=r"a value of type lock cannot be serialised: PydanticSerializationError"):
            await values().to_payload(threading.Lock())

    async def test_what_does_not_fit_is_told_by_the_type_that_was_wanted(self):
        payload = await values().to_payload({"address": "u"})
        with pytest.raises(ResultError, match="the stored value does not fit Shot") as refused:
            await values().from_payload(payload, Shot)
        assert refused.value.__cause__ is not None

    @pytest.mark.parametrize("value", [None, b"5"])
    async def test_what_is_no_json_must_fit_too(self, value: Any):
        payload = await values().to_payload(value)
        with pytest.raises(ResultError, match="does not fit int"):
            await values().from_payload(payload, int)

    async def test_a_payload_that_nobody_can_read_is_told(self):
        with pytest.raises(ResultError, match="does not fit"):
            await values().from_payload(Payload(metadata={"encoding": b"binary/unknown"}, data=b"?"), int)

    async def test_a_value_over_the_servers_limit_is_refused_with_its_size(self):
        with pytest.raises(PayloadTooLargeError, match=r"A value of 2,1\d\d,\d\d\d bytes is over the limit"):
            await values().to_payload("x" * 2_100_000)

    async def test_a_value_under_the_limit_is_taken(self):
        payload = await values().to_payload("x" * 2_000_000)
        assert payload.ByteSize() > 2_000_000


class Measured(BaseModel):
    value: float
    error: float | None = None


@dataclass
class Reading:
    of: Measured
    raw: list[float]


class Terse(PydanticPayloadConverter):
    """What an application may make of pydantic's converter."""

    def __init__(self) -> None:
        super().__init__(ToJsonOptions(exclude_unset=True))


def nested(depth: int, kind: Callable[[Any], Any]) -> Any:
    value = kind(1)
    for _ in range(depth - 1):
        value = kind(value)
    return value


NAN, INFINITY = float("nan"), float("inf")


class TestExactness:
    """What is taken comes back as it was; what could not be read again is refused before it is stored."""

    @pytest.mark.parametrize(
        ("value", "hint"),
        [
            (Measured(value=NAN), Measured),
            (Measured(value=1.5, error=-INFINITY), Measured),
            ([Measured(value=INFINITY), Measured(value=-0.0)], list[Measured]),
            ({"a": Measured(value=NAN), "b": None}, dict[str, Measured | None]),
            (Reading(Measured(value=NAN), [NAN, 1.0]), Reading),
            ({"raw": [NAN, None, INFINITY]}, None),
        ],
        ids=repr,
    )
    async def test_numbers_that_json_does_not_have_come_back_wherever_they_are(self, value: Any, hint: Any):
        payload = await values().to_payload(value)
        assert repr(await values().from_payload(payload, hint)) == repr(value)
        assert values().check(value, hint) == payload

    async def test_a_models_nan_without_a_type_is_a_nan(self):
        payload = await values().to_payload(Measured(value=NAN))
        assert repr(await values().from_payload(payload)) == "{'value': nan, 'error': None}"

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "null",
            {"null": None},
            Measured(value=1.5),
            [Shot(url="null"), None, datetime(2026, 1, 2, tzinfo=UTC), UUID(int=7), timedelta(1), 2**70, 1e300],
            {1: None, None: {"a"}, 1.5: (1, None)},
        ],
        ids=repr,
    )
    def test_what_pydantic_writes_exactly_stays_as_it_writes_it(self, value: Any):
        assert values().serialise(value) == payload_of(value)

    def test_what_can_be_gone_through_only_once_is_written_whole(self):
        assert values().serialise(iter(["a", None])).data == b'["a",null]'

    def test_the_options_of_the_applications_converter_are_kept(self):
        converter = dataclasses.replace(pydantic_data_converter, payload_converter_class=Terse)
        assert values(converter).serialise([Measured(value=1.5), None]).data == b'[{"value":1.5},null]'

    def test_a_payload_that_is_made_already_is_passed_on(self):
        raw = Payload(metadata={"encoding": b"json/plain"}, data=b"null, or not")
        assert values().serialise(RawValue(raw)) == raw

    @pytest.mark.parametrize("kind", [lambda value: [value], lambda value: {"a": value}, lambda value: (value,)])
    @pytest.mark.parametrize("hint", [None, list[Any], Shot])
    def test_what_is_nested_too_deep_to_be_read_is_refused(self, kind: Callable[[Any], Any], hint: Any):
        for depth in (201, 250, 254, 255, 300):
            with pytest.raises(ResultError, match=r"cannot be serialised: .*(nested 200 deep|depth exceeded)"):
                values().serialise(nested(depth, kind))
            with pytest.raises(ResultError, match="cannot be serialised"):
                values().check(nested(depth, kind), hint)
        assert values().convert(values().serialise(nested(200, kind))) is not None

    def test_a_number_too_long_to_be_read_is_refused(self):
        with pytest.raises(ResultError, match="whole numbers may have 4,300 digits"):
            values().serialise({"count": 10**4300})
        assert values().convert(values().serialise(10**4300 - 1)) == 10**4300 - 1

    @settings(deadline=None)
    @given(
        st.recursive(
            st.none() | st.floats() | st.builds(Measured, value=st.floats(), error=st.none() | st.floats()),
            lambda inner: st.lists(inner) | st.dictionaries(st.text("nul", max_size=4), inner),
            max_leaves=10,
        )
    )
    def test_no_number_is_lost(self, value: Any):
        back = values().convert(values().serialise(value))
        assert repr(back) == repr(to_jsonable_python(value))

    def test_a_converter_of_the_applications_own_decides_by_itself(self):
        data = values(DataConverter.default).serialise(nested(300, lambda value: [value])).data
        assert data == b"[" * 300 + b"1" + b"]" * 300


class TestCheck:
    def test_params_that_fit_give_their_payload(self):
        payload = values().check(Shot(url="u"), Shot)
        assert (payload.metadata["encoding"], payload.data) == (b"json/plain", b'{"url":"u"}')

    def test_what_a_worker_would_decode_decides(self):
        assert values().check({"url": "u"}, Shot).data == b'{"url":"u"}'

    def test_without_a_type_anything_fits_that_can_be_serialised(self):
        assert values().check([1, "a"], None).data == b'[1,"a"]'

    @pytest.mark.parametrize(
        ("value", "hint"),
        [
            ({"address": "u"}, Shot),
            ("many", int),
            ([1, "a"], list[int]),
            (None, Shot),
            (None, int),
            (b"u", Shot),
            (b"5", int),
        ],
    )
    def test_params_that_do_not_fit_are_refused(self, value: Any, hint: Any):
        with pytest.raises(ResultError):
            values().check(value, hint)

    def test_params_that_cannot_be_serialised_are_refused(self):
        with pytest.raises(ResultError, match="serialize"):
            values().check(threading.Lock(), None)

    def test_a_codec_is_not_asked(self):
        codec = Sealing()
        assert values(with_codec(codec)).check(5, int).data == b"5"
        assert codec.sealed == 0


class Sealing(PayloadCodec):
    """Puts payloads into sealed ones, and counts them."""

    def __init__(self) -> None:
        self.sealed = 0
        self.opened = 0

    async def encode(self, payloads: Any) -> list[Payload]:
        self.sealed += len(payloads)
        return [Payload(metadata={"encoding": b"binary/sealed"}, data=one.SerializeToString()) for one in payloads]

    async def decode(self, payloads: Any) -> list[Payload]:
        self.opened += len(payloads)
        assert all(one.metadata["encoding"] == b"binary/sealed" for one in payloads)
        return [Payload.FromString(one.data) for one in payloads]


class Lost(Sealing):
    """Has lost its key."""

    async def decode(self, _: Any) -> list[Payload]:
        raise LookupError("no such key")


def with_codec(codec: PayloadCodec) -> DataConverter:
    return dataclasses.replace(pydantic_data_converter, payload_codec=codec)


class TestCodec:
    async def test_it_is_applied_once_to_each_value(self):
        codec = Sealing()
        payload = await values(with_codec(codec)).to_payload(Shot(url="u"))
        assert codec.sealed == 1
        inner = Payload.FromString(payload.data)
        assert (inner.metadata["encoding"], inner.data) == (b"json/plain", b'{"url":"u"}')

    async def test_it_is_undone_once(self):
        codec = Sealing()
        sealing = values(with_codec(codec))
        assert await sealing.from_payload(await sealing.to_payload(Shot(url="u")), Shot) == Shot(url="u")
        assert (codec.sealed, codec.opened) == (1, 1)

    async def test_what_it_raises_says_nothing_of_the_value(self):
        payload = await values(with_codec(Sealing())).to_payload(5)
        with pytest.raises(LookupError, match="no such key"):
            await values(with_codec(Lost())).from_payload(payload, int)

    async def test_of_a_journal_only_the_header_is_sealed_as_the_results_were_before(self):
        codec = Sealing()
        sealing = values(with_codec(codec))
        journal = Journal()
        journal.complete(journal.open("a"), await sealing.seal(sealing.serialise("secret")), now=1.0)
        header, results = await sealing.encode_journal(journal.snapshot())
        assert codec.sealed == 2
        assert header.metadata["encoding"] == b"binary/sealed"
        assert results.metadata["encoding"] == b"binary/plain"

    async def test_a_journal_comes_back_with_its_results(self):
        sealing = values(with_codec(Sealing()))
        journal = Journal()
        journal.complete(journal.open("a"), await sealing.seal(sealing.serialise(Shot(url="u"))), now=1.0)
        [record] = (await sealing.decode_journal(await sealing.encode_journal(journal.snapshot()))).done()
        assert sealing.convert(await sealing.unseal(record.result or b""), Shot) == Shot(url="u")

    async def test_no_journal_is_an_empty_one(self):
        assert len(await values().decode_journal([])) == 0

    def test_a_run_seals_each_result_once(self):
        codec = Sealing()

        def one() -> int:
            return 1

        @async_task
        async def task() -> int:
            return await step("a", one) + await step("b", one)

        run = TaskRun(task, data_converter=with_codec(codec))
        run.on("b").loses_worker(3)
        assert run.execute() == 2
        assert codec.sealed == 3  # two steps and the task itself, however many attempts it took
