"""Submits by two clients in turn, in one process: what one costs beside the other, noise or not.

``python -m performance.pairs PLACE PLACE COUNT`` prints the seconds of each as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid

from performance.load import make_peer
from performance.place import Place
from performance.variants import base

_WARM_UP = 5


async def main(places: list[Place], count: int) -> None:
    peers = [make_peer(place) for place in places]
    for peer in peers:
        await peer.open()
    times: list[list[float]] = [[] for _ in peers]
    for turn in range(count + _WARM_UP):
        for peer, own in zip(peers, times, strict=True):
            task_id = uuid.uuid4().hex
            began = time.perf_counter()
            await peer.submit(base.CALL, 1, task_id, queue="nobody")
            if turn >= _WARM_UP:
                own.append(time.perf_counter() - began)
    print(json.dumps(times))


if __name__ == "__main__":
    asyncio.run(main([Place.from_json(text) for text in sys.argv[1:3]], int(sys.argv[3])))
