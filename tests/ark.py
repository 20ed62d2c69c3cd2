"""The example `nanobanana2_image`, importable, and the stub of its vendor, served in a thread of this process."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the example is a package that is copied, not one that is installed

from nanobanana2_image.settings import Settings  # noqa: E402
from nanobanana2_image.stub_api import Stub, create_app  # noqa: E402


@contextlib.contextmanager
def serving(app: Any, *, port: int = 0, lifespan: Literal["on", "off"] = "off") -> Iterator[str]:
    """An ASGI application, on a port of its own unless one is given.

    In a thread, so that code that blocks the tests' loop does not block it.
    """
    config = uvicorn.Config(app, port=port, log_level="critical", lifespan=lifespan, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def serving_stub(folder: Path, **settings: Any) -> Iterator[tuple[Stub, str, Settings]]:
    """The stub, its address, and settings with which the application uses it."""
    stub = Stub()
    with serving(create_app(stub)) as url:
        given = {
            "ark_base_url": f"{url}/api/v3",
            "ark_api_key": "the-key-that-nobody-sees",
            "picture_hosts": (url.removeprefix("http://"),),
            "private_addresses": True,
            "media_dir": folder,
        }
        yield stub, url, Settings(**{**given, **settings})
