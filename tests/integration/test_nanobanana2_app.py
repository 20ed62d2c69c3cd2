"""The example as a whole, but for its processes: web application, database, Temporal, a worker, and the stub."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import sqlite3
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession

from ark import serving, serving_stub
from nanobanana2_image import stub_pictures
from nanobanana2_image.app import create_app
from nanobanana2_image.entities import APICall, create_engine, create_tables
from nanobanana2_image.integration import NanoBanana2ImageIntegration, create_integration
from nanobanana2_image.pictures import read_picture
from nanobanana2_image.settings import Settings
from nanobanana2_image.stub_api import Fault, Stub
from support import App, wait_until
from temporal_async_task import AsyncTaskComponentConfig, StepState, StepStatus, TemporalAsyncTask
from temporal_async_task.integrations.lifecycle import Event, RecordStatus, state_after

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = "a secret of the tests"  # noqa: S105
CUP = stub_pictures.sample("cup")


class Shop:
    """The web application, as its users see it; and what it runs on."""

    def __init__(self, stub: Stub, stub_url: str, http: httpx.Client, app: App, settings: Settings) -> None:
        self.stub = stub
        self.stub_url = stub_url
        self.http = http
        self._app = app
        self._settings = settings

    async def start_worker(self) -> None:
        component = self._app.component()
        component.register_all(create_integration(component, self._settings).create_async_tasks())
        await component.start()

    def order(self, **changes: Any) -> httpx.Response:
        sources = {f"{name}_image_url": f"{self.stub_url}/samples/cup.png" for name in ("source", "uploaded")}
        return self.http.post("/api/calls", json={"kind": "picture", "prompt": "a cup", **sources, **changes})

    def call(self, call_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/api/calls/{call_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    async def ended(self, call_id: str, status: str = "completed") -> dict[str, Any]:
        """The call, when it has ended so."""
        found: dict[str, Any] = {}

        async def has_ended() -> bool:
            found.update(await asyncio.to_thread(self.call, call_id))
            return found["status"] == status

        await wait_until(has_ended, timeout=90, interval=0.1)
        return found

    def events(self, call_id: str) -> list[dict[str, Any]]:
        return self.http.get(f"/api/calls/{call_id}/events").json()  # type: ignore[no-any-return]


@pytest.fixture
def shop(app: App, tmp_path: Path, database_url: str) -> Iterator[Shop]:
    """On both kinds of database."""
    yield from opened(app, tmp_path, database_url)


@pytest.fixture
def sqlite_shop(app: App, tmp_path: Path) -> Iterator[Shop]:
    """On SQLite, where the database does not matter."""
    yield from opened(app, tmp_path, f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")


def opened(app: App, folder: Path, database_url: str) -> Iterator[Shop]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings: dict[str, Any] = {
        "database_url": database_url,
        "callback_url": f"{url}/integrations/reports",
        "callback_secret": SECRET,
        "video_poll_every": 1.0,
    }
    with serving_stub(folder / "media", **settings) as (stub, stub_url, complete):
        config = AsyncTaskComponentConfig(temporal_address=app.address, task_queue=app.queue)
        web = create_app(complete, config)
        with serving(web, port=port, lifespan="on"), httpx.Client(base_url=url, timeout=20) as http:
            yield Shop(stub, stub_url, http, app, complete)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def test_an_ordered_picture_is_made_stored_and_shown(shop: Shop) -> None:
    await shop.start_worker()
    upload = shop.http.post("/api/pictures", content=stub_pictures.sample("fox"))
    assert upload.status_code == 201, upload.text
    assert (upload.json()["width"], upload.json()["height"], upload.json()["format"]) == (480, 360, "image/png")
    created = shop.order(uploaded_image_url=upload.json()["url"], prompt="  a fox in a cup ")
    assert created.status_code == 201, created.text
    assert (created.json()["status"], created.json()["attempts"]) == ("pending", 0)

    call = await shop.ended(created.json()["id"])
    assert (call["attempts"], call["error"], call["request_params"]["prompt"]) == (1, None, "a fox in a cup")
    assert call["response"] == call["response"] | {"width": 768, "height": 512, "format": "image/png"}
    assert {step["state"] for step in call["steps"]} == {"completed"}
    keys = [step["key"] for step in call["steps"]]
    assert sorted(keys[:2]) == ["fetch source image", "fetch uploaded image"]  # at the same time
    assert keys[2:] == ["generate", "store"]
    shown = shop.http.get(call["response"]["merged_image_url"])
    assert (shown.headers["content-type"], shown.headers["x-content-type-options"]) == ("image/png", "nosniff")
    assert shown.content == stub_pictures.painted("a fox in a cup", [CUP, stub_pictures.sample("fox")])
    [made] = shop.stub.generations
    assert made.prompt == "a fox in a cup"

    events = shop.events(call["id"])
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    state = state_after(Event(RecordStatus(event["type"]), event["at"], event["payload"]) for event in events)
    assert (state.status, state.attempts, state.response) == ("completed", 1, call["response"]), "it all follows"


async def test_a_video_is_waited_for_and_its_record_knows_the_vendors_id_meanwhile(sqlite_shop: Shop) -> None:
    shop = sqlite_shop
    shop.stub.video_seconds = 3600.0
    await shop.start_worker()
    order = {"kind": "video", "prompt": "a fox", "image_url": f"{shop.stub_url}/samples/fox.png"}
    call_id = shop.http.post("/api/calls", json=order).json()["id"]

    async def vendors_id() -> Any:
        return (await asyncio.to_thread(shop.call, call_id))["external_id"]  # not on the loop that the worker is on

    assert (await wait_until(vendors_id, timeout=90, interval=0.1)).startswith("cgt-")
    call = shop.call(call_id)
    assert call["status"] == "processing", call["error"]
    shop.stub.finish_videos()
    call = await shop.ended(call_id)
    video = shop.http.get(call["response"]["video_url"])
    assert video.headers["content-type"] == "video/mp4"
    assert video.content[4:8] == b"ftyp"
    assert call["response"] == call["response"] | {"size": len(video.content), "format": "video/mp4"}
    assert [(made.kind, made.images) for made in shop.stub.generations] == [("video", 1)]


async def test_faults_that_pass_are_waited_out_and_the_picture_is_paid_for_once(sqlite_shop: Shop) -> None:
    shop = sqlite_shop
    shop.stub.faults += [
        Fault(route="images", kind="429", retry_after=2),
        Fault(route="images", kind="500"),
        Fault(route="files", kind="500"),
    ]
    await shop.start_worker()
    call = await shop.ended(shop.order().json()["id"])
    steps = {step["key"]: step["attempts"] for step in call["steps"]}
    assert (steps["generate"], steps["store"]) == (3, 2)
    assert len(shop.stub.generations) == 1


async def test_what_the_vendor_refuses_is_told_and_a_person_may_have_it_tried_again(sqlite_shop: Shop) -> None:
    shop = sqlite_shop
    shop.stub.faults.append(Fault(route="images", kind="error_inside"))
    await shop.start_worker()
    call_id = shop.order().json()["id"]
    failed = await shop.ended(call_id, "failed")
    assert "OutputImageSensitiveContentDetected: It cannot be done." in failed["error"]
    assert "Traceback" not in str(failed)
    assert failed["next_try_at"] is None, "another try would not help, so none is made"
    assert shop.stub.generations == []

    assert shop.http.post(f"/api/calls/{call_id}/try-again").status_code == 202
    completed = await shop.ended(call_id)
    assert completed["attempts"] == 2
    assert [step["attempts"] for step in completed["steps"] if step["key"].startswith("fetch")] == [1, 1]
    assert len(shop.stub.generations) == 1
    assert shop.http.post(f"/api/calls/{call_id}/try-again").status_code == 409


async def test_steps_that_are_shown_are_no_older_than_the_record(
    sqlite_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page asks no more once a record has ended: what it shows then, it shows for ever."""
    shop = sqlite_shop
    state = "running"

    async def report_arrives(integration: NanoBanana2ImageIntegration, _: Any, call_id: str) -> bool:
        nonlocal state
        async with integration._sessions.begin() as session:
            (await session.get_one(APICall, call_id)).status = "failed"
        state = "failed"
        return False

    async def get_status(*_: Any) -> Any:
        step = StepStatus(key="generate", state=StepState(state), attempts=1)
        return SimpleNamespace(steps=(step,))

    call_id = shop.order().json()["id"]
    await shop.ended(call_id, "queued")
    monkeypatch.setattr(NanoBanana2ImageIntegration, "refresh", report_arrives)
    monkeypatch.setattr(TemporalAsyncTask, "get_status", get_status)
    call = shop.call(call_id)
    assert (call["status"], [step["state"] for step in call["steps"]]) == ("failed", ["failed"])


async def test_an_id_that_is_none_is_not_found(shop: Shop) -> None:
    for call_id in ("unknown", "%00", "0" * 33, "%ff", "x" * 5000):
        for path, method in (("", "GET"), ("/events", "GET"), ("/try-again", "POST")):
            answer = shop.http.request(method, f"/api/calls/{call_id}{path}")
            assert (answer.status_code, answer.json()["detail"]) == (404, "There is no such call.")


async def test_sources_that_would_burst_the_journal_do_not(sqlite_shop: Shop) -> None:
    """Two pictures of 3 MB each: as base64 in the journal, they would be four times what it may hold."""
    shop = sqlite_shop
    await shop.start_worker()
    urls = []
    for _ in range(2):
        file = io.BytesIO()
        Image.frombytes("RGB", (1000, 1000), os.urandom(3_000_000)).save(file, "PNG")
        urls.append(shop.http.post("/api/pictures", content=file.getvalue()).json()["url"])
    call = await shop.ended(shop.order(source_image_url=urls[0], uploaded_image_url=urls[1]).json()["id"])
    assert read_picture(shop.http.get(call["response"]["merged_image_url"]).content).width == 768


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": ""}, "prompt: The prompt is empty"),
        ({"prompt": " \n\t "}, "prompt: The prompt is empty"),
        ({"prompt": "x" * 100_000}, "prompt: The prompt has 100,000 characters; the limit is 4,000."),
        ({"prompt": None}, "prompt: "),
        ({"prompt": "a\0b"}, "prompt: The prompt holds what is no character"),
        ({"source_image_url": "/media/source-unknown.png"}, "There is no source-unknown.png"),
        ({"source_image_url": "/media/../app.db"}, "cannot be a file's name"),
        ({"prompt": ["a"]}, "prompt: "),
        ({"kind": "sculpture"}, "Input tag 'sculpture'"),
        ({"source_image_url": None}, "source_image_url: "),
        ({"source_image_url": ""}, "source_image_url: "),
        ({"source_image_url": "x" * 3000}, "source_image_url: String should have at most 2048 characters"),
        ({"source_image_url": "http://169.254.169.254/latest/meta-data"}, "Nothing is fetched from 169.254.169.254"),
        ({"uploaded_image_url": "http://localhost:1/"}, "Nothing is fetched from localhost:1"),
        ({"uploaded_image_url": "file:///etc/passwd"}, "must begin with http"),
    ],
)
def test_an_order_that_cannot_be_is_refused_with_the_reason(
    refusing: httpx.Client, changes: dict[str, Any], told: str
) -> None:
    sources = {f"{name}_image_url": "http://pictures.example/cup.png" for name in ("source", "uploaded")}
    answer = refusing.post("/api/calls", json={"kind": "picture", "prompt": "a cup", **sources, **changes})
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert len(answer.content) < 400, "what was sent is not sent back"
    assert refusing.get("/api/calls").json() == [], "and nothing was written"


def test_a_body_that_is_no_json_is_told(refusing: httpx.Client) -> None:
    answer = refusing.post("/api/calls", content=b'{"kind": ', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("The body is no JSON: ")


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/api/calls", {"content": b"{"}, 422),
        ("POST", "/api/calls", {"content": b"\xff"}, 400),
        ("POST", "/api/calls", {"content": b'{"kind": "video", "prompt": "\\ud800"}'}, 422),
        ("POST", "/api/calls", {"content": b"x" * 11_000_000}, 413),
        ("POST", "/api/pictures", {"content": b"x" * 11_000_000}, 413),
        ("POST", "/api/pictures", {"content": b""}, 422),
        ("POST", "/api/pictures", {"content": b"<svg/>"}, 422),
        ("POST", "/api/pictures", {"content": stub_pictures.huge()}, 422),
        ("GET", "/api/calls/unknown", {}, 404),
        ("GET", "/api/calls/unknown/events", {}, 404),
        ("POST", "/api/calls/unknown/try-again", {}, 404),
        ("GET", "/media/unknown.png", {}, 404),
        ("GET", "/media/..%2fapp.db", {}, 404),
        ("GET", "/media/../app.db", {}, 404),
        ("GET", "/", {"headers": {"Host": "elsewhere.example"}}, 400),
        ("POST", "/integrations/reports", {"content": b"{}"}, 401),
        ("POST", "/integrations/reports", {"content": b"{}", "headers": {"Async-Task-Signature": "t=1,v1=00"}}, 401),
    ],
)
def test_no_request_is_answered_with_what_is_inside(
    refusing: httpx.Client, method: str, path: str, options: Any, status: int
) -> None:
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    answer = refusing.request(method, path, headers=headers, **options)
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """An application without Temporal: it starts, takes orders, and refuses what is wrong with them."""
    folder = tmp_path_factory.mktemp("app")
    settings = Settings(
        database_url=f"sqlite+aiosqlite:///{folder / 'app.db'}",
        media_dir=folder / "media",
        callback_secret=SECRET,
        picture_hosts=("pictures.example",),
    )
    web = create_app(settings, AsyncTaskComponentConfig(temporal_address="127.0.0.1:1"))
    with serving(web, lifespan="on") as url, httpx.Client(base_url=url, timeout=20) as http:
        yield http


def test_without_temporal_orders_are_taken_and_wait(refusing: httpx.Client) -> None:
    """The last test of its application: it leaves a record."""
    order = {"kind": "video", "prompt": "a fox"}
    call = refusing.post("/api/calls", json=order).json()
    found = refusing.get(f"/api/calls/{call['id']}").json()
    assert (found["status"], found["steps"]) == ("pending", None)


def test_all_columns_that_the_application_reads_are_the_records(refusing: httpx.Client) -> None:
    names = {"id", "status", "started_at", "attempts", "external_id", "request_params", "response"}
    assert names <= set(APICall.__table__.columns.keys())
    assert names <= set(refusing.get("/api/calls").json()[0])


async def test_web_processes_that_start_at_once_on_an_empty_database_all_find_their_tables(database_url: str):
    engines = [create_engine(database_url) for _ in range(6)]
    await asyncio.gather(*(create_tables(engine) for engine in engines))
    for engine in engines:
        async with AsyncSession(engine) as session:
            assert (await session.scalars(select(APICall))).all() == []
        await engine.dispose()


async def test_a_web_process_starts_while_another_makes_the_same_tables(tmp_path: Path):
    """It would be told so at once, and not after a timeout: a file that is written to is not brought to WAL."""
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        engine = create_engine(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
        refused = asyncio.Event()
        event.listen(engine.sync_engine, "handle_error", lambda _: refused.set())
        making = asyncio.create_task(create_tables(engine))
        await asyncio.wait_for(refused.wait(), 10)
        other.execute("COMMIT")
        await making
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        await engine.dispose()
