"""The routes of one task."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Annotated, Any, cast
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Body, Depends, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from temporal_async_task.checks import check_text
from temporal_async_task.errors import ConfigError, InvalidKeyError, TaskNotFoundError
from temporal_async_task.integrations._events import (
    EventStream,
    Snapshot,
    StreamsClosedError,
    Watch,
    Watches,
    disconnected,
    events,
)
from temporal_async_task.integrations._problems import (
    NO_STORE,
    RETRY_AFTER,
    answered,
    documented,
    problem_response,
)
from temporal_async_task.integrations._run_document import RunDocuments, RunSummary
from temporal_async_task.status import TaskResult, TaskStatus
from temporal_async_task.task import TemporalAsyncTask

MAX_WAIT = 60.0
"""Seconds that a request for a result may ask to wait."""
DEFAULT_WAIT = 25.0
"""Seconds; below the 30 after which many proxies give up."""
MAX_PAGE, MAX_OFFSET = 100, 10_000

_BODY_PROBLEMS = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


class Accepted(BaseModel):
    """What was asked for will be done."""

    task_id: str


class RunPage(BaseModel):
    """Some runs of a task, newest first."""

    runs: list[RunSummary]
    next: str | None = Field(description="The query for the page after this one; null on the last")


class CancelRequest(BaseModel):
    """How to cancel."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(default="", max_length=1000, description="Shown as the run's error")


class ResumeRequest(BaseModel):
    """How to resume."""

    model_config = ConfigDict(extra="forbid")

    redo: list[str] = Field(default_factory=list[str], max_length=1000, description="Keys of steps to be done again")


TaskId = Annotated[str, Path(min_length=1, description="The id that the submit has answered")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key with the same params is one run, however often it is sent; with others a conflict",
    ),
]
Endpoint = Callable[..., Awaitable[Response]]


LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="Sent by browsers when they come back: goes on from there")
]
_Responses = dict[int | str, dict[str, Any]]


class TaskRoutes:
    """The routes of one task.

    Args:
        task: The task.
        watches: The runs that are listened to.
        key_scope: A dependency that returns whose an ``Idempotency-Key`` is: a str, int or UUID.
    """

    def __init__(
        self, task: TemporalAsyncTask[Any, Any], watches: Watches, key_scope: Callable[..., Any] | None
    ) -> None:
        self.task = task
        self.documents = RunDocuments(task)
        self._watches = watches
        self._key_scope = key_scope

    def add_to(self, router: APIRouter) -> None:
        """Add the routes, those with a fixed end first: a run's id may hold slashes."""
        path, run = f"/tasks/{self.task.name}", f"/tasks/{self.task.name}/{{task_id:path}}"
        shown = {HTTPStatus.OK: {"model": self.documents.model}}
        on_run = documented(HTTPStatus.NOT_FOUND)
        accepted: _Responses = {HTTPStatus.ACCEPTED: {"model": Accepted}}
        where = {"description": "Where the run's status is", "schema": {"type": "string"}}
        located: _Responses = {HTTPStatus.ACCEPTED: {"model": Accepted, "headers": {"Location": where}}}
        submitting: _Responses = {**located, **documented(HTTPStatus.CONFLICT, *_BODY_PROBLEMS)}
        add = self._adder(router)
        add("submit", "POST", path, self._submit(), status=HTTPStatus.ACCEPTED, responses=submitting)
        add("list", "GET", path, self._list, responses={HTTPStatus.OK: {"model": RunPage}, **documented()})
        add(
            "result",
            "GET",
            f"{run}/result",
            self._result,
            responses={
                **shown,
                HTTPStatus.ACCEPTED: {"model": self.documents.model, "description": "It has not ended yet"},
                **on_run,
            },
        )
        stream: _Responses = {
            HTTPStatus.OK: {
                "description": "Events `run`, each with the run as its data, and at last one `end`",
                "content": {"text/event-stream": {}},
            },
            HTTPStatus.NO_CONTENT: {"description": "It has ended, and the last event was received"},
        }
        add("events", "GET", f"{run}/events", self._events, responses={**stream, **on_run})
        changing: _Responses = {**accepted, **documented(HTTPStatus.NOT_FOUND, *_BODY_PROBLEMS)}
        add("cancel", "POST", f"{run}/cancel", self._cancel, status=HTTPStatus.ACCEPTED, responses=changing)
        add(
            "resume",
            "POST",
            f"{run}/resume",
            self._resume,
            status=HTTPStatus.ACCEPTED,
            responses={**changing, **documented(HTTPStatus.CONFLICT)},
        )
        add("status", "GET", run, self._status, responses={**shown, **on_run})

    def _adder(self, router: APIRouter) -> Callable[..., None]:
        def add(
            verb: str,
            method: str,
            path: str,
            endpoint: Endpoint,
            *,
            responses: _Responses,
            status: HTTPStatus = HTTPStatus.OK,
        ) -> None:
            name = self.task.name
            router.add_api_route(
                path,
                answered(endpoint),
                methods=[method],
                name=f"{verb}_{name}",
                operation_id=f"{verb}_{name}",
                summary=f"{verb.capitalize()}: {name}",
                description=inspect.cleandoc(endpoint.__doc__ or ""),
                status_code=status,
                responses=responses,
                tags=[name],
            )
            if method == "GET" and verb in {"status", "list"}:
                router.add_api_route(path, answered(endpoint), methods=["HEAD"], include_in_schema=False)

        return add

    # Endpoints -----------------------------------------------------------------------------------------------

    def _submit(self) -> Endpoint:
        """The endpoint for submits: its parameters depend on the task."""

        async def submit(
            request: Request, params: Any = None, idempotency_key: str | None = None, key_scope: Any = ""
        ) -> Response:
            """Have the task run. Answers at once, with the run's id, and its address in `Location`."""
            if self.task.takes_params:
                # What FastAPI has made of the params is for the document only: it would take "1" or true for a number.
                params = self.documents.read_params(await request.body())
            task_id = None if idempotency_key is None else self.task_id_of(idempotency_key, _scope_of(key_scope))
            task_id = await self.task.submit(params, task_id=task_id)
            where = f"{quote(request.scope['path'])}/{quote(task_id, safe='')}"
            return _accepted(task_id, Location=where)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter("request", keyword, annotation=Request),
            inspect.Parameter("idempotency_key", keyword, annotation=IdempotencyKey, default=None),
        ]
        if self.task.takes_params:
            # Null is a value like others where the params may be null; FastAPI takes it for a body that is not there.
            default = None if _may_be_null(self.documents.params_type) else inspect.Parameter.empty
            declared = cast("Any", Annotated)[self.documents.params_type, Body(description="The task's params")]
            parameters.append(inspect.Parameter("params", keyword, annotation=declared, default=default))
        if self._key_scope is not None:
            scope = Annotated[Any, Depends(self._key_scope)]
            parameters.append(inspect.Parameter("key_scope", keyword, annotation=scope))
        cast("Any", submit).__signature__ = inspect.Signature(parameters)
        return submit

    def task_id_of(self, idempotency_key: str, scope: str) -> str:
        """The id of the run that a key stands for: a digest, so that a key may be any text."""
        told = json.dumps([self.task.name, scope, idempotency_key]).encode()
        return f"key-{hashlib.sha256(told).hexdigest()[:40]}"

    async def _status(self, task_id: TaskId) -> Response:
        """Where a run stands: one look at the server, no worker need be up."""
        return _json(self.documents.encode(await self._run(task_id)))

    async def _result(
        self,
        request: Request,
        task_id: TaskId,
        wait: Annotated[float, Query(ge=0, le=MAX_WAIT, description="Seconds to wait for the end")] = DEFAULT_WAIT,
    ) -> Response:
        """A run once it has ended, whether well or badly (see `status`), or 202 and where it stands after `wait`."""
        gone = asyncio.ensure_future(disconnected(request.receive))
        try:
            with self._listen(task_id) as watch:
                ended = asyncio.ensure_future(_ended(watch, wait))
                try:
                    await asyncio.wait((gone, ended), return_when=asyncio.FIRST_COMPLETED)
                    if not ended.done():
                        return Response(status_code=HTTPStatus.NO_CONTENT)  # nobody is there to read it
                    snapshot = ended.result()
                finally:
                    ended.cancel()
        except StreamsClosedError:
            return _stopping()
        finally:
            gone.cancel()
        if snapshot.ended:
            return _json(snapshot.document)
        return _json(snapshot.document, HTTPStatus.ACCEPTED, _RETRY)

    async def _events(
        self,
        task_id: TaskId,
        last_event_id: LastEventId = None,
    ) -> Response:
        """Server-sent events: each change of the run's status, its steps and its progress, until it has ended."""
        with self._listen(task_id) as watch:
            try:
                first = await watch.changed()
            except StreamsClosedError:
                return _stopping()
        if first.ended and first.id == last_event_id:
            # By which an EventSource knows to stay away.
            return Response(status_code=HTTPStatus.NO_CONTENT, headers=NO_STORE)
        return EventStream(events(lambda: self._listen(task_id), first, last_event_id))

    async def _cancel(self, task_id: TaskId, how: Annotated[CancelRequest | None, Body()] = None) -> Response:
        """Cancel a run: its function may clean up. Of one that has ended nothing changes."""
        await self.task.cancel(_known(task_id), (how or CancelRequest()).reason)
        return _accepted(task_id)

    async def _resume(self, task_id: TaskId, how: Annotated[ResumeRequest | None, Body()] = None) -> Response:
        """Have a run that failed or was cancelled go on from its last finished step."""
        await self.task.resume(_known(task_id), redo=(how or ResumeRequest()).redo)
        return _accepted(task_id)

    async def _list(
        self,
        status: Annotated[TaskStatus | None, Query(description="Only runs that stand so")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET, description="How many of the newest to leave out")] = 0,
    ) -> Response:
        """The task's runs, newest first, without their results; a moment behind."""
        found = [run async for run in self.task.list(status=status, limit=limit + 1, skip=offset)]
        after = offset + limit
        more = len(found) > limit and after <= MAX_OFFSET
        wanted = f"&status={status}" if status else ""
        page = RunPage(
            runs=[self.documents.summary(run) for run in found[:limit]],
            next=f"?limit={limit}&offset={after}{wanted}" if more else None,
        )
        return _json(page.model_dump_json().encode())

    # -------------------------------------------------------------------------------------------------------

    async def _run(self, task_id: str) -> TaskResult[Any]:
        return await self.task.get_status(_known(task_id))

    def _listen(self, task_id: str) -> AbstractContextManager[Watch]:
        async def read() -> Snapshot:
            run = await self._run(task_id)
            return Snapshot.of(run, self.documents.encode(run))

        return self._watches.listen(self.task.name, task_id, read)


_RETRY = {"Retry-After": str(RETRY_AFTER)}


async def _ended(watch: Watch, wait: float) -> Snapshot:
    snapshot = await watch.changed()
    try:
        async with asyncio.timeout(wait):
            while not snapshot.ended:
                snapshot = await watch.changed(snapshot.id)
    except TimeoutError:
        pass
    return snapshot


def _known(task_id: str) -> str:
    """An id as it came; one that cannot be an id is unknown, as any other that nobody has."""
    try:
        return check_text(task_id, "A task id")
    except InvalidKeyError as error:
        raise TaskNotFoundError(str(error)) from None


def _json(document: bytes, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    return Response(document, status, {**NO_STORE, **(headers or {})}, media_type="application/json")


def _stopping() -> Response:
    """The answer where ``StreamsClosedError`` ends the wait."""
    return problem_response(
        HTTPStatus.SERVICE_UNAVAILABLE, "This web server is stopping. Ask again.", code="unavailable", headers=_RETRY
    )


def _accepted(task_id: str, **headers: str) -> Response:
    return _json(Accepted(task_id=task_id).model_dump_json().encode(), HTTPStatus.ACCEPTED, headers)


def _scope_of(found: object) -> str:
    """The scope of a key as text.

    Raises:
        ConfigError: It is no id. The text of other objects is not the same for each request (an address), or not
            another for each caller (None), so that a key would stand for too many runs, or for another caller's.
    """
    if isinstance(found, str | int | UUID) and not isinstance(found, bool):
        return str(found)
    raise ConfigError(  # whose message does not show the object: it may hold secrets
        f"The dependency key_scope of create_task_router must return whose an Idempotency-Key is as a str, an int or a "
        f"uuid.UUID (the user's id), not {type(found).__name__}. Nothing was submitted. Where there is no such id, let "
        f"it raise an HTTPException."
    )


def _may_be_null(declared: Any) -> bool:
    try:
        TypeAdapter[Any](declared).validate_python(None)
    except ValidationError:
        return False
    return True
