"""Which records run which task, and how."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import inspect
from sqlalchemy.exc import NoInspectionAvailable

from temporal_async_task.checks import seconds
from temporal_async_task.errors import ConfigError
from temporal_async_task.integrations.sqlalchemy.mixins import EVENT_COLUMNS, RECORD_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import InstrumentedAttribute, Mapper

    from temporal_async_task.task import TemporalAsyncTask

P = TypeVar("P")


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordTask(Generic[P]):
    """Which records run which task, and how.

    Attributes:
        record: The mapped class, with ``APICallMixin``'s columns.
        event: The mapped class of its events, with ``IntegrationEventMixin``'s columns.
        task: What is run for each record.
        params: Makes the task's params from a record. It may use the record's relationships; an error of it fails the
            record.
        where: Which records of the class, if not all, as in ``APICall.kind == "video"``.
        max_attempts: How often a record is started and resumed by itself. A failure that another try cannot mend
            ends it before.
        retry_delay: Seconds (or a ``timedelta``) before a failed record is resumed, doubled with each attempt.
        max_backlog: No record is started while so many others wait for a worker, in the database's count of those
            that are queued or in Temporal's of the task queue. So a flood waits in the database.
        check_every: Seconds (or a ``timedelta``) without news after which a started record's run is asked about.

    Raises:
        ConfigError: The classes lack columns, or a number makes no sense.
    """

    record: type[Any]
    event: type[Any]
    task: TemporalAsyncTask[P, Any]
    params: Callable[[Any], P]
    where: ColumnElement[bool] | None = None
    max_attempts: int = 3
    retry_delay: float | timedelta = 60.0
    max_backlog: int = 1000
    check_every: float | timedelta = 60.0

    def __post_init__(self) -> None:
        mapper = _mapper(self.record, "record", "APICallMixin", RECORD_COLUMNS)
        _mapper(self.event, "event", "IntegrationEventMixin", EVENT_COLUMNS)
        elsewhere = [
            name for name in RECORD_COLUMNS if mapper.column_attrs[name].columns[0].table is not mapper.local_table
        ]
        if elsewhere:
            raise ConfigError(
                f"{self.record.__name__} has {', '.join(elsewhere)} in the table of a class that it inherits from. Use "
                f"that class as record=, and where= to say which of them."
            )
        if len(mapper.primary_key) != 1:
            raise ConfigError(f"{self.record.__name__} must have a primary key of one column.")
        for name in ("max_attempts", "max_backlog"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, not {getattr(self, name)!r}.")
        for name in ("retry_delay", "check_every"):
            if not seconds(getattr(self, name)) > 0:
                raise ConfigError(f"{name} must be over 0 seconds, not {getattr(self, name)!r}.")

    @property
    def key(self) -> InstrumentedAttribute[Any]:
        """The record's primary key."""
        mapper: Mapper[Any] = inspect(self.record)
        return getattr(self.record, mapper.get_property_by_column(mapper.primary_key[0]).key)  # type: ignore[no-any-return]

    def criteria(self) -> tuple[ColumnElement[bool], ...]:
        return () if self.where is None else (self.where,)

    def delay_after(self, attempts: int) -> timedelta | None:
        """How long a record that has failed waits for another try; None: for ever."""
        if attempts >= self.max_attempts:
            return None
        return timedelta(seconds=min(seconds(self.retry_delay) * 2.0 ** max(attempts - 1, 0), 86400.0))

    def check_delay(self) -> timedelta:
        return timedelta(seconds=seconds(self.check_every))


def _mapper(mapped: type[Any], what: str, mixin: str, columns: Iterable[str]) -> Mapper[Any]:
    try:
        mapper: Mapper[Any] = inspect(mapped)
        missing = [name for name in columns if name not in mapper.column_attrs]
    except (NoInspectionAvailable, AttributeError):
        raise ConfigError(f"{what}= must be a mapped class of SQLAlchemy, not {mapped!r}.") from None
    if missing:
        raise ConfigError(
            f"{mapped.__name__} lacks {', '.join(missing)}. Derive it from {mixin}, as in "
            f"`class {mapped.__name__}({mixin}, Base)`, or map columns with these names."
        )
    return mapper
