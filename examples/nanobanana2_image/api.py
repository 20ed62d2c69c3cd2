"""The application's own routes: order, ask, try again; upload and show pictures.

Nobody is asked who they are: serve it on your own machine only, or give the router your ``dependencies``.
"""

import asyncio
import contextlib
import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse
from pydantic import AfterValidator, BaseModel, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from temporal_async_task import NotConnectedError, ServerUnavailableError, StepState, TaskNotFoundError
from temporal_async_task.integrations.lifecycle import RecordStatus

from .downloads import DownloadRefusedError
from .entities import APICall, IntegrationEvent
from .pictures import NotAPictureError
from .settings import MAX_URL, PromptError, Settings, check_prompt
from .storage import NotStoredError, Storage
from .tasks import MEDIA, StoredPicture, check_source, keep_upload

if TYPE_CHECKING:
    from .integration import NanoBanana2ImageIntegration

PATIENCE = 3.0
"""Seconds for which an answer about a record waits for Temporal. Without it, it is as of the last report."""
_ID = re.compile("[0-9a-f]{32}")
_OWN_STEPS = "report: "
"""What the library's steps begin with that tell the application how a run has ended."""


def _prompt(text: str) -> str:
    try:
        return check_prompt(text)
    except PromptError as error:
        raise ValueError(str(error)) from None


Prompt = Annotated[str, AfterValidator(_prompt)]
ImageUrl = Annotated[str, Field(min_length=1, max_length=MAX_URL)]


class PictureRequest(BaseModel):
    kind: Literal["picture"]
    prompt: Prompt
    source_image_url: ImageUrl
    uploaded_image_url: ImageUrl


class VideoRequest(BaseModel):
    kind: Literal["video"]
    prompt: Prompt
    image_url: ImageUrl | None = None


CallRequest = Annotated[PictureRequest | VideoRequest, Field(discriminator="kind")]


class UploadView(BaseModel):
    url: str
    width: int
    height: int
    format: str


class StepView(BaseModel):
    key: str
    state: StepState
    attempts: int
    last_error: str | None
    next_attempt_at: datetime | None


class CallView(BaseModel):
    """An ``APICall``, and the steps of its run."""

    id: str
    kind: str
    status: RecordStatus
    attempts: int
    request_params: dict[str, Any]
    external_id: str | None
    response: Any
    error: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    next_try_at: datetime | None
    """Of a failed one: when it will be tried again by itself."""
    steps: list[StepView] | None = None
    """None where the Temporal server was not asked, or does not answer."""


class EventView(BaseModel):
    sequence: int
    type: RecordStatus
    at: datetime
    payload: Any


def create_api(
    settings: Settings, sessions: async_sessionmaker[AsyncSession], integration: "NanoBanana2ImageIntegration"
) -> APIRouter:
    """The routes."""
    router = APIRouter()
    storage = Storage(settings.media_dir)

    async def find(session: AsyncSession, call_id: str) -> APICall:
        # What cannot be an id is not asked for: PostgreSQL refuses a NUL with an error.
        call = await session.get(APICall, call_id) if _ID.fullmatch(call_id) else None
        if call is None:
            raise HTTPException(404, "There is no such call.")
        return call

    @router.post("/api/calls", status_code=201)
    async def create(order: CallRequest) -> CallView:
        """Write the record. That is all: once it is committed, its task will run."""
        params = order.model_dump(exclude={"kind"})
        for url in (value for name, value in params.items() if name.endswith("_url") and value):
            try:
                check_source(url, settings)
            except (DownloadRefusedError, NotStoredError) as error:
                raise HTTPException(422, str(error)) from None
        async with sessions.begin() as session:
            call = APICall(kind=order.kind, request_params=params)
            session.add(call)
        return _view(call)

    @router.get("/api/calls")
    async def newest() -> list[CallView]:
        """The last twenty, as the database has them."""
        async with sessions() as session:
            calls = await session.scalars(select(APICall).order_by(APICall.created_at.desc()).limit(20))
            return [_view(call) for call in calls]

    @router.get("/api/calls/{call_id}")
    async def query(call_id: str) -> CallView:
        """A record, brought up to date with its run first."""
        async with sessions() as session:
            call = await find(session, call_id)
        steps: list[StepView] | None = None
        if call.status != RecordStatus.PENDING:
            with contextlib.suppress(ServerUnavailableError, NotConnectedError, TaskNotFoundError, TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await integration.refresh(APICall, call_id)
                    async with sessions() as session:
                        call = await find(session, call_id)
                    # After the record: steps that are older than a record that has ended would be shown for ever.
                    run = await integration.task_of(call).get_status(call.task_id or "")
                    steps = [
                        StepView.model_validate(step, from_attributes=True)
                        for step in run.steps
                        if not step.key.startswith(_OWN_STEPS)
                    ]
        return _view(call, steps)

    @router.get("/api/calls/{call_id}/events")
    async def events(call_id: str) -> list[EventView]:
        """What has happened to it, in order."""
        async with sessions() as session:
            call = await find(session, call_id)
            found = select(IntegrationEvent).where(IntegrationEvent.task_id == call.task_id)
            happened = await session.scalars(found.order_by(IntegrationEvent.sequence))
            return [EventView.model_validate(event, from_attributes=True) for event in happened]

    @router.post("/api/calls/{call_id}/try-again", status_code=202)
    async def try_again(call_id: str) -> CallView:
        """Have a failed one go on from its last finished step: what was paid for is not paid for again."""
        async with sessions.begin() as session:
            call = await find(session, call_id)
            if call.status != RecordStatus.FAILED:
                raise HTTPException(409, f"It is {call.status}: only what has failed can be tried again.")
            call.try_again()
        return _view(call)

    @router.post("/api/pictures", status_code=201)
    async def upload(request: Request) -> UploadView:
        """Keep a picture (the body, as it is) to be named in an order."""
        body = await request.body()  # limited by the middleware
        try:
            kept: StoredPicture = await asyncio.to_thread(keep_upload, storage, body)
        except NotAPictureError as error:
            raise HTTPException(422, str(error)) from None
        return UploadView(url=MEDIA + kept.name, width=kept.width, height=kept.height, format=kept.format)

    @router.get(MEDIA + "{name}")
    async def show(name: str) -> FileResponse:
        """A picture or a video."""
        try:
            path = storage.path(name)
        except NotStoredError:
            raise HTTPException(404, "There is no such file.") from None
        return FileResponse(path, headers={"X-Content-Type-Options": "nosniff"})

    return router


def _view(call: APICall, steps: list[StepView] | None = None) -> CallView:
    values = {name: getattr(call, name) for name in CallView.model_fields if name not in {"steps", "next_try_at"}}
    next_try_at = call.due_at if call.status == RecordStatus.FAILED else None
    return CallView(**values, next_try_at=next_try_at, steps=steps)
