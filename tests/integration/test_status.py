"""What the server alone tells of a run: before, while and after it is worked on, with no worker up."""

import asyncio
import itertools
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support import (
    AT_ONCE,
    BY_TIMER,
    FOR_AN_HOUR,
    NEVER_AGAIN,
    App,
    Meter,
    Operator,
    backs_off,
    ended,
    on_both,
    status_when,
    utc_now,
    wait_until,
)
from temporal_async_task import (
    StepFailedError,
    StepState,
    StepStatus,
    TaskFailedError,
    TaskNotFoundError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    async_task,
    progress,
    sleep,
    step,
    wait_for,
)

TICK = timedelta(milliseconds=50)
"""What the server's clock, stored times and ours may differ by."""


class VendorError(Exception):
    pass


async def generate(prompt: str) -> str:
    return f"an image of {prompt}"


async def unavailable(_: str) -> str:
    raise VendorError("503 from the vendor")


async def hold() -> None:
    await asyncio.Event().wait()


@async_task(retry_policy=FOR_AN_HOUR)
async def stuck(prompt: str) -> str:
    """Two steps, of which the second backs off for an hour."""
    image = await step("generate", generate, prompt)
    return await step("upload", unavailable, image)


async def left_in_backoff(app: App) -> str:
    """The id of a run of ``stuck`` whose worker is gone."""
    worker = await app.start(stuck)
    task_id = await stuck.submit("a cup")
    await status_when(stuck, task_id, backs_off)
    await worker.stop()
    return task_id


def in_order(*times: datetime | None) -> bool:
    return list(times) == sorted(time for time in times if time is not None)


# The states of a run --------------------------------------------------------------------------------------


@on_both
async def test_a_run_is_pending_before_any_worker_ever_came(app: App):
    @async_task
    async def echo(text: str) -> str:
        return text

    await app.connect(echo)
    before = utc_now()
    task_id = await echo.submit("hello")
    run = await echo.get_status(task_id)
    assert run.created_at is not None
    assert before - TICK <= run.created_at <= utc_now() + TICK
    assert run == TaskResult(task_id=task_id, status=TaskStatus.PENDING, created_at=run.created_at)
    assert run.created_at.tzinfo is UTC


@on_both
async def test_a_run_that_waits_for_a_slot_is_pending_and_has_no_next_retry(app: App):
    begun, go_on = asyncio.Event(), threading.Event()

    async def hold() -> None:
        begun.set()
        await asyncio.to_thread(go_on.wait, 30)

    @async_task
    async def busy() -> None:
        await step("hold", hold)

    component = await app.start(busy, max_concurrent_tasks=1)
    first = await busy.submit()
    await wait_until(begun.is_set)
    task_id = await busy.submit()
    await wait_until(lambda: has_activity(app.operator(component, task_id)))
    run = await busy.get_status(task_id)
    assert run == TaskResult(task_id=task_id, status=TaskStatus.PENDING, created_at=run.created_at)
    go_on.set()
    await asyncio.gather(busy.result(first), busy.result(task_id))


async def has_activity(operator: Operator) -> bool:
    return await operator.attempt() > 0


@on_both
async def test_a_run_in_a_step_names_it_within_two_seconds(app: App):
    @async_task
    async def shoot(prompt: str) -> None:
        await step("generate", generate, prompt)
        await step("upload", hold)

    await app.start(shoot)
    submitted = utc_now()
    task_id = await shoot.submit("a cup")
    run = await status_when(shoot, task_id, lambda run: run.current_step == "upload", timeout=2)
    assert run.status is TaskStatus.PROCESSING
    assert run.completed_steps == ("generate",)
    assert [(one.key, one.state, one.attempts) for one in run.steps] == [
        ("generate", StepState.COMPLETED, 1),
        ("upload", StepState.RUNNING, 1),
    ]
    assert in_order(submitted - TICK, run.started_at, *(one.started_at for one in run.steps), utc_now() + TICK)
    assert (run.attempt, run.result, run.error, run.last_error, run.next_retry_at) == (1, None, None, None, None)
    assert run.completed_at is None
    assert run.steps[0].finished_at is not None
    assert run.steps[1].finished_at is None


async def test_of_several_steps_at_once_the_one_that_began_first_is_the_current_one(app: App):
    @async_task
    async def shoot() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(step("first", hold))
            group.create_task(step("second", hold))

    await app.start(shoot)
    task_id = await shoot.submit()
    run = await status_when(shoot, task_id, lambda run: len(run.steps) == 2)
    assert run.current_step == "first"
    assert {one.state for one in run.steps} == {StepState.RUNNING}


@on_both
async def test_a_run_in_backoff_tells_its_last_error_and_next_retry_with_no_worker_up(app: App):
    before = utc_now()
    task_id = await left_in_backoff(app)
    run = await stuck.get_status(task_id)
    assert run.status is TaskStatus.PROCESSING
    assert (run.current_step, run.completed_steps) == ("upload", ("generate",))
    assert run.last_error == "VendorError: 503 from the vendor"
    assert run.next_retry_at is not None
    assert before + timedelta(hours=1) <= run.next_retry_at <= utc_now() + timedelta(hours=1, seconds=1)
    assert run.attempt == 2, "the attempt that is due"
    assert (run.result, run.error, run.error_type, run.completed_at) == (None, None, None, None)
    generated, uploaded = run.steps
    assert (generated.key, generated.state, generated.attempts) == ("generate", StepState.COMPLETED, 1)
    assert (uploaded.key, uploaded.state, uploaded.attempts) == ("upload", StepState.RETRYING, 1)
    assert uploaded.last_error == "VendorError: 503 from the vendor"
    assert uploaded.next_attempt_at is not None
    assert abs(uploaded.next_attempt_at - run.next_retry_at) < timedelta(seconds=1)


@on_both
async def test_a_task_without_steps_in_backoff_tells_its_last_error_and_next_retry(app: App):
    @async_task(retry_policy=FOR_AN_HOUR)
    async def upload(image: str) -> str:
        return await unavailable(image)

    worker = await app.start(upload)
    task_id = await upload.submit("a cup")
    await status_when(upload, task_id, backs_off)
    await worker.stop()
    run = await upload.get_status(task_id)
    assert run.status is TaskStatus.PROCESSING
    assert (run.steps, run.current_step, run.attempt) == ((), None, 2)
    assert run.last_error == "VendorError: 503 from the vendor"


@on_both
async def test_a_completed_run_tells_all_with_no_worker_up(app: App):
    @async_task
    async def shoot(prompt: str) -> str:
        image = await step("generate", generate, prompt)
        return await step("frame", "{} in a frame".format, image)

    worker = await app.start(shoot)
    before = utc_now()
    task_id = await shoot.submit("a cup")
    await shoot.result(task_id)
    await worker.stop()
    run = await shoot.get_status(task_id)
    generated, framed = run.steps
    assert run == TaskResult(
        task_id=task_id,
        status=TaskStatus.COMPLETED,
        result="an image of a cup in a frame",
        created_at=run.created_at,
        started_at=run.started_at,
        completed_at=run.completed_at,
        completed_steps=("generate", "frame"),
        steps=(
            StepStatus("generate", StepState.COMPLETED, 1, generated.started_at, generated.finished_at),
            StepStatus("frame", StepState.COMPLETED, 1, framed.started_at, framed.finished_at),
        ),
        attempt=1,
    )
    assert in_order(before - TICK, run.created_at, run.started_at, run.completed_at, utc_now() + TICK)
    assert in_order(generated.started_at, generated.finished_at, framed.started_at, framed.finished_at)
    assert None not in {run.created_at, run.started_at, run.completed_at, framed.finished_at}
    assert run.started_at is not None
    assert generated.started_at is not None
    assert run.started_at <= generated.started_at + TICK


@on_both
async def test_a_run_that_failed_in_a_step_tells_all_with_no_worker_up(app: App):
    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot(prompt: str) -> str:
        image = await step("generate", generate, prompt)
        return await step("upload", unavailable, image)

    worker = await app.start(shoot)
    task_id = await shoot.submit("a cup")
    await status_when(shoot, task_id, ended)
    await worker.stop()
    run = await shoot.get_status(task_id)
    assert run.status is TaskStatus.FAILED
    assert run.error_type == "StepFailedError"
    assert run.error == "Step 'upload' failed after 1 attempt: VendorError: 503 from the vendor"
    assert (run.result, run.current_step, run.next_retry_at) == (None, None, None)
    assert run.completed_steps == ("generate",)
    assert [(one.key, one.state, one.attempts, one.last_error) for one in run.steps] == [
        ("generate", StepState.COMPLETED, 1, None),
        ("upload", StepState.FAILED, 1, "VendorError: 503 from the vendor"),
    ]
    assert in_order(run.created_at, run.started_at, run.steps[1].finished_at, run.completed_at)
    assert run.completed_at is not None


@pytest.mark.parametrize("execution", ["workflow"])
async def test_an_error_without_text_is_told_by_its_name_alone(app: App):
    async def silent() -> None:
        raise TimeoutError

    @async_task(retry_policy=NEVER_AGAIN)
    async def asks(_: None) -> None:
        await step("ask", silent)

    await app.start(asks)
    with pytest.raises(TaskFailedError, match=r"StepFailedError: Step 'ask' failed after 1 attempt: TimeoutError$"):
        await asks.run(None)


@on_both
async def test_a_run_that_failed_outside_of_steps_tells_the_error_and_the_steps_before_it(app: App):
    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot(prompt: str) -> None:
        await step("generate", generate, prompt)
        raise VendorError("not an image")

    worker = await app.start(shoot)
    task_id = await shoot.submit("a cup")
    await status_when(shoot, task_id, ended)
    await worker.stop()
    run = await shoot.get_status(task_id)
    assert (run.status, run.error_type, run.error) == (TaskStatus.FAILED, "VendorError", "not an image")
    assert run.completed_steps == ("generate",)


@on_both
async def test_a_run_that_was_terminated_has_failed_and_keeps_its_steps(app: App):
    task_id = await left_in_backoff(app)
    component = await app.connect(stuck)
    await app.operator(component, task_id).terminate()
    run = await stuck.get_status(task_id)
    assert (run.status, run.error_type) == (TaskStatus.FAILED, "TerminatedError")
    assert run.completed_steps == ("generate",)
    assert run.completed_at is not None
    with pytest.raises(TaskFailedError, match="Terminated"):
        await stuck.result(task_id)


@on_both
async def test_attempts_and_the_first_start_are_told_over_all_attempts(app: App):
    calls = []

    async def flaky() -> str:
        calls.append(utc_now())
        if len(calls) < 3:
            raise VendorError("later")
        return "done"

    @async_task(retry_policy=BY_TIMER)
    async def shoot() -> str:
        return await step("flaky", flaky)

    await app.start(shoot)
    submitted = utc_now()
    task_id = await shoot.submit()
    await shoot.result(task_id)
    run = await shoot.get_status(task_id)
    assert (run.attempt, run.steps[0].attempts, run.steps[0].last_error) == (3, 3, None)
    assert run.started_at is not None
    assert run.steps[0].started_at is not None
    assert submitted - TICK <= run.started_at <= calls[0] + TICK
    assert submitted - TICK <= run.steps[0].started_at <= calls[0] + TICK


# How it is asked for --------------------------------------------------------------------------------------


WAITED = {
    "workflow": {"GetWorkflowExecutionHistory"},
    "activity": {"PollActivityExecution"},
}
DESCRIBE = {"workflow": "DescribeWorkflowExecution", "activity": "DescribeActivityExecution"}


async def attach(meter: Meter, app: App, task: TemporalAsyncTask[Any, Any]) -> None:
    """Have the task ask by a client whose calls are counted, from now on."""
    with meter.attached():
        await app.connect(task)
    meter.calls()


@on_both
@pytest.mark.parametrize("state", ["pending", "running", "in backoff"])
async def test_the_status_of_a_run_that_goes_on_is_one_call_to_the_server(app: App, meter: Meter, state: str):
    @async_task
    async def held() -> None:
        await step("hold", hold)

    task: TemporalAsyncTask[Any, Any] = held
    if state == "in backoff":
        task, task_id = stuck, await left_in_backoff(app)
    elif state == "running":
        await app.start(held)
        task_id = await held.submit()
        await status_when(held, task_id, lambda run: run.current_step)
    else:
        await app.connect(held)
        task_id = await held.submit()
    await attach(meter, app, task)
    run = await task.get_status(task_id)
    assert meter.calls() == [DESCRIBE[app.execution]]
    assert run.status is (TaskStatus.PENDING if state == "pending" else TaskStatus.PROCESSING)
    assert run.completed_steps == (("generate",) if state == "in backoff" else ())


@on_both
@pytest.mark.parametrize("begun", ["submitted", "submitted again", "resumed"])
async def test_the_result_of_a_run_that_was_begun_here_is_waited_for_and_not_asked_for(
    app: App, meter: Meter, begun: str
):
    is_broken = begun == "resumed"

    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot() -> str:
        if is_broken:
            raise VendorError("503")
        return "shot"

    await app.start(shoot)
    task_id = None
    if begun != "submitted":
        task_id = await shoot.submit()
        await status_when(shoot, task_id, ended)
    await attach(meter, app, shoot)
    if is_broken:
        is_broken = False
        await shoot.resume(task_id)
    else:
        task_id = await shoot.submit(task_id=task_id)
    meter.calls()
    assert await shoot.result(task_id) == "shot"
    assert set(meter.calls()) == WAITED[app.execution]


@on_both
@pytest.mark.slow  # the server takes its time to forget
async def test_the_result_of_a_run_that_the_server_has_forgotten_is_unknown_until_its_id_is_in_use_again(app: App):
    shots = itertools.count(1)

    @async_task
    async def shoot() -> int:
        return next(shots)

    web = await app.start(shoot)
    task_id = await shoot.submit()
    assert await shoot.result(task_id) == 1
    await app.operator(web, task_id).delete()

    async def is_forgotten() -> bool:
        try:
            await shoot.result(task_id)
        except TaskNotFoundError:
            return True
        return False

    await wait_until(is_forgotten, timeout=90, interval=0.2)
    elsewhere = TemporalAsyncTask("shoot", shoot.task_function)
    await app.connect(elsewhere)
    await elsewhere.submit(task_id=task_id)
    assert await shoot.result(task_id) == 2


@pytest.mark.parametrize("fails", [False, True], ids=["completed", "failed"])
async def test_the_status_of_a_run_that_has_ended_is_two_calls_to_the_server(app: App, meter: Meter, fails: bool):
    @async_task(retry_policy=NEVER_AGAIN)
    async def shoot(prompt: str) -> str:
        return await step("upload", unavailable if fails else generate, prompt)

    await app.start(shoot)
    task_id = await shoot.submit("a cup")
    await status_when(shoot, task_id, ended)
    await attach(meter, app, shoot)
    await shoot.get_status(task_id)
    assert len(meter.calls()) == 2


# Progress -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["body", "async step", "sync step"])
async def test_progress_is_shown_within_two_seconds(app: App, where: str):
    async def report() -> None:
        progress(0.25, "a quarter")
        await hold()

    def report_in_thread() -> None:
        progress(0.25, "a quarter")

    @async_task
    async def render() -> None:
        if where == "body":
            await report()
        elif where == "async step":
            await step("render", report)
        await step("render", report_in_thread)
        await step("hold", hold)

    await app.start(render)
    task_id = await render.submit()
    run = await status_when(render, task_id, lambda run: run.progress is not None, timeout=2.5)
    assert (run.progress, run.progress_message) == (0.25, "a quarter")


async def test_the_newest_progress_is_the_one_that_is_shown(app: App):
    @async_task
    async def render() -> None:
        for percent in range(0, 60, 2):
            progress(percent / 100, f"{percent} %")
            await asyncio.sleep(0.01)
        await hold()

    await app.start(render)
    task_id = await render.submit()
    run = await status_when(render, task_id, lambda run: run.progress == 0.58, timeout=2.5)
    assert run.progress_message == "58 %"


async def test_progress_without_a_number_has_a_message_and_what_lies_outside_of_0_to_1_is_cut(app: App):
    @async_task
    async def render(fraction: float | None) -> None:
        progress(fraction, "on it")

    await app.start(render)
    shown = []
    for fraction in (None, -1, 7):
        task_id = await render.submit(fraction)
        await render.result(task_id)
        run = await render.get_status(task_id)
        shown.append((run.progress, run.progress_message))
    assert shown == [(None, "on it"), (0.0, "on it"), (1.0, "on it")]


async def test_a_burst_of_progress_is_written_about_once_a_second(app: App, meter: Meter):
    @async_task
    async def render() -> None:
        for number in range(250):
            progress(number / 250)
            await asyncio.sleep(0.01)

    with meter.attached():
        await app.start(render)
    task_id = await render.submit()
    meter.calls()
    await render.result(task_id)
    assert meter.calls().count("RecordActivityTaskHeartbeat") <= 4


# Several at once, and errors on the way -------------------------------------------------------------------


async def test_a_run_that_was_compensated_tells_the_failed_step_and_completes(app: App):
    @async_task(retry_policy=AT_ONCE)
    async def shoot(prompt: str) -> str:
        try:
            return await step("upload", unavailable, prompt)
        except StepFailedError:
            return await step("keep", generate, prompt)

    await app.start(shoot)
    task_id = await shoot.submit("a cup")
    await shoot.result(task_id)
    run = await shoot.get_status(task_id)
    assert (run.status, run.error, run.last_error) == (TaskStatus.COMPLETED, None, None)
    assert run.completed_steps == ("keep",)
    assert [(one.key, one.state, one.attempts) for one in run.steps] == [
        ("upload", StepState.FAILED, 4),
        ("keep", StepState.COMPLETED, 1),
    ]


async def test_the_last_error_of_a_retry_in_the_attempt_is_shown_while_it_goes_on(app: App):
    calls = []

    async def flaky() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise VendorError("busy")
        await hold()

    @async_task(retry_policy=AT_ONCE)
    async def shoot() -> None:
        await step("flaky", flaky)

    await app.start(shoot)
    task_id = await shoot.submit()
    await wait_until(lambda: len(calls) == 2)
    run = await status_when(shoot, task_id, lambda run: run.last_error, timeout=2.5)
    assert run.last_error == "VendorError: busy"
    assert (run.current_step, run.steps[0].attempts) == ("flaky", 2)


async def watched(task: TemporalAsyncTask[Any, Any], task_id: str) -> list[TaskResult[Any]]:
    """All that is told of a run, asked for again and again until it has ended."""
    told = [await task.get_status(task_id)]
    while not ended(told[-1]):
        told.append(await task.get_status(task_id))
    return told


@async_task(retry_policy=NEVER_AGAIN)
async def fails(prompt: str) -> str:
    picture = await step("generate", generate, prompt)
    return await step("upload", unavailable, picture)


@async_task
async def completes(prompt: str) -> str:
    picture = await step("generate", generate, prompt)
    await sleep("settle", 0.3)
    return picture


@async_task
async def takes_an_event(prompt: str) -> str:
    picture = await step("generate", generate, prompt)
    return picture + await wait_for("approved", result_type=str)


async def send_approved(task: TemporalAsyncTask[Any, Any], task_id: str) -> None:
    await status_when(task, task_id, lambda run: run.current_step == "approved")
    await task.send(task_id, "approved", ", approved")


async def cancel_in_backoff(task: TemporalAsyncTask[Any, Any], task_id: str) -> None:
    await status_when(task, task_id, backs_off)
    await task.cancel(task_id, "enough")


@pytest.mark.parametrize(
    ("task", "meanwhile"),
    [(fails, None), (completes, None), (takes_an_event, send_approved), (stuck, cancel_in_backoff)],
    ids=["fails", "completes", "takes_an_event", "cancelled"],
)
async def test_what_is_told_of_a_run_does_not_go_back(app: App, task: TemporalAsyncTask[Any, Any], meanwhile: Any):
    """Not for the moment either in which one part of the server has told another, and that has not taken note yet."""
    await app.start(task)

    async def one() -> list[TaskResult[Any]]:
        task_id = await task.submit("a cup")
        acts = asyncio.create_task(meanwhile(task, task_id)) if meanwhile else None
        told = await watched(task, task_id)
        if acts:
            await acts
        return told

    order = [TaskStatus.PENDING, TaskStatus.PROCESSING, TaskStatus.COMPLETED, TaskStatus.FAILED]
    for told in await asyncio.gather(*(one() for _ in range(10))):
        for before, after in itertools.pairwise(told):
            assert order.index(before.status) <= order.index(after.status), (before, after)
            assert set(before.completed_steps) <= set(after.completed_steps), (before, after)
            assert {each.key for each in before.steps} <= {each.key for each in after.steps}, (before, after)
