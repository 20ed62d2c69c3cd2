"""Case 9, values that cannot be stored: a typed error that names the step, and what was finished stays."""

import asyncio
import re
from typing import Any

import pytest
from pydantic import BaseModel

from support import AT_ONCE, App, ended, on_both, status_when
from temporal_async_task import (
    ParamsError,
    PayloadTooLargeError,
    TaskResult,
    TaskStatus,
    async_task,
    step,
)

pytestmark = pytest.mark.case(9, "sizes")

MB = 1024 * 1024


class Opaque:
    """A value that no converter knows."""


class Measured(BaseModel):
    value: float


class Maybe(BaseModel):
    found: float | None


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


UNFIT = {
    "an object": (Opaque, "ResultError", "cannot be serialised"),
    "an object deep inside": (lambda: {"a": [{"b": Opaque()}]}, "ResultError", "cannot be serialised"),
    "a function": (lambda: print, "ResultError", "cannot be serialised"),
    "a generator": (lambda: (opaque for opaque in [Opaque()]), "ResultError", "cannot be serialised"),
    "a surrogate": (lambda: "\ud800", "ResultError", "cannot be serialised"),
    "a surrogate in a key": (lambda: {"\udfff": 1}, "ResultError", "cannot be serialised"),
    "bytes in JSON that are no text": (lambda: {"image": b"\xff\xfe"}, "ResultError", "cannot be serialised"),
    "a list in itself": (circular, "ResultError", "cannot be serialised"),
    "lists in lists, 100,000 deep": (lambda: nested(100_000), "ResultError", "cannot be serialised"),
    "lists in lists, 250 deep": (lambda: nested(250), "ResultError", "could not be read again: recursion limit"),
    "a number of 4,301 digits": (lambda: {"n": 10**4300}, "ResultError", "could not be read again: number out of"),
    "2.1 MB": (lambda: "x" * int(2.1 * MB), "PayloadTooLargeError", r"2,20\d,\d{3} bytes"),
    "5 MB": (lambda: "x" * 5 * MB, "PayloadTooLargeError", r"5,24\d,\d{3} bytes"),
    "5 MB of bytes": (lambda: bytes(5 * MB), "PayloadTooLargeError", r"5,24\d,\d{3} bytes"),
    "1.9 MB beside another of 0.5": (lambda: "x" * int(1.9 * MB), "PayloadTooLargeError", "the run's journal"),
}
BESIDE = "1.9 MB beside another of 0.5"
each_unfit = pytest.mark.parametrize("unfit", UNFIT)
each_unfit_alone = pytest.mark.parametrize("unfit", [name for name in UNFIT if name != BESIDE])


@on_both
async def test_a_step_result_that_cannot_be_stored_fails_the_run_naming_the_step_and_resume_goes_on_after_the_mend(
    app: App, report: Any
):
    calls: list[tuple[str, str]] = []

    async def first(unfit: str) -> str:
        calls.append((unfit, "first"))
        return "x" * (MB // 2)

    async def second(unfit: str) -> Any:
        calls.append((unfit, "second"))
        return UNFIT[unfit][0]() if calls.count((unfit, "second")) == 1 else "mended"

    @async_task(retry_policy=AT_ONCE)
    async def shoot(unfit: str) -> str:
        length = len(await step("first", first, unfit))
        return f"{length} {await step('the second step', second, unfit)}"

    async def check(unfit: str) -> None:
        _, error_type, says = UNFIT[unfit]
        task_id = await shoot.submit(unfit)
        run = await status_when(shoot, task_id, ended, timeout=60)
        assert (run.status, run.error_type) == (TaskStatus.FAILED, error_type), unfit
        assert re.search(rf"'the second step'.*{says}", str(run.error), re.DOTALL), unfit
        assert run.completed_steps == ("first",)
        await shoot.resume(task_id)
        assert await shoot.result(task_id, timeout=60) == f"{MB // 2} mended"
        assert [key for name, key in calls if name == unfit] == ["first", "second", "second"]

    await app.start(shoot)
    await asyncio.gather(*map(check, UNFIT))
    report(step_results_refused=len(UNFIT), resumed=len(UNFIT))


@on_both
async def test_a_task_result_that_cannot_be_stored_fails_the_run_and_says_that_it_is_the_tasks(app: App, report: Any):
    calls: list[tuple[str, str]] = []

    async def first(unfit: str) -> None:
        calls.append((unfit, "first"))

    @async_task(retry_policy=AT_ONCE)
    async def shoot(unfit: str) -> Any:
        calls.append((unfit, "body"))
        await step("first", first, unfit)
        return UNFIT[unfit][0]() if calls.count((unfit, "body")) == 1 else "mended"

    async def check(unfit: str) -> None:
        _, error_type, says = UNFIT[unfit]
        task_id = await shoot.submit(unfit)
        run = await status_when(shoot, task_id, ended, timeout=60)
        assert (run.status, run.error_type) == (TaskStatus.FAILED, error_type), unfit
        assert re.search(rf"The result of task 'shoot'.*{says}", str(run.error), re.DOTALL), unfit
        await shoot.resume(task_id)
        assert await shoot.result(task_id, timeout=60) == "mended"
        assert [key for name, key in calls if name == unfit] == ["body", "first", "body"]

    await app.start(shoot)
    alone = [name for name in UNFIT if name != BESIDE]
    await asyncio.gather(*map(check, alone))
    report(task_results_refused=len(alone), resumed=len(alone))


@each_unfit_alone
async def test_params_that_cannot_be_stored_are_refused_before_anything_is_sent(app: App, unfit: str):
    make, error_type, _ = UNFIT[unfit]

    @async_task
    async def shoot(params: Any) -> None: ...

    await app.connect(shoot)
    refused = PayloadTooLargeError if error_type == "PayloadTooLargeError" else ParamsError
    with pytest.raises(refused, match="params of task 'shoot'"):
        await shoot.submit(make())
    with pytest.raises(refused, match="params of task 'shoot'"):
        await shoot.schedule("never", make(), every=3600)


@each_unfit
async def test_an_event_that_cannot_be_stored_is_refused_before_anything_is_sent(app: App, unfit: str):
    make, error_type, _ = UNFIT[unfit]

    @async_task
    async def shoot() -> None: ...

    await app.connect(shoot)
    task_id = await shoot.submit()
    refused = PayloadTooLargeError if error_type == "PayloadTooLargeError" else ParamsError
    with pytest.raises(refused, match="event 'approval'"):
        await shoot.send(task_id, "approval", make())


@on_both
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=repr)
async def test_numbers_that_json_does_not_have_come_back_in_the_fields_of_models_too(app: App, value: float):
    seen: list[Any] = []

    def measure(params: Measured) -> Measured:
        return params

    def find(params: Measured) -> Maybe:
        return Maybe(found=params.value)

    @async_task(retry_policy=AT_ONCE)
    async def shoot(params: Measured) -> dict[str, Measured]:
        seen.extend([params, await step("measure", measure, params), await step("find", find, params)])
        return {"result": Measured(value=value)}

    await app.start(shoot)
    result = await shoot.run(Measured(value=value), timeout=30)
    assert repr([*seen, result]) == repr(
        [Measured(value=value), Measured(value=value), Maybe(found=value), {"result": Measured(value=value)}]
    )


@on_both
@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        -0.0,
        2**70,
        "\0 \N{FIRE} \u2028 \x7f",
        b"\xff\xfe\x00",
        b"",
        "",
        None,
        {"": None},
        [],
        nested(100),
        "x" * 1_900_000,
        bytes(1_900_000),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_what_is_unusual_but_fits_comes_back_as_it_was_through_params_steps_and_results(app: App, value: Any):
    seen: list[Any] = []

    @async_task(retry_policy=AT_ONCE)
    async def shoot(params: Any) -> Any:
        seen.append(params)
        if len(repr(params)) < MB:  # else params and journal would not fit together
            seen.append(await step("echo", lambda: params))
        return params

    await app.start(shoot)
    seen.append(await shoot.run(value, timeout=30))
    for came in seen:
        assert type(came) is type(value)
        assert repr(came) == repr(value)


async def fail_at_the_limit(app: App, size: int, count: int) -> tuple[TaskResult[Any], list[int], Any]:
    calls: list[int] = []
    large = [True]

    def page(number: int) -> str:
        calls.append(number)
        return "x" * (size if large[0] else 1)

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> int:
        return sum([len(await step(f"page-{number}", page, number)) for number in range(count)])

    await app.start(shoot)
    task_id = await shoot.submit()
    run = await status_when(shoot, task_id, ended, timeout=60)
    large[0] = False
    return run, calls, shoot


@on_both
@pytest.mark.parametrize("size", [100_000, 1_000_000])
async def test_a_journal_that_grows_past_the_limit_keeps_all_that_was_finished_and_resume_goes_on(app: App, size: int):
    count = 25
    run, calls, shoot = await fail_at_the_limit(app, size, count)
    fit = (2 * MB - 64 * 1024) // (size + 200)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "PayloadTooLargeError")
    assert run.completed_steps == tuple(f"page-{number}" for number in range(fit))
    assert re.search(rf"'page-{fit}'.*over the limit of .*Store large results elsewhere", str(run.error))
    assert calls == list(range(fit + 1))
    await shoot.resume(run.task_id)
    assert await shoot.result(run.task_id, timeout=60) == fit * size + (count - fit)
    assert calls == [*range(fit + 1), *range(fit, count)]


@on_both
async def test_no_size_shows_a_run_as_cancelled_or_holds_its_worker(app: App):
    """One worker slot serves run after run at every size around the limits."""
    sizes = [2**20 * n // 10 for n in (15, 18, 19, 20, 21, 30, 40, 41, 50)]

    @async_task(retry_policy=AT_ONCE)
    async def shoot(size: int) -> str:
        return await step("image", lambda: "x" * size)

    await app.start(shoot, max_concurrent_tasks=1)
    ids = [await shoot.submit(size) for size in sizes]
    for size, task_id in zip(sizes, ids, strict=True):
        run = await status_when(shoot, task_id, ended, timeout=30)
        fits = size < 2 * MB - 64 * 1024
        assert run.status is (TaskStatus.COMPLETED if fits else TaskStatus.FAILED)
        assert run.error_type == (None if fits else "PayloadTooLargeError")
