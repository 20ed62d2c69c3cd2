"""Records that run tasks, as one integration: side effect, dispatcher, route and tasks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from temporal_async_task.errors import ConfigError
from temporal_async_task.integrations.base import Integration
from temporal_async_task.integrations.callbacks import Callback
from temporal_async_task.integrations.reported import ReportedTask, reported
from temporal_async_task.integrations.sqlalchemy.dispatcher import Dispatcher
from temporal_async_task.integrations.sqlalchemy.receiver import DirectReport, ReportReceiver
from temporal_async_task.integrations.sqlalchemy.side_effects import (
    MutationType,
    RecordMutation,
    RecordMutationSideEffect,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from temporal_async_task.component import AsyncTaskComponent
    from temporal_async_task.integrations.callbacks import Secret
    from temporal_async_task.integrations.sqlalchemy.mapping import RecordTask
    from temporal_async_task.integrations.sqlalchemy.sessions import Sessions
    from temporal_async_task.task import TemporalAsyncTask


class RecordIntegration(Integration):
    """Records that run tasks: created in a transaction, and kept from then on.

    In the web process it dispatches what was committed, and receives the reports. In a worker it is only the tasks.

    Args:
        component: The process's component, by which the dispatcher reaches Temporal.
        sessions: The application's ``async_sessionmaker`` or ``sessionmaker``.
        records: Which records run which task.
        report_to: How workers bring reports: ``Callback(url, secret)``, or ``DirectReport(sessions)`` where they share
            the database.
        former_secrets: Of callbacks, still accepted while workers change to the new one.
        batch: See ``Dispatcher``.
        lease: See ``Dispatcher``.
    """

    def __init__(
        self,
        component: AsyncTaskComponent,
        sessions: Sessions,
        *records: RecordTask[Any],
        report_to: Callback | DirectReport,
        former_secrets: Sequence[Secret] = (),
        batch: int = 50,
        lease: float | timedelta = 60.0,
    ) -> None:
        if not records:
            raise ConfigError("RecordIntegration(...) needs one or more RecordTask.")
        self._report_to = report_to
        self._former_secrets = former_secrets
        tasks: dict[int, ReportedTask[Any, Any]] = {}
        self.records = tuple(dataclasses.replace(one, task=_reported(one.task, report_to, tasks)) for one in records)
        self._tasks = tuple(tasks.values())
        self.receiver = ReportReceiver(sessions, *self.records)
        if isinstance(report_to, DirectReport):
            report_to.serve(*self.records)
        self.dispatcher = Dispatcher(component, sessions, *self.records, batch=batch, lease=lease)

    def create_async_tasks(self) -> Sequence[TemporalAsyncTask[Any, Any]]:
        return self._tasks

    def create_side_effects(self) -> Sequence[RecordMutationSideEffect]:
        """The nudge: what was committed here is dispatched at once, and not with the next look."""
        changes = (MutationType.CREATE, MutationType.UPDATE)
        return [
            RecordMutationSideEffect(record, self._nudge, on=changes, name="dispatch")
            for record in dict.fromkeys(one.record for one in self.records)
        ]

    def _nudge(self, mutation: RecordMutation) -> None:
        # An update is the application's (``try_again``) if it is no event's, and no claim's.
        own = {"event_count", "claims"} & mutation.changes.keys()
        if mutation.type is MutationType.CREATE or ("due_at" in mutation.changes and not own):
            self.dispatcher.wake()

    def create_apis(self) -> Sequence[Any]:
        """The route that receives callbacks, at the path of their URL."""
        if not isinstance(self._report_to, Callback):
            return ()
        try:
            # A worker, or an application of another framework, does without the extra.
            from temporal_async_task.integrations.sqlalchemy.router import create_report_router  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ConfigError(
                "The route for callbacks needs FastAPI: pip install 'temporal-async-task[fastapi]'"
            ) from error
        parts = urlsplit(self._report_to.url)
        secrets = [self._report_to.secret, *self._former_secrets]
        return [create_report_router(self.receiver, secrets, path=parts.path or "/")]

    async def setup(self, app: Any) -> None:  # noqa: ARG002 - an integration's
        """Begin to dispatch."""
        await self.dispatcher.start()

    async def teardown(self, app: Any) -> None:  # noqa: ARG002
        """Stop dispatching."""
        await self.dispatcher.stop()

    async def refresh(self, record: type[Any], key: Any) -> bool:
        """Bring a record up to date with its run, now. True if there was news.

        Reports and the dispatcher do it in time; an API that answers about a record may ask for it.

        Args:
            record: The record's class.
            key: Its primary key.

        Raises:
            ServerUnavailableError: The Temporal server does not answer.
            NotConnectedError: The process is not connected yet.
        """
        return await self.dispatcher.refresh(record, key)


def _reported(
    task: TemporalAsyncTask[Any, Any], to: Callback | DirectReport, known: dict[int, ReportedTask[Any, Any]]
) -> TemporalAsyncTask[Any, Any]:
    if isinstance(task, ReportedTask):
        return known.setdefault(id(task), task)
    if id(task) not in known:
        known[id(task)] = reported(task, to=to)
    return known[id(task)]
