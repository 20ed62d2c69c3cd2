"""Records that run tasks, with SQLAlchemy (extra ``sqlalchemy``)."""

try:
    import sqlalchemy.ext.asyncio  # pyright: ignore[reportUnusedImport]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "This integration needs SQLAlchemy: pip install 'temporal-async-task[sqlalchemy]'", name=error.name
    ) from error

from temporal_async_task.integrations.sqlalchemy.dispatcher import Dispatcher
from temporal_async_task.integrations.sqlalchemy.integration import RecordIntegration
from temporal_async_task.integrations.sqlalchemy.mapping import RecordTask
from temporal_async_task.integrations.sqlalchemy.mixins import APICallMixin, IntegrationEventMixin, UTCDateTime
from temporal_async_task.integrations.sqlalchemy.receiver import DirectReport, ReportReceiver
from temporal_async_task.integrations.sqlalchemy.side_effects import (
    MutationType,
    RecordMutation,
    RecordMutationSideEffect,
)

del sqlalchemy  # imported for the sake of the error above
__all__ = [
    "APICallMixin",
    "DirectReport",
    "Dispatcher",
    "IntegrationEventMixin",
    "MutationType",
    "RecordIntegration",
    "RecordMutation",
    "RecordMutationSideEffect",
    "RecordTask",
    "ReportReceiver",
    "UTCDateTime",
]
