"""The task: three calls to an API, each made durable. This is all the code that an application would write."""

import json
import os
import urllib.request
from dataclasses import dataclass

from temporal_async_task import async_task, current_run, current_step, step


@dataclass(frozen=True)
class Order:
    """What is asked for: the task's params."""

    name: str
    prompt: str


# A worker that is silent for so long has lost its tasks to the others. Short, to keep the demo short.
@async_task(heartbeat_timeout=4.0)
async def picture(order: Order) -> str:
    """Make a picture, fetch it, and store it. A step that has finished is never called again, whatever dies."""
    url = await step("generate", generate, order.prompt)
    image = await step("download", download, url)
    return await step("upload", upload, f"{order.name}.png", image)


# The calls: plain functions, which run in threads. What they raise tells whether to call again, and when: here
# urllib's HTTPError, with its status and Retry-After.


def generate(prompt: str) -> str:
    answer = json.loads(_call("POST", _api("/images"), json.dumps({"prompt": prompt}).encode()))
    return str(answer["url"])


def download(url: str) -> bytes:
    return _call("GET", url)


def upload(name: str, image: bytes) -> str:
    _call("PUT", _api(f"/folder/{name}"), image)
    return name


def _api(path: str) -> str:
    return os.environ["IMAGE_API"] + path


def _call(method: str, url: str, body: bytes | None = None) -> bytes:
    headers = {
        # The same for every call of this step of this run, so that the API can tell a repeated call from a new one.
        "Idempotency-Key": current_step().idempotency_key,
        "X-Task-Id": current_run().task_id,
    }
    request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310 - always our own API
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        data: bytes = answer.read()
    return data
