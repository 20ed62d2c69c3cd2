"""Tasks over HTTP: a FastAPI router with submit, status, result, events, cancel, resume and list, and a small page.

::

    app.include_router(create_task_router([product_shot], dependencies=[Depends(current_user)]), prefix="/api")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any

try:
    from fastapi import APIRouter, HTTPException
    from fastapi.params import Depends
except ImportError as error:
    raise ImportError(
        "The task router needs FastAPI, which is not installed: pip install 'temporal-async-task[fastapi]'"
    ) from error
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from temporal_async_task.errors import ConfigError
from temporal_async_task.integrations._events import Watches
from temporal_async_task.integrations._page import page, page_file, to_page
from temporal_async_task.integrations._problems import (
    NO_STORE,
    TaskProblem,
    answered,
    documented,
    limited_route,
)
from temporal_async_task.integrations._task_routes import TaskRoutes
from temporal_async_task.registry import Registry
from temporal_async_task.task import TemporalAsyncTask

MAX_BODY = 2 * 1024 * 1024
"""Bytes: as much as Temporal takes as a payload."""

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
_NOT_IN_A_PATH = set("/\\{}?#%")


class TaskInfo(BaseModel):
    """A task that can be submitted."""

    name: str
    takes_params: bool
    params_schema: dict[str, Any] | None = Field(description="The JSON Schema of its params")


class TaskList(BaseModel):
    """The tasks that can be submitted."""

    tasks: list[TaskInfo]


def create_task_router(
    tasks: Iterable[TemporalAsyncTask[Any, Any]],
    *,
    dependencies: Sequence[Depends] = (),
    public: bool = False,
    ui: bool = True,
    max_body: int = MAX_BODY,
    key_scope: Callable[..., Any] | None = None,
) -> APIRouter:
    """A router that puts tasks on the web.

    Args:
        tasks: The tasks; give them a connection (``component.connect()``) before the first request.
        dependencies: What decides who may use it, as ``[Depends(current_user)]``. They stand before every route, the
            page and its files, too.
        public: Mount it without dependencies: for everybody, or behind something else that asks who is there.
        ui: Whether to serve the page at ``/tasks/ui``.
        max_body: Bytes that the body of a request may have.
        key_scope: A FastAPI dependency that returns whose an ``Idempotency-Key`` is (a user's id, as a ``str``, ``int``
            or ``uuid.UUID``), so that the same key of two callers stands for two runs. Where it returns anything else
            (a user object, None), a submit with a key is answered with 500. Without it, keys are shared by all callers.

    Returns:
        The router: ``app.include_router(router, prefix=...)``.

    Raises:
        ConfigError: There is no dependency and ``public`` is not set; or a task's name or params do not go with HTTP.
        DuplicateTaskError: Two tasks have the same name.
    """
    _check_dependencies(dependencies, public=public)
    if max_body < 1:
        raise ConfigError(f"max_body must be 1 byte or more, not {max_body!r}.")
    watches = Watches()
    routes = [TaskRoutes(task, watches, key_scope) for task in _checked(tasks, ui=ui)]
    router = APIRouter(dependencies=list(dependencies), route_class=limited_route(max_body))
    _add_task_list(router, routes)
    if ui:
        _add_page(router)
    for one in routes:
        one.add_to(router)
    _add_fallback(router, {one.task.name for one in routes}, ui=ui)
    return router


def _check_dependencies(dependencies: Sequence[Depends], *, public: bool) -> None:
    for one in dependencies:
        if not isinstance(one, Depends):
            raise ConfigError(f"dependencies must be a list of Depends(...), not of {one!r}.")
    if not dependencies and not public:
        raise ConfigError(
            "The task router has no dependency that says who may use it, so anybody could submit, see and cancel runs. "
            "Pass dependencies=[Depends(your_auth)], or public=True if that is meant, or if the application asks "
            "elsewhere who is there."
        )


def _checked(tasks: Iterable[TemporalAsyncTask[Any, Any]], *, ui: bool) -> list[TemporalAsyncTask[Any, Any]]:
    checked: Registry[TemporalAsyncTask[Any, Any]] = Registry()
    for task in tasks:
        if not isinstance(task, TemporalAsyncTask):
            raise ConfigError(f"create_task_router takes tasks; {task!r} is none. Is @async_task missing?")
        name = task.name
        if name in {".", ".."} or name != name.strip() or _NOT_IN_A_PATH & set(name):
            raise ConfigError(
                f"The task {name!r} cannot stand in a URL by this name: leave out slashes, {{}}, ?, #, % and spaces "
                f"around it (@async_task(name=...))."
            )
        if ui and name == "ui":
            raise ConfigError("A task named 'ui' stands where the page is: rename it, or pass ui=False.")
        checked.add(task)
    if not checked:
        raise ConfigError("create_task_router was given no task.")
    return list(checked)


def _add_task_list(router: APIRouter, routes: list[TaskRoutes]) -> None:
    listed = TaskList(
        tasks=[
            TaskInfo(
                name=one.task.name,
                takes_params=one.task.takes_params,
                params_schema=one.documents.params_schema if one.task.takes_params else None,
            )
            for one in routes
        ]
    )

    async def list_tasks() -> Response:
        return Response(listed.model_dump_json(), media_type="application/json", headers=NO_STORE)

    router.add_api_route(
        "/tasks",
        answered(list_tasks),
        operation_id="list_tasks",
        summary="The tasks",
        response_model=TaskList,
        # Here, once, so that the document has the schema to which all other routes refer.
        responses={**documented(), "default": {"model": TaskProblem, "description": "A problem document (RFC 9457)"}},
        tags=["tasks"],
    )


def _add_page(router: APIRouter) -> None:
    async def show_page() -> Response:
        return page()

    async def show_file(name: str) -> Response:
        found = page_file(name)
        if found is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "The page has no such file.")
        return found

    methods = ["GET", "HEAD"]
    router.add_api_route("/tasks/ui", answered(show_page), methods=methods, include_in_schema=False, name="tasks_ui")
    router.add_api_route("/tasks/ui/{name}", answered(show_file), methods=methods, include_in_schema=False)


def _add_fallback(router: APIRouter, names: set[str], *, ui: bool) -> None:
    """What is left under ``/tasks``: an unknown task, or a method that a path does not take."""

    async def nothing_here(request: Request, rest: str = "") -> Response:
        if ui and rest == "ui/" and request.method in {"GET", "HEAD"}:
            return to_page(request)
        allowed = _allowed(rest, names, ui=ui)
        if allowed:
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, f"This takes {allowed}.", headers={"Allow": allowed})
        raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such task, or no such thing of a task.")

    for path in ("/tasks", "/tasks/{rest:path}"):
        router.add_api_route(path, answered(nothing_here), methods=_METHODS, include_in_schema=False)


def _allowed(rest: str, names: set[str], *, ui: bool) -> str:
    """The methods that a path below ``/tasks`` takes, as in the header ``Allow``; empty if there is no such path."""
    name, _, run = rest.partition("/")
    if not rest or (ui and name == "ui"):
        return "GET"
    if name not in names:
        return ""
    if not run:
        return "GET, HEAD, POST" if rest == name else ""
    last = run.rpartition("/")[2] if "/" in run else ""
    return {"cancel": "POST", "resume": "POST", "result": "GET", "events": "GET"}.get(last, "GET, HEAD")
