"""A stand-in for Volcengine Ark: both APIs, source pictures to choose from, and faults on demand.

``python -m nanobanana2_image.stub_api --port 9900``

POST /api/v3/images/generations                 GET /samples/{name}.png         pictures to choose from
POST /api/v3/contents/generations/tasks         GET /samples/bad/{kind}         ... and what is none
GET  /api/v3/contents/generations/tasks/{id}    GET /files/{name}?...           what was made

GET  /stub/generations      what was made so far, with prompt and idempotency key: what would have been paid
POST /stub/faults           a ``Fault``: what goes wrong next
"""

import argparse
import asyncio
import base64
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from . import stub_pictures

VIDEO = Path(__file__).with_name("stub_video.mp4")


class Fault(BaseModel):
    """What goes wrong with the next calls of a route."""

    route: Literal["images", "videos", "jobs", "files"]
    """Making a picture, making a video, asking for a video, fetching what was made."""
    kind: Literal["429", "500", "malformed", "error_inside", "empty", "expired", "slow", "failed"]
    times: int = Field(default=1, ge=1)
    retry_after: float = 1.0
    """Seconds, of a 429."""
    seconds: float = 5.0
    """Of a slow one."""
    code: str = "OutputImageSensitiveContentDetected"
    """The vendor's, of an error inside."""


class Generation(BaseModel):
    """Something that was made, and would have been paid."""

    kind: Literal["picture", "video"]
    model: str
    prompt: str
    images: int
    idempotency_key: str | None
    at: float


class Stub:
    """What the stub knows.

    Args:
        latency: Seconds that a picture takes.
        video_seconds: Seconds that a video takes.
    """

    def __init__(self, latency: float = 0.0, video_seconds: float = 0.0) -> None:
        self.latency = latency
        self.video_seconds = video_seconds
        self.generations: list[Generation] = []
        self.faults: list[Fault] = []
        self._files: dict[str, bytes] = {}
        self._jobs: dict[str, float] = {}
        self._ids = itertools.count(1)

    async def fault(self, route: str) -> Fault | None:
        """What goes wrong with this call. 429 and 500 are raised."""
        fault = next((one for one in self.faults if one.route == route), None)
        if fault is None:
            return None
        fault.times -= 1
        if not fault.times:
            self.faults.remove(fault)
        match fault.kind:
            case "429":
                headers = {"Retry-After": f"{fault.retry_after:g}"}
                raise _refusal(429, "RateLimitExceeded.EndpointRPMExceeded", "Too many requests.", headers)
            case "500":
                raise _refusal(500, "InternalServiceError", "The service encountered an unexpected error.")
            case "slow":
                await asyncio.sleep(fault.seconds)
        return fault

    def made(self, kind: Literal["picture", "video"], request: Request, body: Any, prompt: str, images: int) -> None:
        key = request.headers.get("idempotency-key")
        self.generations.append(
            Generation(
                kind=kind, model=body["model"], prompt=prompt, images=images, idempotency_key=key, at=time.time()
            )
        )

    def keep(self, data: bytes, suffix: str) -> str:
        """A file's name."""
        name = f"{next(self._ids)}{suffix}"
        self._files[name] = data
        return name

    def file(self, name: str) -> bytes | None:
        return self._files.get(name)

    def begin(self) -> str:
        job_id = f"cgt-{next(self._ids)}"
        self._jobs[job_id] = time.monotonic() + self.video_seconds
        return job_id

    def finish_videos(self) -> None:
        """All videos are ready now."""
        self._jobs = dict.fromkeys(self._jobs, time.monotonic())

    def ready_in(self, job_id: str) -> float | None:
        """Seconds until a video is ready; None: there is no such job."""
        ready_at = self._jobs.get(job_id)
        return None if ready_at is None else ready_at - time.monotonic()


def create_app(stub: Stub) -> FastAPI:
    """The stub as an application."""
    app = FastAPI(title="A stand-in for Ark")
    api = "/api/v3"

    @app.exception_handler(_RefusalError)
    async def refuse(_: Request, refusal: _RefusalError) -> JSONResponse:
        return JSONResponse({"error": refusal.error}, refusal.status_code, refusal.headers)

    @app.post(f"{api}/images/generations")
    async def make_picture(request: Request) -> Response:
        body = await _order(request)
        fault = await stub.fault("images")
        if fault is not None and fault.kind == "error_inside":
            return JSONResponse({"error": {"code": fault.code, "message": "It cannot be done."}})
        await asyncio.sleep(stub.latency)
        try:
            images = [base64.b64decode(url.partition(";base64,")[2], validate=True) for url in body.get("image", [])]
            data = await asyncio.to_thread(stub_pictures.painted, body["prompt"], images)
        except (OSError, ValueError):
            raise _refusal(400, "InvalidParameter.UnsupportedImageFormat", "The image is none.") from None
        stub.made("picture", request, body, body["prompt"], len(images))
        if fault is not None and fault.kind == "malformed":
            return Response('{"data": [{"url": "http', media_type="application/json")
        if fault is not None and fault.kind == "empty":
            return JSONResponse({"model": body["model"], "created": int(time.time()), "data": []})
        url = _signed(request, stub.keep(data, ".png"), expired=fault is not None and fault.kind == "expired")
        answer = {"model": body["model"], "created": int(time.time()), "data": [{"url": url}]}
        # As Ark does: "&" escaped once too often.
        return Response(json.dumps(answer).replace("&", "\\\\u0026"), media_type="application/json")

    @app.post(f"{api}/contents/generations/tasks")
    async def make_video(request: Request) -> Response:
        body = await _order(request)
        fault = await stub.fault("videos")
        if fault is not None and fault.kind == "error_inside":
            return JSONResponse({"error": {"code": fault.code, "message": "It cannot be done."}})
        texts = [part["text"] for part in body.get("content", []) if part.get("type") == "text"]
        if not texts:
            raise _refusal(400, "MissingParameter.content", "There is no text.")
        stub.made("video", request, body, texts[0], len(body["content"]) - len(texts))
        if fault is not None and fault.kind == "malformed":
            return Response("<html>502", media_type="text/html")
        return JSONResponse({"id": stub.begin()})

    @app.get(f"{api}/contents/generations/tasks/{{job_id}}")
    async def ask_for_video(request: Request, job_id: str) -> Response:
        _check_key(request)
        fault = await stub.fault("jobs")
        ready_in = stub.ready_in(job_id)
        if ready_in is None:
            raise _refusal(404, "NotFound.Task", "There is no such task.")
        answer: dict[str, Any] = {"id": job_id, "model": "stub", "status": "running", "error": None}
        if fault is not None and fault.kind == "failed":
            answer |= {"status": "failed", "error": {"code": fault.code, "message": "It cannot be shown."}}
        elif fault is not None and fault.kind == "malformed":
            return Response("<html>502", media_type="text/html")
        elif ready_in <= 0:
            url = _signed(request, stub.keep(VIDEO.read_bytes(), ".mp4"))
            answer |= {"status": "succeeded", "content": {"video_url": url}}
        return JSONResponse(answer)

    @app.get("/files/{name}")
    async def fetch(name: str, expires: float = 0, signature: str = "") -> Response:
        await stub.fault("files")
        data = stub.file(name)
        if data is None or signature != "valid" or expires < time.time():
            return Response("<Error><Code>AccessDenied</Code></Error>", 403, media_type="application/xml")
        return Response(data, media_type="video/mp4" if name.endswith(".mp4") else "image/png")

    @app.get("/samples/{name}.png")
    async def sample(name: str) -> Response:
        if name not in stub_pictures.SAMPLES:
            raise HTTPException(404)
        return Response(await asyncio.to_thread(stub_pictures.sample, name), media_type="image/png")

    @app.get("/samples/bad/{kind}")
    async def bad(request: Request, kind: str, to: str = "") -> Response:
        match kind:
            case "text":
                return Response("no picture", media_type="image/png")
            case "damaged":
                return Response(stub_pictures.sample("cup")[:-500], media_type="image/png")
            case "bomb":
                return Response(stub_pictures.huge(), media_type="image/png")
            case "endless":
                return StreamingResponse(_endless(0.0), media_type="image/png")
            case "drip":
                return StreamingResponse(_endless(0.2), media_type="image/png")
            case "hang":
                await asyncio.sleep(3600)
            case "loop":
                return RedirectResponse(str(request.url))
            case "redirect":
                return RedirectResponse(to)
        raise HTTPException(404)

    @app.get("/stub/generations")
    async def generations() -> list[Generation]:
        return stub.generations

    @app.post("/stub/faults", status_code=201)
    async def add_fault(fault: Fault) -> Fault:
        stub.faults.append(fault)
        return fault

    return app


class _RefusalError(HTTPException):
    error: dict[str, str]


def _refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> _RefusalError:
    refusal = _RefusalError(status, message, headers)
    refusal.error = {"code": code, "message": message, "param": "", "type": ""}
    return refusal


def _check_key(request: Request) -> None:
    if request.headers.get("authorization", "") in {"", "Bearer ", "Bearer wrong"}:
        raise _refusal(401, "AuthenticationError", "The API key in the request is missing or invalid.")


async def _order(request: Request) -> Any:
    _check_key(request)
    body = await request.json()
    if not body.get("model") or not (body.get("prompt") or body.get("content")):
        raise _refusal(400, "MissingParameter", "The request lacks a required parameter.")
    return body


def _signed(request: Request, name: str, *, expired: bool = False) -> str:
    expires = time.time() + (-1 if expired else 86_400)
    return f"{request.base_url}files/{name}?expires={expires:.0f}&signature=valid"


async def _endless(pause: float) -> AsyncIterator[bytes]:
    while True:
        yield b"\x89PNG" * (1 if pause else 16_384)
        await asyncio.sleep(pause)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9900)
    parser.add_argument("--latency", type=float, default=3.0, help="seconds that a picture takes")
    parser.add_argument("--video-seconds", type=float, default=25.0, help="seconds that a video takes")
    options = parser.parse_args()
    app = create_app(Stub(options.latency, options.video_seconds))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="info", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()
