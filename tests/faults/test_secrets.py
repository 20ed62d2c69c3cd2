"""Case 16, security: what is secret is stored nowhere in clear, and what is stored runs nothing."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import pickle
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import WorkflowFailureError
from temporalio.common import RawValue
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter

from support import AT_ONCE, BY_TIMER, FOR_AN_HOUR, App, backs_off, ended, status_when, wait_until
from temporal_async_task import (
    ConfigError,
    RetryPolicy,
    StepState,
    TaskConflictError,
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
from temporal_async_task.devserver import DevServer, _find_binary
from temporal_async_task.encryption import AESGCMCodec, encrypted_data_converter, generate_key
from temporal_async_task.engine import attempt_end, runner, wire

pytestmark = pytest.mark.case(16, "security")

PLACES = (
    "params",
    "step-key",
    "step-result",
    "step-error",
    "caught-error",
    "final-error",
    "cause",
    "progress",
    "event-key",
    "event-value",
    "early-event-value",
    "result",
    "child-params",
    "child-result",
    "schedule-params",
    "reason-before-begin",
    "reason-in-backoff",
    "reason-in-wait",
    "reason-while-running",
    "cleanup-error",
)


def canary(place: str) -> str:
    return f"canary-{place}-7f3a"


def seen_in(data: bytes) -> set[str]:
    """The places whose canaries stand in it."""
    return {place for place in PLACES if canary(place).encode() in data}


class Everything:
    """Tasks that between them store whatever can be stored, and what the status says of their runs."""

    def __init__(self) -> None:
        self.tasks: list[TemporalAsyncTask[Any, Any]] = []
        self.runs: dict[str, TaskResult[Any]] = {}
        self.described: list[bytes] = []

    async def run(self, app: App, converter: DataConverter) -> None:
        calls: list[str] = []
        begun = asyncio.Event()

        async def flaky() -> str:
            calls.append("flaky")
            if calls.count("flaky") == 1:
                raise ConnectionError(canary("step-error"))
            return canary("step-result")

        async def refuse() -> None:
            raise KeyError(canary("caught-error"))

        async def slow() -> None:
            begun.set()
            await asyncio.sleep(60)

        async def busy() -> None:
            raise ConnectionError("busy")

        @async_task
        async def child(params: str) -> str:
            assert params == canary("child-params")
            return canary("child-result")

        @async_task(retry_policy=BY_TIMER)
        async def completes(params: str) -> dict[str, Any]:
            assert params == canary("params")
            progress(0.5, canary("progress"))
            image = await step(canary("step-key"), flaky)
            with contextlib.suppress(Exception):
                await step.with_options(retry_policy=RetryPolicy(max_retries=0))("refused", refuse)
            event = await wait_for(canary("event-key"))
            early = await wait_for("early")
            of_child = await step("child", child.run, canary("child-params"))
            return {"image": image, "event": event, "early": early, "child": of_child, "own": canary("result")}

        @async_task(retry_policy=AT_ONCE)
        async def fails() -> None:
            raise TypeError(canary("final-error")) from LookupError(canary("cause"))

        @async_task(retry_policy=FOR_AN_HOUR)
        async def backs_off_for_long() -> None:
            await step("busy", busy)

        @async_task
        async def waits() -> None:
            try:
                await wait_for("never")
            except asyncio.CancelledError:
                raise TypeError(canary("cleanup-error")) from None

        @async_task
        async def runs() -> None:
            await step("slow", slow)

        @async_task
        async def scheduled(params: str) -> str:
            await sleep("a moment", 0.01)
            return params

        tasks = [completes, fails, child, backs_off_for_long, waits, runs, scheduled]
        component = await app.start(*tasks, data_converter=converter)

        async def look(task: TemporalAsyncTask[Any, Any], task_id: str) -> None:
            execution = WorkflowExecution(workflow_id=task_id)
            request = DescribeWorkflowExecutionRequest(namespace="default", execution=execution)
            found = await component.client.workflow_service.describe_workflow_execution(request)
            self.described.append(found.SerializeToString())
            show = [_find_binary(), "workflow", "describe", "--workflow-id", task_id, "--address", app.address]
            self.described.append(await asyncio.to_thread(subprocess.check_output, show))

        # Completes, after a retry, a failed step, two events and a child.
        first = await completes.submit(canary("params"))
        await completes.send(first, "early", canary("early-event-value"))
        await status_when(completes, first, backs_off)
        await look(completes, first)
        await status_when(completes, first, lambda run: run.current_step == canary("event-key"))
        await look(completes, first)
        await completes.send(first, canary("event-key"), canary("event-value"))
        self.runs["completes"] = await status_when(completes, first, ended, timeout=30)
        await look(completes, first)

        second = await fails.submit()
        self.runs["fails"] = await status_when(fails, second, ended)
        await look(fails, second)

        # Cancelled: before the first attempt, in backoff, in a wait, in a call.
        for name, task, condition, delay in (
            ("reason-before-begin", runs, lambda run: run.status is TaskStatus.PENDING, 3600),
            ("reason-in-backoff", backs_off_for_long, backs_off, None),
            ("reason-in-wait", waits, lambda run: run.steps and run.steps[0].state is StepState.WAITING, None),
            ("reason-while-running", runs, lambda run: begun.is_set() and run.current_step == "slow", None),
        ):
            task_id = await task.submit(delay=delay)
            await status_when(task, task_id, condition)
            await task.cancel(task_id, canary(name))
            while (run := await task.get_status(task_id)).status is not TaskStatus.FAILED:
                await look(task, task_id)
            self.runs[name] = run
            await look(task, task_id)

        schedule = await scheduled.schedule(f"nightly-{uuid.uuid4()}", canary("schedule-params"), every=3600)
        await schedule.trigger()
        view = await wait_until(lambda: _with_runs(schedule))
        self.runs["scheduled"] = await status_when(scheduled, view.last_task_ids[0], ended)
        await look(scheduled, view.last_task_ids[0])


async def _with_runs(schedule: Any) -> Any:
    view = await schedule.describe()
    return view if view.last_task_ids else None


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "in clear"])
async def test_a_canary_in_whatever_is_stored_is_in_no_database_log_or_description(
    encrypted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    converter = pydantic_data_converter
    if encrypted:
        converter = encrypted_data_converter(AESGCMCodec({"2026-11": generate_key()}))
    everything = Everything()
    folder = tmp_path / "server"
    async with DevServer(folder / "runs.db", log_path=tmp_path / "server.log") as server:
        app = App(server.address, f"queue-{uuid.uuid4().hex[:8]}")
        try:
            await everything.run(app, converter)
        finally:
            await app.stop()
    runs = everything.runs
    assert runs["completes"].result == {
        "image": canary("step-result"),
        "event": canary("event-value"),
        "early": canary("early-event-value"),
        "child": canary("child-result"),
        "own": canary("result"),
    }
    assert runs["completes"].progress_message == canary("progress")
    assert canary("step-key") in runs["completes"].completed_steps
    assert runs["completes"].steps[1].last_error == f"KeyError: '{canary('caught-error')}'"
    assert runs["fails"].error == canary("final-error")
    for name in ("reason-before-begin", "reason-in-backoff", "reason-in-wait", "reason-while-running"):
        assert (runs[name].error_type, runs[name].error) == ("TaskCancelledError", canary(name))
    assert runs["scheduled"].result == canary("schedule-params")

    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    described = b"".join(everything.described)
    logged = (caplog.text + (tmp_path / "server.log").read_text()).encode()
    if encrypted:
        assert seen_in(stored) == set()
        assert seen_in(described) == set()
        assert seen_in(logged) == {"step-key"}  # keys are names, by which the log tells of steps
    else:  # the places are such that one would find them
        assert seen_in(stored) == set(PLACES) - {"cleanup-error"}  # that one is in the log alone
        assert seen_in(described) >= {"step-error", "reason-in-backoff", "final-error"}
        assert seen_in(logged) >= {"step-error", "cleanup-error"}


# Encryption, as time goes by ------------------------------------------------------------------------------


def encrypting(*keys: str, accept_unencrypted: bool = False) -> DataConverter:
    """A converter with these keys, of which the first one encrypts."""
    codec = AESGCMCodec({key: KEYS[key] for key in keys}, active=keys[0], accept_unencrypted=accept_unencrypted)
    return encrypted_data_converter(codec)


KEYS = {"old": generate_key(), "new": generate_key()}


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker cannot read is left after a try, and offered again after a second."""
    monkeypatch.setattr(attempt_end, "UNREADABLE_DELAY", 1.0)
    monkeypatch.setattr(runner, "UNREADABLE_DELAY", 1.0)
    monkeypatch.setattr(runner, "_READS", 2)


async def test_a_key_is_changed_while_runs_are_in_flight_and_a_worker_without_the_old_one_leaves_them(
    app: App, quickly: None, caplog: pytest.LogCaptureFixture
):
    calls: list[str] = []

    async def note(name: str) -> str:
        calls.append(name)
        if calls.count(name) < {"first": 1, "second": 3}[name]:
            raise ConnectionError("not now")
        return name

    @async_task(retry_policy=BY_TIMER)
    async def shoot(prompt: str) -> str:
        return prompt + await step("first", note, "first") + await step("second", note, "second")

    async def work(converter: DataConverter, until: Any) -> TaskResult[Any]:
        worker = await app.start(shoot, data_converter=converter)
        await app.connect(shoot, data_converter=encrypting("new", "old"))  # whoever asks has both keys
        run = await status_when(shoot, task_id, until)
        await worker.stop()
        return run

    await app.connect(shoot, data_converter=encrypting("old"))
    task_id = await shoot.submit("a cup: ")
    await work(encrypting("old"), lambda run: calls.count("second") == 1 and backs_off(run))
    # Every process has got the new key, and then begins to use it.
    await work(encrypting("old", "new"), lambda run: calls.count("second") == 2 and backs_off(run))
    stranger = await work(encrypting("new"), lambda _: "cannot be read here" in caplog.text)
    assert "encrypted with the key 'old', which is not known here; known are 'new'" in caplog.text
    assert stranger.status is TaskStatus.PROCESSING
    end = await work(encrypting("new", "old"), ended)
    assert (end.status, end.result) == (TaskStatus.COMPLETED, "a cup: firstsecond")
    assert calls == ["first", "second", "second", "second"]


async def test_encryption_is_switched_on_while_runs_are_in_flight_and_wait_for_events(app: App):
    @async_task
    async def order(prompt: str) -> str:
        first = await step("first", str.upper, prompt)
        return first + await wait_for("approval", result_type=str)

    worker = await app.start(order)
    task_id = await order.submit("a cup ")
    await status_when(order, task_id, lambda run: run.current_step == "approval")
    await worker.stop()
    await app.start(order, data_converter=encrypting("new", accept_unencrypted=True))
    assert (await order.get_status(task_id)).completed_steps == ("first",)
    await order.send(task_id, "approval", "is approved")
    assert await order.result(task_id, timeout=20) == "A CUP is approved"


async def test_what_was_not_encrypted_is_refused_unless_it_is_allowed(
    app: App, quickly: None, caplog: pytest.LogCaptureFixture
):
    @async_task
    async def order(prompt: str) -> str:
        return prompt

    await app.connect(order)
    task_id = await order.submit("slipped in")
    await app.start(order, data_converter=encrypting("new"))
    await wait_until(lambda: "A stored value is not encrypted" in caplog.text)
    assert (await order.get_status(task_id)).status is not TaskStatus.COMPLETED
    await app.start(order, data_converter=encrypting("new", accept_unencrypted=True))
    assert await order.result(task_id, timeout=20) == "slipped in"


async def test_the_longest_reason_of_a_cancellation_arrives_encrypted(app: App):
    begun = asyncio.Event()
    reason = "\N{FIRE}" * 999

    async def slow() -> None:
        begun.set()
        await asyncio.sleep(60)

    @async_task
    async def order() -> None:
        await step("slow", slow)

    await app.start(order, data_converter=encrypting("new"))
    task_id = await order.submit()
    await wait_until(begun.is_set)
    await status_when(order, task_id, lambda run: run.current_step == "slow")
    await order.cancel(task_id, reason)
    run = await status_when(order, task_id, ended, timeout=30)
    assert (run.error_type, run.error) == ("TaskCancelledError", reason)


# What is stored runs nothing ------------------------------------------------------------------------------


async def start_by_hand(app: App, component: Any, workflow_type: str, *params: Payload) -> str:
    """Start a workflow on the application's queue as anybody might who can talk to the server."""
    start = wire.TaskInput(origin=uuid.uuid4().hex, heartbeat_timeout=15)
    task_id = str(uuid.uuid4())
    args = [RawValue(payload) for payload in (start.to_payload(), *params)]
    await component.client.start_workflow(workflow_type, args=args, id=task_id, task_queue=app.queue)
    return task_id


def _has_logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def tricks(path: Path) -> Iterator[tuple[str, Payload]]:
    pickled = pickle.dumps(Evil(path))
    for encoding in ("python/pickle", "binary/pickle", "application/x-python", "json/pickle"):
        yield encoding, Payload(metadata={"encoding": encoding.encode()}, data=pickled)
    message = {"encoding": b"json/protobuf", "messageType": b"pathlib.Path"}
    yield "a message type that is none", Payload(metadata=message, data=b'{"path": "x"}')
    yield "no encoding", Payload(data=pickled)
    yield "a codec's", Payload(metadata={"encoding": b"binary/encrypted"}, data=pickled)
    yield (
        "a store's",
        Payload(metadata={"encoding": b"binary/temporal-async-task-reference"}, data=b'{"driver_name": "../x"}'),
    )


async def test_a_pickle_or_another_foreign_encoding_in_params_runs_nothing(
    app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    begun: list[Any] = []

    @async_task
    async def order(params: Any) -> Any:
        begun.append(params)

    component = await app.start(order)
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(path)))  # noqa: S301 - it would, if anybody unpickled it
    assert path.exists()
    path.unlink()
    for name, payload in tricks(path):
        task_id = await start_by_hand(app, component, order.workflow_type, payload)
        if payload.metadata.get("encoding", b"").startswith(b"binary/"):  # another worker may have that store, or codec
            left = f"{task_id}: it cannot be read here, and is left to another worker"
            await wait_until(functools.partial(_has_logged, caplog, left))
        else:
            run = await status_when(order, task_id, ended)
            assert (run.status, run.error_type) == (TaskStatus.FAILED, "ParamsError"), name
    assert begun == []
    assert not path.exists()


IMPORT_PATHS = [
    {"__class__": "pathlib.Path", "__init__": ["/"]},
    {
        "__reduce__": ["os.system", ["id"]],
        "py/object": "os.system",
        "py/reduce": [{"py/function": "os.system"}, ["id"]],
    },
    {"!!python/object/apply:os.system": ["id"], "$type": "System.Diagnostics.Process", "@class": "java.lang.Runtime"},
    {"__annotations__": {"params": "os.system"}, "__type__": "builtins.eval", "type": "importlib.import_module"},
    {"__dict__": {}, "__module__": "os", "__mro__": [], "__subclasshook__": "eval"},
    ["os.system", "__import__('os').system('id')", "{0.__class__.__mro__}", "%(x)s", "${jndi:ldap://x}"],
]


@dataclasses.dataclass
class Order:
    prompt: str
    extra: Any = None


@pytest.mark.parametrize("trick", IMPORT_PATHS, ids=str)
async def test_import_paths_and_class_names_in_params_are_data_and_arrive_as_they_are(app: App, trick: Any):
    @async_task
    async def untyped(params: Any) -> Any:
        return await step("echo", echo, params)

    @async_task
    async def typed(params: Order) -> Any:
        assert type(params) is Order
        return params.extra

    async def echo(value: Any) -> Any:
        return value

    await app.start(untyped, typed)
    assert await untyped.run(trick, timeout=20) == trick
    assert await typed.run(Order("a cup", trick), timeout=20) == trick


async def test_a_field_in_the_params_that_the_class_does_not_have_sets_no_attribute(app: App):
    @async_task
    async def typed(params: Order) -> list[str]:
        return [type(params).__qualname__, *sorted(vars(params))]

    component = await app.start(typed)
    for extra in ('"__class__": "os.system"', '"admin": true', '"__dict__": {"prompt": "other"}'):
        data = f'{{"prompt": "a cup", {extra}}}'.encode()
        payload = Payload(metadata={"encoding": b"json/plain"}, data=data)
        task_id = await start_by_hand(app, component, typed.workflow_type, payload)
        assert await typed.result(task_id, timeout=20) == ["Order", "extra", "prompt"]


async def test_a_task_that_is_not_registered_cannot_be_named_into_being(app: App, caplog: pytest.LogCaptureFixture):
    @async_task
    async def order(params: Any) -> str:
        return "done"

    component = await app.start(order)
    payload = Payload(metadata={"encoding": b"json/plain"}, data=b'"id"')
    for name in ("os.system", "subprocess:check_output", f"{__name__}.Evil", "Order", "__class__", "../order", ""):
        task_id = await start_by_hand(app, component, wire.WORKFLOW_PREFIX + name, payload)
        if name:
            text = f"Task {name!r} is not registered on this worker"
            await wait_until(lambda text=text: text in caplog.text)
        handle = component.client.get_workflow_handle(task_id)
        await handle.terminate()
    for type_ in ("Foreign", "asyncTask", wire.WORKFLOW_PREFIX + wire.COLLECT_ACTIVITY):  # fail at once
        task_id = await start_by_hand(app, component, type_, payload)
        with pytest.raises(WorkflowFailureError) as failed:
            await component.client.get_workflow_handle(task_id).result()
        assert "is not a task" in str(failed.value.cause)
    assert await order.run(None, timeout=20) == "done"


async def test_an_engines_own_name_is_no_name_for_a_task():
    with pytest.raises(ConfigError, match="asyncTask:collect"):
        TemporalAsyncTask("asyncTask:collect", str.upper)


@pytest.mark.parametrize("whose", ["another task's run", "a foreign workflow", "nobody's"])
@pytest.mark.parametrize("state", ["open", "ended"])
async def test_every_call_about_a_run_of_somebody_else_is_refused_as_unknown_and_changes_nothing(
    app: App, whose: str, state: str
):
    @async_task
    async def mine() -> None: ...

    @async_task
    async def other() -> None:
        await wait_for("never")

    component = await app.connect(mine, other)
    task_id = str(uuid.uuid4())
    client = component.client
    if whose == "another task's run":
        await other.submit(task_id=task_id)
    elif whose == "a foreign workflow":
        await client.start_workflow("Foreign", id=task_id, task_queue=app.queue)
    if state == "ended" and whose != "nobody's":
        await client.get_workflow_handle(task_id).terminate()
    calls = {
        "get_status": lambda: mine.get_status(task_id),
        "result": lambda: mine.result(task_id, timeout=5),
        "cancel": lambda: mine.cancel(task_id, "not yours"),
        "send": lambda: mine.send(task_id, "never", 1),
        "resume": lambda: mine.resume(task_id),
        "resume with redo": lambda: mine.resume(task_id, redo=["x"]),
    }
    for call in calls.values():
        with pytest.raises(TaskNotFoundError):
            await call()
    assert task_id not in [run.task_id async for run in mine.list(limit=None)]
    if whose != "nobody's":
        with pytest.raises(TaskConflictError):
            await mine.submit(task_id=task_id)
        events = [event.event_type async for event in client.get_workflow_handle(task_id).fetch_history_events()]
        assert EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED not in events
        assert len(events) == (2 if state == "open" else 3)
