"""Reports as signed HTTP calls from a worker to the web process. Signing, checking, sending.

The signature is an HMAC-SHA256 (RFC 2104) over ``<timestamp>.<body>``, in the header
``Async-Task-Signature: t=<seconds since 1970>,v1=<hexadecimal>``. Each try is signed anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from temporal_async_task.engine.threads import DaemonThreads
from temporal_async_task.errors import ConfigError, ReportError, ReportRefusedError, SignatureError

if TYPE_CHECKING:
    from http.client import HTTPMessage

    from temporal_async_task.integrations.reports import Report

SIGNATURE_HEADER = "Async-Task-Signature"
TOLERANCE = 300.0
"""Seconds by which a signature's timestamp may differ from the receiver's clock."""
MIN_SECRET_BYTES = 16
REFUSALS = frozenset({"malformed", "too_large", "unknown_record", "out_of_order"})
"""Codes of the receiver's answers after which a report is not sent again."""
_HEADER = re.compile(r"t=(\d{1,12}),v1=([0-9a-f]{64})")
_MAX_ANSWER = 64 * 1024
_SHOWN = 100
"""Bytes of an unexpected answer that an error shows."""
_THREADS = 16

Secret = str | bytes


def check_secret(secret: object) -> bytes:
    """A secret's bytes.

    Raises:
        ConfigError: It is too short to be one.
    """
    key = secret.encode() if isinstance(secret, str) else secret
    if not isinstance(key, bytes) or len(key) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"The callback's secret must be text or bytes of at least {MIN_SECRET_BYTES} bytes, the same in the web "
            f'process and the workers. Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return key


def sign(body: bytes, secret: Secret, *, timestamp: float | None = None) -> str:
    """The value of the signature header for a body that is sent now (or at ``timestamp``, seconds since 1970)."""
    at = int(time.time() if timestamp is None else timestamp)
    return f"t={at},v1={_digest(body, check_secret(secret), at)}"


def verify(
    body: bytes,
    header: str | None,
    secrets: Secret | Sequence[Secret],
    *,
    tolerance: float = TOLERANCE,
    now: float | None = None,
) -> None:
    """Check that a body was signed with one of the secrets, not long ago. Comparing takes the same time for all.

    Args:
        body: The body as it was received.
        header: The signature header's value.
        secrets: One, or several while one replaces another.
        tolerance: Seconds by which the timestamp may differ from the clock.
        now: Seconds since 1970, instead of the clock's.

    Raises:
        SignatureError: It was not.
    """
    keys = [secrets] if isinstance(secrets, str | bytes) else secrets
    found = _HEADER.fullmatch(header or "")
    if found is None:
        raise SignatureError("signature_missing", f"The header {SIGNATURE_HEADER} must be 't=<seconds>,v1=<hex>'.")
    at = int(found[1])
    # All keys are compared, and the time afterwards: an answer tells nothing to those who cannot sign.
    matches = [hmac.compare_digest(_digest(body, check_secret(key), at), found[2]) for key in keys]
    if not any(matches):
        raise SignatureError("signature_wrong", "The signature does not fit the body: look at both sides' secrets.")
    off = (time.time() if now is None else now) - at
    if abs(off) > tolerance:
        raise SignatureError(
            "timestamp_old" if off > 0 else "timestamp_ahead",
            f"The signature's timestamp is {abs(off):.0f} s {'old' if off > 0 else 'ahead'}; the limit is "
            f"{tolerance:.0f} s. Look at the clocks, if this is no replay.",
        )


def _digest(body: bytes, key: bytes, at: int) -> str:
    return hmac.new(key, b"%d." % at + body, hashlib.sha256).hexdigest()


class Callback:
    """Sends reports to the web process, as signed HTTP calls. Needs no database and no HTTP library.

    It is acknowledged by nothing but the status 200 with a JSON object whose ``applied`` is an integer.

    Args:
        url: Where the web process receives them, as in ``https://shop.example/integrations/reports``.
        secret: At least 16 bytes, known to the web process and the workers only.
        timeout: Seconds that one call may take.

    Raises:
        ConfigError: The URL is not one of http or https, or the secret is too short.
    """

    def __init__(self, url: str, secret: Secret, *, timeout: float = 10.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"The callback's URL must begin with http:// or https:// and a host, not {url!r:.200}.")
        self.url = url
        self.secret = check_secret(secret)
        self.timeout = timeout
        self._opener = build_opener(_NoRedirects())
        self._threads = DaemonThreads(_THREADS)  # a web process that hangs must not take the tasks' threads

    async def send(self, report: Report) -> None:
        """Send a report once.

        Raises:
            ReportRefusedError: The application will never take it.
            ReportError: It was not acknowledged.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._post, report.encode())

    def _post(self, body: bytes) -> None:
        headers = {"Content-Type": "application/json", SIGNATURE_HEADER: sign(body, self.secret)}
        request = Request(self.url, body, headers, method="POST")  # noqa: S310 - the scheme was checked
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                _check_acknowledged(self.url, answer.status, _read(answer, self.timeout))
        except HTTPError as error:
            with error:
                raise _not_taken(error, self.timeout) from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            raise ReportError(f"{self.url} does not answer: {error}") from error


class _NoRedirects(HTTPRedirectHandler):
    """A redirected POST would become a GET, and seem to have been taken."""

    def redirect_request(  # noqa: PLR0917
        self,
        req: Request,  # noqa: ARG002 - the standard library's names
        fp: Any,  # noqa: ARG002
        code: int,  # noqa: ARG002
        msg: str,  # noqa: ARG002
        headers: HTTPMessage,  # noqa: ARG002
        newurl: str,  # noqa: ARG002
    ) -> None:
        return None


def _read(answer: Any, seconds: float) -> bytes:
    """An answer's body, or as much of it as matters. One that goes on and on (a stream) must not keep the thread."""
    until = time.monotonic() + seconds
    body = b""
    while len(body) < _MAX_ANSWER and (part := answer.read1(_MAX_ANSWER - len(body))):
        body += part
        if time.monotonic() > until:
            raise TimeoutError(f"the answer has not come to its end within {seconds} s")
    return body


def _check_acknowledged(url: str, status: int, body: bytes) -> None:
    """Raise unless it is the receiver that has answered: a login, a page for all paths say 200, too."""
    try:
        applied = json.loads(body)["applied"]
    except (ValueError, KeyError, TypeError, RecursionError):
        applied = None
    if status != HTTPStatus.OK or not isinstance(applied, int) or isinstance(applied, bool):
        raise ReportError(
            f"{url} answered {status} with {body[:_SHOWN]!r}, where a receiver of reports answers 200 with "
            f'{{"applied": n}}. Does something else answer in its place?'
        )


def _not_taken(error: HTTPError, seconds: float) -> ReportError:
    code, detail = "", str(error.reason)
    try:
        problem = json.loads(_read(error, seconds))
        code, detail = str(problem["code"]), str(problem["detail"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError, RecursionError):
        pass  # an answer of something else: a proxy, an application that lacks the route
    if error.code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:  # by whoever stands before the route, too
        return ReportRefusedError("too_large", detail)
    if code in REFUSALS:
        return ReportRefusedError(code, detail)
    return ReportError(f"The web process answered {error.code}: {detail[:500]}")
