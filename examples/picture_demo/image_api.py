"""A stand-in for a paid image API: a real HTTP server that is slow, sometimes busy, and keeps count of its calls.

POST /images            generate   makes a picture of {"prompt": ...}; answers with its address
GET  /images/ID.png     download   the picture
PUT  /folder/NAME.png   upload     stores a picture in the folder
"""

import contextlib
import hashlib
import json
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import png
from verdict import Call

SECONDS = {"generate": 1.5, "download": 0.7, "upload": 0.3}
"""How long each kind of call takes."""
BUSY_EVERY = 3
"""The first call for every third picture is answered with 503, and a request to come back in a second."""


class ImageApi:
    """The API, in threads of this process.

    Args:
        folder: Where uploaded pictures go.
        log: The file to which each call is appended, as a line of JSON, when it is answered.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._log = log
        self._lock = threading.Lock()
        self._pictures: dict[str, bytes] = {}
        self._orders: list[str] = []

        class Handler(_Handler):
            api = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def is_busy(self, task_id: str) -> bool:
        """Whether this picture has to wait: so for every third one, when it is asked for the first time."""
        with self._lock:
            if task_id in self._orders:
                return False
            self._orders.append(task_id)
            return len(self._orders) % BUSY_EVERY == 0

    def make(self, prompt: str) -> str:
        # A real API would know the Idempotency-Key again and charge once. This one only counts, so that it shows.
        name = hashlib.sha256(prompt.encode()).hexdigest()[:12] + ".png"
        self._pictures[name] = png.gradient(prompt)
        return f"{self.url}/images/{name}"

    def find(self, name: str) -> bytes | None:
        return self._pictures.get(name)

    def store(self, name: str, data: bytes) -> None:
        # First under another name: whoever looks into the folder sees the whole picture or none.
        partial = self.folder / f".{name}.{threading.get_ident()}"
        partial.write_bytes(data)
        partial.replace(self.folder / name)

    def record(self, call: Call) -> None:
        with self._lock, self._log.open("a") as log:
            log.write(json.dumps(asdict(call)) + "\n")


class _Handler(BaseHTTPRequestHandler):
    api: ImageApi

    def do_POST(self) -> None:
        began_at, body = time.time(), self._body()
        if self.api.is_busy(self.headers["X-Task-Id"]):
            self._answer("generate", began_at, 503, b"busy, come back later", retry_after=1)
            return
        time.sleep(SECONDS["generate"])
        address = self.api.make(json.loads(body)["prompt"])
        self._answer("generate", began_at, 201, json.dumps({"url": address}).encode())

    def do_GET(self) -> None:
        began_at = time.time()
        time.sleep(SECONDS["download"])
        data = self.api.find(self._name())
        self._answer("download", began_at, 404 if data is None else 200, data or b"no such picture")

    def do_PUT(self) -> None:
        began_at, body = time.time(), self._body()
        time.sleep(SECONDS["upload"])
        if len(body) < int(self.headers["Content-Length"]):  # its sender was killed in the middle
            self._answer("upload", began_at, 400, b"half a picture")
            return
        self.api.store(self._name(), body)
        self._answer("upload", began_at, 201, b"")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _name(self) -> str:
        return self.path.rpartition("/")[2]

    def _answer(self, step: str, began_at: float, status: int, body: bytes, retry_after: int | None = None) -> None:
        task_id, key = self.headers["X-Task-Id"], self.headers["Idempotency-Key"]
        # Before the answer, so that no caller can be ahead of the log.
        self.api.record(Call(task_id, step, key, began_at, time.time(), status))
        with contextlib.suppress(ConnectionError):  # the caller may be gone: the demo kills it
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if retry_after is not None:
                self.send_header("Retry-After", str(retry_after))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not to the terminal: there is the log of calls."""
