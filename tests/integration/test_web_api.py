"""Tasks over HTTP: what each request answers, and what a bad one does."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel

import web
from support import App, wait_until
from temporal_async_task import ConfigError, DuplicateTaskError, TaskStatus, TemporalAsyncTask, async_task
from temporal_async_task.integrations.fastapi import create_task_router

JSON = {"Content-Type": "application/json"}
ORDER = {"prompt": "cup"}


@pytest.fixture
def tasks() -> list[Any]:
    return web.picture_tasks()


@pytest.fixture
async def client(app: App, tasks: list[Any]) -> AsyncIterator[httpx.AsyncClient]:
    """An application with the router under /api, and a worker."""
    await app.start(*tasks)
    async with web.client_of(application(tasks)) as client:
        yield client


def application(tasks: list[Any], **options: Any) -> FastAPI:
    web_app = FastAPI()
    web_app.include_router(create_task_router(tasks, **{"public": True, **options}), prefix="/api")
    return web_app


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """What a problem document says; it is one, with this status."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document = answer.json()
    assert document["status"] == status
    assert {"type", "title", "detail", "code"} <= document.keys()
    assert "Traceback" not in answer.text
    return document


# What goes well --------------------------------------------------------------------------------------------


async def test_a_submit_answers_202_with_the_runs_address_and_its_result_is_there(client: httpx.AsyncClient):
    answer = await client.post("/api/tasks/anything", json={"a": [1, None]})
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/api/tasks/anything/{answer.json()['task_id']}"
    run = (await client.get(answer.headers["location"] + "/result")).json()
    assert (run["status"], run["result"], run["task"]) == ("completed", {"a": [1, None]}, "anything")
    assert (await client.get(answer.headers["location"])).json() == run


async def test_a_result_that_is_not_there_yet_is_202_after_the_wait(client: httpx.AsyncClient):
    where = (await client.post("/api/tasks/approval", json=ORDER)).headers["location"]
    answer = await client.get(where + "/result?wait=0.2")
    assert (answer.status_code, answer.json()["result"]) == (202, None)
    assert answer.json()["status"] in {"pending", "processing"}


async def test_the_same_idempotency_key_is_one_run_and_with_other_params_a_conflict(client: httpx.AsyncClient):
    key = {"Idempotency-Key": "order 1001 / ü".encode()}
    first = await client.post("/api/tasks/approval", json=ORDER, headers=key)
    again = await client.post("/api/tasks/approval", json=ORDER, headers=key)
    other = await client.post("/api/tasks/approval", json={"prompt": "plate"}, headers=key)
    elsewhere = await client.post("/api/tasks/anything", json=ORDER, headers=key)
    assert first.json() == again.json() != elsewhere.json()
    assert problem(other, 409)["code"] == "conflict"


async def test_the_same_key_of_two_callers_is_two_runs_where_keys_have_a_scope(app: App, tasks: list[Any]):
    await app.connect(*tasks)

    async def user(x_user: Annotated[str, Header()]) -> str:
        return x_user

    async with web.client_of(application(tasks, key_scope=user)) as client:
        made = [
            (await client.post("/api/tasks/anything", json=1, headers={"Idempotency-Key": "1", "X-User": name})).json()
            for name in ("ada", "bob", "ada")
        ]
    assert made[0] == made[2] != made[1]


@pytest.mark.parametrize("scope", [lambda: 7, lambda: UUID(int=7), lambda: "7"], ids=["int", "uuid", "str"])
async def test_a_key_whose_scope_is_an_id_of_any_kind_is_one_run(app: App, tasks: list[Any], scope: Any):
    await app.connect(*tasks)
    async with web.client_of(application(tasks, key_scope=scope)) as client:
        key = {"Idempotency-Key": f"of {scope()!r}"}
        made = [await client.post("/api/tasks/anything", json=1, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in made] == [202, 202]
    assert made[0].json() == made[1].json()


class User:
    """What many an application's dependency returns: its text is an address, another for each request."""


class Profile(BaseModel):
    name: str = "lovelace"
    seen: int = 1


async def test_a_key_whose_scope_is_no_id_is_500_and_no_run(app: App, caplog: pytest.LogCaptureFixture):
    @async_task
    async def scoped() -> None:
        pass

    await app.connect(scoped)
    scopes: list[Any] = [User, Profile, lambda: None, lambda: True, lambda: 7.0, lambda: b"7", lambda: ("lovelace", 7)]
    for scope in scopes:
        async with web.client_of(application([scoped], key_scope=scope)) as client:
            caplog.clear()
            answer = await client.post("/api/tasks/scoped", headers={"Idempotency-Key": "1"})
            assert problem(answer, 500)["code"] == "internal"
            assert f"str, an int or a uuid.UUID (the user's id), not {type(scope()).__name__}." in caplog.text
            assert "lovelace" not in caplog.text + answer.text
    async with web.client_of(application([scoped], key_scope=User)) as client:
        without_key = (await client.post("/api/tasks/scoped")).json()["task_id"]  # nobody asks for its scope
    listed = await wait_until(lambda: listed_runs(scoped))
    assert listed == [without_key]


async def listed_runs(task: TemporalAsyncTask[Any, Any]) -> list[str]:
    return [run.task_id async for run in task.list()]


@pytest.mark.parametrize(
    ("name", "body", "result"),
    [("maybe", "null", None), ("maybe", "3", 3), ("no_params", "", "/wA="), ("anything", '"text"', "text")],
)
async def test_plain_params_and_results_of_any_kind(client: httpx.AsyncClient, name: str, body: str, result: Any):
    """Bytes, which JSON does not have, are Base64."""
    answer = await client.post(f"/api/tasks/{name}", content=body, headers=JSON if body else {})
    assert answer.status_code == 202, answer.text
    run = (await client.get(answer.headers["location"] + "/result")).json()
    assert (run["status"], run["result"]) == ("completed", result)


async def test_cancel_and_resume(client: httpx.AsyncClient, tasks: list[Any]):
    web.gate.clear()
    where = (await client.post("/api/tasks/mended_later", json="x")).headers["location"]
    run = (await client.get(where + "/result")).json()
    assert (run["status"], run["error_type"], run["completed_steps"]) == ("failed", "StepFailedError", ["first"])
    assert (await client.post(where + "/cancel")).status_code == 202  # of a run that has ended nothing changes
    web.gate.set()
    assert (await client.post(where + "/resume", json={})).status_code == 202
    run = (await client.get(where + "/result")).json()
    assert (run["status"], run["result"]) == ("completed", "mended")
    assert problem(await client.post(where + "/resume"), 409)["code"] == "conflict"


async def test_a_cancelled_run_tells_the_reason(client: httpx.AsyncClient):
    where = (await client.post("/api/tasks/approval", json=ORDER)).headers["location"]
    assert (await client.post(where + "/cancel", json={"reason": "the customer left"})).status_code == 202
    run = (await client.get(where + "/result")).json()
    assert (run["status"], run["error_type"], run["error"]) == ("failed", "TaskCancelledError", "the customer left")


async def test_runs_are_listed_by_status_and_in_pages(client: httpx.AsyncClient, tasks: list[Any]):
    anything = tasks[-1]
    ids = [await anything.submit(number) for number in range(5)]
    for task_id in ids:
        await anything.result(task_id)

    async def listed() -> Any:
        page = (await client.get("/api/tasks/anything?status=completed&limit=100")).json()
        return page if len(page["runs"]) >= 5 else None

    whole = await wait_until(listed, timeout=90)
    found, query = [], "?status=completed&limit=2"
    while query:
        page = (await client.get("/api/tasks/anything" + query)).json()
        assert len(page["runs"]) <= 2
        found += page["runs"]
        query = page["next"]
    assert [run["task_id"] for run in found] == [run["task_id"] for run in whole["runs"]]
    assert set(ids) <= {run["task_id"] for run in found}
    assert "result" not in found[0]
    assert (await client.get("/api/tasks/anything?status=failed")).json() == {"runs": [], "next": None}


async def test_a_page_of_runs_that_go_on_counts_only_those(app: App, tasks: list[Any]):
    """Whether a run has begun is known by the run alone, so these pages are counted there."""
    await app.connect(*tasks)
    approval = tasks[1]
    ids = [await approval.submit(web.Order("cup")) for _ in range(3)]

    async def listed() -> list[str]:
        return [run.task_id async for run in approval.list(status="pending")]

    await wait_until(lambda: _holds(listed, ids), timeout=90)
    whole = await listed()
    assert [run.task_id async for run in approval.list(status="pending", skip=1, limit=1)] == whole[1:2]
    assert [run.task_id async for run in approval.list(skip=2)][:1] == whole[2:3]


async def _holds(listed: Any, ids: list[str]) -> bool:
    return set(ids) <= set(await listed())


async def test_a_run_whose_id_has_a_slash_is_reached(client: httpx.AsyncClient, tasks: list[Any]):
    task_id = await tasks[-1].submit(1, task_id="orders/2026 #1?")
    for address in ("orders%2F2026%20%231%3F", "orders/2026%20%231%3F"):
        run = (await client.get(f"/api/tasks/anything/{address}/result")).json()
        assert (run["task_id"], run["result"]) == (task_id, 1)


async def test_openapi_shows_each_tasks_own_params_and_result(tasks: list[Any]):
    document = application(tasks).openapi()
    schemas = document["components"]["schemas"]
    submit = document["paths"]["/api/tasks/product_shot"]["post"]
    status = document["paths"]["/api/tasks/product_shot/{task_id}"]["get"]
    assert submit["operationId"] == "submit_product_shot"
    body = submit["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert schemas[body]["properties"].keys() == {"prompt", "size"}
    run = status["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert {"$ref": "#/components/schemas/Picture"} in schemas[run]["properties"]["result"]["anyOf"]
    assert "requestBody" not in document["paths"]["/api/tasks/no_params"]["post"]
    ids = [verb["operationId"] for path in document["paths"].values() for verb in path.values()]
    assert len(ids) == len(set(ids)) == 1 + 7 * len(tasks)
    assert "detail" in schemas["TaskProblem"]["properties"]


# What does not ---------------------------------------------------------------------------------------------


def test_without_a_dependency_it_is_not_mounted_unless_that_is_meant(tasks: list[Any]):
    with pytest.raises(ConfigError, match=r"dependencies=\[Depends\(your_auth\)\], or public=True"):
        create_task_router(tasks)


async def test_every_path_stands_behind_the_dependencies(tasks: list[Any]):
    def refuse() -> None:
        raise HTTPException(401, "Who are you?", headers={"WWW-Authenticate": "Bearer"})

    web_app = FastAPI()
    web_app.include_router(create_task_router(tasks, dependencies=[Depends(refuse)]))
    paths = ["", "/ui", "/ui/tasks.js", "/nothing", "/anything", *(f"/anything/x{end}" for end in ENDS)]
    async with web.client_of(web_app) as client:
        for path in paths:
            answer = await client.get("/tasks" + path)
            assert problem(answer, 401)["detail"] == "Who are you?"
            assert answer.headers["www-authenticate"] == "Bearer"
        for end in ("", "/x/cancel", "/x/resume"):
            problem(await client.post(f"/tasks/anything{end}", content="1", headers=JSON), 401)


ENDS = ("", "/result", "/events")


@pytest.mark.parametrize("end", ENDS)
async def test_an_unknown_run_and_another_tasks_run_answer_alike(client: httpx.AsyncClient, tasks: list[Any], end: str):
    other = await tasks[1].submit(web.Order("cup"))
    answers = [
        await client.get(f"/api/tasks/anything/{task_id}{end}") for task_id in ("unknown", other, "%00", "x" * 300)
    ]
    assert len({json.dumps(problem(answer, 404)) for answer in answers}) == 1


@pytest.mark.parametrize("verb", ["cancel", "resume"])
async def test_an_unknown_run_cannot_be_changed(client: httpx.AsyncClient, tasks: list[Any], verb: str):
    other = await tasks[1].submit(web.Order("cup"))
    for task_id in ("unknown", other, "%00"):
        problem(await client.post(f"/api/tasks/anything/{task_id}/{verb}"), 404)


async def test_an_unknown_task_and_a_method_that_is_not_there(client: httpx.AsyncClient):
    problem(await client.get("/api/tasks/nothing"), 404)
    problem(await client.post("/api/tasks/nothing", json={}), 404)
    answer = await client.delete("/api/tasks/anything/1")
    problem(answer, 405)
    assert answer.headers["allow"] == "GET, HEAD"
    assert (await client.head("/api/tasks/anything")).status_code == 200


@pytest.mark.parametrize(
    "body",
    ["{nope", "", b"\xff", "NaN", '"\\ud800"', "[" * 100_000, '{"prompt": Infinity}', "1" * 5000],
    ids=lambda body: repr(body)[:12],
)
async def test_what_is_not_json_is_a_problem(client: httpx.AsyncClient, body: str | bytes):
    answer = await client.post("/api/tasks/product_shot", content=body, headers=JSON)
    assert answer.status_code in {400, 422}
    problem(answer, answer.status_code)


async def test_params_that_do_not_fit_are_named_and_not_repeated(client: httpx.AsyncClient):
    answer = await client.post("/api/tasks/product_shot", json={"prompt": ["secret"], "size": "big"})
    errors = problem(answer, 422)["errors"]
    assert [(error["where"], error["pointer"]) for error in errors] == [("body", "/prompt"), ("body", "/size")]
    assert "secret" not in answer.text
    problem(await client.get("/api/tasks/product_shot?limit=1000"), 422)


async def test_params_fit_to_the_letter_and_are_read_as_json(app: App):
    """What pydantic would make of other values (a number of true, a set of text) is not in the document."""

    @dataclass
    class Visit:
        day: date
        guests: int
        tags: set[str]
        notes: dict[int, Decimal]
        id: UUID
        kind: TaskStatus
        share: float

    @async_task
    async def visit(params: Visit) -> Visit:
        return params

    await app.start(visit)
    good = {
        "day": "2026-05-04", "guests": 2, "tags": ["a"], "notes": {"1": "2.50"},
        "id": "12345678-1234-5678-1234-567812345678", "kind": "failed", "share": 1,
    }  # fmt: skip
    async with web.client_of(application([visit])) as client:
        for bad in ({"guests": True}, {"guests": "2"}, {"share": "1.0"}, {"tags": "a"}, {"kind": "other"}):
            problem(await client.post("/api/tasks/visit", json=good | bad), 422)
        where = (await client.post("/api/tasks/visit", json=good)).headers["location"]
        assert (await client.get(where + "/result")).json()["result"] == good


async def test_a_body_over_the_limit_is_refused_while_it_is_read(app: App, tasks: list[Any]):
    await app.connect(*tasks)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    async with web.client_of(application(tasks, max_body=10_000)) as client:
        problem(await client.post("/api/tasks/anything", content=endless(), headers=JSON), 413)
        problem(await client.post("/api/tasks/anything", content=b" " * 10_001, headers=JSON), 413)
        assert (await client.post("/api/tasks/anything", content=b"1" + b" " * 9_999, headers=JSON)).status_code == 202
    assert sent <= 12_000


async def test_params_over_temporals_limit_are_413(client: httpx.AsyncClient):
    problem(await client.post("/api/tasks/anything", json="x" * (2 * 1024 * 1024 - 3000)), 413)


async def test_a_form_of_another_site_cannot_submit_or_cancel(client: httpx.AsyncClient):
    """It cannot say that it sends JSON, unless the application's CORS rules allow it."""
    form = {"Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}
    problem(await client.post("/api/tasks/anything", content="{}", headers=form), 415)
    problem(await client.post("/api/tasks/no_params", headers={"Sec-Fetch-Site": "cross-site"}), 403)
    for origin in ("http://elsewhere.example", "null"):  # to plain http browsers tell nothing but the origin
        problem(await client.post("/api/tasks/no_params", headers={"Origin": origin}), 403)
    own = {"Origin": str(client.base_url).rstrip("/")}
    assert (await client.post("/api/tasks/no_params", headers=own)).status_code == 202


async def test_a_task_that_is_not_connected_is_503_with_retry_after(tasks: list[Any]):
    async with web.client_of(application(tasks)) as client:
        for path in ("anything", "anything/x", "anything/x/result", "anything/x/events"):
            answer = await client.get(f"/api/tasks/{path}")
            assert problem(answer, 503)["code"] == "unavailable"
            assert int(answer.headers["retry-after"]) > 0


async def test_an_error_inside_says_nothing_of_itself(tasks: list[Any], monkeypatch: pytest.MonkeyPatch):
    async def broken(*_: object) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(tasks[-1], "get_status", broken)
    async with web.client_of(application(tasks)) as client:
        answer = await client.get("/api/tasks/anything/x")
    assert problem(answer, 500)["code"] == "internal"
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("name", ["a/b", "..", "{x}", "ui", "a?b"])
def test_a_task_whose_name_cannot_stand_in_a_url_is_refused(name: str):
    async def body() -> None: ...

    with pytest.raises(ConfigError, match=r"URL|where the page is"):
        create_task_router([TemporalAsyncTask(name, body)], public=True)


def test_what_makes_no_router_is_refused(tasks: list[Any]):
    class Opaque:
        pass

    @async_task
    async def opaque(value: Opaque) -> None: ...

    async def other() -> None: ...

    with pytest.raises(ConfigError, match="no task"):
        create_task_router([], public=True)
    with pytest.raises(DuplicateTaskError):
        create_task_router([*tasks, TemporalAsyncTask("anything", other)], public=True)
    with pytest.raises(ConfigError, match="cannot be read from JSON"):
        create_task_router([opaque], public=True)
    with pytest.raises(ConfigError, match="Depends"):
        create_task_router(tasks, dependencies=[other])  # type: ignore[list-item]


async def test_a_result_that_is_not_json_says_so(app: App, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    """As of an application with a data converter of its own."""
    where = (await client.post("/api/tasks/anything", json=1)).headers["location"]
    await client.get(where + "/result")
    monkeypatch.setattr("temporal_async_task.integrations._run_document.to_json", lambda *_, **__: 1 / 0)
    answer = await client.get(where)
    assert answer.status_code == 200
    assert (answer.json()["result"], answer.json()["error_type"]) == (None, "ResultError")


# By the document -------------------------------------------------------------------------------------------


def fuzz_command(address: str, folder: Path) -> list[str]:
    # One thread: CPython 3.11's ast.parse, which Hypothesis uses, may fail in two at once ("recursion depth mismatch").
    return [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{address}/openapi.json",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "5", "--seed", "1", "--no-shrink", "--workers", "1",
        "--generation-database", "none", "--report-dir", str(folder), "--continue-on-failure",
    ]  # fmt: skip


@pytest.mark.slow
async def test_whatever_the_document_allows_or_forbids_gets_an_answer_that_it_describes(
    app: App, tasks: list[Any], tmp_path: Path
):
    """Requests made up from the OpenAPI document, good and bad ones: no 5xx, and nothing undocumented."""
    served = [tasks[0], *tasks[3:5]]  # a model, nothing, a plain type
    await app.start(*served)
    async with web.serving(application(served)) as address:
        process = await asyncio.create_subprocess_exec(
            *fuzz_command(address, tmp_path),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-8000:]
