"""The example's calls, over HTTP: the vendor's API and the pictures, as the stub serves them and as nobody should."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from ark import serving, serving_stub
from nanobanana2_image import stub_pictures
from nanobanana2_image.clients import ArkBusyError, ArkClient, ArkError
from nanobanana2_image.downloads import DownloadRefusedError, Downloads
from nanobanana2_image.pictures import data_url, read_picture
from nanobanana2_image.stub_api import Fault, Stub
from nanobanana2_image.tasks import PictureOrder, create_tasks
from support import wait_until
from temporal_async_task import RetryPolicy, StepFailedError
from temporal_async_task.retry import decide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nanobanana2_image.settings import Settings

CUP = stub_pictures.sample("cup")
CUP_URL = data_url(CUP, "image/png")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stub, str, Settings]]:
    with serving_stub(tmp_path_factory.mktemp("media")) as served:
        yield served


@pytest.fixture
def stub(served: tuple[Stub, str, Settings]) -> Stub:
    stub, _, _ = served
    stub.faults.clear()
    stub.generations.clear()
    return stub


@pytest.fixture
def url(served: tuple[Stub, str, Settings]) -> str:
    return served[1]


@pytest.fixture
def client(served: tuple[Stub, str, Settings]) -> ArkClient:
    return ArkClient(served[2].ark_base_url, served[2].ark_api_key)


@pytest.fixture
def downloads(served: tuple[Stub, str, Settings]) -> Downloads:
    return Downloads(served[2].picture_hosts, private_addresses=True)


async def generate(client: ArkClient) -> str:
    return await client.generate_picture(model="m", prompt="a cup", images=[CUP_URL, CUP_URL], idempotency_key="k-1")


def is_retried(error: BaseException) -> bool:
    """What the library makes of it."""
    return decide(error, RetryPolicy(), 1).retry


# The vendor's API


async def test_a_picture_is_made_and_can_be_fetched_under_the_unescaped_address(
    stub: Stub, client: ArkClient, downloads: Downloads
) -> None:
    """The stub escapes "&" once too often and looks at the signature behind it, as the vendor does."""
    address = await generate(client)
    assert "\\u0026" not in address
    info = read_picture(await downloads.fetch(address, max_bytes=10**6, deadline=10))
    assert (info.width, info.height, info.format) == (768, 512, "image/png")
    [made] = stub.generations
    assert (made.model, made.prompt, made.images, made.idempotency_key) == ("m", "a cup", 2, "k-1")


async def test_a_request_is_as_the_vendors_documentation_has_it() -> None:
    app, seen = FastAPI(), []

    @app.post("/api/v3/images/generations")
    async def record(request: Request) -> Any:
        seen.append((await request.json(), request.headers["authorization"], request.headers["content-type"]))
        return {"data": [{"url": "https://x.volces.com/1.jpeg"}]}

    with serving(app) as url:
        await generate(ArkClient(f"{url}/api/v3/", "the-key"))
    assert seen == [
        (
            {
                "model": "m",
                "prompt": "a cup",
                "image": [CUP_URL, CUP_URL],
                "watermark": False,
                "response_format": "url",
            },
            "Bearer the-key",
            "application/json",
        )
    ]


async def test_a_video_is_made_asked_for_and_fetched(stub: Stub, client: ArkClient, downloads: Downloads) -> None:
    stub.video_seconds = 0.3
    job_id = await client.create_video(model="m", prompt="a fox", image=CUP_URL, idempotency_key="k-2")
    assert await client.video(job_id) is None
    await asyncio.sleep(0.35)
    address = await client.video(job_id)
    assert address is not None
    assert (await downloads.fetch(address, max_bytes=10**6, deadline=10))[4:8] == b"ftyp"
    assert [(made.kind, made.images, made.idempotency_key) for made in stub.generations] == [("video", 1, "k-2")]


async def test_a_429_is_tried_again_when_the_vendor_says(stub: Stub, client: ArkClient) -> None:
    stub.faults.append(Fault(route="images", kind="429", retry_after=17))
    with pytest.raises(httpx.HTTPStatusError, match=r"429: RateLimitExceeded.*Too many requests") as raised:
        await generate(client)
    verdict = decide(raised.value, RetryPolicy(), 1)
    assert verdict.retry
    assert 17 <= (verdict.delay or 0) < 20  # with jitter
    assert stub.generations == []


@pytest.mark.parametrize(
    ("fault", "kind", "message", "again"),
    [
        (Fault(route="images", kind="500"), httpx.HTTPStatusError, "500: InternalServiceError", True),
        (Fault(route="images", kind="malformed"), ArkBusyError, "not JSON", True),
        (Fault(route="images", kind="empty"), ArkError, "no data", False),
        (Fault(route="images", kind="error_inside"), ArkError, "SensitiveContentDetected: It cannot", False),
        (Fault(route="images", kind="error_inside", code="ServerOverloaded"), ArkBusyError, "Overloaded", True),
        (
            Fault(route="images", kind="error_inside", code="RateLimitExceeded.EndpointRPMExceeded"),
            ArkBusyError,
            "RateLimit",
            True,
        ),
    ],
    ids=["500", "malformed", "empty", "refused inside", "overloaded inside", "rate limit inside"],
)
async def test_what_can_pass_is_tried_again_and_what_cannot_is_not(
    stub: Stub, client: ArkClient, *, fault: Fault, kind: type[Exception], message: str, again: bool
) -> None:
    stub.faults.append(fault.model_copy())
    with pytest.raises(kind, match=message) as raised:
        await generate(client)
    assert is_retried(raised.value) is again
    assert await generate(client), "and the next call goes well"


@pytest.mark.parametrize(
    ("body", "again"),
    [
        (b"", True),
        (b"<html>Bad gateway</html>", True),
        (b"\xff\xfe\x00", True),
        (b"null", True),
        (b"[]", False),
        (b'"text"', False),
        (b"{}", False),
        (b'{"data": null}', False),
        (b'{"data": {}}', False),
        (b'{"data": [null]}', False),
        (b'{"data": [{"url": 1}]}', False),
        (b'{"data": [{"url": ""}]}', False),
        (b'{"data": [{"error": {"code": "InternalServiceError", "message": "later"}}]}', True),
        (b'{"data": [{"error": {"code": "OutputImageSensitiveContentDetected", "message": "no"}}]}', False),
        (b'{"error": "text"}', False),
        (b'{"error": {"message": "no code"}}', False),
        (b'{"error": {"code": 7}}', False),
        (b"[" * 100_000, True),
        (b'"' + b"x" * 2_000_000, False),
    ],
)
async def test_no_answer_with_status_200_is_taken_for_more_than_it_is(body: bytes, again: bool) -> None:
    app = FastAPI()

    @app.post("/images/generations")
    async def answer() -> Response:
        return Response(body, media_type="application/json")

    with serving(app) as url, pytest.raises((ArkError, ArkBusyError)) as raised:
        await generate(ArkClient(url, "the-key"))
    assert is_retried(raised.value) is again
    assert len(str(raised.value)) < 600
    assert "the-key" not in str(raised.value)


async def test_a_wrong_key_and_none_are_told_and_not_tried_again(url: str) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="401: AuthenticationError") as raised:
        await generate(ArkClient(f"{url}/api/v3", "wrong"))
    assert not is_retried(raised.value)
    for key in ("", "with a\nnewline"):
        with pytest.raises(ArkError, match="ARK_API_KEY") as raised_here:
            await generate(ArkClient(f"{url}/api/v3", key))
        assert "newline" not in str(raised_here.value)


async def test_a_vendor_that_hangs_is_given_up_and_tried_again(stub: Stub, served: tuple[Stub, str, Settings]) -> None:
    stub.faults.append(Fault(route="images", kind="slow", seconds=2))
    with pytest.raises(httpx.ReadTimeout, match="The vendor does not answer") as raised:
        await generate(ArkClient(served[2].ark_base_url, "the-key", timeout=0.3))
    assert is_retried(raised.value)
    await wait_until(lambda: stub.generations)  # it makes the picture all the same, which is no other test's


async def test_a_video_that_has_failed_is_told_with_the_vendors_reason(stub: Stub, client: ArkClient) -> None:
    job_id = await client.create_video(model="m", prompt="a fox")
    stub.faults.append(Fault(route="jobs", kind="failed", code="OutputVideoSensitiveContentDetected"))
    with pytest.raises(ArkError, match="has failed: OutputVideoSensitiveContentDetected: It cannot be shown"):
        await client.video(job_id)


async def test_a_job_that_nobody_knows_is_no_job_that_is_not_ready(stub: Stub, client: ArkClient) -> None:
    for job_id in ("cgt-unknown", "../../images/generations", "a/b?c#d"):
        with pytest.raises(httpx.HTTPStatusError) as raised:
            await client.video(job_id)
        assert not is_retried(raised.value)


# Fetching


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/samples/missing.png", "answers 404"),
        ("/files/1.png?signature=wrong", "answers 403"),
        ("/samples/bad/loop", "more than 3 times"),
        ("/samples/bad/endless", "over 1,000,000 bytes"),
        ("/samples/bad/redirect?to=http://169.254.169.254/latest", "Nothing is fetched from 169.254.169.254"),
        ("/samples/bad/redirect?to=http://127.0.0.1:1/", "Nothing is fetched from 127.0.0.1:1"),
        ("/samples/bad/redirect?to=file:///etc/passwd", "must begin with http"),
        ("/samples/bad/redirect?to=//elsewhere.example/", "Nothing is fetched from elsewhere.example"),
    ],
)
async def test_what_must_not_or_cannot_be_fetched_is_refused_for_good(
    downloads: Downloads, url: str, path: str, reason: str
) -> None:
    with pytest.raises(DownloadRefusedError, match=reason) as raised:
        await downloads.fetch(url + path, max_bytes=1_000_000, deadline=20)
    assert not is_retried(raised.value)
    assert "signature" not in str(raised.value)


async def test_a_redirect_to_an_allowed_address_is_followed(downloads: Downloads, url: str) -> None:
    found = await downloads.fetch(f"{url}/samples/bad/redirect?to=/samples/cup.png", max_bytes=10**6, deadline=20)
    assert found == CUP


@pytest.mark.parametrize("kind", ["hang", "drip"])
async def test_a_download_as_a_whole_has_a_deadline(downloads: Downloads, url: str, kind: str) -> None:
    """A server that sends a byte now and then keeps every timeout that is counted from byte to byte."""
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"was not fetched within 0\.6 s") as raised:
        await downloads.fetch(f"{url}/samples/bad/{kind}", max_bytes=10**6, deadline=0.6)
    assert time.monotonic() - began < 5
    assert is_retried(raised.value)


async def test_a_server_that_does_not_answer_is_named_and_asked_again(
    downloads: Downloads, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanobanana2_image.downloads.TIMEOUT", httpx.Timeout(0.3, connect=10))
    with pytest.raises(httpx.ReadTimeout, match=f"{url}/samples/bad/hang does not answer") as raised:
        await downloads.fetch(f"{url}/samples/bad/hang", max_bytes=10**6, deadline=20)
    assert is_retried(raised.value)


async def test_a_busy_server_is_asked_again(stub: Stub, downloads: Downloads, client: ArkClient) -> None:
    address = await generate(client)
    stub.faults.append(Fault(route="files", kind="429", retry_after=9))
    with pytest.raises(httpx.HTTPStatusError) as raised:
        await downloads.fetch(address, max_bytes=10**6, deadline=10)
    verdict = decide(raised.value, RetryPolicy(), 1)
    assert verdict.retry
    assert 9 <= (verdict.delay or 0) < 11


async def test_private_addresses_are_refused_unless_configured(url: str) -> None:
    port = url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]"):
        downloads = Downloads((f"{host.strip('[]')}:{port}", f"{host}:{port}"))
        with pytest.raises(DownloadRefusedError, match="private address"):
            await downloads.fetch(f"http://{host}:{port}/samples/cup.png", max_bytes=10**6, deadline=10)


async def test_the_address_that_was_checked_is_the_one_that_is_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once: a second answer, another one, would come too late. The server sees the name."""
    port = int(url.rpartition(":")[2])
    lookups: list[str] = []

    async def resolve(_: Any, host: str, *args: Any, **options: Any) -> Any:
        if host == "pictures.example":
            lookups.append(host)
            host = "127.0.0.1"
        return await asyncio.to_thread(socket.getaddrinfo, host, *args, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    address = f"http://pictures.example:{port}/samples/cup.png"
    allowed = Downloads((f"pictures.example:{port}",), private_addresses=True)
    assert await allowed.fetch(address, max_bytes=10**6, deadline=10) == CUP
    assert lookups == ["pictures.example"]
    with pytest.raises(DownloadRefusedError, match="private address"):
        await Downloads((f"pictures.example:{port}",)).fetch(address, max_bytes=10**6, deadline=10)


async def test_a_compressed_answer_is_refused_before_it_is_unpacked() -> None:
    app = FastAPI()

    @app.get("/a.png")
    async def bomb() -> Response:
        return Response(gzip.compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"})

    with serving(app) as url:
        downloads = Downloads((url.removeprefix("http://"),), private_addresses=True)
        with pytest.raises(DownloadRefusedError, match="compressed"):
            await downloads.fetch(f"{url}/a.png", max_bytes=10**9, deadline=10)


# The tasks, called without a server


async def test_the_picture_that_is_stored_is_the_vendors(
    stub: Stub, url: str, served: tuple[Stub, str, Settings]
) -> None:
    picture_task, _ = create_tasks(served[2])
    order = PictureOrder(f"{url}/samples/cup.png", f"{url}/samples/lamp.png", "a lamp in a cup")
    picture = await picture_task(order)
    stored = (served[2].media_dir / picture.merged_image_url.removeprefix("/media/")).read_bytes()
    assert stored == stub_pictures.painted("a lamp in a cup", [CUP, stub_pictures.sample("lamp")])
    assert (picture.width, picture.height, picture.format) == (768, 512, "image/png")
    assert len(stub.generations) == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/samples/bad/text", "This is no picture"),
        ("/samples/bad/damaged", "damaged"),
        ("/samples/bad/bomb", "pixels"),
        ("/samples/bad/endless", "over 10,485,760 bytes"),
        ("/samples/bad/missing", "404"),
    ],
)
async def test_nothing_is_paid_for_a_source_that_is_no_picture(
    stub: Stub, url: str, served: tuple[Stub, str, Settings], source: str, reason: str
) -> None:
    picture_task, _ = create_tasks(served[2])
    with pytest.raises(StepFailedError, match=f"'fetch uploaded image' failed after 1 attempt: .*{reason}"):
        await picture_task(PictureOrder(f"{url}/samples/cup.png", url + source, "nothing to see"))
    assert [made for made in stub.generations if made.prompt == "nothing to see"] == []


@pytest.mark.parametrize(("prompt", "reason"), [(" \n", "prompt is empty"), ("x" * 100_000, "limit is 4,000")])
async def test_a_prompt_is_checked_before_it_is_paid_for(
    stub: Stub, url: str, served: tuple[Stub, str, Settings], prompt: str, reason: str
) -> None:
    picture_task, _ = create_tasks(served[2])
    with pytest.raises(StepFailedError, match=f"PromptError: .*{reason}"):
        await picture_task(PictureOrder(f"{url}/samples/cup.png", f"{url}/samples/fox.png", prompt))
    assert stub.generations == []


async def test_an_address_that_has_expired_fails_clearly_and_is_not_paid_again(
    stub: Stub, url: str, served: tuple[Stub, str, Settings]
) -> None:
    stub.faults.append(Fault(route="images", kind="expired"))
    picture_task, _ = create_tasks(served[2])
    with pytest.raises(StepFailedError, match=r"'store' failed after 1 attempt: .*answers 403: it is not there"):
        await picture_task(PictureOrder(f"{url}/samples/cup.png", f"{url}/samples/fox.png", "a cup"))
    assert len(stub.generations) == 1


def test_the_stub_refuses_what_the_vendor_would(url: str) -> None:
    headers = {"Authorization": "Bearer k"}
    bad = data_url(b"no picture", "image/png")
    wrong = base64.b64encode(b"x").decode()
    with httpx.Client(base_url=f"{url}/api/v3", headers=headers) as http:
        for image in (bad, wrong):
            answer = http.post("/images/generations", json={"model": "m", "prompt": "p", "image": [image]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                400,
                "InvalidParameter.UnsupportedImageFormat",
            )
        assert http.post("/images/generations", json={"model": "m"}).status_code == 400
        assert http.get("/contents/generations/tasks/none").status_code == 404
