"""Callbacks: signed, checked, sent again, and by nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temporal_async_task import ConfigError, ReportError, ReportRefusedError, SignatureError
from temporal_async_task.integrations.callbacks import SIGNATURE_HEADER, Callback, sign, verify
from temporal_async_task.integrations.lifecycle import RecordStatus
from temporal_async_task.integrations.reports import Report, ReportedEvent

SECRET = "0123456789abcdef"  # noqa: S105
OTHER = "fedcba9876543210"
NOW = 1_800_000_000.0


def report(*sequences: int) -> Report:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    events = [ReportedEvent(sequence=n, type=RecordStatus.PROCESSING, at=at) for n in sequences]
    return Report(task="draw", task_id="t-1", generation=1, events=tuple(events))


# Signatures -----------------------------------------------------------------------------------------------


def test_the_signature_is_an_hmac_sha256_of_timestamp_and_body():
    # Made with: printf '1800000000.{"a":1}' | openssl dgst -sha256 -hmac 0123456789abcdef
    known = "d3e17924cac4a72ca2ee9e5700df170fdb5733eaf69ecd909fb0c18a962b03a5"
    assert sign(b'{"a":1}', SECRET, timestamp=NOW) == f"t=1800000000,v1={known}"


@given(body=st.binary(max_size=200))
def test_what_was_signed_is_accepted_within_the_tolerance(body: bytes):
    header = sign(body, SECRET, timestamp=NOW)
    verify(body, header, SECRET, now=NOW + 299)
    verify(body, header, SECRET, now=NOW - 299)
    verify(body, header, [OTHER, SECRET], now=NOW)


@given(body=st.binary(min_size=1, max_size=50), at=st.integers(0, 49), flip=st.integers(1, 255))
def test_a_body_that_was_changed_in_any_place_is_refused(body: bytes, at: int, flip: int):
    changed = bytearray(body)
    changed[at % len(body)] ^= flip
    with pytest.raises(SignatureError) as refused:
        verify(bytes(changed), sign(body, SECRET, timestamp=NOW), SECRET, now=NOW)
    assert refused.value.code == "signature_wrong"


def test_another_secret_or_another_timestamp_is_refused():
    header = sign(b"body", OTHER, timestamp=NOW)
    with pytest.raises(SignatureError, match="signature_wrong"):
        verify(b"body", header, SECRET, now=NOW)
    moved = sign(b"body", SECRET, timestamp=NOW).replace("t=1800000000", "t=1800000200")
    with pytest.raises(SignatureError, match="signature_wrong"):
        verify(b"body", moved, SECRET, now=NOW + 200)


def test_a_replay_is_refused_once_it_is_older_than_the_tolerance():
    header = sign(b"body", SECRET, timestamp=NOW)
    with pytest.raises(SignatureError, match="301 s old") as old:
        verify(b"body", header, SECRET, now=NOW + 301)
    assert old.value.code == "timestamp_old"
    with pytest.raises(SignatureError) as ahead:
        verify(b"body", header, SECRET, now=NOW - 301)
    assert ahead.value.code == "timestamp_ahead"


@pytest.mark.parametrize("header", [None, "", "v1=abc", "t=1,v1=zz", "t=-1,v1=" + "0" * 64, "t=1,v1=" + "A" * 64])
def test_a_header_that_is_none_is_refused(header: str | None):
    with pytest.raises(SignatureError) as refused:
        verify(b"body", header, SECRET)
    assert refused.value.code == "signature_missing"


@pytest.mark.parametrize("secret", ["", "short", b"15 bytes, no mo", None, 5])
def test_a_secret_that_is_too_short_is_refused(secret: Any):
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        Callback("https://shop.example/reports", secret)


@pytest.mark.parametrize("url", ["", "shop.example", "ftp://shop.example/x", "file:///etc/passwd", "https:///x"])
def test_a_url_that_cannot_be_called_back_is_refused(url: str):
    with pytest.raises(ConfigError, match="http"):
        Callback(url, SECRET)


# Reports --------------------------------------------------------------------------------------------------


def test_a_report_survives_its_way():
    assert Report.decode(report(1, 2).encode()) == report(1, 2)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[]", "malformed"),
        (b"[" * 100_000, "malformed"),
        (report(1).encode().replace(b"processing", b"deleted"), "malformed"),
        (report(1).encode().replace(b'"generation":1', b'"generation":-1'), "malformed"),
        (report(1).encode().replace(b"Z", b""), "malformed"),  # a time without a zone
        (report(2, 1).encode(), "out_of_order"),
        (report(1, 3).encode(), "out_of_order"),
        (report(1, 1).encode(), "out_of_order"),
    ],
)
def test_a_body_that_is_no_report_is_refused(body: bytes, code: str):
    with pytest.raises(ReportRefusedError) as refused:
        Report.decode(body)
    assert refused.value.code == code


# Sending --------------------------------------------------------------------------------------------------


def parts_of(answer: Any) -> Iterable[bytes]:
    if answer is None:
        return [b"<html>proxy</html>"]
    return answer if isinstance(answer, Iterator) else [json.dumps(answer).encode()]


class Web:
    """A web process that answers as it is told."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.got: list[tuple[str, bytes]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                web.got.append((self.headers[SIGNATURE_HEADER], body))
                status, answer = web.answers.pop(0) if web.answers else (200, {"applied": 1})
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                with contextlib.suppress(OSError):  # who called has gone
                    for part in parts_of(answer):
                        self.wfile.write(part)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/reports"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.close()


async def test_a_report_is_sent_signed(web: Web):
    await Callback(web.url, SECRET).send(report(1))
    [(header, body)] = web.got
    verify(body, header, SECRET)
    assert Report.decode(body) == report(1)


@pytest.mark.parametrize("code", ["malformed", "unknown_record", "out_of_order", "too_large"])
async def test_a_refusal_is_told_from_a_failure(web: Web, code: str):
    web.answers = [(409, {"code": code, "detail": "because"})]
    with pytest.raises(ReportRefusedError, match="because") as refused:
        await Callback(web.url, SECRET).send(report(1))
    assert refused.value.code == code


async def test_a_proxy_that_finds_a_report_too_large_has_refused_it(web: Web):
    web.answers = [(413, None)]
    with pytest.raises(ReportRefusedError, match="too_large"):
        await Callback(web.url, SECRET).send(report(1))


@pytest.mark.parametrize(
    "answer",
    [(404, None), (401, {"code": "signature_wrong", "detail": "?"}), (503, {"code": "unavailable", "detail": ""})],
)
async def test_what_may_be_mended_is_no_refusal(web: Web, answer: Any):
    web.answers = [answer]
    with pytest.raises(ReportError) as failed:
        await Callback(web.url, SECRET).send(report(1))
    assert not isinstance(failed.value, ReportRefusedError)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_no_acknowledgement_and_is_not_followed(web: Web, status: int):
    web.answers = [(status, None)]
    with pytest.raises(ReportError, match=str(status)):
        await Callback(web.url, SECRET).send(report(1))
    assert len(web.got) == 1


async def test_a_page_that_answers_200_is_no_acknowledgement(web: Web):
    web.answers = [(200, None), (200, None), (200, {"applied": 0})]
    callback = Callback(web.url, SECRET)
    for _ in range(2):
        with pytest.raises(ReportError, match="200 with b'<html>proxy") as failed:
            await callback.send(report(1))
        assert not isinstance(failed.value, ReportRefusedError)
    await callback.send(report(1))
    assert len(web.got) == 3


@pytest.mark.parametrize("status", [201, 202, 203, 204, 206])
async def test_no_other_success_is_an_acknowledgement(web: Web, status: int):
    web.answers = [(status, {"applied": 1})]
    with pytest.raises(ReportError, match=str(status)):
        await Callback(web.url, SECRET).send(report(1))


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"ok": True},
        {"applied": None},
        {"applied": True},
        {"applied": "1"},
        {"applied": 1.5},
        [{"applied": 1}],
        "applied",
        iter([b""]),
        iter([b'{"applied": 1']),
        iter([b"[" * 60_000]),
        iter([b"\xff\xfe\xfd"]),
        iter([b" " * 70_000, b'{"applied": 1}']),  # too long to be the receiver's
    ],
    ids=lambda answer: "bytes" if isinstance(answer, Iterator) else None,
)
async def test_an_answer_that_is_not_the_receivers_is_no_acknowledgement(web: Web, answer: Any):
    web.answers = [(200, answer)]
    with pytest.raises(ReportError, match="Does something else answer") as failed:
        await Callback(web.url, SECRET).send(report(1))
    assert len(str(failed.value)) < 600


@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_that_does_not_end_is_not_waited_for(web: Web, status: int):
    def stream() -> Iterator[bytes]:
        for _ in range(50):
            time.sleep(0.1)
            yield b" "
        yield b'{"applied": 1}'

    web.answers = [(status, stream())]
    began = time.monotonic()
    with pytest.raises(ReportError):
        await Callback(web.url, SECRET, timeout=0.3).send(report(1))
    assert time.monotonic() - began < 3


async def test_an_answer_in_parts_and_with_more_in_it_acknowledges(web: Web):
    web.answers = [(200, iter([b'\xef\xbb\xbf{"status": "ok",', b' "applied"', b": 0}\r\n"]))]
    await Callback(web.url, SECRET).send(report(1))


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{"applied": 1}',
        b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"applied": 1',
        b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{",
    ],
    ids=["no HTTP", "chunk", "length", "problem"],
)
async def test_an_answer_that_breaks_off_is_no_acknowledgement(answer: bytes):
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]}")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ReportError):
            await Callback(f"http://127.0.0.1:{port}/reports", SECRET).send(report(1))


async def test_a_web_process_that_is_down_is_named(web: Web):
    with pytest.raises(ReportError, match=r"127\.0\.0\.1:1"):
        await Callback("http://127.0.0.1:1/reports", SECRET).send(report(1))
