"""How much of everything is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a full run."""

    rounds: int = 5
    tasks: int = 200
    in_flight: int = 50
    one_by_one: int = 40
    submits: int = 60
    pairs: int = 200
    """Submits by this library and by the SDK, in turn."""
    asks: int = 30
    long: int = 500
    longest: int = 5000
    fan: int = 500
    waiting: int = 200
    """Tasks of each kind that wait while memory is measured; with them, fewer than the SDK caches."""
    beyond: int = 300
    """And more of them, until it caches no more; and then as many again."""
    settling: float = 12.0
    """Seconds before memory is looked at: the SDK's core keeps a timer of an attempt that has ended for about ten."""
    looks: int = 5
    """At memory, a second apart, that have to be alike."""
    drained: int = 10_000
    stretch: int = 300
    """Tasks of a queue's drain that are timed at once; as many stretches as there are rounds."""
    drained_by: tuple[int, ...] = (1, 2, 4)
    """Worker processes."""
    engine: int = 200


QUICK = Sizes(
    rounds=2,
    tasks=60,
    one_by_one=10,
    submits=15,
    pairs=40,
    asks=8,
    long=50,
    longest=500,
    fan=50,
    waiting=50,
    beyond=0,
    drained=2_000,
    stretch=100,
    engine=60,
)
TINY = Sizes(
    rounds=1,
    tasks=12,
    in_flight=6,
    one_by_one=3,
    submits=3,
    pairs=3,
    asks=2,
    long=10,
    longest=20,
    fan=5,
    waiting=5,
    beyond=0,
    settling=0.0,
    looks=2,
    drained=80,
    stretch=10,
    drained_by=(1,),
    engine=10,
)
