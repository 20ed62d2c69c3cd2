"""Runs that begin by the clock: Temporal's own Schedules, thinly."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleState,
)
from temporalio.common import RawValue
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.checks import MAX_DURATION, check_seconds, check_text
from temporal_async_task.engine import wire
from temporal_async_task.engine.backend import TaskAddress
from temporal_async_task.engine.client import translated
from temporal_async_task.engine.workflow_backend import WorkflowBackend
from temporal_async_task.errors import AsyncTaskError, ConfigError, TaskConflictError, TaskNotFoundError

if TYPE_CHECKING:
    from temporalio.api.schedule.v1 import ScheduleInfo, ScheduleListInfo
    from temporalio.api.schedule.v1 import ScheduleSpec as StoredSpec

Overlap = Literal["skip", "buffer_one", "buffer_all", "cancel_other", "terminate_other", "allow_all"]
"""What happens when a run is due and the one before it is still going on; see
https://docs.temporal.io/schedule#overlap-policy."""

_SERVERS_PREFIX = "temporal-sys-scheduler:"
"""The server names its own workflow, which keeps a schedule, by this and the schedule's id."""


class ScheduleOptions(TypedDict, total=False):
    """The keywords of ``TemporalAsyncTask.schedule``."""

    cron: str | Sequence[str] | None
    every: float | timedelta | None
    overlap: Overlap
    time_zone: str | None
    jitter: float | timedelta
    paused: bool
    note: str


@dataclass(frozen=True, slots=True)
class TaskSchedule:
    """What the server says of a schedule."""

    id: str
    task_name: str
    cron: tuple[str, ...]
    """Empty for a schedule with ``every``."""
    every: float | None
    """Seconds between two runs."""
    time_zone: str | None
    """Whose clock ``cron`` means; None for UTC."""
    paused: bool
    note: str
    next_runs: tuple[datetime, ...]
    """When the next runs (ten at most) are due, soonest first; were due, while it is paused."""
    last_task_ids: tuple[str, ...]
    """Of the runs that it has started last (ten at most), newest first."""


class ScheduleHandle:
    """A schedule of a task, to be paused, triggered and deleted. ``task.schedule`` and ``task.get_schedule`` give it.

    Each method raises ``TaskNotFoundError`` if the schedule was deleted meanwhile, and ``ServerUnavailableError`` if
    the server does not answer.
    """

    def __init__(self, client: Client, task: TaskAddress, schedule_id: str) -> None:
        self.id = schedule_id
        self._client = client
        self._task = task
        self._handle = client.get_schedule_handle(schedule_id)

    def __repr__(self) -> str:
        return f"<ScheduleHandle {self.id!r} of task {self._task.name!r}>"

    async def describe(self) -> TaskSchedule:
        """What the server says of it now."""
        with self._errors():
            found = (await self._handle.describe()).raw_description
        if found.schedule.action.start_workflow.workflow_type.name != self._task.workflow_type:
            raise self._unknown()
        state = found.schedule.state
        return _view(self.id, self._task, found.schedule.spec, found.info, paused=state.paused, note=state.notes)

    async def pause(self, note: str = "") -> None:
        """Start no runs until ``unpause()``. Those that it has started go on.

        Args:
            note: Why; takes the place of the schedule's note.
        """
        with self._errors():
            await self._handle.pause(note=note or None)

    async def unpause(self, note: str = "") -> None:
        """Start runs again when they are due. What was due meanwhile is not made up for.

        Args:
            note: Takes the place of the schedule's note.
        """
        with self._errors():
            await self._handle.unpause(note=note or None)

    async def trigger(self) -> None:
        """Start a run now, whether the schedule is paused or not. ``overlap`` decides, if another one is going on.

        Its id is soon the first of ``describe().last_task_ids``. Two runs that begin within a second have the same id,
        which then tells of the second one only.
        """
        with self._errors():
            await self._handle.trigger()

    async def delete(self) -> None:
        """Delete the schedule. The runs that it has started go on."""
        with self._errors():
            await self._handle.delete()

    @contextlib.contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                raise self._unknown() from None
            raise translated(error, self._client) from error

    def _unknown(self) -> AsyncTaskError:
        return TaskNotFoundError(f"There is no schedule {self.id!r} of task {self._task.name!r}.")


async def create_schedule(
    backend: WorkflowBackend,
    task: TaskAddress,
    schedule_id: str,
    params: Any,
    *,
    cron: str | Sequence[str] | None = None,
    every: float | timedelta | None = None,
    overlap: Overlap = "skip",
    time_zone: str | None = None,
    jitter: float | timedelta = 0.0,
    paused: bool = False,
    note: str = "",
) -> ScheduleHandle:
    """See ``TemporalAsyncTask.schedule``."""
    what = f"Schedule {_checked_id(schedule_id)!r} of task {task.name!r}"
    spec = ScheduleSpec(
        cron_expressions=[] if cron is None else _cron(cron, what),
        intervals=[] if every is None else [ScheduleIntervalSpec(_interval(every, what))],
        jitter=_jitter(jitter, what),
        time_zone_name=time_zone,
    )
    if bool(spec.cron_expressions) == bool(spec.intervals):
        raise ConfigError(f"{what} needs either cron (as '0 3 * * *') or every (seconds), and not both.")
    if overlap not in get_args(Overlap):
        raise ConfigError(f"{what}: overlap must be one of {', '.join(get_args(Overlap))}, not {overlap!r}.")
    encoded = await backend.encode_params(task, schedule_id, params)
    # The one message starts every run, so the origin, which is to be each run's own, is left to the run.
    start = wire.TaskInput(
        origin="", heartbeat_timeout=task.heartbeat_timeout, timeout=task.timeout, digest=encoded.sealed_digest
    )
    action = ScheduleActionStartWorkflow(
        task.workflow_type,
        args=[RawValue(start.to_payload()), RawValue(encoded.payload)],
        id=schedule_id,
        task_queue=task.task_queue,
    )
    schedule = Schedule(
        action=action,
        spec=spec,
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy[overlap.upper()]),
        state=ScheduleState(paused=paused, note=note),
    )
    try:
        await backend.client.create_schedule(schedule_id, schedule)
    except ScheduleAlreadyRunningError:
        raise TaskConflictError(
            f"The schedule id {schedule_id!r} is in use. Choose another id, or delete that schedule first."
        ) from None
    except RPCError as error:
        if error.status == RPCStatusCode.INVALID_ARGUMENT:
            raise ConfigError(f"{what} was refused by the server: {error}") from error
        raise translated(error, backend.client) from error
    return ScheduleHandle(backend.client, task, schedule_id)


async def find_schedule(backend: WorkflowBackend, task: TaskAddress, schedule_id: str) -> ScheduleHandle:
    """See ``TemporalAsyncTask.get_schedule``."""
    handle = ScheduleHandle(backend.client, task, _checked_id(schedule_id))
    await handle.describe()
    return handle


async def list_schedules(backend: WorkflowBackend, task: TaskAddress) -> AsyncIterator[TaskSchedule]:
    """See ``TemporalAsyncTask.schedules``."""
    try:
        # Visibility knows the type of what a schedule starts, but has no query for it.
        async for found in await backend.client.list_schedules():
            info = found.raw_entry.info
            if info.workflow_type.name == task.workflow_type:
                yield _view(found.id, task, info.spec, info, paused=info.paused, note=info.notes)
    except RPCError as error:
        raise translated(error, backend.client) from error


def _view(
    schedule_id: str,
    task: TaskAddress,
    spec: StoredSpec,
    info: ScheduleInfo | ScheduleListInfo,
    *,
    paused: bool,
    note: str,
) -> TaskSchedule:
    return TaskSchedule(
        id=schedule_id,
        task_name=task.name,
        cron=tuple(calendar.comment for calendar in spec.structured_calendar if calendar.comment),
        every=spec.interval[0].interval.ToTimedelta().total_seconds() if spec.interval else None,
        time_zone=spec.timezone_name or None,
        paused=paused,
        note=note,
        next_runs=tuple(time.ToDatetime(UTC) for time in info.future_action_times),
        last_task_ids=tuple(
            dict.fromkeys(run.start_workflow_result.workflow_id for run in reversed(info.recent_actions))
        ),
    )


def _checked_id(schedule_id: str) -> str:
    check_text(schedule_id, "A schedule's id")
    check_text(_SERVERS_PREFIX + schedule_id, "The server's own id of a schedule")
    return schedule_id


def _cron(cron: str | Sequence[str], what: str) -> list[str]:
    if not (isinstance(cron, Sequence) and all(isinstance(expression, str) for expression in cron)):
        raise ConfigError(f"{what}: cron must be text, or a list of texts, not {cron!r}.")
    expressions = [cron] if isinstance(cron, str) else cron
    for expression in expressions:
        if "#" in expression:  # "5#3", the third Friday with others, would be every Friday
            raise ConfigError(
                f"{what}: cron={expression!r} has a '#', behind which the server sees a comment. Use note= for that."
            )
        if expression.strip().startswith("@every"):
            raise ConfigError(f"{what}: write cron={expression!r} as every=, in seconds or as a timedelta.")
    # The server keeps what it makes of an expression, and the comment: the expression itself, as Temporal's UI does it.
    return [f"{expression} # {expression}" for expression in expressions]


def _interval(every: float | timedelta, what: str) -> timedelta:
    length = check_seconds(every, f"{what}: every")
    if not (1 <= length <= MAX_DURATION and length.is_integer()):  # of 1.5 s the server would make 1 s
        raise ConfigError(f"{what}: every must be whole seconds, from 1 to ten years, not {every!r}.")
    return timedelta(seconds=length)


def _jitter(jitter: float | timedelta, what: str) -> timedelta:
    length = check_seconds(jitter, f"{what}: jitter")
    if not 0 <= length <= MAX_DURATION:
        raise ConfigError(f"{what}: jitter must be 0 seconds or more, not {jitter!r}.")
    return timedelta(seconds=length)
