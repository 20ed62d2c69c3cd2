"""The two tasks. This is what runs in the workers.

What is a step, and why: a step's result is kept in the run's journal, which may hold 2 MB in all. Two pictures in
base64 would burst it. So a fetched picture goes into the storage, and the journal gets its name only: fetching is not
repeated because the vendor was busy, both attempts send the same bytes though the source has changed meanwhile, and
base64 is made on the way out, of the stored file. The price is that all workers share the storage, which they do
anyway: it is where the results go.
"""

import asyncio
import hashlib
from dataclasses import dataclass

from temporal_async_task import TemporalAsyncTask, current_run, current_step, poll, step
from temporal_async_task.integrations.reported import report_external_id

from .clients import ArkClient
from .downloads import DownloadRefusedError, Downloads
from .pictures import MAX_BYTES, PictureInfo, data_url, read_picture
from .settings import Settings, check_prompt
from .storage import Storage

MEDIA = "/media/"
"""Where the web process serves the storage. Addresses below it are ours, and are not fetched but read."""
MAX_VIDEO_BYTES = 200 * 1024 * 1024
FETCH_DEADLINE = 60.0
STORE_DEADLINE = 600.0
CALL_TIMEOUT = 300.0
"""Seconds that one call to the vendor may take."""


@dataclass(frozen=True)
class PictureOrder:
    """Two pictures to make one of."""

    source_image_url: str
    uploaded_image_url: str
    prompt: str


@dataclass(frozen=True)
class Picture:
    """The picture that was made, as it is: measured, not assumed."""

    merged_image_url: str
    width: int
    height: int
    format: str


@dataclass(frozen=True)
class VideoOrder:
    """A video to make of a prompt, and perhaps of a picture to begin with."""

    prompt: str
    image_url: str | None = None


@dataclass(frozen=True)
class Video:
    """The video that was made."""

    video_url: str
    size: int
    format: str


@dataclass(frozen=True)
class StoredPicture:
    """What the journal keeps of a picture."""

    name: str
    width: int
    height: int
    format: str


class Calls:
    """The steps: each is one call to the outside, which may be made again after a crash."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ark = ArkClient(settings.ark_base_url, settings.ark_api_key)
        self._downloads = Downloads(settings.picture_hosts, private_addresses=settings.private_addresses)
        self._storage = Storage(settings.media_dir)

    async def fetch(self, url: str) -> StoredPicture:
        """Bring a picture into the storage, unless it is there."""
        if url.startswith(MEDIA):
            return await asyncio.to_thread(self._look_at, url.removeprefix(MEDIA))
        data = await self._downloads.fetch(url, max_bytes=MAX_BYTES, deadline=FETCH_DEADLINE)
        return await asyncio.to_thread(keep_upload, self._storage, data)

    async def generate(self, prompt: str, pictures: list[StoredPicture]) -> str:
        """Have the picture made. Paid."""
        prompt = check_prompt(prompt)
        images = await asyncio.gather(*(asyncio.to_thread(self._as_data_url, picture) for picture in pictures))
        return await self._ark.generate_picture(
            model=self._settings.ark_image_model,
            prompt=prompt,
            images=images,
            idempotency_key=current_step().idempotency_key,
        )

    async def store_picture(self, url: str) -> Picture:
        """Keep the picture before its address expires. Named after the run: stored again, it replaces itself."""
        data = await self._downloads.fetch(url, max_bytes=3 * MAX_BYTES, deadline=STORE_DEADLINE)
        info = await asyncio.to_thread(read_picture, data)
        name = await asyncio.to_thread(self._storage.write, f"picture-{_run_name()}{info.suffix}", data)
        return Picture(MEDIA + name, info.width, info.height, info.format)

    async def create_video(self, prompt: str, picture: StoredPicture | None) -> str:
        """Have the vendor begin with a video. Paid."""
        prompt = check_prompt(prompt)
        return await self._ark.create_video(
            model=self._settings.ark_video_model,
            prompt=prompt,
            image=None if picture is None else await asyncio.to_thread(self._as_data_url, picture),
            idempotency_key=current_step().idempotency_key,
        )

    async def video_is_ready(self, job_id: str) -> bool | None:
        """True when it is; None: ask again."""
        return None if await self._ark.video(job_id) is None else True

    async def store_video(self, job_id: str) -> Video:
        """Keep the video. Its address is asked for anew, so that one that has expired meanwhile does no harm."""
        url = await self._ark.video(job_id)
        if url is None:
            raise DownloadRefusedError(f"The vendor has the video of job {job_id} no more.")
        name = f"video-{_run_name()}.mp4"
        head, size = bytearray(), 0

        with self._storage.writing(name) as file:

            def write(chunk: bytes) -> None:
                nonlocal size
                head.extend(chunk[: 12 - len(head)])
                size += len(chunk)
                file.write(chunk)

            await self._downloads.download(url, write, max_bytes=MAX_VIDEO_BYTES, deadline=STORE_DEADLINE)
            if head[4:8] != b"ftyp":  # ISO/IEC 14496-12, 4.3: what an MP4 file begins with
                raise DownloadRefusedError("What the vendor calls a video is no MP4 file.")
        return Video(MEDIA + name, size, "video/mp4")

    def _look_at(self, name: str) -> StoredPicture:
        return _stored(name, read_picture(self._storage.read(name)))

    def _as_data_url(self, picture: StoredPicture) -> str:
        return data_url(self._storage.read(picture.name), picture.format)


def keep_upload(storage: Storage, data: bytes) -> StoredPicture:
    """Check a picture and keep it, named after what is in it: kept twice, it is there once.

    Raises:
        NotAPictureError: It is none.
    """
    info = read_picture(data)
    name = storage.write(f"source-{hashlib.sha256(data).hexdigest()[:40]}{info.suffix}", data)
    return _stored(name, info)


def check_source(url: str, settings: Settings) -> None:
    """Whether a picture's address is one that may be fetched, as far as can be said without fetching it.

    Raises:
        DownloadRefusedError: It may not.
        NotStoredError: It is one of ours, and there is nothing.
    """
    if url.startswith(MEDIA):
        Storage(settings.media_dir).path(url.removeprefix(MEDIA))
    else:
        Downloads(settings.picture_hosts).check(url)


def create_tasks(
    settings: Settings,
) -> tuple[TemporalAsyncTask[PictureOrder, Picture], TemporalAsyncTask[VideoOrder, Video]]:
    """The tasks. The web process submits them, the workers run them."""
    calls = Calls(settings)
    paid = step.with_options(timeout=CALL_TIMEOUT)

    async def nanobanana2_image(order: PictureOrder) -> Picture:
        source, uploaded = await asyncio.gather(
            step("fetch source image", calls.fetch, order.source_image_url),
            step("fetch uploaded image", calls.fetch, order.uploaded_image_url),
        )
        url = await paid("generate", calls.generate, order.prompt, [source, uploaded])
        return await step("store", calls.store_picture, url)

    async def seedance_video(order: VideoOrder) -> Video:
        first = None if order.image_url is None else await step("fetch image", calls.fetch, order.image_url)
        job_id = await paid("create job", calls.create_video, order.prompt, first)
        report_external_id(job_id)  # the record knows it from now on
        await poll(
            "render",
            calls.video_is_ready,
            job_id,
            every=settings.video_poll_every,
            timeout=settings.video_timeout,
        )
        return await step("store", calls.store_video, job_id)

    return (
        TemporalAsyncTask("nanobanana2_image", nanobanana2_image, heartbeat_timeout=settings.worker_lost_after),
        TemporalAsyncTask("seedance_video", seedance_video, heartbeat_timeout=settings.worker_lost_after),
    )


def _stored(name: str, info: PictureInfo) -> StoredPicture:
    return StoredPicture(name, info.width, info.height, info.format)


def _run_name() -> str:
    return hashlib.sha256(current_run().task_id.encode()).hexdigest()[:40]
