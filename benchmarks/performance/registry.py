"""Which variants there are, where they are written, and what is said of them. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do the same work."""

    name: str
    title: str
    module: str
    peer: str
    """The client's class in ``module``."""
    server: str
    """What it needs: one of the services of ``services.py``."""
    durability: str
    """What is durable when, in words."""


_DEV_SERVER = "dev server, SQLite file, WAL, synchronous=normal: no fsync per write"
_OURS = "performance.variants.ours"
_TEMPORAL = "performance.variants.temporal"
_ALL = (
    Variant("workflow", 'this library, execution="workflow"', _OURS, "WorkflowPeer", "temporal", _DEV_SERVER),
    Variant("standalone", 'this library, execution="activity"', _OURS, "StandalonePeer", "temporal", _DEV_SERVER),
    Variant("by-hand", "Temporal workflow by hand", _TEMPORAL, "ByHandPeer", "temporal", _DEV_SERVER),
    Variant("floor-workflow", "bare activity in a workflow", _TEMPORAL, "FloorWorkflowPeer", "temporal", _DEV_SERVER),
    Variant("floor-standalone", "bare standalone activity", _TEMPORAL, "FloorStandalonePeer", "temporal", _DEV_SERVER),
    Variant(
        "dbos-sqlite",
        "DBOS on SQLite",
        "performance.variants.dbos_peer",
        "DBOSPeer",
        "sqlite",
        "SQLite file, DBOS's own settings: rollback journal, synchronous=full, fsync at every commit",
    ),
    Variant(
        "dbos-postgres",
        "DBOS on PostgreSQL",
        "performance.variants.dbos_peer",
        "DBOSPeer",
        "postgres",
        "PostgreSQL's defaults: fsync at every commit",
    ),
    Variant(
        "restate",
        "Restate",
        "performance.variants.restate_peer",
        "RestatePeer",
        "restate",
        "one node, its own log on disk, Restate's defaults: fsync, of many writes together",
    ),
    Variant(
        "queue",
        "taskiq on Redis, no steps",
        "performance.variants.taskiq_peer",
        "TaskiqPeer",
        "redis",
        "Redis, appendonly, appendfsync everysec: the last second may be lost; no steps to resume",
    ),
)
VARIANTS = {variant.name: variant for variant in _ALL}
OURS = ("workflow", "standalone")
BASE = "by-hand"
"""What ratios are against."""
