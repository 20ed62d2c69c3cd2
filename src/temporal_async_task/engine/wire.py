"""What crosses the wire: each name, and each message, once. Imports nothing of the application.

The workflow imports this module, so nothing here may depend on the time, the environment or the network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, ClassVar, Self

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.common import RawValue, RetryPolicy
from temporalio.converter import DataConverter, DefaultPayloadConverter

WORKFLOW_PREFIX = "asyncTask_"
"""A task's workflow type is this and its name; so is the type of the standalone activity that carries a run."""
ACTIVITY_ID = "task-"
"""How the ids of the activities that carry a run begin; a number follows. There is one at a time, but for one whose
worker is gone, which the server keeps until the run ends."""
OWN_PREFIX = "asyncTask:"
"""How the names of the engine's own activities begin; no task has such a name."""
COLLECT_ACTIVITY = OWN_PREFIX + "collect"
"""The engine's own activity: gets the journal of a run that is to be cancelled out of its activity."""

MEMO_JOURNAL = "asyncTaskJournal"
"""Memo: the journal's header, as it was when the workflow and not the activity held the journal."""
MEMO_CREATED = "asyncTaskCreated"
"""Memo of a resumed run: when it was first submitted."""
RESULT_JOURNAL = "asyncTaskJournal"
"""Metadata of a result's payload: the journal's header."""
ATTEMPTS = "asyncTaskAttempts"
"""Metadata of the header's payload: the attempts accounted for, in clear, so that a worker that cannot read the
journal can still say that its attempt was not lost."""

CANCELLING = "asyncTaskCancelling"
"""Metadata of the header's payload, in clear: an attempt has been told of the cancellation, and the journal says so."""

NOTHING_BEGUN = "asyncTaskNothingBegun"
"""Metadata of the header's payload: there is no journal yet, only attempts to account for."""

ATTEMPT_ENDED = "AttemptEnded"
"""Type of the failure that gives an attempt back."""
ATTEMPT_LEFT = "AttemptLeft"
"""Type of the failure that gives an attempt back because its worker cannot serve the run."""
CANCELLED = "TaskCancelledError"
"""Type of the failure that ends a cancelled run."""

SIGNAL_CANCEL = "asyncTaskCancel"
SIGNAL_EVENT = "asyncTaskEvent"
PAUSED_TO_CANCEL = "asyncTaskCancel: "
"""How the reason begins for which an activity is paused, if that is to cancel its run. The rest is the caller's."""

CANCEL_MARK = "asyncTaskCancel: "
"""How the entry begins, among a standalone activity's error types that are not retried, which says that its run is
cancelled. The rest is the caller's reason. It is the one text of such an activity that can be changed while it waits,
and that its attempts get to see."""

_HOLD = "asyncTaskHold"

AFTER_A_LOSS = RetryPolicy(initial_interval=timedelta(seconds=1), backoff_coefficient=1.0)
"""How attempts are repeated is the engine's business: an attempt that ends in order says when the next is due. What is
left to this policy is the attempt whose worker was lost: the next one begins after a second, as often as it takes."""
NO_LIMIT = timedelta(days=3650)
"""The server wants a bound for an attempt. It is not what notices a dead worker (the heartbeat timeout is)."""
MAX_INPUT = 2 * 1024 * 1024 - 16 * 1024
"""Bytes that a workflow may be started with. The server takes 2 MB."""


class _Message:
    """A message of the engine's own: JSON in clear, unknown fields ignored, so that fields can be added."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_payload(self) -> Payload:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(fields).encode())

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
    delay: float = 0.0
    """Seconds before it begins."""
    digest: str = ""
    """Of the params, through the codec: tells a repeated submit from a conflicting one."""
    deadline: float | None = None
    """When it must have ended, of a run that goes on in a new history; seconds since the epoch."""
    events: tuple[str, ...] = ()
    """Keys of the events that came before, of a run that goes on; their values follow the journal."""
    given: tuple[str, ...] = ()
    """Of these, those for the first attempt in a new history."""
    history_before: str = ""
    """Of a run that was resumed, the id of the history before, if not all of its events have fitted here. The others
    are sent anew. Those that are not, because who resumes it dies or it fails again before, are found there the next
    time that it is resumed."""


@dataclass(frozen=True, slots=True)
class AttemptInput(_Message):
    """What the workflow tells the activity, beside params and journal."""

    origin: str
    timeout: float | None = None
    deadline: float | None = None
    """Seconds since the epoch."""
    cancelled: bool = False
    reason: str = ""
    events: tuple[str, ...] = ()
    """Keys of the events whose values follow the journal."""


@dataclass(frozen=True, slots=True)
class CancelRequest(_Message):
    """Why a run is cancelled."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class LookRequest(_Message):
    """Stop the run's activity, and look where it stands."""

    reason: str = ""
    now: float = 0.0
    """The server's time, in seconds since the epoch: the worker's own clock may be wrong."""


@dataclass(frozen=True, slots=True)
class EventInput(_Message):
    """Which event is sent; its value follows."""

    key: str


@dataclass(frozen=True, slots=True)
class Hold(_Message):
    """The activity's result when a run waits for events: the workflow holds the journal until one comes."""

    due: float | None
    """Seconds since the epoch; None for however long it takes."""
    events: tuple[str, ...]
    taken: tuple[str, ...] | None = None
    """Of the events that the attempt was given, those that are in the journal now. None, from a worker that does not
    tell: all of them."""


def own_input(start: TaskInput, run_id: str) -> TaskInput:
    """What a run was started with, its origin filled in.

    A schedule starts all of its runs with one message, whose origin is empty: each run's own id, a UUID, is its origin.
    """
    return start if start.origin else replace(start, origin=run_id.replace("-", ""))


def hold_payload(hold: Hold, journal: Sequence[Payload]) -> Payload:
    """An activity's result that is not its run's."""
    payload = pack(journal)
    payload.metadata[_HOLD] = hold.to_payload().data
    return payload


def hold_of(result: Payload) -> Hold | None:
    """What an activity's result says of events to wait for; None if it is the run's own result."""
    hold = result.metadata.get(_HOLD)
    return None if hold is None else Hold.from_payload(Payload(data=hold))


def created_payload(time: Timestamp | datetime) -> Payload:
    """The memo that keeps when a run was first submitted."""
    stamp = Timestamp()
    stamp.FromDatetime(time) if isinstance(time, datetime) else stamp.CopyFrom(time)
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(stamp.ToJsonString()).encode())


def created_time(payload: Payload) -> Timestamp:
    """The time in ``created_payload``."""
    time = Timestamp()
    time.FromJsonString(json.loads(payload.data))
    return time


def nothing_begun() -> Payload:
    """What stands in the place of a journal that there is not yet."""
    return Payload(metadata={"encoding": b"binary/null", NOTHING_BEGUN: b"true"})


def is_nothing_begun(payload: Payload) -> bool:
    """Whether a payload only stands in the place of a journal's."""
    return NOTHING_BEGUN in payload.metadata


def is_cancelling(journal: Sequence[Payload]) -> bool:
    """Whether a journal, by its header, says that an attempt has been told of the cancellation."""
    return any(CANCELLING in header.metadata for header in journal[:1])


def cancel_mark(error_types: Sequence[str] | None) -> str | None:
    """The reason for which a run was marked as cancelled, from its activity's error types that are not retried."""
    for error_type in error_types or ():
        if error_type.startswith(CANCEL_MARK):
            return error_type.removeprefix(CANCEL_MARK)
    return None


def input_size(payloads: Sequence[Payload]) -> int:
    """Bytes of a workflow's arguments, as the server counts them."""
    return Payloads(payloads=payloads).ByteSize()


def pack(payloads: Sequence[Payload]) -> Payload:
    """Several payloads in one."""
    return Payload(metadata={"encoding": b"binary/plain"}, data=Payloads(payloads=payloads).SerializeToString())


def unpack(payload: Payload) -> list[Payload]:
    """The payloads that ``pack`` was given."""
    return list(Payloads.FromString(payload.data).payloads)


class _RawPayloadConverter(DefaultPayloadConverter):
    """Hands payloads on as they are."""

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        hints: list[type] = [RawValue] * len(payloads)
        for index, hint in enumerate(type_hints or []):
            hints[index] = hint or RawValue
        return super().from_payloads(payloads, hints)


RAW = DataConverter(payload_converter_class=_RawPayloadConverter)
"""The converter of the engine's own connection to the server. What is the user's is encoded before."""
