"""The digest of params: the same in every process for the same params, another one for others."""

import os
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, Field
from temporalio.contrib.pydantic import pydantic_data_converter

from temporal_async_task.engine.digest import digest


class Inner(BaseModel):
    tags: set[str]
    order: list[str] = Field(alias="inOrder")


def digest_of(value: Any) -> str:
    [payload] = pydantic_data_converter.payload_converter.to_payloads([value])
    return digest(payload, value)


PROGRAM = """
import dataclasses
from pydantic import BaseModel, Field
from temporalio.contrib.pydantic import pydantic_data_converter
from temporal_async_task.engine.digest import digest

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]

class Inner(BaseModel):
    tags: set[str]
    order: list[str] = Field(alias="inOrder")

@dataclasses.dataclass
class Outer:
    inner: Inner
    ids: frozenset[str]
    groups: set[frozenset[str]]
    by_name: dict[int, set[str]]
    pairs: list[tuple[str, set[str]]]

value = Outer(
    Inner(tags=set(WORDS), inOrder=WORDS),
    frozenset(WORDS),
    {frozenset(WORDS[:4]), frozenset(WORDS[4:]), frozenset(WORDS)},
    {1: set(WORDS)},
    [("a", set(WORDS)), ("b", set())],
)
for params in (value, set(WORDS), {"tags": set(WORDS)}, [set(WORDS)], {w: {w: set(WORDS)} for w in set(WORDS)}):
    [payload] = pydantic_data_converter.payload_converter.to_payloads([params])
    print(digest(payload, params), payload.data)
"""


def test_a_set_has_the_same_digest_in_processes_that_iterate_over_it_differently():
    digests, documents = set(), set()
    for seed in ("0", "1", "2", "3"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        lines = subprocess.check_output([sys.executable, "-c", PROGRAM], env=env, text=True).splitlines()
        digests.add(tuple(line.split()[0] for line in lines))
        documents.add(tuple(lines))
    assert len(documents) == 4  # what is sent does differ
    assert len(digests) == 1
    assert len(set(next(iter(digests)))) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a", "b"}, {"a", "c"}),
        (["a", "b"], ["b", "a"]),
        ({"x": ["a", "b"]}, {"x": ["b", "a"]}),
        ([{"a"}, {"b"}], [{"b"}, {"a"}]),
        (Inner(tags={"a"}, inOrder=["a", "b"]), Inner(tags={"a"}, inOrder=["b", "a"])),
        (Inner(tags={"a"}, inOrder=[]), Inner(tags={"b"}, inOrder=[])),
    ],
    ids=["sets", "lists", "lists in objects", "sets in lists", "lists in models", "sets in models"],
)
def test_other_params_have_another_digest(one, other):
    assert digest_of(one) != digest_of(other)


def test_params_without_sets_have_the_digest_that_runs_in_flight_were_begun_with():
    [payload] = pydantic_data_converter.payload_converter.to_payloads([{"b": [2, 1], "a": {"d": None, "c": 1.5}}])
    known = "dab7dcfc12a9dd4854643745af81cdfc40cc5cdb7e3f6376d430c113beb69a7c"
    assert digest(payload, {"b": [2, 1], "a": {"d": None, "c": 1.5}}) == known
