"""The journal: what is known of a run, to and from the two parts in which it is stored.

The header is a small JSON document that holds all the status needs: steps, calls, times, errors, progress.
The results are one opaque run of bytes, each result behind its length. A finished step never changes, so its
fragments of both are made once and only copied at every later checkpoint.
"""

from __future__ import annotations

import json
import struct
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from temporal_async_task.errors import PayloadTooLargeError, in_words
from temporal_async_task.status import StepState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

VERSION = 1
MAX_BYTES = 2 * 1024 * 1024 - 64 * 1024
"""What a journal and its run's params may measure: the server takes 2 MB, and fails the activity for good beyond that.
The margin is for the open steps' part of the header and for the message around it."""

_MAX_ERROR_TEXT = 1_000  # characters
_MAX_OPEN_TEXT = 10_000  # characters; of the errors of all open steps
_OPEN_BYTES = 400  # what the record of an open step takes, at most, but for its key and its error's text
_MAX_REST = 64 * 1024  # what the errors of all open steps take, at most, and all that is not a step's
_FEW_OPEN = 20  # steps, for which the limit's margin is enough
_LENGTH = struct.Struct(">I")


class ErrorInfo(NamedTuple):
    """What is kept of an error: the name of its class, and its message."""

    type: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        parts: Sequence[BaseException] = getattr(error, "exceptions", ()) if _is_group(error) else ()
        try:
            text = ": ".join([str(error), *filter(None, ["; ".join(str(cls.of(part)) for part in parts)])])
        except Exception:
            text = "(its text cannot be made)"
        return cls.named(error.__class__.__name__, text)

    @classmethod
    def named(cls, error_type: str, message: str) -> ErrorInfo:
        text = message.encode("utf-8", "backslashreplace").decode()
        return cls(error_type, text if len(text) <= _MAX_ERROR_TEXT else text[:_MAX_ERROR_TEXT] + "…")

    def __str__(self) -> str:
        return in_words(self.type, self.message)


class Snapshot(NamedTuple):
    """A journal as it is stored: the header's JSON, and the results."""

    header: bytes
    results: bytes
    cancelled: bool = False
    """Whether the header says that the attempt has been told of a cancellation."""

    @property
    def size(self) -> int:
        return len(self.header) + len(self.results)


@dataclass(slots=True)
class StepRecord:
    """One step. Times are seconds since the epoch, by the server's clock."""

    key: str
    state: StepState = StepState.RETRYING
    calls: int = 0
    """Calls that ended by themselves. Those lost with a worker, or handed over, do not count."""
    failures: int = 0
    """Calls that failed (a poll's since it last succeeded): what the retry policy counts."""
    lost: int = 0
    """Attempts lost with their worker while this step was running."""
    started: float | None = None
    finished: float | None = None
    due: float | None = None
    """Not to be called before."""
    error: ErrorInfo | None = None
    child: str | None = None
    """The id of the run that this step has submitted, if it is a child."""
    once: bool = False
    """With ``at_most_once``: its call was made, or may have been, and no error has said that nothing was done."""
    result: bytes | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to tell of it yet."""
        return self.started is not None or self.state is not StepState.RETRYING or self.child is not None

    def note_failure(self, error: BaseException) -> ErrorInfo:
        """Count a call that has failed."""
        self.calls += 1
        self.failures += 1
        self.error = ErrorInfo.of(error)
        return self.error

    def to_json(self, max_error_text: int = _MAX_ERROR_TEXT) -> list[Any]:
        error = self.error
        if error is not None and len(error.message) > max_error_text:
            error = ErrorInfo(error.type, error.message[:max_error_text])
        fields = [
            self.key,
            self.state.value,
            self.calls,
            self.failures,
            self.lost,
            _rounded(self.started),
            _rounded(self.finished),
            _rounded(self.due),
            error,
            self.child,
        ]
        return [*fields, True] if self.once else fields

    @classmethod
    def from_json(cls, fields: list[Any]) -> StepRecord:
        # Another version of this library may have written fewer fields, or more: both can be in use during a deploy.
        padded: list[Any] = [*fields, *[None] * 11]
        key, state, calls, failures, lost, started, finished, due, error, child, once = padded[:11]
        info = ErrorInfo(*error) if error else None
        once = bool(once) or (info is not None and info.type == "StepOutcomeUnknownError")
        return cls(
            key, StepState(state), calls or 0, failures or 0, lost or 0, started, finished, due, info, child, once
        )


@dataclass(slots=True)
class Journal:
    """The steps of one run, and what else must outlive an attempt.

    Steps are begun on the users' event loop. They finish there, in the thread of their call or, behind a codec, on the
    engine's loop, which is where they are stored: what reads or changes which steps there are holds a lock. The fields
    of one record belong to its step's call.
    """

    started: float | None = None
    """When the first attempt began."""
    attempt: int = 0
    """Which attempt this is or was; for the status."""
    earlier: int = 0
    """Attempts made before the run was resumed, or taken out of its activity in some other way."""
    body: StepRecord = field(default_factory=lambda: StepRecord(""))
    """The body's own failures, outside of steps."""
    progress: tuple[float | None, str] | None = None
    max_bytes: int = MAX_BYTES
    cancel_reason: str | None = None
    """Set once an attempt has been told of a cancellation. It may not have been raised in the body yet."""
    cancelled_at: tuple[str, ...] | None = None
    """The keys of the steps that it was raised in, once it was: so that a later attempt raises it there."""
    _done: dict[str, StepRecord] = field(default_factory=dict[str, StepRecord])
    _open: dict[str, StepRecord] = field(default_factory=dict[str, StepRecord])
    _done_header: list[str] = field(default_factory=list[str])
    _done_bytes: int = 0
    _open_bytes: int = 0
    _results: bytearray = field(default_factory=bytearray)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self._done) + len(self._open)

    def __iter__(self) -> Iterator[StepRecord]:
        """All steps, the finished ones first, in the order in which they finished."""
        with self._lock:
            records = [*self._done.values(), *self._open.values()]
        return iter(records)

    def done(self) -> list[StepRecord]:
        """The finished steps, in the order in which they finished."""
        return list(self._done.values())

    def get(self, key: str) -> StepRecord | None:
        return self._done.get(key) or self._open.get(key)

    def count_lost(self, attempts: int) -> None:
        """Count attempts that were lost with their worker against the steps that ran, or else the body."""
        running = [record for record in self._open.values() if record.state is StepState.RUNNING]
        for record in running or [self.body]:
            record.lost += attempts

    def open(self, key: str) -> StepRecord:
        """The record of a step that is not finished, made if there is none.

        Raises:
            PayloadTooLargeError: There is no room for it.
        """
        with self._lock:
            if key not in self._open:
                if len(self._open) >= _FEW_OPEN and self._is_over(_open_bytes(key)):
                    raise PayloadTooLargeError(
                        f"{len(self._open)} steps are under way, and the run's journal has no room for another: its "
                        f"limit is {self.max_bytes:,} bytes (2 MB with the params). Begin fewer at once, or keep "
                        f"results smaller."
                    )
                self._add_open(StepRecord(key))
            return self._open[key]

    def _size(self) -> int:
        return len(self._results) + self._done_bytes + len(self._rest().encode())

    def _is_over(self, more: int) -> bool:
        """Whether so many bytes more would be over the limit."""
        # At first roughly: to measure all open steps for each that begins or ends would cost the square of them.
        at_most = len(self._results) + self._done_bytes + self._open_bytes + _MAX_REST
        return at_most + more > self.max_bytes and self._size() + more > self.max_bytes

    def complete(self, record: StepRecord, result: bytes, now: float) -> None:
        """Note a step's result.

        Raises:
            PayloadTooLargeError: The journal would be too large; it is as it was before.
        """
        with self._lock:
            if self._is_over(len(result)):
                raise PayloadTooLargeError(
                    f"A result of {len(result):,} bytes would bring the run's journal to "
                    f"{self._size() + len(result):,} bytes, over the limit of {self.max_bytes:,} (2 MB with the "
                    f"params). Store large results elsewhere, and return a reference."
                )
            record.state, record.result, record.finished = StepState.COMPLETED, result, now
            record.due, record.error = None, None
            # What the body loses or fails at counts only while nothing gets done.
            self.body.lost = self.body.failures = 0
            self.body.error = None
            if self._open.pop(record.key, None) is not None:
                self._open_bytes -= _open_bytes(record.key)
            self._add_done(record)

    def reopen(self, redo: Iterable[str] = ()) -> Journal:
        """A journal for another try: steps that failed, and those to ``redo``, start anew; all other results stay.

        A step that was running stays so, and one that failed with ``at_most_once`` stays failed: it is not called a
        second time, unless ``redo`` names it. One that waits goes on waiting until the same time. A child's run stays
        the step's: it has its id from the step, and there is no other.

        Raises:
            KeyError: One of ``redo`` is not known.
        """
        again = set(redo)
        if missing := again - self._done.keys() - self._open.keys():
            raise KeyError(", ".join(sorted(missing)))
        fresh = Journal(started=self.started, attempt=self.attempt)
        for record in self._done.values():
            if record.key not in again:
                fresh._add_done(record)
        for record in self._open.values():
            goes_on = record.state in {StepState.RUNNING, StepState.WAITING} and record.key not in again
            if record.state is StepState.FAILED and record.once and record.key not in again:
                fresh._add_open(replace(record))
            elif goes_on:
                # No look at a child counts: the first one resumes a child that has failed.
                calls = record.calls if record.child is None else 0
                fresh._add_open(replace(record, calls=calls, failures=0, lost=0))
            elif record.child is not None:
                fresh.open(record.key).child = record.child
        return fresh

    def _add_open(self, record: StepRecord) -> None:
        self._open[record.key] = record
        self._open_bytes += _open_bytes(record.key)

    def _add_done(self, record: StepRecord) -> None:
        result = record.result or b""
        self._index(record)
        self._results += _LENGTH.pack(len(result)) + result

    def _index(self, record: StepRecord) -> None:
        fragment = _dumps(record.to_json())
        self._done[record.key] = record
        self._done_header.append(fragment)
        self._done_bytes += len(fragment.encode()) + 1

    def snapshot(self) -> Snapshot:
        with self._lock:
            header = f'{self._rest()[:-1]},"done":[{",".join(self._done_header)}]}}'
            return Snapshot(header.encode(), bytes(self._results), cancelled=self.cancel_reason is not None)

    def _rest(self) -> str:
        """The header, but for the finished steps. However many fail at once, it does not grow past all bounds."""
        text = _MAX_OPEN_TEXT // max(len(self._open), 1)
        return _dumps(
            {
                "v": VERSION,
                "started": _rounded(self.started),
                "attempt": self.attempt,
                "earlier": self.earlier,
                "body": self.body.to_json(),
                "progress": self.progress,
                "cancel": self.cancel_reason,
                "cancelled_at": self.cancelled_at,
                "open": [record.to_json(text) for record in self._open.values()],
            }
        )

    @classmethod
    def restore(cls, snapshot: Snapshot) -> Journal:
        """The journal of a snapshot.

        Raises:
            ValueError: It is not a journal, or one of a version that this code does not know.
        """
        journal = cls.of_header(snapshot.header)
        at = 0
        for record in journal.done():
            if len(snapshot.results) < at + _LENGTH.size:
                break
            (length,) = _LENGTH.unpack_from(snapshot.results, at)
            at += _LENGTH.size
            record.result = snapshot.results[at : at + length]
            at += length
        else:
            if at == len(snapshot.results):
                journal._results += snapshot.results  # noqa: SLF001 - its own
                return journal
        raise ValueError("The journal's results do not fit its header")

    @classmethod
    def of_header(cls, header: bytes) -> Journal:
        """A journal without its results: enough for the status.

        Raises:
            ValueError: As for ``restore``.
        """
        try:
            fields = json.loads(header)
            if fields["v"] == VERSION:
                return cls._of_fields(fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"The journal's header is damaged: {error!r}") from error
        raise ValueError(f"The journal has version {fields['v']!r}, this library reads {VERSION}")

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> Journal:
        journal = cls(body=StepRecord.from_json(fields["body"]))
        journal.started = fields.get("started")
        journal.attempt, journal.earlier = fields.get("attempt") or 0, fields.get("earlier") or 0
        journal.progress = tuple(fields["progress"]) if fields.get("progress") else None
        journal.cancel_reason = fields.get("cancel")
        cancelled_at = fields.get("cancelled_at")
        journal.cancelled_at = None if cancelled_at is None else tuple(cancelled_at)
        for step in fields["done"]:
            journal._index(StepRecord.from_json(step))
        for step in fields["open"]:
            journal._add_open(StepRecord.from_json(step))
        return journal


def _is_group(error: BaseException) -> bool:
    return isinstance(error, BaseExceptionGroup)


def _open_bytes(key: str) -> int:
    return 2 * len(_dumps(key).encode()) + _OPEN_BYTES  # it may stand in `cancelled_at`, too


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == float("inf") else round(seconds, 3)


_dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
