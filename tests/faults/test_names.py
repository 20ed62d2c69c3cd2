"""Case 10, keys, names and ids: taken exactly as they are, or refused at the call."""

import asyncio
import uuid
from typing import Any

import pytest

from support import AT_ONCE, App, ended, status_when, wait_until
from temporal_async_task import (
    InvalidKeyError,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    poll,
    sleep,
    step,
    wait_for,
)

pytestmark = pytest.mark.case(10, "names")

LONGEST = 255
"""Bytes of UTF-8."""
_PREFIX = len("asyncTask_")

TAKEN = {
    "one letter": "x",
    "emoji": "\N{FIRE}\N{WOMAN}\u200d\N{PERSONAL COMPUTER}",
    "one flag, two code points": "\N{REGIONAL INDICATOR SYMBOL LETTER D}\N{REGIONAL INDICATOR SYMBOL LETTER E}",
    "other scripts": "план-計画-خطة-תכנית",
    "not normalised": "e\u0301",
    "normalised": "\xe9",
    "spaces within and around": " a  b ",
    "quotes and slashes": "'\"\\/../`$()",
    "a query": "x' OR 'a' = 'a",
    "a format": "{0} %s %(x)s ${y}",
    "JSON": '{"a": [1]}',
    "a path": "../../etc/passwd",
    "a URL": "https://example.com/?a=b&c=%00#d",
    "the engine's own": "asyncTaskJournal",
    "255 letters": "x" * LONGEST,
    "255 bytes of emoji": "\N{FIRE}" * 63 + "xyz",
}
REFUSED = {
    "empty": ("", "is empty"),
    "blank": (" \t ", "is empty"),
    "NUL": ("a\0b", "has the control character"),
    "NUL alone": ("\0", "has the control character"),
    "a newline": ("a\n", "has the control character"),
    "an escape": ("\x1b[31mred", "has the control character"),
    "a C1 control": ("a\x85", "has the control character"),
    "a surrogate": ("a\ud800", "lone surrogates"),
    "the other half": ("\udfff", "lone surrogates"),
    "half of a pair": ("\N{FIRE}\ud83d", "lone surrogates"),
    "256 letters": ("x" * 256, "is 256 bytes long; the limit is 255"),
    "256 bytes of emoji": ("\N{FIRE}" * 64, "is 256 bytes long; the limit is 255"),
    "255 letters, 257 bytes": ("é\xe9" + "x" * 253, "is 257 bytes long; the limit is 255"),
    "1,001 bytes": ("x" * 1001, "is 1001 bytes long; the limit is 255"),
    "bytes": (b"key", "must be text"),
    "a number": (7, "must be text"),
    "None": (None, "must be text"),
}


async def one(value: str = "") -> str:
    return value + "1"


async def test_a_text_is_taken_exactly_as_key_of_steps_waits_and_events(app: App, report: Any):
    @async_task(retry_policy=AT_ONCE)
    async def steps(params: tuple[str, str]) -> str:
        kind, text = params
        match kind:
            case "step":
                return await step(text, one, "a")
            case "poll":
                return await poll(text, one, every=1)
            case "sleep":
                await sleep(text, 0.01)
                return "slept"
            case _:
                return await wait_for(text, timeout=20, result_type=str)

    async def check(kind: str, text: str, result: str) -> None:
        task_id = await steps.submit((kind, text))
        if kind == "wait_for":
            await steps.send(task_id, text + "x" if len(text.encode()) < LONGEST else "y", "wrong")
            await steps.send(task_id, text, "came")
        assert await steps.result(task_id, timeout=60) == result, text
        assert (await steps.get_status(task_id)).completed_steps == (text,)

    await app.start(steps)
    kinds = (("step", "a1"), ("poll", "1"), ("sleep", "slept"), ("wait_for", "came"))
    await asyncio.gather(*(check(kind, text, result) for text in TAKEN.values() for kind, result in kinds))
    report(keys_taken=len(TAKEN) * len(kinds))


async def test_a_text_is_taken_exactly_as_name_and_id_and_by_every_call(app: App, report: Any):
    async def fails(again: str) -> str:
        await step("one", one)
        await wait_for("go on")
        raise TypeError("on purpose")

    async def other() -> None: ...

    pairs: list[tuple[str, TemporalAsyncTask[str, str], TemporalAsyncTask[None, None]]] = []
    for text in TAKEN.values():
        name = text.encode()[: LONGEST - _PREFIX].decode(errors="ignore")
        near = name[:-1] + chr(ord("A") + len(pairs))  # one letter off
        task = TemporalAsyncTask[str, str](name, fails, retry_policy=AT_ONCE)
        pairs.append((text, task, TemporalAsyncTask[None, None](near, other)))
    await app.start(*(task for _, *both in pairs for task in both))

    async def check(text: str, task: TemporalAsyncTask[str, str], near: TemporalAsyncTask[None, None]) -> None:
        unique = uuid.uuid4().hex[:12]  # on a server that other tests use, too
        task_id = text + unique if len(text.encode()) <= LONGEST - len(unique) else unique + text[len(unique) :]
        assert await task.submit("x", task_id=task_id) == task_id
        assert await task.submit("x", task_id=task_id) == task_id  # once
        await status_when(task, task_id, lambda run: run.current_step == "go on", timeout=60)
        await task.send(task_id, "go on")
        run = await status_when(task, task_id, ended, timeout=60)
        assert (run.task_id, run.error) == (task_id, "on purpose")
        await task.resume(task_id, redo=["one"])
        await status_when(task, task_id, ended, timeout=60)
        await task.cancel(task_id)
        assert task_id in await _when(lambda: _failed(task))
        assert await _failed(near) == []

    await asyncio.gather(*(check(*pair) for pair in pairs))
    report(names_and_ids_taken=len(pairs))


async def _failed(task: TemporalAsyncTask[Any, Any]) -> list[str]:
    return [run.task_id async for run in task.list(status=TaskStatus.FAILED)]


async def _when(ask: Any) -> list[str]:
    """What visibility says, once it says anything."""
    return await wait_until(ask, timeout=60)  # type: ignore[no-any-return]


async def test_texts_that_look_the_same_are_not_the_same(app: App):
    @async_task(retry_policy=AT_ONCE)
    async def twins() -> list[str]:
        return [await step("e\u0301", one, "two code points"), await step("\xe9", one, "one code point")]

    await app.start(twins)
    assert await twins.run(timeout=20) == ["two code points1", "one code point1"]


async def test_a_text_that_cannot_be_a_key_fails_the_run_with_the_reason_and_makes_no_call(app: App, report: Any):
    calls: list[str] = []

    async def call() -> None:
        calls.append("called")

    @async_task(retry_policy=AT_ONCE)
    async def steps(params: tuple[str, str]) -> None:
        kind, text = params[0], REFUSED[params[1]][0]
        match kind:
            case "step":
                await step(text, call)
            case "poll":
                await poll(text, call, every=1)
            case "sleep":
                await sleep(text, 0.01)
            case _:
                await wait_for(text, timeout=20)

    async def check(kind: str, name: str) -> None:
        run = await status_when(steps, await steps.submit((kind, name)), ended, timeout=60)
        assert (run.status, run.error_type) == (TaskStatus.FAILED, "InvalidKeyError"), name
        assert REFUSED[name][1] in str(run.error)

    await app.start(steps)
    kinds = ("step", "poll", "sleep", "wait_for")
    await asyncio.gather(*(check(kind, name) for name in REFUSED for kind in kinds))
    assert calls == []
    report(keys_refused=len(REFUSED) * len(kinds))


async def test_a_text_that_cannot_be_a_name_or_an_id_is_refused_by_every_call(app: App, report: Any):
    @async_task
    async def shoot() -> None: ...

    await app.connect(shoot)
    refused = 0
    for text, says in REFUSED.values():
        calls: list[Any] = [
            shoot.get_status,
            shoot.result,
            shoot.cancel,
            shoot.resume,
            lambda text: shoot.send(text, "key"),
            lambda text: shoot.send("id", text),
            lambda text: shoot.schedule(text, every=3600),
            shoot.get_schedule,
        ]
        if text is not None:  # which asks for a random one
            calls.append(lambda text: shoot.submit(task_id=text))
        for call in calls:
            with pytest.raises(InvalidKeyError, match=says):
                await call(text)
        with pytest.raises(InvalidKeyError, match=says):
            TemporalAsyncTask[None, str](text, one)
        with pytest.raises(InvalidKeyError, match=says):
            TemporalAsyncTask[None, str]("shoot", one, task_queue=text)
        refused += len(calls) + 2
    report(names_and_ids_refused=refused)


async def test_the_longest_name_leaves_room_for_what_the_engine_puts_before_it():
    TemporalAsyncTask[None, str]("x" * (LONGEST - _PREFIX), one)
    with pytest.raises(InvalidKeyError, match="is 256 bytes long"):
        TemporalAsyncTask[None, str]("x" * (LONGEST - _PREFIX + 1), one)
