"""Records that run tasks: dispatched once they are committed, and told what becomes of their runs."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
from asyncpg.exceptions import CannotConnectNowError
from fastapi import FastAPI, HTTPException
from sqlalchemy import ForeignKey, String, TypeDecorator, UniqueConstraint, create_engine, event, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker
from sqlalchemy.pool import NullPool

from records_app import SECRET, make_engine
from support import App, wait_until
from temporal_async_task import (
    AsyncTaskComponent,
    ConfigError,
    NonRetryableError,
    RetryPolicy,
    StepOutcomeUnknownError,
    TaskConflictError,
    TaskNotFoundError,
    TaskNotRegisteredError,
    TaskResult,
    TaskStatus,
    TemporalAsyncTask,
    step,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.integrations.base import AggregatedIntegration
from temporal_async_task.integrations.callbacks import SIGNATURE_HEADER, Callback, sign
from temporal_async_task.integrations.lifecycle import Event, RecordStatus, state_after
from temporal_async_task.integrations.reported import report_external_id
from temporal_async_task.integrations.reports import Report, ReportedEvent, utc_now
from temporal_async_task.integrations.sqlalchemy import (
    APICallMixin,
    DirectReport,
    Dispatcher,
    IntegrationEventMixin,
    RecordIntegration,
    RecordTask,
)
from temporal_async_task.integrations.sqlalchemy import dispatcher as dispatching
from temporal_async_task.integrations.sqlalchemy.mixins import state_of
from temporal_async_task.integrations.sqlalchemy.sessions import Database
from temporal_async_task.integrations.sqlalchemy.store import TO_CHECK, TO_START, RecordStore, Settled

NO_RETRY = RetryPolicy(max_retries=0)


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Call(APICallMixin, Base):
    __tablename__ = "calls"
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str] = mapped_column(default="")
    kind: Mapped[str] = mapped_column(default="picture")
    customer_id: Mapped[int | None] = mapped_column(ForeignKey("customers.id"))
    customer: Mapped[Customer | None] = relationship()


class CallEvent(IntegrationEventMixin, Base):
    __tablename__ = "call_events"


class Page(Base):
    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)
    album_id: Mapped[int] = mapped_column(ForeignKey("albums.id"))


class Album(APICallMixin, Base):
    """Its table has arguments of its own, a column has another name, and it loads others with it."""

    __tablename__ = "albums"
    __table_args__ = (UniqueConstraint("title"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    status: Mapped[str] = mapped_column("state", default="pending")
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("customers.id"))
    owner: Mapped[Customer | None] = relationship(lazy="joined")
    pages: Mapped[list[Page]] = relationship(lazy="joined")


class Sealed(TypeDecorator[str]):
    """A text that only those who have the key can read."""

    impl = String
    cache_ok = True

    def process_result_value(self, value: str | None, _: Any) -> str | None:
        if value == "bad":
            raise ValueError("no key for it")
        return value


class Letter(APICallMixin, Base):
    __tablename__ = "letters"
    id: Mapped[int] = mapped_column(primary_key=True)
    words: Mapped[str] = mapped_column(Sealed)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(database_url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


class Records:
    """One test's records and the processes around them."""

    def __init__(self, engine: AsyncEngine, app: App) -> None:
        self.sessions = async_sessionmaker(engine, expire_on_commit=False)
        self.app = app

    def mapping(self, task: TemporalAsyncTask[Any, Any], **options: Any) -> RecordTask[Any]:
        settings = {"params": lambda call: call.prompt, "retry_delay": 0.2, "check_every": 600} | options
        return RecordTask(record=Call, event=CallEvent, task=task, **settings)

    def integration(
        self, component: AsyncTaskComponent, *mappings: RecordTask[Any], **options: Any
    ) -> RecordIntegration:
        options = {"report_to": DirectReport(self.sessions), "lease": 2.0} | options
        return RecordIntegration(component, self.sessions, *mappings, **options)

    def store(self, mapping: RecordTask[Any]) -> RecordStore:
        return RecordStore(mapping, Database(self.sessions))

    async def add(self, *ids: int, **values: Any) -> None:
        async with self.sessions.begin() as session:
            session.add_all([Call(**({"id": one, "prompt": f"p{one}"} | values)) for one in ids])

    async def add_failed(self, *reported: RecordStatus | tuple[RecordStatus, dict[str, Any]]) -> str:
        """A record that is due for another try, after the one whose run has told this. Returns the run's id."""
        task_id = f"failed-{self.app.queue}"
        async with self.sessions.begin() as session:
            session.add(Call(id=1, prompt="p1", task_id=task_id))
        report = Report(task="draw", task_id=task_id, generation=1, events=events(*reported))
        await self.store(self.mapping(TemporalAsyncTask("draw", lambda prompt: prompt))).apply(report)
        await self.change(1, Call.try_again)
        return task_id

    async def change(self, call_id: int, how: Callable[[Call], None]) -> None:
        async with self.sessions.begin() as session:
            how(await session.get_one(Call, call_id))

    async def leave(self, call_id: int, how: str) -> None:
        async with self.sessions.begin() as session:
            call = await session.get_one(Call, call_id)
            if how == "deleted":
                await session.delete(call)
            else:
                call.give_up()

    async def get(self, call_id: int = 1) -> Call:
        async with self.sessions() as session:
            return await session.get_one(Call, call_id)

    async def events(self, call_id: int = 1) -> list[CallEvent]:
        call = await self.get(call_id)
        async with self.sessions() as session:
            query = select(CallEvent).where(CallEvent.task_id == call.task_id).order_by(CallEvent.sequence)
            return list(await session.scalars(query))

    async def told(self, call_id: int = 1) -> list[str]:
        """The types of a record's events, of which it is made sure that the record follows from them."""
        call, events = await self.get(call_id), await self.events(call_id)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [event.at for event in events] == sorted(event.at for event in events)
        state = state_after(Event(RecordStatus(event.type), event.at, event.payload) for event in events)
        if call.event_count == len(events):  # nothing has come meanwhile
            assert state_of(call) == state
        return [event.type for event in events]

    async def becomes(self, status: str, call_id: int = 1, timeout: float = 20) -> Call:
        async def there() -> Call | None:
            call = await self.get(call_id)
            return call if call.status == status else None

        return await wait_until(there, timeout=timeout)


@pytest.fixture
def records(engine: AsyncEngine, app: App) -> Records:
    return Records(engine, app)


@dataclass
class Vendor:
    """A paid API: what was called, and what it answers."""

    calls: list[str]
    answer: Callable[[str], str]

    async def generate(self, prompt: str) -> str:
        self.calls.append(prompt)
        return self.answer(prompt)

    def task(self, **options: Any) -> TemporalAsyncTask[str, str]:
        async def draw(prompt: str) -> str:
            return await step("generate", self.generate, prompt)

        return TemporalAsyncTask("draw", draw, retry_policy=NO_RETRY, **options)


@pytest.fixture
def vendor() -> Vendor:
    return Vendor([], lambda prompt: f"url of {prompt}")


# From a commit to its result ------------------------------------------------------------------------------


async def test_a_committed_record_runs_its_task_and_gets_the_result(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    async with component, AggregatedIntegration(integration).running(None, component):
        await records.add(1)
        call = await records.becomes("completed")
    assert (call.response, call.attempts, call.error, call.due_at) == ("url of p1", 1, None, None)
    assert await records.told() == ["queued", "processing", "completed"]
    assert vendor.calls == ["p1"]
    assert call.started_at <= call.completed_at


@pytest.mark.slow
async def test_a_commit_is_dispatched_at_once_and_not_with_the_next_look(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    async with AggregatedIntegration(integration).running(None, component):
        await asyncio.sleep(7)  # by now it looks every five seconds
        begin = asyncio.get_running_loop().time()
        await records.add(1)
        await records.becomes("queued")
        assert asyncio.get_running_loop().time() - begin < 3


async def test_the_dispatcher_is_woken_by_what_the_application_commits_and_not_by_itself(
    records: Records, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
):
    woken: list[str] = []
    mapping = records.mapping(vendor.task())
    integration = records.integration(records.app.component(), mapping)
    monkeypatch.setattr(integration.dispatcher, "wake", lambda: woken.append("woken"))
    store = records.store(mapping)
    [effect] = integration.create_side_effects()
    effect.install()
    try:
        await records.add(1, task_id="t1")
        assert len(woken) == 1
        claims = await store.claim(TO_START, 5, timedelta(seconds=60))
        await store.settle([Settled(claim, trouble=RuntimeError()) for claim in claims])
        claims = await store.claim(TO_START, 5, timedelta(seconds=60))
        await store.settle([Settled(claim, Event(RecordStatus.QUEUED, utc_now())) for claim in claims])
        await store.apply(Report(task="draw", task_id="t1", generation=1, events=events(PROCESSING, KNOWN, BROKEN)))
        assert len(woken) == 1
        async with records.sessions.begin() as session:
            (await session.get_one(Call, 1)).try_again()
        assert len(woken) == 2
    finally:
        effect.remove()


async def test_a_record_that_is_rolled_back_starts_nothing(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    async with AggregatedIntegration(integration).running(None, component):
        async with records.sessions() as session:
            call = Call(id=1, prompt="p1")
            session.add(call)
            await session.flush()
            rolled_back = str(call.task_id)
            await session.rollback()
        await records.add(2)
        await records.becomes("queued", 2)
        [task] = integration.create_async_tasks()
        with pytest.raises(TaskNotFoundError):
            await task.get_status(rolled_back)


async def test_records_that_were_inserted_by_other_means_are_dispatched_too(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    async with records.sessions.begin() as session:
        await session.execute(insert(Call), [{"id": 1, "prompt": "bulk"}])
        await session.execute(text("INSERT INTO calls (id, prompt, kind) VALUES (2, 'sql', 'picture')"))
    async with component, integration.dispatcher:
        await records.becomes("completed", 1)
        await records.becomes("completed", 2)
    assert sorted(vendor.calls) == ["bulk", "sql"]


async def test_sync_sessions_do_as_well(tmp_path, app: App, vendor: Vendor):
    engine = create_engine(f"sqlite:///{tmp_path / 'records.db'}")
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    component = app.component()
    mapping = RecordTask(record=Call, event=CallEvent, task=vendor.task(), params=lambda call: call.prompt)
    integration = RecordIntegration(component, sessions, mapping, report_to=DirectReport(sessions))
    component.register_all(integration.create_async_tasks())

    def create() -> None:
        with sessions.begin() as session:
            session.add_all([Call(id=one, prompt=f"p{one}") for one in range(5)])

    def completed() -> bool:
        with sessions() as session:
            return {call.status for call in session.scalars(select(Call))} == {"completed"}

    async with component, AggregatedIntegration(integration).running(None, component):
        await asyncio.to_thread(create)
        await wait_until(lambda: asyncio.to_thread(completed), timeout=90)
    assert sorted(vendor.calls) == [f"p{one}" for one in range(5)]
    engine.dispose()


async def test_classes_of_work_may_share_a_table(records: Records, vendor: Vendor):
    async def film(prompt: str) -> str:
        return f"video of {prompt}"

    component = records.app.component()
    integration = records.integration(
        component,
        records.mapping(vendor.task(), where=Call.kind == "picture"),
        records.mapping(TemporalAsyncTask("film", film), where=Call.kind == "video"),
    )
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    await records.add(2, kind="video")
    async with component, integration.dispatcher:
        assert (await records.becomes("completed", 1)).response == "url of p1"
        assert (await records.becomes("completed", 2)).response == "video of p2"


async def test_params_may_be_made_from_what_the_record_is_related_to(records: Records, vendor: Vendor):
    async with records.sessions.begin() as session:
        session.add(Call(id=1, prompt="cup", customer=Customer(id=1, name="Ada")))
    component = records.app.component()
    mapping = records.mapping(vendor.task(), params=lambda call: f"{call.prompt} for {call.customer.name}")
    integration = records.integration(component, mapping)
    component.register_all(integration.create_async_tasks())
    async with component, integration.dispatcher:
        assert (await records.becomes("completed")).response == "url of cup for Ada"


async def test_what_a_class_loads_with_its_records_by_joins_is_in_nobodys_way(records: Records, vendor: Vendor):
    component = records.app.component()
    mapping = RecordTask(
        record=Album,
        event=CallEvent,
        task=vendor.task(),
        params=lambda album: f"{album.owner and album.owner.name}: {[page.id for page in album.pages]}",
    )
    integration = records.integration(component, mapping)
    component.register_all(integration.create_async_tasks())
    async with records.sessions.begin() as session:
        session.add(Album(id=1, pages=[Page(id=1), Page(id=2)]))
        session.add(Album(id=2, owner=Customer(id=1, name="Ada"), pages=[]))

    async def responses() -> list[Any]:
        async with records.sessions() as session:
            found = list(await session.scalars(select(Album.response).order_by(Album.id)))
        return found if all(found) else []

    async with component, integration.dispatcher:
        assert await wait_until(responses, timeout=90) == ["url of None: [1, 2]", "url of Ada: []"]


async def test_sessions_that_are_bound_by_class_do_as_well(engine: AsyncEngine, records: Records, vendor: Vendor):
    sessions = async_sessionmaker(binds={Base: engine})
    component = records.app.component()
    integration = RecordIntegration(
        component, sessions, records.mapping(vendor.task()), report_to=DirectReport(records.sessions)
    )
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    async with component, integration.dispatcher:
        await records.becomes("completed")


# What goes wrong ------------------------------------------------------------------------------------------


async def test_records_that_cannot_be_submitted_fail_with_the_reason_and_block_no_others(
    records: Records, vendor: Vendor
):
    def params(call: Call) -> Any:
        match call.prompt:
            case "number":
                return 5
            case "large":
                return "x" * 3_000_000
            case "broken":
                raise KeyError("no such field")
            case "sql":  # takes the transaction down with it
                return records_of(call).execute(text("SELECT no_such_column FROM calls"))
            case prompt:
                return prompt

    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task(), params=params))
    component.register_all(integration.create_async_tasks())
    async with records.sessions.begin() as session:
        for number, prompt in enumerate(["number", "large", "broken", "sql", "good"], 1):
            session.add(Call(id=number, prompt=prompt))
    async with component, integration.dispatcher:
        await records.becomes("completed", 5)
        for number, reason in enumerate(["ParamsError", "PayloadTooLargeError", "KeyError", "no_such_column"], 1):
            call = await records.becomes("failed", number)
            assert reason in call.error
            assert (call.due_at, call.attempts) == (None, 0)
            assert await records.told(number) == ["failed"]
    assert vendor.calls == ["good"]


async def test_a_failed_record_that_is_refused_when_it_is_tried_again_stays_so_and_blocks_no_others(
    records: Records, vendor: Vendor
):
    faults = ["no such field", "still no such field"]

    def params(call: Call) -> str:
        if call.prompt == "broken":
            raise KeyError(faults[0])
        return call.prompt

    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task(), params=params))
    component.register_all(integration.create_async_tasks())
    await records.add(1, prompt="broken")
    async with component, integration.dispatcher:
        await records.becomes("failed", 1)
    del faults[0]
    async with records.sessions.begin() as session:
        (await session.get_one(Call, 1)).try_again()
    await records.add(2, 3)
    async with component, integration.dispatcher:
        await records.becomes("completed", 2)
        await records.becomes("completed", 3)

        async def is_left_alone() -> bool:
            return (await records.get(1)).due_at is None

        await wait_until(is_left_alone)
    assert "still no such field" in str((await records.get(1)).error)
    assert await records.told(1) == ["failed", "failed"]
    assert await records.told(2) == ["queued", "processing", "completed"]


async def test_a_run_that_has_told_of_its_failure_and_is_about_to_end_is_resumed(
    records: Records, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
):
    """Else its record would wait for it until ``check_every``."""
    failures = [ConnectionError("down")]
    too_early = [TaskConflictError("it is going on")] * 2

    def draw(prompt: str) -> str:
        if failures:
            raise failures.pop()
        return f"url of {prompt}"

    vendor.answer = draw
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task(), max_attempts=2))
    [task] = integration.create_async_tasks()
    resume = task.resume

    async def resumed(task_id: str) -> str:
        if too_early:
            raise too_early.pop()
        return await resume(task_id)

    monkeypatch.setattr(task, "resume", resumed)
    component.register_all([task])
    await records.add(1)
    async with component, AggregatedIntegration(integration).running(None, component):
        assert (await records.becomes("completed")).response == "url of p1"
    assert not too_early


ODD = "a NUL: \0, half a pair: \ud800"
PLAIN = "a NUL: \\x00, half a pair: \\ud800"


@pytest.mark.parametrize("tells", [True, False], ids=["told", "asked"])
async def test_an_error_that_no_database_takes_is_told_all_the_same(records: Records, vendor: Vendor, tells: bool):
    """It would be told again and again, and its run would never end."""

    def fail(_: str) -> str:
        raise NonRetryableError(ODD)

    vendor.answer = fail
    task = vendor.task()
    component = records.app.component()
    integration = records.integration(component, records.mapping(task, check_every=0.2))
    dispatcher = integration.dispatcher
    if not tells:
        dispatcher = Dispatcher(component, records.sessions, records.mapping(task, check_every=0.2))
    component.register_all(integration.create_async_tasks() if tells else [task])
    await records.add(1)
    async with component, dispatcher:
        call = await records.becomes("failed")
    assert str(call.error).endswith(f"NonRetryableError: {PLAIN}")
    assert "failed" in await records.told()  # it may be tried again by now


async def test_params_with_an_error_that_no_database_takes_block_no_others(records: Records, vendor: Vendor):
    def params(call: Call) -> str:
        if call.id == 1:
            raise ValueError(ODD)
        return call.prompt

    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task(), params=params))
    component.register_all(integration.create_async_tasks())
    await records.add(1, 2)
    async with component, integration.dispatcher:
        assert str((await records.becomes("failed", 1)).error).endswith(PLAIN)
        await records.becomes("completed", 2)


@pytest.mark.parametrize("tells", [True, False], ids=["told", "asked"])
async def test_a_result_that_json_has_no_word_for_is_kept_without_it(records: Records, tells: bool):
    async def measure(_: str) -> dict[str, Any]:
        return {"sizes": [float("nan"), float("inf"), 1.5], "name": "a\0b"}

    task = TemporalAsyncTask("measure", measure)
    component = records.app.component()
    integration = records.integration(component, records.mapping(task, check_every=0.2))
    dispatcher = integration.dispatcher
    if not tells:
        dispatcher = Dispatcher(component, records.sessions, records.mapping(task, check_every=0.2))
    component.register_all(integration.create_async_tasks() if tells else [task])
    await records.add(1)
    async with component, dispatcher:
        call = await records.becomes("completed")
    assert call.response == {"sizes": [None, None, 1.5], "name": "a\\x00b"}


async def test_a_record_that_cannot_be_loaded_fails_with_the_reason_and_blocks_no_others(
    records: Records, vendor: Vendor
):
    component = records.app.component()
    letters = RecordTask(record=Letter, event=CallEvent, task=vendor.task(), params=lambda letter: letter.words)
    integration = records.integration(component, letters)
    component.register_all(integration.create_async_tasks())
    async with records.sessions.begin() as session:
        session.add_all([Letter(id=number, words=words) for number, words in enumerate(["a", "bad", "b"], 1)])
    await integration.dispatcher.sweep()
    async with records.sessions() as session:
        query = select(Letter.status, Letter.error, Letter.due_at.is_(None)).order_by(Letter.id)
        queued, bad, *others = [tuple(row) for row in await session.execute(query)]
    assert queued == ("queued", None, False)
    assert others == [queued]
    assert bad == ("failed", "RecordError: it cannot be loaded: ValueError: no key for it", True)


async def test_a_record_that_cannot_be_written_blocks_no_others(
    records: Records, vendor: Vendor, caplog: pytest.LogCaptureFixture
):
    def refuse(_: Any, __: Any, call: Call) -> None:
        if call.id == 2:
            raise ValueError("not this one")

    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    await records.add(1, 2, 3)
    event.listen(Call, "before_update", refuse)
    try:
        await integration.dispatcher.sweep()
    finally:
        event.remove(Call, "before_update", refuse)
    assert [(await records.get(one)).status for one in (1, 2, 3)] == ["queued", "pending", "queued"]
    [logged] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "cannot be written" in logged.getMessage()
    assert "not this one" in str(logged.exc_info)


def records_of(call: Call) -> Any:
    from sqlalchemy.orm import object_session  # noqa: PLC0415

    return object_session(call)


async def test_a_record_whose_task_id_is_taken_fails_with_the_reason(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    async with component:
        [task] = integration.create_async_tasks()
        await task.run("other params", task_id=f"taken-{records.app.queue}", timeout=90)
        await records.add(1, task_id=f"taken-{records.app.queue}")
        async with integration.dispatcher:
            call = await records.becomes("failed")
    assert call.error.startswith("TaskConflictError")


async def test_a_failed_run_is_resumed_from_its_last_finished_step(records: Records, vendor: Vendor):
    uploads: list[str] = []

    def upload(url: str) -> str:
        uploads.append(url)
        if len(uploads) < 3:
            raise ConnectionError("no bucket")
        return "stored"

    async def draw(prompt: str) -> str:
        return await step("upload", upload, await step("generate", vendor.generate, prompt))

    component = records.app.component()
    mapping = records.mapping(TemporalAsyncTask("draw", draw, retry_policy=NO_RETRY))
    integration = records.integration(component, mapping)
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    async with component, integration.dispatcher:
        call = await records.becomes("completed")
    assert (call.response, call.attempts, call.error) == ("stored", 3, None)
    tries = ["queued", "processing", "failed"]
    assert await records.told() == [*tries, *tries, "queued", "processing", "completed"]
    assert vendor.calls == ["p1"]
    assert (await records.events())[2].payload == {
        "error": "Step 'upload' failed after 1 attempt: ConnectionError: no bucket",
        "error_type": "StepFailedError",
        "retryable": True,
    }


async def test_a_failed_run_is_resumed_though_its_params_could_not_be_made_again(records: Records, vendor: Vendor):
    """It has them already, and was paid for."""
    uploads = [ConnectionError("no bucket")]

    def upload(_: str) -> str:
        if uploads:
            raise uploads.pop()
        return "stored"

    async def draw(prompt: str) -> str:
        return await step("upload", upload, await step("generate", vendor.generate, prompt))

    def params(call: Call) -> str:
        if call.attempts:
            raise KeyError("the customer's address was deleted")
        return call.prompt

    component = records.app.component()
    task = TemporalAsyncTask("draw", draw, retry_policy=NO_RETRY)
    integration = records.integration(component, records.mapping(task, params=params))
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    async with component, integration.dispatcher:
        call = await records.becomes("completed")
    assert (call.response, call.attempts, vendor.calls) == ("stored", 2, ["p1"])


async def test_a_record_is_tried_so_often_and_no_more_until_somebody_asks(records: Records, vendor: Vendor):
    def fail(_: str) -> str:
        raise ConnectionError("down")

    vendor.answer = fail
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task(), max_attempts=2))
    component.register_all(integration.create_async_tasks())
    await records.add(1)

    async def given_up() -> Call | None:
        call = await records.get()
        return call if call.status == "failed" and call.due_at is None else None

    async with component, AggregatedIntegration(integration).running(None, component):
        call = await wait_until(given_up, timeout=90)
        assert (call.attempts, vendor.calls) == (2, ["p1", "p1"])
        vendor.answer = lambda prompt: f"url of {prompt}"
        async with records.sessions.begin() as session:
            (await session.get_one(Call, 1)).try_again()
        call = await records.becomes("completed")
    assert (call.attempts, vendor.calls) == (3, ["p1"] * 3)


@pytest.mark.parametrize(
    "error", [NonRetryableError("no such model"), TypeError("a bug"), StepOutcomeUnknownError("pay", 1, "X", "lost")]
)
async def test_a_failure_that_another_try_cannot_mend_is_final_at_once(
    records: Records, vendor: Vendor, error: Exception
):
    def fail(_: str) -> str:
        raise error

    vendor.answer = fail
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    async with component, integration.dispatcher:
        call = await records.becomes("failed")
        assert call.due_at is None
        assert type(error).__name__ in call.error
    assert (await records.events())[-1].payload["retryable"] is False


async def test_a_cancelled_run_is_told_and_not_tried_again(records: Records, vendor: Vendor):
    async def wait(_: str) -> None:
        await asyncio.sleep(600)

    component = records.app.component()
    integration = records.integration(component, records.mapping(TemporalAsyncTask("wait", wait, heartbeat_timeout=2)))
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    async with component, integration.dispatcher:
        call = await records.becomes("processing")
        [task] = integration.create_async_tasks()
        await task.cancel(call.task_id, "the customer left")
        call = await records.becomes("failed")
        await wait_until(lambda: is_failed(task, call.task_id), timeout=90)
    assert (call.error, call.due_at) == ("the customer left", None)
    assert await records.told() == ["queued", "processing", "failed"]


async def test_a_run_that_was_cancelled_after_it_had_told_of_its_failure_is_left_to_a_person(
    records: Records, vendor: Vendor
):
    """Its record waits for another try."""

    async def wait(prompt: str) -> None:
        vendor.calls.append(prompt)
        await asyncio.sleep(600)

    task = TemporalAsyncTask("draw", wait, heartbeat_timeout=2)
    dispatcher = Dispatcher(component := records.app.component(task), records.sessions, records.mapping(task))
    task_id = await records.add_failed(PROCESSING, UNAVAILABLE)
    async with component:
        await task.submit("p1", task_id=task_id)
        await wait_until(lambda: vendor.calls, timeout=90)
        await task.cancel(task_id, "the customer left")
        await wait_until(lambda: ended(task, task_id), timeout=90)
        await dispatcher.sweep()
        call = await records.get()
        assert (call.status, call.error, call.due_at) == ("failed", "the customer left", None)
        assert await records.told() == ["queued", "processing", "failed", "failed"]
        await records.change(1, Call.try_again)
        await dispatcher.sweep()
        assert (await records.get()).status == "queued"
        await wait_until(lambda: len(vendor.calls) == 2, timeout=90)


async def test_a_record_that_is_given_up_is_not_started(records: Records, vendor: Vendor):
    """Nor does it count as one that is just being started."""
    integration = records.integration(
        component := records.app.component(), records.mapping(vendor.task(), max_backlog=1)
    )
    component.register_all(integration.create_async_tasks())
    await records.add(1, claims=1)
    await records.change(1, Call.give_up)
    await records.add(2)
    await integration.dispatcher.sweep()
    assert [(await records.get(one)).status for one in (1, 2)] == ["pending", "queued"]


async def test_a_failed_record_that_is_given_up_is_tried_again_only_if_somebody_asks(records: Records, vendor: Vendor):
    integration = records.integration(component := records.app.component(), records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    await records.add_failed(PROCESSING, UNAVAILABLE)
    await records.change(1, Call.give_up)
    await integration.dispatcher.sweep()
    assert await records.told() == ["queued", "processing", "failed"]
    await records.change(1, Call.try_again)
    await integration.dispatcher.sweep()
    assert await records.told() == ["queued", "processing", "failed", "queued"]


async def ended(task: TemporalAsyncTask[Any, Any], task_id: Any) -> TaskResult[Any] | None:
    run = await task.get_status(task_id)
    return run if run.completed_at else None


async def is_failed(task: TemporalAsyncTask[Any, Any], task_id: Any) -> bool:
    return (await task.get_status(task_id)).status is TaskStatus.FAILED


async def test_a_run_that_was_terminated_is_found_out_by_asking(records: Records, vendor: Vendor):
    async def wait(_: str) -> None:
        await asyncio.sleep(600)

    component = records.app.component()
    mapping = records.mapping(TemporalAsyncTask("wait", wait), check_every=0.5)
    integration = records.integration(component, mapping)
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    async with component, integration.dispatcher:
        call = await records.becomes("processing")
        await component.client.get_workflow_handle(str(call.task_id)).terminate("by hand")
        call = await records.becomes("failed")
    assert "terminated" in str(call.error)
    assert (call.due_at, await records.told()) == (None, ["queued", "processing", "failed"])


async def test_a_run_that_the_server_has_forgotten_is_submitted_again(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task(), check_every=0.5))
    component.register_all(integration.create_async_tasks())
    async with records.sessions.begin() as session:  # as of before the server's database was lost
        task_id = f"forgotten-{records.app.queue}"
        session.add(Call(id=1, prompt="p1", status="queued", attempts=1, event_count=1, task_id=task_id))
        session.add(CallEvent(task_id=task_id, sequence=1, type="queued", at=utc_now(), payload={"attempt": 1}))
    async with component, integration.dispatcher:
        await records.becomes("completed")
    assert await records.told() == ["queued", "failed", "queued", "processing", "completed"]


async def test_a_run_that_takes_the_place_of_a_forgotten_one_is_heard(records: Records, vendor: Vendor):
    """It tells its events from the first on, as the forgotten one had done."""
    component = records.app.component()

    async def draw(prompt: str) -> str:
        report_external_id("B")
        return await step("generate", vendor.generate, prompt)

    integration = records.integration(component, records.mapping(TemporalAsyncTask("draw", draw)))
    component.register_all(integration.create_async_tasks())
    await records.add_failed((PROCESSING, {"external_id": "A"}), UNAVAILABLE)
    async with component, integration.dispatcher:
        call = await records.becomes("completed")
    assert (call.external_id, call.attempts, call.generation) == ("B", 2, 1)
    assert (await records.told())[:4] == ["queued", "processing", "failed", "queued"]
    assert vendor.calls == ["p1"]


async def test_asking_about_a_record_brings_it_up_to_date(records: Records, vendor: Vendor):
    """Of a run that tells nothing itself, since its worker is of another kind."""
    task = vendor.task()
    component = records.app.component()
    integration = records.integration(component, records.mapping(task))
    await records.add(1)
    async with AggregatedIntegration(integration).running(None, component):
        call = await records.becomes("queued")
        async with records.app.component(task):
            await task.result(str(call.task_id), timeout=90)
            assert (await records.get()).status == "queued"
            assert await integration.refresh(Call, 1)
            assert (await records.get()).response == "url of p1"
            assert not await integration.refresh(Call, 1)  # it has ended
            assert not await integration.refresh(Call, 99)
    assert await records.told() == ["queued", "completed"]


@pytest.mark.slow
async def test_while_the_server_is_down_records_wait_and_are_dispatched_when_it_is_back(
    records: Records, vendor: Vendor, caplog: pytest.LogCaptureFixture
):
    server = DevServer()
    async with server:
        address = server.address
        component = records.app.component(temporal_address=address)
        integration = records.integration(component, records.mapping(vendor.task()))
        component.register_all(integration.create_async_tasks())
        async with AggregatedIntegration(integration).running(None, component):
            await wait_until(lambda: component._client is not None, timeout=90)
            server.kill()
            with caplog.at_level(logging.WARNING):
                await records.add(*range(1, 31))
                await wait_until(lambda: "Records wait: ServerUnavailableError" in caplog.text, timeout=90)
            states = {((call := await records.get(one)).status, call.attempts) for one in range(1, 31)}
            assert states == {("pending", 0)}
            await server.start()
            async with records.app.component(*integration.create_async_tasks(), temporal_address=address):
                for one in range(1, 31):
                    await records.becomes("completed", one, timeout=40)
    assert sorted(vendor.calls) == sorted(f"p{one}" for one in range(1, 31))


async def test_a_dispatcher_that_starts_before_the_server_goes_on_when_it_is_there(records: Records, vendor: Vendor):
    server = DevServer()
    async with server:
        address = server.address
        await server.stop()
        component = records.app.component(temporal_address=address)
        integration = records.integration(component, records.mapping(vendor.task()))
        await records.add(1)
        async with AggregatedIntegration(integration).running(None, component):
            await server.start()
            await records.becomes("queued", timeout=40)


# Claims ---------------------------------------------------------------------------------------------------


async def test_a_claim_is_one_callers_until_it_runs_out(records: Records, vendor: Vendor):
    store = records.store(records.mapping(vendor.task()))
    await records.add(1, 2, 3)
    first = await store.claim(TO_START, 2, timedelta(seconds=1))
    second = await store.claim(TO_START, 5, timedelta(seconds=60))
    assert (len(first), len(second)) == (2, 1)
    assert {claim.key for claim in [*first, *second]} == {1, 2, 3}
    assert await store.claim(TO_START, 5, timedelta(seconds=60)) == []
    again = await wait_until(lambda: store.claim(TO_START, 5, timedelta(seconds=60)))
    assert {claim.key for claim in again} <= {claim.key for claim in first}
    assert {claim.claims for claim in again} == {2}


@pytest.mark.parametrize(("table", "status"), [("calls", "status"), ("albums", "state")])
def test_what_is_due_is_found_by_an_index_whatever_the_table_is_like(table: str, status: str):
    indexes = {tuple(index.columns.keys()) for index in Base.metadata.tables[table].indexes}
    assert {(status, "due_at"), ("claims", status, "due_at")} <= indexes


async def test_what_came_of_a_claim_is_not_told_of_another_record_with_its_key(records: Records, vendor: Vendor):
    """SQLite gives the key of a record that was deleted to the next."""
    store = records.store(records.mapping(vendor.task()))
    await records.add(1)
    claims = await store.claim(TO_START, 5, timedelta(seconds=60))
    async with records.sessions.begin() as session:
        await session.delete(await session.get_one(Call, 1))
    await records.add(1)
    await store.settle([Settled(claim, Event(RecordStatus.QUEUED, utc_now())) for claim in claims])
    assert await records.told() == []
    assert (await records.get()).status == "pending"


async def test_many_that_claim_at_once_get_each_record_once(records: Records, vendor: Vendor):
    store = records.store(records.mapping(vendor.task()))
    await records.add(*range(100))
    got: list[int] = []

    async def claim_all() -> None:
        while claims := await store.claim(TO_START, 7, timedelta(seconds=600)):
            got.extend(claim.key for claim in claims)

    await asyncio.gather(*(claim_all() for _ in range(8)))
    # PostgreSQL leaves out rows that another one is claiming: nothing is left, and nothing is there twice.
    while claims := await store.claim(TO_START, 50, timedelta(seconds=600)):
        got.extend(claim.key for claim in claims)
    assert sorted(got) == list(range(100))


async def test_many_that_claim_at_once_keep_the_limit_together(records: Records, vendor: Vendor):
    store = records.store(records.mapping(vendor.task()))
    await records.add(*range(100))
    lease = timedelta(seconds=600)
    claimed = await asyncio.gather(*(store.claim(TO_START, 10, lease, max_waiting=25) for _ in range(8)))
    assert sum(map(len, claimed)) == 25
    assert await store.claim(TO_START, 10, lease, max_waiting=25) == []
    assert len(await store.claim(TO_START, 10, lease, max_waiting=26)) == 1


async def test_claims_that_have_run_out_are_made_again_before_others_and_within_the_limit(
    records: Records, vendor: Vendor
):
    """Whoever made them may be slow, and start their records yet."""
    store = records.store(records.mapping(vendor.task()))
    await records.add(*range(1, 21))
    lease, none = timedelta(seconds=60), timedelta(0)
    slow = await store.claim(TO_START, 4, none, max_waiting=6)
    assert {claim.key for claim in await store.claim(TO_START, 4, lease, max_waiting=6)} == {one.key for one in slow}
    assert len(await store.claim(TO_START, 4, lease, max_waiting=6)) == 2
    assert await store.claim(TO_START, 4, lease, max_waiting=6) == []
    await store.settle([Settled(claim, Event(RecordStatus.QUEUED, utc_now())) for claim in slow])
    assert await store.claim(TO_START, 4, lease, max_waiting=6) == []


def report_before_reading(
    store: RecordStore, report: Report, monkeypatch: pytest.MonkeyPatch, records: Records
) -> None:
    """Have a report arrive when a record was claimed, and was not read yet."""
    read, receiver = store.database.read, records.store(store.records)

    async def after_the_report(work: Callable[[Any], Any]) -> Any:
        await receiver.apply(report)
        return await read(work)

    monkeypatch.setattr(store.database, "read", after_the_report)


async def test_a_record_that_was_begun_between_claim_and_submit_is_left_alone(
    records: Records, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
):
    """It had been submitted by a dispatcher that was killed before it could write so."""
    store = records.store(records.mapping(vendor.task()))
    await records.add(1, task_id="t1")
    await records.add(2)
    begun = Report(task="draw", task_id="t1", generation=1, events=events(PROCESSING))
    report_before_reading(store, begun, monkeypatch, records)
    assert [claim.key for claim in await store.claim(TO_START, 5, timedelta(seconds=60))] == [2]
    assert await records.told() == ["queued", "processing"]


async def test_a_record_that_failed_for_good_between_claim_and_question_is_not_tried_again(
    records: Records, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
):
    store = records.store(records.mapping(vendor.task()))
    await records.add(1, task_id="t1")
    await store.apply(Report(task="draw", task_id="t1", generation=1, events=events(PROCESSING)))
    async with records.sessions.begin() as session:
        (await session.get_one(Call, 1)).due_at = utc_now()
    failed = Report(task="draw", task_id="t1", generation=1, events=events(PROCESSING, BROKEN))
    report_before_reading(store, failed, monkeypatch, records)
    assert await store.claim(TO_CHECK, 5, timedelta(seconds=60)) == []
    assert (await records.get()).due_at is None


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have records of a batch wait for each other, as behind a server that is slow."""
    monkeypatch.setattr(dispatching, "_CONCURRENCY", 1)
    monkeypatch.setattr(dispatching, "_FRESH", 0)


def on_submit(
    task: TemporalAsyncTask[Any, Any], monkeypatch: pytest.MonkeyPatch, do: Callable[[str], Awaitable[object]]
) -> list[str]:
    """Have something happen when a task was submitted and its record is not settled. Returns the submitted params."""
    submit, submitted = task.submit, list[str]()

    async def submit_and_do(params: str, **options: Any) -> str:
        task_id = await submit(params, **options)
        submitted.append(params)
        await do(params)
        return task_id

    monkeypatch.setattr(task, "submit", submit_and_do)
    return submitted


@pytest.mark.parametrize("how", ["deleted", "given up"])
async def test_a_record_that_is_deleted_or_given_up_before_its_turn_is_not_started(
    records: Records, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, one_at_a_time: None, how: str
):
    integration = records.integration(component := records.app.component(), records.mapping(vendor.task()))
    component.register_all(tasks := integration.create_async_tasks())
    submitted = on_submit(tasks[0], monkeypatch, lambda _: records.leave(2, how))
    await records.add(1, 2)
    await integration.dispatcher.sweep()
    assert submitted == ["p1"]


@pytest.mark.parametrize("how", ["deleted", "given up"])
async def test_a_record_that_is_deleted_or_given_up_as_it_is_started_has_its_run_cancelled(
    records: Records, monkeypatch: pytest.MonkeyPatch, how: str
):
    """Whoever does it may have tried to, when there was no run yet."""

    async def wait(_: str) -> None:
        await asyncio.sleep(600)

    integration = records.integration(
        component := records.app.component(), records.mapping(TemporalAsyncTask("wait", wait, heartbeat_timeout=2))
    )
    component.register_all(tasks := integration.create_async_tasks())
    on_submit(tasks[0], monkeypatch, lambda _: records.leave(1, how))
    task_id = f"unwanted-{records.app.queue}"
    await records.add(1, task_id=task_id)
    await integration.dispatcher.sweep()
    async with component:
        run = await wait_until(lambda: ended(tasks[0], task_id), timeout=90)
    assert (run.error_type, run.error) == ("TaskCancelledError", "its record was deleted or given up")


async def test_a_record_whose_claim_has_run_out_before_its_turn_waits_for_the_next(
    records: Records, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, one_at_a_time: None
):
    integration = records.integration(
        component := records.app.component(), records.mapping(vendor.task()), lease=(lease := 2.0)
    )
    component.register_all(tasks := integration.create_async_tasks())
    submitted = on_submit(tasks[0], monkeypatch, lambda _: asyncio.sleep(lease))
    await records.add(1, 2)
    await integration.dispatcher.sweep()
    assert (submitted, (await records.get(2)).claims) == (["p1"], 0)
    await integration.dispatcher.sweep()
    assert submitted == ["p1", "p2"]


async def test_a_record_that_another_has_claimed_before_its_turn_is_left_to_it(
    records: Records, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, one_at_a_time: None
):
    integration = records.integration(component := records.app.component(), records.mapping(vendor.task()), lease=60)
    component.register_all(tasks := integration.create_async_tasks())
    store = records.store(integration.records[0])

    async def claim(_: str) -> None:
        async with records.sessions.begin() as session:
            (await session.get_one(Call, 2)).due_at = utc_now()  # a clock that is ahead
        assert [one.key for one in await store.claim(TO_START, 5, timedelta(seconds=600))] == [2]

    submitted = on_submit(tasks[0], monkeypatch, claim)
    await records.add(1, 2)
    await integration.dispatcher.sweep()
    assert submitted == ["p1"]
    assert (await records.get(2)).due_at > utc_now() + timedelta(seconds=300)


async def test_a_record_that_takes_its_dispatcher_down_each_time_is_given_up(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    await records.add(1, claims=10)
    await records.add(2)
    async with component, integration.dispatcher:
        call = await records.becomes("failed", 1)
        await records.becomes("completed", 2)
    assert "claimed 10 times" in str(call.error)


async def test_a_dispatcher_that_is_killed_between_submit_and_commit_loses_nothing(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task()))
    component.register_all(integration.create_async_tasks())
    await records.add(1)
    async with component:
        [mapping] = integration.records
        [claim] = await records.store(mapping).claim(TO_START, 5, timedelta(seconds=1))
        await mapping.task.submit(claim.params, task_id=claim.task_id)  # ... and it dies here
        async with integration.dispatcher:
            await records.becomes("completed")
    assert await records.told() == ["queued", "processing", "completed"]
    assert vendor.calls == ["p1"]


async def test_a_dispatcher_without_its_task_is_refused(records: Records, vendor: Vendor):
    dispatcher = Dispatcher(records.app.component(), records.sessions, records.mapping(vendor.task()))
    with pytest.raises(TaskNotRegisteredError, match="'draw'"):
        await dispatcher.start()
    with pytest.raises(TaskNotRegisteredError, match="'draw'"):
        await dispatcher.run()


async def test_a_flood_waits_in_the_database_and_not_in_the_queue(records: Records, vendor: Vendor):
    component = records.app.component()
    integration = records.integration(component, records.mapping(vendor.task(), max_backlog=15), batch=10)
    await records.add(*range(60))
    async with AggregatedIntegration(integration).running(None, component):

        async def queued() -> int:
            async with records.sessions() as session:
                return len((await session.scalars(select(Call).where(Call.status == "queued"))).all())

        await wait_until(lambda: queued_is(queued, 15), timeout=90)
        await asyncio.sleep(1)
        assert await queued() == 15
        async with records.app.component(*integration.create_async_tasks()):
            for one in range(60):
                await records.becomes("completed", one, timeout=40)


async def queued_is(queued: Callable[[], Any], number: int) -> bool:
    return bool(await queued() == number)


# Reports that arrive --------------------------------------------------------------------------------------


def events(*kinds: RecordStatus | tuple[RecordStatus, dict[str, Any]], first: int = 1) -> tuple[ReportedEvent, ...]:
    pairs = [kind if isinstance(kind, tuple) else (kind, {}) for kind in kinds]
    return tuple(
        ReportedEvent(sequence=number, type=kind, at=utc_now(), payload=payload)
        for number, (kind, payload) in enumerate(pairs, first)
    )


PROCESSING, COMPLETED, FAILED = RecordStatus.PROCESSING, RecordStatus.COMPLETED, RecordStatus.FAILED
KNOWN = (PROCESSING, {"external_id": "job-1"})
DONE = (COMPLETED, {"result": {"url": "x"}})
BROKEN = (FAILED, {"error": "503", "error_type": "E", "retryable": False})
UNAVAILABLE = (FAILED, {"error": "503", "error_type": "E", "retryable": True})


@pytest.mark.parametrize("autoflush", [True, False])
async def test_the_times_of_a_records_events_do_not_go_back_though_each_is_by_another_clock(
    records: Records, vendor: Vendor, autoflush: bool
):
    """Of a dispatcher, and of the workers of two attempts."""
    records.sessions.configure(autoflush=autoflush)
    store = records.store(records.mapping(vendor.task()))
    await records.add(1, task_id="t1")
    [claim] = await store.claim(TO_START, 1, timedelta(seconds=60))
    now, second = utc_now(), timedelta(seconds=1)
    await store.settle([Settled(claim, Event(RecordStatus.QUEUED, now + 9 * second))])
    begun = ReportedEvent(sequence=1, type=PROCESSING, at=now + second)
    await store.apply(Report(task="draw", task_id="t1", generation=1, events=(begun,)))
    known = ReportedEvent(sequence=2, type=PROCESSING, at=now + 11 * second, payload={"external_id": "job-1"})
    failed = ReportedEvent(sequence=3, type=FAILED, at=now, payload=BROKEN[1])
    await store.apply(Report(task="draw", task_id="t1", generation=1, events=(begun, known, failed)))
    assert await records.told() == ["queued", "processing", "processing", "failed"]
    assert [(event.at - now) / second for event in await records.events()] == [9, 9, 11, 11]
    call = await records.get()
    assert (call.started_at, call.completed_at) == (now + 9 * second, now + 11 * second)


class WebProcess:
    """The receiving side, called without a network."""

    def __init__(self, records: Records, vendor: Vendor) -> None:
        component = records.app.component()
        callback = Callback("http://web/integrations/reports", SECRET)
        integration = records.integration(component, records.mapping(vendor.task()), report_to=callback)
        self.app = FastAPI()
        AggregatedIntegration(integration).mount(self.app)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://web")

    async def post(self, body: bytes, *, signature: str | None = None) -> httpx.Response:
        headers = {SIGNATURE_HEADER: sign(body, SECRET) if signature is None else signature}
        return await self._client.post("/integrations/reports", content=body, headers=headers)

    async def report(self, *kinds: Any, generation: int = 1, first: int = 1, task_id: str = "t1") -> httpx.Response:
        told = events(*kinds, first=first)
        return await self.post(Report(task="draw", task_id=task_id, generation=generation, events=told).encode())


@pytest.fixture
async def web(records: Records, vendor: Vendor) -> WebProcess:
    await records.add(1, task_id="t1")
    return WebProcess(records, vendor)


def code(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert set(answer.json()) == {"type", "title", "status", "detail", "code"}
    assert "Traceback" not in answer.text
    return answer.status_code, answer.json()["code"]


async def test_reports_are_applied_in_order_and_once(web: WebProcess, records: Records):
    assert (await web.report(PROCESSING)).json() == {"applied": 1}
    assert (await web.report(PROCESSING)).json() == {"applied": 0}
    assert (await web.report(PROCESSING, KNOWN, DONE)).json() == {"applied": 2}
    assert (await web.report(PROCESSING, KNOWN)).json() == {"applied": 0}  # delayed on its way
    assert (await web.report(PROCESSING, KNOWN, DONE)).json() == {"applied": 0}
    assert await records.told() == ["queued", "processing", "processing", "completed"]
    call = await records.get()
    assert (call.external_id, call.response) == ("job-1", {"url": "x"})


async def test_an_attempt_that_has_less_to_tell_than_the_one_before_it_tells_the_end_all_the_same(
    web: WebProcess, records: Records
):
    assert (await web.report(PROCESSING, KNOWN)).json() == {"applied": 2}
    ends = (COMPLETED, {"result": {"url": "x"}, "external_id": "job-2"})
    assert (await web.report(PROCESSING, ends)).json() == {"applied": 1}
    assert (await web.report(PROCESSING, ends)).json() == {"applied": 0}
    assert (await web.report(PROCESSING, KNOWN)).json() == {"applied": 0}
    assert await records.told() == ["queued", "processing", "processing", "completed"]
    call = await records.get()
    assert (call.external_id, call.response) == ("job-2", {"url": "x"})


async def test_the_end_of_a_run_that_arrives_again_after_it_was_resumed_is_not_applied_again(
    web: WebProcess, records: Records, vendor: Vendor
):
    await web.report(PROCESSING, BROKEN)
    async with records.sessions.begin() as session:
        (await session.get_one(Call, 1)).try_again()
    store = records.store(records.mapping(vendor.task()))
    claims = await store.claim(TO_START, 5, timedelta(seconds=60))
    await store.settle([Settled(claim, Event(RecordStatus.QUEUED, utc_now())) for claim in claims])
    assert (await web.report(PROCESSING, BROKEN)).json() == {"applied": 0}
    assert await records.told() == ["queued", "processing", "failed", "queued"]


async def test_a_report_that_arrives_twice_at_the_same_time_is_applied_once(web: WebProcess, records: Records):
    answers = await asyncio.gather(*(web.report(PROCESSING, KNOWN, DONE) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(answer.json()["applied"] for answer in answers) == 3
    assert await records.told() == ["queued", "processing", "processing", "completed"]


async def test_an_event_out_of_order_is_refused_and_changes_nothing(web: WebProcess, records: Records):
    assert code(await web.report(DONE, first=3)) == (409, "out_of_order")
    assert code(await web.report(DONE, PROCESSING)) == (409, "out_of_order")
    assert await records.told() == []
    assert (await records.get()).status == "pending"
    await web.report(PROCESSING, DONE)
    assert code(await web.report(PROCESSING, DONE, BROKEN)) == (409, "out_of_order")
    assert (await records.get()).status == "completed"


async def test_a_run_that_was_resumed_by_hand_tells_its_events_anew(web: WebProcess, records: Records):
    await web.report(PROCESSING, BROKEN)
    assert (await web.report(PROCESSING, DONE, generation=2)).json() == {"applied": 2}
    assert (await web.report(PROCESSING, BROKEN, generation=1)).json() == {"applied": 0}
    assert await records.told() == ["queued", "processing", "failed", "queued", "processing", "completed"]
    assert (await records.get()).attempts == 2


async def test_what_was_not_signed_with_the_secret_or_long_ago_is_refused(web: WebProcess, records: Records):
    body = Report(task="draw", task_id="t1", generation=1, events=events(PROCESSING)).encode()
    assert code(await web.post(body, signature="")) == (401, "signature_missing")
    other = sign(body, "another secret, as long")
    assert code(await web.post(body, signature=other)) == (401, "signature_wrong")
    assert code(await web.post(body + b" ", signature=sign(body, SECRET))) == (401, "signature_wrong")
    old = utc_now().timestamp() - 400
    assert code(await web.post(body, signature=sign(body, SECRET, timestamp=old))) == (401, "timestamp_old")
    assert await records.told() == []


async def test_an_unknown_record_and_what_is_no_report_are_told(web: WebProcess):
    assert code(await web.report(PROCESSING, task_id="nobody's")) == (404, "unknown_record")
    unknown_task = Report(task="paint", task_id="t1", generation=1, events=events(PROCESSING)).encode()
    assert code(await web.post(unknown_task)) == (404, "unknown_record")
    for body in (b"", b"{}", b"\xff", json.dumps({"task": "draw"}).encode(), b"[" * 10_000):
        assert code(await web.post(body)) == (400, "malformed")
    assert code(await web.post(b" " * 7_000_000)) == (413, "too_large")
    for payload in ({"external_id": 5}, {"external_id": "x" * 256}, {"error": {}}, {"error_type": None}):
        told = {"sequence": 1, "type": "processing", "at": "2026-01-01T00:00:00Z", "payload": payload}
        report = {"task": "draw", "task_id": "t1", "generation": 1, "events": [told]}
        assert code(await web.post(json.dumps(report).encode())) == (400, "malformed")


async def test_what_a_middleware_answers_while_it_reads_is_answered(web: WebProcess):
    """As to a body that is too long for it: the worker must not send it for ever."""

    class Refuses:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def refuse() -> Any:
                raise HTTPException(413)

            await self.app(scope, receive if scope["type"] != "http" else refuse, send)

    web.app.add_middleware(Refuses)
    assert (await web.report(PROCESSING)).status_code == 413


async def test_a_caller_that_goes_away_leaves_no_error_in_the_log(web: WebProcess, caplog: pytest.LogCaptureFixture):
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    path = "/integrations/reports"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": b"", "root_path": "", "query_string": b""}
    await web.app(scope | {"headers": [], "scheme": "http", "http_version": "1.1"}, receive, send)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_database_that_is_away_is_told_without_details(records: Records, vendor: Vendor, engine: AsyncEngine):
    web = WebProcess(records, vendor)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
    assert code(await web.report(PROCESSING)) == (503, "unavailable")


async def test_a_database_that_takes_no_connections_is_told_without_details(
    records: Records, vendor: Vendor, engine: AsyncEngine
):
    """SQLAlchemy hands on what a driver raises when it connects, as "the database system is starting up"."""
    web = WebProcess(records, vendor)

    @event.listens_for(engine.sync_engine, "do_connect")
    def refuse(*_: Any) -> None:
        raise CannotConnectNowError("the database system is starting up")

    assert code(await web.report(PROCESSING)) == (503, "unavailable")


# Settings -------------------------------------------------------------------------------------------------


def test_a_mapping_that_cannot_work_is_refused(vendor: Vendor):
    class Plain(Base):
        __tablename__ = "plain"
        id: Mapped[int] = mapped_column(primary_key=True)
        status: Mapped[str]

    class Sketch(Call):
        __tablename__ = "sketches"
        id: Mapped[int] = mapped_column(ForeignKey("calls.id"), primary_key=True)

    def mapping(**options: Any) -> RecordTask[Any]:
        settings = {"record": Call, "event": CallEvent, "task": vendor.task(), "params": str}
        return RecordTask(**(settings | options))

    with pytest.raises(ConfigError, match=r"Plain lacks attempts, .*APICallMixin"):
        mapping(record=Plain)
    with pytest.raises(ConfigError, match=r"Call lacks sequence, .*IntegrationEventMixin"):
        mapping(event=Call)
    with pytest.raises(ConfigError, match=r"Sketch has status, .* inherits from\. .*where="):
        mapping(record=Sketch)
    with pytest.raises(ConfigError, match="mapped class"):
        mapping(record=dict)
    with pytest.raises(ConfigError, match="max_backlog"):
        mapping(max_backlog=0)
    with pytest.raises(ConfigError, match="check_every"):
        mapping(check_every=0)


def test_a_pool_of_asyncio_connections_is_refused_where_loops_would_share_it():
    pooled = async_sessionmaker(make_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none"))
    with pytest.raises(ConfigError, match="NullPool"):
        DirectReport(pooled)
    DirectReport(sessionmaker())
    with pytest.raises(ConfigError, match="sessionmaker"):
        DirectReport(AsyncSession())  # type: ignore[arg-type]
