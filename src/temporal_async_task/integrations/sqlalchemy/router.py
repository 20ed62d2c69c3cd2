"""The route that receives reports, for FastAPI (extra ``fastapi``)."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from temporal_async_task.errors import ReportRefusedError, SignatureError
from temporal_async_task.integrations._problems import problem_response
from temporal_async_task.integrations.callbacks import SIGNATURE_HEADER, TOLERANCE, Secret, check_secret, verify
from temporal_async_task.integrations.reports import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporal_async_task.integrations.sqlalchemy.receiver import ReportReceiver

logger = logging.getLogger("temporal_async_task")

MAX_BODY = 6 * 1024 * 1024
"""Bytes. A result has 2 MB at most; JSON's escapes and base64 make it longer."""
_STATUS = {
    "malformed": HTTPStatus.BAD_REQUEST,
    "unknown_record": HTTPStatus.NOT_FOUND,
    "out_of_order": HTTPStatus.CONFLICT,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
}


def create_report_router(
    receiver: ReportReceiver,
    secret: Secret | Sequence[Secret],
    *,
    path: str = "/integrations/reports",
    tolerance: float = TOLERANCE,
) -> APIRouter:
    """A router with one route, ``POST path``, for what ``Callback`` sends.

    It needs no user: what is not signed with the secret is refused. Answers are 200 with ``{"applied": n}`` (0 for
    what was applied before), or a problem (RFC 9457) whose ``code`` says what is wrong.

    Args:
        receiver: Applies the reports.
        secret: What the workers sign with; several while one replaces another.
        path: Where.
        tolerance: Seconds by which a signature's timestamp may differ from the clock.

    Raises:
        ConfigError: The secret is too short.
    """
    secrets = [secret] if isinstance(secret, str | bytes) else list(secret)
    keys = [check_secret(one) for one in secrets]
    router = APIRouter()

    @router.post(path, include_in_schema=False)
    async def receive(request: Request) -> Response:
        try:
            body = await _body(request)
            verify(body, request.headers.get(SIGNATURE_HEADER), keys, tolerance=tolerance)
            applied = await receiver.apply(Report.decode(body))
        except SignatureError as error:
            return problem_response(HTTPStatus.UNAUTHORIZED, error.detail, code=error.code)
        except ReportRefusedError as error:
            return problem_response(_STATUS[error.code], error.detail, code=error.code)
        except HTTPException:  # of a middleware that reads along
            raise
        except ClientDisconnect:
            return problem_response(HTTPStatus.BAD_REQUEST, "The body has not come to its end.", code="malformed")
        except Exception:  # SQLAlchemy's, and what a driver raises when it connects, which is handed on as it is
            logger.exception("A report could not be applied; it will be sent again")
            return problem_response(
                HTTPStatus.SERVICE_UNAVAILABLE, "The database does not answer. Try again.", code="unavailable"
            )
        return JSONResponse({"applied": applied})

    return router


async def _body(request: Request) -> bytes:
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > MAX_BODY:
            raise ReportRefusedError("too_large", f"A report has {MAX_BODY:,} bytes at most.")
    return bytes(chunks)
