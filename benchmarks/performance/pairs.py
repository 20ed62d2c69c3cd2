"""Submits by two clients in turn, in one process: what one costs beside the other, noise or not.

``python -m performance.pairs PLACE PLACE COUNT`` prints how many times as long the first takes: the median of the
ratios of the pairs. Which of a pair is first alternates.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import uuid

from performance.load import make_peer
from performance.place import Place
from performance.variants import base

_WARM_UP = 10


async def main(places: list[Place], count: int) -> None:
    peers = [make_peer(place) for place in places]
    for peer in peers:
        await peer.open()
    ratios: list[float] = []
    for turn in range(count + _WARM_UP):
        took = [0.0, 0.0]
        for at in (0, 1) if turn % 2 else (1, 0):
            task_id = uuid.uuid4().hex
            began = time.perf_counter()
            await peers[at].submit(base.CALL, 1, task_id, queue="nobody")
            took[at] = time.perf_counter() - began
        if turn >= _WARM_UP:
            ratios.append(took[0] / took[1])
    print(json.dumps(statistics.median(ratios)))


if __name__ == "__main__":
    asyncio.run(main([Place.from_json(text) for text in sys.argv[1:3]], int(sys.argv[3])))
