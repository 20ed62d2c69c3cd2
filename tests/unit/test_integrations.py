"""Integrations and their aggregate: the web process takes all of their parts, a worker takes the tasks."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from support import wait_until
from temporal_async_task import (
    AsyncTaskComponent,
    AsyncTaskComponentConfig,
    ConfigError,
    DuplicateTaskError,
    TemporalAsyncTask,
)
from temporal_async_task.devserver import DevServer
from temporal_async_task.integrations.base import AggregatedIntegration, Integration
from temporal_async_task.integrations.reported import reported

NOWHERE = AsyncTaskComponentConfig(temporal_address="127.0.0.1:1")


def task(name: str) -> TemporalAsyncTask[None, None]:
    async def nothing() -> None:
        pass

    return TemporalAsyncTask(name, nothing)


class Effect:
    def __init__(self) -> None:
        self.installed = 0

    def install(self) -> None:
        self.installed += 1

    def remove(self) -> None:
        self.installed -= 1


class Header:
    def __init__(self, app: Any, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {}).setdefault("seen", []).append(self.name)
        await self.app(scope, receive, send)


class Pictures(Integration):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.effect = name, log, Effect()
        self.task = task(name)

    async def configure(self) -> None:
        self.log.append(f"{self.name} configured")

    async def setup(self, app: Any) -> None:  # noqa: ARG002
        self.log.append(f"{self.name} set up")

    async def teardown(self, app: Any) -> None:  # noqa: ARG002
        self.log.append(f"{self.name} torn down")

    def create_side_effects(self):
        return [self.effect]

    def create_async_tasks(self):
        return [self.task]

    def create_middlewares(self):
        return [Middleware(Header, name=self.name)]

    def create_apis(self):
        router = APIRouter()
        router.add_route(f"/{self.name}", lambda request: JSONResponse(request.state.seen))
        return [router]


async def test_the_web_process_takes_all_parts_in_order_and_leaves_them_in_reverse():
    log: list[str] = []
    one, two = Pictures("one", log), Pictures("two", log)
    aggregate = AggregatedIntegration(one, two)
    component = AsyncTaskComponent(NOWHERE)
    app = FastAPI(lifespan=aggregate.lifespan(component))
    aggregate.mount(app)
    async with app.router.lifespan_context(app):
        assert log == ["one configured", "two configured", "one set up", "two set up"]
        assert (one.effect.installed, two.effect.installed) == (1, 1)
        assert component.tasks == (one.task, two.task)
        assert not component.is_started
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            assert (await client.get("/two")).json() == ["one", "two"]  # the first middleware is the outermost
    assert log[4:] == ["two torn down", "one torn down"]
    assert (one.effect.installed, two.effect.installed) == (0, 0)


def test_the_worker_process_takes_the_tasks_only():
    log: list[str] = []
    aggregate = AggregatedIntegration(Pictures("one", log), Pictures("two", log))
    component = AsyncTaskComponent(NOWHERE)
    component.register_all(aggregate.create_async_tasks())
    assert [one.name for one in component.tasks] == ["one", "two"]
    assert log == []


def test_the_tasks_are_the_same_objects_each_time():
    made = AggregatedIntegration(SimpleNamespace(create_async_tasks=lambda: [task("fresh")]))
    assert made.create_async_tasks() == made.create_async_tasks()


async def test_every_part_is_optional():
    class Nothing(Integration):
        pass

    aggregate = AggregatedIntegration(SimpleNamespace(setup=lambda _: None), Nothing())
    assert (aggregate.create_async_tasks(), aggregate.create_apis(), aggregate.create_middlewares()) == ((), (), ())
    await aggregate.configure()
    await aggregate.setup(None)
    await aggregate.teardown(None)


def test_what_has_no_part_is_refused():
    with pytest.raises(ConfigError, match="is no integration"):
        AggregatedIntegration(object())
    with pytest.raises(ConfigError, match="is no integration"):
        AggregatedIntegration(Pictures)  # the class, not one of it


def test_two_tasks_of_one_name_are_refused():
    log: list[str] = []
    with pytest.raises(DuplicateTaskError, match="'one'"):
        AggregatedIntegration(Pictures("one", log), Pictures("one", log)).create_async_tasks()


def test_of_two_tasks_that_report_the_functions_are_named_that_were_written():
    reporter: Any = None
    one, two = (SimpleNamespace(create_async_tasks=lambda: [reported(task("one"), to=reporter)]) for _ in range(2))
    with pytest.raises(DuplicateTaskError, match=rf"{task.__module__}\.task\.<locals>\.nothing and "):
        AggregatedIntegration(one, two).create_async_tasks()


async def test_one_that_fails_to_start_has_those_before_it_torn_down():
    log: list[str] = []

    async def fail(app: Any) -> None:
        raise RuntimeError("no bucket")

    aggregate = AggregatedIntegration(Pictures("one", log), SimpleNamespace(setup=fail))
    with pytest.raises(RuntimeError, match="no bucket"):
        async with aggregate.running(None, AsyncTaskComponent(NOWHERE)):
            pass
    assert log == ["one configured", "one set up", "one torn down"]


async def test_an_error_in_a_teardown_keeps_no_other_up(caplog: pytest.LogCaptureFixture):
    log: list[str] = []
    aggregate = AggregatedIntegration(Pictures("one", log), SimpleNamespace(teardown=lambda _: 1 / 0))
    with caplog.at_level(logging.ERROR):
        await aggregate.teardown(None)
    assert log == ["one torn down"]
    assert "ZeroDivisionError" in caplog.text


async def test_the_web_process_starts_without_a_server_and_connects_when_there_is_one():
    log: list[str] = []
    server = DevServer()
    async with server:
        address = server.address
        await server.stop()
        component = AsyncTaskComponent(AsyncTaskComponentConfig(temporal_address=address))
        async with AggregatedIntegration(Pictures("one", log)).running(None, component):
            await asyncio.sleep(0.3)
            assert log == ["one configured", "one set up"]
            await server.start()
            await wait_until(lambda: component._client is not None, timeout=30)
