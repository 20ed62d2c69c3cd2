"""What the errors of HTTP clients mean, told without importing any of the clients.

The clients are optional, so their classes are known by name (httpx, requests, aiohttp, urllib3 and those of
the standard library). Vendors' SDKs bring classes of their own, known by their shape: a status, a response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_RETRY_AFTER = timedelta(days=1).total_seconds()
"""A vendor's slip (a Unix time in ``Retry-After``, say) must not park a task for years. In seconds."""

# "package.Class", for the class itself or any class that it derives from.
_HOPELESS = frozenset({
    "aiohttp.InvalidURL", "aiohttp.NonHttpUrlClientError", "aiohttp.ServerFingerprintMismatch",
    "aiohttp.TooManyRedirects",
    "http.InvalidURL",
    "httpx.CookieConflict", "httpx.InvalidURL", "httpx.LocalProtocolError", "httpx.StreamError",
    "httpx.TooManyRedirects", "httpx.UnsupportedProtocol",
    "requests.InvalidHeader", "requests.InvalidSchema", "requests.InvalidURL", "requests.MissingSchema",
    "requests.TooManyRedirects", "requests.URLRequired", "requests.UnrewindableBodyError",
    "ssl.SSLCertVerificationError",
    "urllib3.LocationValueError", "urllib3.ProxySchemeUnsupported", "urllib3.UnrewindableBodyError",
})  # fmt: skip
_NETWORK = frozenset({
    "aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError",
    "builtins.ConnectionError", "builtins.TimeoutError",
    "http.BadStatusLine", "http.IncompleteRead",
    "httpx.TransportError",
    "requests.ChunkedEncodingError", "requests.ConnectionError", "requests.Timeout",
    "socket.gaierror", "socket.herror", "ssl.SSLError",
    "urllib.URLError",
    "urllib3.ProtocolError", "urllib3.ProxyError", "urllib3.SSLError", "urllib3.TimeoutError",
})  # fmt: skip
_HAS_STATUS = frozenset({"aiohttp.ClientResponseError", "urllib.HTTPError"})

_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")
_URLLIB3_GAVE_UP = re.compile(r"too many ([0-9]{3}) error responses")


def is_hopeless(error: BaseException) -> bool:
    """Whether no answer will ever come: the request is wrong (its URL, say) or the server's certificate."""
    kinds = _kinds(error)
    if "urllib3.ResponseError" in kinds and str(error) == "too many redirects":
        return True
    return not _HOPELESS.isdisjoint(kinds)


def is_network_error(error: BaseException) -> bool:
    """Whether the request got no complete answer: no connection, a broken one, or a timeout."""
    return not _NETWORK.isdisjoint(_kinds(error))


def http_status(error: BaseException) -> int | None:
    """The status (300 to 599) of the answer that an error stands for, or ``None``.

    It is looked for on the error's ``response``, then on the error: an integer ``status_code``, or (only
    beside headers, because the names are common) an integer ``status`` or ``code``.
    """
    kinds = _kinds(error)
    if "urllib3.ResponseError" in kinds and (gave_up := _URLLIB3_GAVE_UP.fullmatch(str(error))):
        return int(gave_up[1])
    if "aiohttp.HttpProcessingError" in _kinds(error.__cause__):
        return None  # aiohttp's own 400 for an answer that is not HTTP: the server sent no such status
    known = not _HAS_STATUS.isdisjoint(kinds)
    for source in (_get(error, "response"), error):
        certain = known or _headers(source) is not None
        for name in ("status_code", "status", "code") if certain else ("status_code",):
            status = _get(source, name)
            if isinstance(status, int):
                return int(status) if 300 <= status <= 599 else None  # noqa: PLR2004
    return None


def retry_after(error: BaseException) -> float | None:
    """The wait in seconds that the answer's ``Retry-After`` asks for (RFC 9110, section 10.2.3), or ``None``.

    The header holds seconds (fractions are taken too, as some vendors send them) or an HTTP date. A date is
    compared with the answer's own ``Date``, so that a skewed clock here does no harm, or with the time here
    if there is none. Malformed, zero or past is no wait; over ``LONGEST_RETRY_AFTER`` is cut to it.
    """
    headers = _headers(_get(error, "response")) or _headers(error) or {}
    asked = headers.get("retry-after", "")
    if _SECONDS.fullmatch(asked):
        seconds = float(asked)
    elif until := _http_date(asked):
        seconds = (until - (_http_date(headers.get("date", "")) or datetime.now(UTC))).total_seconds()
    else:
        return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else None


def explicit_causes(error: BaseException) -> Iterator[BaseException]:
    """The errors that an error says it comes from, nearest first.

    That is ``raise ... from``, and what requests, urllib3 and urllib do instead: the cause as an argument or
    as ``reason``. Not ``__context__``: an error raised while another was handled need not come from it.
    """
    found = [error]
    for current in found:  # grows while it is walked
        for cause in (current.__cause__, _get(current, "reason"), *current.args):
            if isinstance(cause, BaseException) and not any(cause is known for known in found):
                found.append(cause)
                yield cause


def _kinds(error: BaseException | None) -> set[str]:
    return {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}


def _get(source: object, name: str) -> Any:
    try:
        return getattr(source, name, None)
    except Exception:  # a property of a foreign class may raise anything; urllib's HTTPError does
        return None


def _headers(source: object) -> dict[str, str] | None:
    """The headers of a response (or of an error that carries them), with lower-case names."""
    headers = _get(source, "headers")
    if not isinstance(headers, Mapping | Message):
        return None
    pairs = cast("Mapping[object, object]", headers).items()
    return {str(name).lower(): str(value).strip() for name, value in pairs}


def _http_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # HTTP dates are in UTC; the obsolete asctime form, which has to be understood too, does not say so.
    return date if date.tzinfo else date.replace(tzinfo=UTC)
