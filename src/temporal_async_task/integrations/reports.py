"""What a run tells the application: the events of a run so far, as one message that may arrive any number of times."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python

from temporal_async_task.errors import ReportRefusedError
from temporal_async_task.integrations.lifecycle import RecordStatus

MAX_EXTERNAL_ID = 255
"""Characters."""


def storable(value: Any) -> Any:
    """JSON that every database takes, and every reader: others end with an error that no repetition mends.

    PostgreSQL takes no NUL in texts, nothing takes half of a surrogate pair, and JSON knows no NaN and no infinity.
    """
    within = value  # of Any, where ``value`` is taken for what it matches
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {storable(key): storable(one) for key, one in within.items()}
        case list() | tuple():
            return [storable(one) for one in within]
        case _:
            return value


def _payload(payload: dict[str, Any]) -> dict[str, Any]:
    for name in ("external_id", "error", "error_type"):
        if not isinstance(payload.get(name, ""), str):
            raise ValueError(f"{name} must be a text")  # noqa: TRY004 - which pydantic makes a ValidationError of
    if len(payload.get("external_id", "")) > MAX_EXTERNAL_ID:
        raise ValueError(f"external_id has over {MAX_EXTERNAL_ID} characters")
    return storable(payload)  # type: ignore[no-any-return]


class ReportedEvent(BaseModel):
    """An event of a run."""

    model_config = ConfigDict(frozen=True)

    sequence: int = Field(ge=1, le=1_000_000)
    """Its place among the events of the report's generation, from 1."""
    type: Literal[RecordStatus.PROCESSING, RecordStatus.COMPLETED, RecordStatus.FAILED]
    at: AwareDatetime
    payload: Annotated[dict[str, Any], AfterValidator(_payload)] = Field(default_factory=dict[str, Any])
    """``result``; or ``error``, ``error_type`` and ``retryable``; and ``external_id``, if it is known."""


class Report(BaseModel):
    """All events of a run so far, in order, whether they were told before or not.

    So no report depends on another one's arrival: the receiver applies what it does not know yet.
    """

    model_config = ConfigDict(frozen=True)

    task: str = Field(min_length=1, max_length=255)
    task_id: str = Field(min_length=1, max_length=255)
    generation: int = Field(ge=1, le=1_000_000)
    """1, and one more after each failure that was reported: a run that is resumed tells its events anew."""
    events: tuple[ReportedEvent, ...] = Field(min_length=1, max_length=1000)

    def encode(self) -> bytes:
        """The body of a callback."""
        return self.model_dump_json().encode()

    @classmethod
    def decode(cls, body: bytes) -> Report:
        """The report in a callback's body.

        Raises:
            ReportRefusedError: The body holds none.
        """
        try:
            report = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            raise ReportRefusedError("malformed", f"The body is not a report: {where}: {first['msg']}") from None
        sequences = [event.sequence for event in report.events]
        if any(later != earlier + 1 for earlier, later in itertools.pairwise(sequences)):
            raise ReportRefusedError("out_of_order", f"The report's events are out of order: {sequences}.")
        return report


class Reporter(Protocol):
    """Brings reports to the application."""

    async def send(self, report: Report) -> None:
        """Return once the application has applied the report.

        Raises:
            ReportRefusedError: It never will.
            Exception: It could not be reached, or could not apply it now: the report is sent again.
        """
        ...


def as_json(value: Any) -> Any:
    """A result as JSON has it: bytes in base64 (in pydantic models, as the model says), and else what ``repr`` says."""
    try:
        return storable(to_jsonable_python(value, bytes_mode="base64", fallback=repr))
    except ValueError:  # with pydantic's errors: the task's own data converter has words for it
        return storable(repr(value))


def utc_now() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)
