"""Where reports arrive: in the process that has the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from temporal_async_task.errors import ReportRefusedError
from temporal_async_task.integrations.sqlalchemy.sessions import Database, Sessions
from temporal_async_task.integrations.sqlalchemy.store import RecordStore

if TYPE_CHECKING:
    from temporal_async_task.integrations.reports import Report
    from temporal_async_task.integrations.sqlalchemy.mapping import RecordTask


class ReportReceiver:
    """Applies reports to the records of an application.

    Args:
        sessions: The application's ``async_sessionmaker`` or ``sessionmaker``.
        records: Which records run which task.
    """

    def __init__(self, sessions: Sessions, *records: RecordTask[Any]) -> None:
        self._database = Database(sessions)
        self._stores = [RecordStore(one, self._database) for one in records]

    async def apply(self, report: Report) -> int:
        """Apply what is new in a report. Applying it again changes nothing.

        Returns:
            How many of its events were new.

        Raises:
            ReportRefusedError: There is no such record, or the events cannot follow on those that it has.
        """
        unknown = ReportRefusedError("unknown_record", f"No record runs task {report.task!r}.")
        for store in self._stores:
            if store.records.task.name == report.task:
                try:
                    return await store.apply(report)
                except ReportRefusedError as refusal:
                    if refusal.code != "unknown_record":
                        raise
                    unknown = refusal  # another class may run the same task
        raise unknown


class DirectReport:
    """A reporter for workers that share the application's database: no web process has to be up.

    Args:
        sessions: A ``sessionmaker``; or an ``async_sessionmaker`` whose engine was made with ``poolclass=NullPool``,
            since a worker runs tasks on event loops of its own.

    Raises:
        ConfigError: The engine has a pool that cannot be shared between event loops.
    """

    def __init__(self, sessions: Sessions) -> None:
        Database(sessions).check_usable_on_any_loop()
        self._sessions = sessions
        self._receiver: ReportReceiver | None = None

    def serve(self, *records: RecordTask[Any]) -> None:
        """Say which records there are. ``RecordIntegration`` does it."""
        self._receiver = ReportReceiver(self._sessions, *records)

    async def send(self, report: Report) -> None:
        """Apply a report.

        Raises:
            ReportRefusedError: It cannot be applied.
            Exception: The database's errors.
        """
        if self._receiver is None:
            raise ReportRefusedError("unknown_record", "DirectReport.serve(...) was not called.")
        await self._receiver.apply(report)
