"""Errors as problem documents (RFC 9457), for every route of a router."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlsplit

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from pydantic_core import from_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from temporal_async_task.errors import (
    AsyncTaskError,
    InvalidKeyError,
    NotConnectedError,
    ParamsError,
    PayloadTooLargeError,
    ServerUnavailableError,
    TaskConflictError,
    TaskNotFoundError,
)

logger = logging.getLogger("temporal_async_task")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = 5
"""Seconds after which a client may ask again, while the Temporal server is away."""
NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""For every answer of the API: it is of one moment, and for one caller."""

_JSON_BODY = "application/json"
_SAME_SITE = {"same-origin", "none", None}
"""Of `Sec-Fetch-Site`: the page itself, or the user's own doing; or it is no browser's."""


class InvalidPart(BaseModel):
    """One thing that is wrong with a request."""

    where: str = Field(description="`body`, `query`, `header` or `path`")
    pointer: str = Field(description="A JSON pointer (RFC 6901) into that part")
    detail: str


class TaskProblem(BaseModel):
    """What went wrong, as of RFC 9457. `code` tells problems of the same status apart."""

    type: str = Field(default="about:blank")
    title: str
    status: int
    code: str
    detail: str
    errors: list[InvalidPart] | None = Field(default=None, description="Of a request that is not valid")


def problem_response(
    status: int,
    detail: str,
    *,
    code: str | None = None,
    errors: list[InvalidPart] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem document."""
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    problem = TaskProblem(
        title=title, status=status, code=code or title.lower().replace(" ", "_"), detail=detail, errors=errors
    )
    return Response(
        problem.model_dump_json(exclude_none=True), status, {**(headers or {}), **NO_STORE}, media_type=MEDIA_TYPE
    )


def documented(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these problems. Every route may find its request invalid, or the server away."""
    schema = {"$ref": "#/components/schemas/TaskProblem"}
    return {
        status: {"description": status.phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in sorted({*statuses, HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.SERVICE_UNAVAILABLE})
    }


def answer_to(error: AsyncTaskError) -> Response:
    """The answer to an error of the library."""
    detail = str(error)
    match error:
        case TaskNotFoundError():
            # The same words for an id that nobody has and for one of another task: neither is told of.
            return problem_response(HTTPStatus.NOT_FOUND, "This task has no run with this id.", code="run_not_found")
        case TaskConflictError():
            return problem_response(HTTPStatus.CONFLICT, detail, code="conflict")
        case PayloadTooLargeError():
            return problem_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, code="too_large")
        case ParamsError() | InvalidKeyError():
            return problem_response(HTTPStatus.UNPROCESSABLE_ENTITY, detail, code="invalid")
        case ServerUnavailableError() | NotConnectedError():
            logger.warning("%s", error)
            return problem_response(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "The server that keeps the tasks does not answer. Repeat the request later; a submit that carries an "
                "Idempotency-Key becomes one run, however often it is repeated.",
                code="unavailable",
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        case _:
            return _broken(error)


def answered(endpoint: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """An endpoint whose errors are answers. Those of the application's dependencies are not touched."""

    @functools.wraps(endpoint)
    async def answering(*args: Any, **kwargs: Any) -> Response:
        try:
            return await endpoint(*args, **kwargs)
        except AsyncTaskError as error:
            return answer_to(error)
        except (StarletteHTTPException, RequestValidationError):
            raise
        except Exception as error:
            return _broken(error)

    # Resolved here: FastAPI may look the annotations' names up in the module of the wrapper.
    cast("Any", answering).__signature__ = inspect.signature(endpoint, eval_str=True)
    return answering


def _broken(error: Exception) -> Response:
    logger.error("A request to the task router failed", exc_info=error)
    return problem_response(
        HTTPStatus.INTERNAL_SERVER_ERROR, "This went wrong inside; the application's log says why.", code="internal"
    )


class LimitedRequest(Request):
    """A request whose body may be so long and no longer, and whose JSON is JSON."""

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        self._limit = limit
        self._read = 0
        self._receive_part = receive
        super().__init__(scope, self._receive_limited)

    async def _receive_limited(self) -> Message:
        message = await self._receive_part()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            if self._read > self._limit:
                raise self._too_large()
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is over the limit of {self._limit:,} bytes."
        )

    def check_head(self) -> None:
        """Refuse what the headers give away.

        Raises:
            HTTPException: The body is too long, or not said to be JSON; or another site's page makes the request.
        """
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limit:
            raise self._too_large()
        if self.method != "POST":
            return
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type == _JSON_BODY:
            return  # pages of other sites cannot send it, unless the application's CORS rules let them
        if length != "0" or "transfer-encoding" in self.headers:
            raise HTTPException(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"The body must be JSON, with the header Content-Type: {_JSON_BODY}."
            )
        if self._is_of_another_site():
            raise HTTPException(
                HTTPStatus.FORBIDDEN, f"From another site a request needs the header Content-Type: {_JSON_BODY}."
            )

    def _is_of_another_site(self) -> bool:
        site, origin = self.headers.get("sec-fetch-site"), self.headers.get("origin")
        if site is None and origin is not None:  # a browser tells the site only to https and to localhost
            return urlsplit(origin).netloc != self.headers.get("host")
        return site not in _SAME_SITE

    async def json(self) -> Any:
        """The body. What Python would read beyond JSON (NaN, lone surrogates) is refused.

        Raises:
            HTTPException: It is not JSON.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except (ValueError, RecursionError) as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"The body is not valid JSON: {error}") from None


class ProblemRoute(APIRoute):
    """A route that answers with problem documents where FastAPI has formats of its own."""

    max_body = 0

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            limited = LimitedRequest(request.scope, request.receive, self.max_body)
            try:
                limited.check_head()
                return await handle(limited)
            except RequestValidationError as error:
                return problem_response(
                    HTTPStatus.UNPROCESSABLE_ENTITY,
                    "The request is not valid.",
                    code="invalid",
                    errors=_parts(error.errors()),
                )
            except StarletteHTTPException as error:
                # An application's own kind may have its own handler; a redirect (to a login) is not a problem.
                is_problem = error.status_code >= HTTPStatus.BAD_REQUEST
                if type(error) not in {HTTPException, StarletteHTTPException} or not is_problem:
                    raise
                detail = error.detail if isinstance(error.detail, str) else json.dumps(error.detail, default=str)
                return problem_response(error.status_code, detail, headers=error.headers)

        return handler


def limited_route(max_body: int) -> type[ProblemRoute]:
    """The routes of a router with this limit, in bytes."""
    return type("LimitedProblemRoute", (ProblemRoute,), {"max_body": max_body})


def _parts(errors: Any) -> list[InvalidPart]:
    """What is wrong, without what was sent: it may be long, or secret."""
    parts: list[InvalidPart] = []
    for error in errors:
        where, *path = error["loc"] or ("body",)
        pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
        parts.append(InvalidPart(where=str(where), pointer=pointer, detail=str(error["msg"])))
    return parts
