"""Volcengine Ark's API for pictures and videos (https://www.volcengine.com/docs/82379/1541523 and .../1520757).

What the library makes of errors is all that is needed here: 408, 429 and 5xx are tried again (as ``Retry-After`` says),
other statuses are not, and network errors are. So these are raised as httpx' own, with the vendor's reason as message.
What a status cannot tell is raised as ``ArkBusyError`` (another try may help) or ``ArkError`` (none will).
"""

import json
import re
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx

from temporal_async_task import NonRetryableError, RetryableError

MAX_ANSWER = 1024 * 1024
"""Bytes. The vendor's answers hold addresses, not pictures."""
_TLS = ssl.create_default_context()  # made once: it takes longer than a call on a local network
_KEY = re.compile(r"[!-~]+")
_NOT_READY = {"queued", "running", "pending"}
_OVER = {"failed", "cancelled", "expired"}
# Codes of errors that come with status 200, as they do with 429, 500 and 503: RateLimitExceeded.EndpointRPMExceeded,
# ServerOverloaded, InternalServiceError, ...
_TEMPORARY = re.compile(r"RateLimit|Overload|Internal|Unavailable|Timeout|BurstTooFast", re.IGNORECASE)


class ArkError(NonRetryableError):
    """The vendor refuses, or answers what this client does not understand: asked again it would do the same."""


class ArkBusyError(RetryableError):
    """The vendor could not do it now."""


class ArkClient:
    """The calls. Each has a connection of its own, so that a client may be used on any event loop.

    Args:
        base_url: Without the slash at the end, as in ``https://ark.cn-beijing.volces.com/api/v3``.
        api_key: The vendor's.
        timeout: Seconds without a sign of life after which a call is given up. A picture takes tens of seconds.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout: float = 240.0) -> None:
        self._base_url = base_url.rstrip("/")
        self._api_key = api_key
        self._timeout = httpx.Timeout(timeout, connect=10.0)

    async def generate_picture(
        self, *, model: str, prompt: str, images: Sequence[str], idempotency_key: str | None = None
    ) -> str:
        """Make a picture of a prompt and images (data URLs). Paid.

        Returns:
            The picture's address, which is good for 24 hours.
        """
        body = {"model": model, "prompt": prompt, "image": list(images), "watermark": False, "response_format": "url"}
        answer = await self._call("POST", "/images/generations", body, idempotency_key)
        match answer:
            case {"data": [{"url": str(url)}, *_]} if url:
                return _address(url)
            case {"data": [{"error": dict(error)}, *_]}:
                raise _told(error)
            case _:
                raise _not_understood("data[0].url", answer)

    async def create_video(
        self, *, model: str, prompt: str, image: str | None = None, idempotency_key: str | None = None
    ) -> str:
        """Have a video made of a prompt, and of an image (a data URL) as its first frame. Paid.

        Returns:
            The id of the vendor's job.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if image is not None:
            content.append({"type": "image_url", "image_url": {"url": image}})
        body = {"model": model, "content": content}
        answer = await self._call("POST", "/contents/generations/tasks", body, idempotency_key)
        match answer:
            case {"id": str(job_id)} if 0 < len(job_id) <= 255:  # noqa: PLR2004 - what a record keeps
                return job_id
            case _:
                raise _not_understood("id", answer)

    async def video(self, job_id: str) -> str | None:
        """The video's address, good for 24 hours; None while it is not ready.

        Raises:
            ArkError: There will be none.
        """
        answer = await self._call("GET", f"/contents/generations/tasks/{quote(job_id, safe='')}", fails=False)
        match answer:
            case {"status": "succeeded", "content": {"video_url": str(url)}} if url:
                return _address(url)
            case {"status": str(status)} if status in _NOT_READY:
                return None
            case {"status": str(status)} if status in _OVER:
                error = answer.get("error")
                raise ArkError(f"The video's job has {status}: {_reason(error) or 'no reason is given'}")
            case {"error": dict(error)}:
                raise _told(error)
            case _:
                raise _not_understood("status", answer)

    async def _call(
        self, method: str, path: str, body: Any = None, idempotency_key: str | None = None, *, fails: bool = True
    ) -> dict[str, Any]:
        """A call's answer. With ``fails``, an error in it is raised."""
        if not _KEY.fullmatch(self._api_key):  # httpx' own error would show it
            raise ArkError("There is no API key, or none that can be sent: set ARK_API_KEY for the workers.")
        headers = {"Authorization": f"Bearer {self._api_key}"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        try:
            response, data = await self._sent(method, path, body, headers)
        except httpx.TimeoutException as error:  # which has no message
            raise type(error)("The vendor does not answer.", request=error.request) from None
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        error = answer.get("error") if isinstance(answer, dict) else None
        if not response.is_success:
            reason = _reason(error) or response.reason_phrase
            raise httpx.HTTPStatusError(
                f"The vendor answers {response.status_code}: {reason}", request=response.request, response=response
            )
        if answer is None:
            # Not the API speaks, but something in between: a gateway, or a connection that was cut.
            raise ArkBusyError(f"The vendor's answer is not JSON: {data[:80]!r}")
        if not isinstance(answer, dict):
            raise _not_understood("an object", answer)
        if fails and error:
            raise _told(error)
        return answer

    async def _sent(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[httpx.Response, bytes]:
        async with (
            httpx.AsyncClient(timeout=self._timeout, verify=_TLS) as client,
            client.stream(method, self._base_url + path, json=body, headers=headers) as response,
        ):
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_ANSWER:
                    raise ArkError(f"The vendor's answer is over {MAX_ANSWER:,} bytes.")
            return response, bytes(data)


def _address(url: str) -> str:
    # The vendor's answers have been seen with JSON's escape for "&" escaped once more.
    return url.replace("\\u0026", "&")


def _told(error: Any) -> ArkError | ArkBusyError:
    """The error that an answer with status 200 holds."""
    code = str(error.get("code", "")) if isinstance(error, dict) else ""
    kind = ArkBusyError if _TEMPORARY.search(code) else ArkError
    return kind(f"The vendor answers: {_reason(error) or error!r:.200}")


def _reason(error: Any) -> str:
    match error:
        case {"code": code, "message": message}:
            return f"{code}: {message}"[:500]
        case {"message": message}:
            return str(message)[:500]
        case _:
            return ""


def _not_understood(what: str, answer: Any) -> ArkError:
    return ArkError(f"The vendor's answer has no {what}: {json.dumps(answer, ensure_ascii=False)[:200]}")
