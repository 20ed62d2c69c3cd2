"""What crosses the wire: each name, and each message, once. Imports nothing of the application.

The workflow imports this module, so nothing here may depend on the time, the environment or the network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.converter import DataConverter, DefaultPayloadConverter

WORKFLOW_PREFIX = "asyncTask_"
"""A task's workflow type is this and its name."""
ACTIVITY_ID = "task"
COLLECT_ACTIVITY = "asyncTask:collect"
"""The engine's own activity: gets the journal of a run that is to be cancelled out of its activity."""

MEMO_PARAMS = "asyncTaskParams"
"""Memo: a digest of the params, to tell a repeated submit from a conflicting one."""
MEMO_JOURNAL = "asyncTaskJournal"
"""Memo: the journal's header, while the workflow and not the activity holds the journal."""
RESULT_JOURNAL = "asyncTaskJournal"
"""Metadata of a result's payload: the journal's header."""
ATTEMPTS = "asyncTaskAttempts"
"""Metadata of the header's payload: the attempts accounted for, in clear, so that a worker that cannot read the
journal can still say that its attempt was not lost."""

ATTEMPT_ENDED = "AttemptEnded"
"""Type of the failure that gives an attempt back."""
CANCELLED = "TaskCancelledError"
"""Type of the failure that ends a cancelled run."""

SIGNAL_CANCEL = "asyncTaskCancel"


class _Message:
    """A message of the engine's own: JSON in clear, unknown fields ignored, so that fields can be added."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_payload(self) -> Payload:
        return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(asdict(self)).encode())

    @classmethod
    def from_payload(cls, payload: Payload) -> Self:
        fields = json.loads(payload.data)
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


@dataclass(frozen=True, slots=True)
class TaskInput(_Message):
    """What a run is started with, beside its params."""

    origin: str
    """A UUID, made at the first submit and kept over resumes; idempotency keys derive from it."""
    heartbeat_timeout: float
    """Seconds after which an attempt whose worker is silent is given to another."""
    timeout: float | None = None
    """Seconds that the run may take."""
    created: float | None = None
    """When it was first submitted, of a resumed run; seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class AttemptInput(_Message):
    """What the workflow tells the activity, beside params and journal."""

    origin: str
    timeout: float | None = None
    deadline: float | None = None
    """Seconds since the epoch."""
    cancelled: bool = False
    reason: str = ""


class _RawPayloadConverter(DefaultPayloadConverter):
    """Hands payloads on as they are."""

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        hints: list[type] = [RawValue] * len(payloads)
        for index, hint in enumerate(type_hints or []):
            hints[index] = hint or RawValue
        return super().from_payloads(payloads, hints)


RAW = DataConverter(payload_converter_class=_RawPayloadConverter)
"""The converter of the engine's own connection to the server. What is the user's is encoded before."""
