"""Tasks that tell what becomes of their runs: until it is acknowledged, and without doing anything twice for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel

from support import AT_ONCE, App, backs_off, ended, status_when, wait_until
from temporal_async_task import (
    InvalidKeyError,
    NonRetryableError,
    ReportError,
    ReportRefusedError,
    Result,
    RetryableError,
    RetryPolicy,
    Step,
    StepUsageError,
    TaskFailedError,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    sleep,
    step,
)
from temporal_async_task.integrations.callbacks import Callback
from temporal_async_task.integrations.reported import report_external_id, reported
from temporal_async_task.integrations.reports import Report, as_json
from web import serving

NO_RETRY = RetryPolicy(max_retries=0)


@dataclass
class Application:
    """A reporter that keeps what it is sent, and may be down."""

    down: bool = False
    refuses: bool = False
    tries: int = 0
    reports: list[Report] = field(default_factory=list)

    async def send(self, report: Report) -> None:
        self.tries += 1
        if self.down:
            raise ReportError("connection refused")
        if self.refuses:
            raise ReportRefusedError("unknown_record", "deleted")
        self.reports.append(report)

    def told(self) -> list[tuple[int, int, str, dict[str, Any]]]:
        """Each event that came, once, in the order in which they came first."""
        events: dict[tuple[int, int], tuple[int, int, str, dict[str, Any]]] = {}
        for report in self.reports:
            for event in report.events:
                one = (report.generation, event.sequence, str(event.type), event.payload)
                assert events.setdefault((report.generation, event.sequence), one) == one
        return list(events.values())

    def kinds(self) -> list[str]:
        return [kind for _, _, kind, _ in self.told()]


@pytest.fixture
def application() -> Application:
    return Application()


class Picture(BaseModel):
    url: str


async def test_a_run_tells_that_it_has_begun_what_it_knows_and_its_result(app: App, application: Application):
    @async_task
    async def draw(prompt: str) -> Picture:
        job = await step("start", str.upper, prompt)
        report_external_id(job)
        await wait_until(lambda: len(application.told()) == 2)
        return Picture(url=prompt)

    task = reported(draw, to=application)
    await app.start(task)
    task_id = await task.submit("cup")
    assert await task.result(task_id, timeout=60) == Picture(url="cup")
    assert application.told() == [
        (1, 1, "processing", {}),
        (1, 2, "processing", {"external_id": "CUP"}),
        (1, 3, "completed", {"external_id": "CUP", "result": {"url": "cup"}}),
    ]
    assert {(report.task, report.task_id) for report in application.reports} == {("draw", task_id)}


def test_what_json_has_no_words_for_is_told_as_text():
    assert as_json({"png": b"\xff", "pages": {1}}) == {"png": "_w==", "pages": [1]}
    assert as_json(Application) == repr(Application)
    assert as_json(Raw(data=b"\xff")) == repr(Raw(data=b"\xff"))


def test_what_a_database_or_a_reader_would_refuse_is_told_in_other_words():
    odd = {"a\0": ["\ud800", float("nan"), float("-inf")], "sizes": (1.5, None, True)}
    assert as_json(odd) == {"a\\x00": ["\\ud800", None, None], "sizes": [1.5, None, True]}


class Raw(BaseModel):
    data: bytes


def shapes() -> list[Callable[[int], Any]]:
    async def coroutine(n: int) -> int:
        return n + 1

    def function(n: int) -> int:
        return n + 1

    def generator(n: int):
        return (yield Step("add", function, n))

    async def async_generator(n: int):
        yield Result((yield Step("add", function, n)))

    return [coroutine, function, generator, async_generator]


@pytest.mark.parametrize("body", shapes(), ids=lambda body: body.__name__)
async def test_a_task_of_any_shape_tells(app: App, application: Application, body: Callable[[int], Any]):
    task: TemporalAsyncTask[int, int] = reported(TemporalAsyncTask(f"shape_{body.__name__}", body), to=application)
    await app.start(task)
    assert await task.run(1, timeout=60) == 2
    assert application.kinds() == ["processing", "completed"]


async def test_a_run_does_not_end_while_something_else_answers_for_the_application(app: App):
    pages, acknowledged = 0, list[Report]()
    front = FastAPI()

    @front.post("/reports")
    async def receive(request: Request) -> Response:
        nonlocal pages
        told = Report.decode(await request.body())
        if told.events[-1].type == "completed" and pages < 2:
            pages += 1
            return HTMLResponse("<html>Back soon</html>")
        acknowledged.append(told)
        return JSONResponse({"applied": len(told.events)})

    @async_task
    async def draw(prompt: str) -> str:
        report_external_id(await step("start", str.upper, prompt))
        return prompt

    async with serving(front) as url:
        task = reported(draw, to=Callback(f"{url}/reports", "0123456789abcdef"))
        await app.start(task)
        assert await task.result(await task.submit("cup"), timeout=90) == "cup"
    assert pages == 2
    last = acknowledged[-1].events[-1]
    assert (last.type, last.payload) == ("completed", {"external_id": "CUP", "result": "cup"})


async def test_nothing_waits_for_an_application_that_is_down_but_the_end(app: App, application: Application):
    application.down = True
    done: list[str] = []

    @async_task
    async def draw(prompt: str) -> str:
        await step("one", done.append, "one")
        await step("two", done.append, "two")
        return prompt

    task = reported(draw, to=application)
    await app.start(task)
    task_id = await task.submit("cup")
    waits = await status_when(task, task_id, backs_off, timeout=60)
    assert waits.current_step == "report: completed"
    assert (done, application.tries >= 2) == (["one", "two"], True)
    application.down = False
    assert await task.result(task_id, timeout=60) == "cup"
    assert application.kinds() == ["processing", "completed"]
    assert done == ["one", "two"]


async def test_a_task_that_is_one_call_is_not_called_again_for_its_report(app: App, application: Application):
    application.down = True
    calls: list[str] = []

    @async_task
    async def pay(prompt: str) -> str:
        calls.append(prompt)
        await asyncio.sleep(1)  # a report that fails meanwhile does not cut it off
        return prompt

    task = reported(pay, to=application)
    await app.start(task)
    task_id = await task.submit("cup")
    await status_when(task, task_id, backs_off, timeout=60)
    application.down = False
    assert await task.result(task_id, timeout=60) == "cup"
    assert calls == ["cup"]


async def test_retries_of_the_body_are_not_failures_of_the_run(app: App, application: Application):
    calls: list[int] = []

    @async_task(retry_policy=AT_ONCE)
    async def flaky(n: int) -> int:
        calls.append(n)
        if len(calls) < 3:
            raise ConnectionError("down")
        return n

    task = reported(flaky, to=application)
    await app.start(task)
    assert await task.run(1, timeout=60) == 1
    assert application.kinds() == ["processing", "completed"]
    assert len(calls) == 3


async def failing_body(app: App, application: Application, body: Callable[[int], Awaitable[int]]) -> dict[str, Any]:
    """Run a task that fails while the application is down; what it tells in the end."""
    application.down = True
    task = reported(TemporalAsyncTask("failing", body, retry_policy=AT_ONCE), to=application)
    plain = TemporalAsyncTask("failing_plain", body, retry_policy=AT_ONCE)
    await app.start(task, plain)
    task_id = await task.submit(1)
    await status_when(task, task_id, backs_off, timeout=60)
    application.down = False
    failed = await status_when(task, task_id, ended, timeout=60)
    expected = await status_when(plain, await plain.submit(1), ended, timeout=60)
    # The run looks as it does without reports.
    assert (failed.status, failed.error_type, failed.error) == (TaskStatus.FAILED, expected.error_type, expected.error)
    assert application.kinds() == ["processing", "failed"]
    return application.told()[-1][3]


async def test_a_step_that_fails_is_told_with_whether_another_try_may_help(app: App, application: Application):
    def busy(n: int) -> int:
        raise ConnectionError("down")

    async def body(n: int) -> int:
        return await step("call", busy, n)

    told = await failing_body(app, application, body)
    assert told["error"] == "Step 'call' failed after 4 attempts: ConnectionError: down"
    assert (told["error_type"], told["retryable"]) == ("StepFailedError", True)


@pytest.mark.parametrize(("error", "helps"), [(ConnectionError, False), (RetryableError, True)])
async def test_a_step_of_at_most_once_is_not_tried_again_later_unless_nothing_was_done(
    app: App, application: Application, error: type[Exception], helps: bool
):
    def busy(n: int) -> int:
        raise error("down")

    async def body(n: int) -> int:
        return await step.with_options(at_most_once=True, retry_policy=NO_RETRY)("call", busy, n)

    told = await failing_body(app, application, body)
    assert (told["error_type"], told["retryable"]) == ("StepFailedError", helps)


async def test_a_body_that_fails_for_good_is_not_called_again_for_its_report(app: App, application: Application):
    calls: list[int] = []

    async def body(n: int) -> int:
        calls.append(n)
        raise NonRetryableError("no such model")

    told = await failing_body(app, application, body)
    assert told == {"error": "no such model", "error_type": "NonRetryableError", "retryable": False}
    assert len(calls) == 2  # one of them by the task that does not report


async def test_a_call_that_takes_too_long_is_told(app: App, application: Application):
    @async_task(step_timeout=0.3, retry_policy=NO_RETRY)
    async def slow() -> None:
        await asyncio.sleep(600)

    task = reported(slow, to=application)
    await app.start(task)
    with pytest.raises(TaskFailedError, match=r"step's timeout of 0\.3 s"):
        await task.run(timeout=60)
    assert application.kinds() == ["processing", "failed"]
    assert application.told()[-1][3]["retryable"] is True


async def test_a_result_that_cannot_be_kept_is_a_failure_and_told(app: App, application: Application):
    @async_task
    async def large() -> str:
        return "x" * 3_000_000

    task = reported(large, to=application)
    await app.start(task)
    with pytest.raises(TaskFailedError, match="PayloadTooLargeError"):
        await task.run(timeout=60)
    assert application.told()[-1][3]["error_type"] in {"StepFailedError", "PayloadTooLargeError"}


async def test_a_run_that_is_resumed_tells_its_events_anew(app: App, application: Application):
    calls: list[str] = []

    def paid() -> str:
        calls.append("paid")
        return "job-1"

    def flaky() -> str:
        calls.append("flaky")
        if calls.count("flaky") < 3:
            raise NonRetryableError("402")
        return "done"

    @async_task
    async def draw() -> str:
        report_external_id(await step("paid", paid))
        return await step("flaky", flaky)

    task = reported(draw, to=application)
    await app.start(task)
    task_id = await task.submit()
    for _ in range(2):
        await status_when(task, task_id, ended, timeout=60)
        await task.resume(task_id)
    assert await task.result(task_id, timeout=60) == "done"
    assert [(generation, kind) for generation, _, kind, _ in application.told() if kind != "processing"] == [
        (1, "failed"),
        (2, "failed"),
        (3, "completed"),
    ]
    assert calls == ["paid", "flaky", "flaky", "flaky"]


async def test_a_cancelled_run_tells_it_and_one_that_is_resumed_then_tells_the_rest(app: App, application: Application):
    @async_task(heartbeat_timeout=2)
    async def wait() -> str:
        await step("first", str, 1)
        if not any(kind == "failed" for kind in application.kinds()):
            await asyncio.sleep(600)
        return "done"

    task = reported(wait, to=application)
    await app.start(task)
    task_id = await task.submit()
    await status_when(task, task_id, lambda run: "first" in run.completed_steps)
    await task.cancel(task_id, "the customer left")
    run = await status_when(task, task_id, ended, timeout=60)
    assert run.error_type == "TaskCancelledError"
    assert application.told()[-1][2:] == (
        "failed",
        {"error": "the customer left", "error_type": "TaskCancelledError", "retryable": False},
    )
    await task.resume(task_id)
    assert await task.result(task_id, timeout=60) == "done"
    assert [one[:3] for one in application.told()][-2:] == [(2, 1, "processing"), (2, 2, "completed")]


async def test_a_cancellation_does_not_wait_for_an_application_that_is_down(app: App, application: Application):
    application.down = True

    @async_task(heartbeat_timeout=2)
    async def wait() -> None:
        await asyncio.sleep(600)

    task = reported(wait, to=application)
    await app.start(task)
    task_id = await task.submit()
    await status_when(task, task_id, lambda run: run.status is TaskStatus.PROCESSING)
    await task.cancel(task_id)
    run = await status_when(task, task_id, ended, timeout=90)
    assert run.error_type == "TaskCancelledError"


async def test_a_refused_report_fails_no_run(app: App, application: Application, caplog: pytest.LogCaptureFixture):
    application.refuses = True

    @async_task
    async def draw() -> str:
        return "done"

    task = reported(draw, to=application)
    await app.start(task)
    assert await task.run(timeout=60) == "done"
    assert "The application refuses the report of task run" in caplog.text


async def test_a_run_that_parks_often_tells_each_event_once(app: App, application: Application):
    @async_task
    async def draw() -> str:
        for number in range(3):
            await sleep(f"nap-{number}", 1.1)
        return "done"

    task = reported(draw, to=application)
    await app.start(task)
    assert await task.run(timeout=90) == "done"
    assert [len(report.events) for report in application.reports] == [1, 2]


async def test_the_given_task_submits_and_asks_as_well(app: App, application: Application):
    @async_task
    async def draw() -> str:
        return "done"

    await app.start(reported(draw, to=application))
    assert await draw.run(timeout=60) == "done"


async def test_without_a_server_nothing_is_reported(application: Application):
    @async_task
    async def draw() -> str:
        report_external_id("job-1")
        return "done"

    assert await reported(draw, to=application)() == "done"
    assert application.tries == 0


async def test_an_external_id_that_cannot_be_one_is_refused():
    with pytest.raises(InvalidKeyError):
        report_external_id("")
    with pytest.raises(StepUsageError, match="outside of a task"):
        report_external_id("job-1")


async def test_the_times_of_a_run_s_events_do_not_go_back_though_the_worker_s_clock_is_ahead(
    app: App, application: Application, monkeypatch: pytest.MonkeyPatch
):
    ahead = datetime.now(UTC) + timedelta(hours=1)
    monkeypatch.setattr("temporal_async_task.integrations.reported.utc_now", lambda: ahead)

    async def draw() -> str:
        return "url"

    task = reported(TemporalAsyncTask("draw", draw), to=application)
    await app.start(task)
    await task.run()
    times = [event.at for event in application.reports[-1].events]
    assert len(times) == 2
    assert times == sorted(times)


async def test_an_external_id_that_could_not_be_told_before_the_body_had_ended_is_told_with_the_end(
    app: App, application: Application
):
    """The body does not run again, once its result is kept: it cannot say the id again."""
    application.down = True
    bodies: list[str] = []

    async def call(prompt: str) -> str:
        bodies.append(prompt)
        report_external_id(f"job-{len(bodies)}")
        return prompt

    task = reported(TemporalAsyncTask("call", call), to=application)
    await app.start(task)
    task_id = await task.submit("cup")
    # The end of an attempt: the next one has only the end to tell.
    await status_when(task, task_id, lambda run: run.attempt > 1, timeout=60)
    application.down = False
    assert await task.result(task_id, timeout=60) == "cup"
    assert bodies == ["cup"]
    assert application.told() == [
        (1, 1, "processing", {}),
        (1, 2, "processing", {"external_id": "job-1"}),
        (1, 3, "completed", {"external_id": "job-1", "result": "cup"}),
    ]


async def test_the_end_tells_the_external_id_of_the_last_attempt(app: App, application: Application):
    jobs: list[str] = []

    async def call(prompt: str) -> str:
        jobs.append(f"job-{len(jobs) + 1}")
        report_external_id(jobs[-1])
        await wait_until(lambda: len(application.told()) == 2)
        if len(jobs) == 1:
            raise ConnectionError("reset by the vendor")
        return prompt

    again = RetryPolicy(max_retries=1, initial_delay=1.05, max_delay=1.05, jitter=0)
    task = reported(TemporalAsyncTask("call", call, retry_policy=again), to=application)
    await app.start(task)
    assert await task.run("cup", timeout=90) == "cup"
    last = application.reports[-1].events[-1]
    assert (str(last.type), last.payload) == ("completed", {"external_id": "job-2", "result": "cup"})
