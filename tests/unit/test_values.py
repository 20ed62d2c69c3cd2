"""The user's values: what they are decoded to, how they are told apart, and what is refused."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Annotated, Any, Literal
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

from temporal_async_task import DecryptionError, PayloadTooLargeError, ResultError, async_task, step
from temporal_async_task.engine.digest import digest
from temporal_async_task.engine.journal import Journal
from temporal_async_task.engine.values import PayloadValues
from temporal_async_task.testing import TaskRun


class Shot(BaseModel):
    url: str


@dataclass
class Frame:
    size: int


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
            (Frame(3), Frame),
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
            await values().from_payload(Payload(metadata={"encoding": b"json/unknown"}, data=b"?"), int)

    async def test_a_payload_of_a_codec_that_is_not_here_is_told_from_what_nobody_can_read(self):
        with pytest.raises(DecryptionError, match="binary/unknown"):
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
