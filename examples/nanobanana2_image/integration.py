"""What ties the tasks to the application: when a committed ``APICall`` is there, its task runs and reports."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from temporal_async_task import AsyncTaskComponent, TemporalAsyncTask
from temporal_async_task.integrations.base import AggregatedIntegration
from temporal_async_task.integrations.callbacks import Callback
from temporal_async_task.integrations.sqlalchemy import RecordIntegration, RecordTask

from .api import create_api
from .body_limit import BodyLimit
from .entities import PICTURE, VIDEO, APICall, IntegrationEvent, create_engine, create_tables
from .pictures import MAX_BYTES
from .settings import Settings
from .tasks import PictureOrder, VideoOrder, create_tasks


class NanoBanana2ImageIntegration(RecordIntegration):
    """Pictures and videos, ordered by records.

    The base class brings the dispatcher (a record that was committed is not lost, Temporal up or down), the route that
    receives what workers report, and the tasks. Here it is said which records run which task.
    """

    def __init__(self, component: AsyncTaskComponent, settings: Settings) -> None:
        self._settings = settings
        self._engine = create_engine(settings.database_url)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        picture_task, video_task = create_tasks(settings)
        super().__init__(
            component,
            self._sessions,
            RecordTask(
                record=APICall,
                event=IntegrationEvent,
                task=picture_task,
                params=lambda call: PictureOrder(**call.request_params),
                where=APICall.kind == PICTURE,
            ),
            RecordTask(
                record=APICall,
                event=IntegrationEvent,
                task=video_task,
                params=lambda call: VideoOrder(**call.request_params),
                where=APICall.kind == VIDEO,
            ),
            report_to=Callback(settings.callback_url, settings.callback_secret),
        )

    async def configure(self) -> None:
        """Make the tables."""
        await create_tables(self._engine)

    async def teardown(self, app: Any) -> None:
        """Stop dispatching, and close the connections."""
        await super().teardown(app)
        await self._engine.dispose()

    def create_apis(self) -> Sequence[Any]:
        """The route for reports, and the application's own."""
        return [*super().create_apis(), create_api(self._settings, self._sessions, self)]

    def create_middlewares(self) -> Sequence[Middleware]:
        """No foreign names (DNS rebinding), no bodies without end."""
        return [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(self._settings.web_hosts)),
            Middleware(BodyLimit, max_bytes=MAX_BYTES),
        ]

    def task_of(self, call: APICall) -> TemporalAsyncTask[Any, Any]:
        """The task that a record runs."""
        return self.records[0 if call.kind == PICTURE else 1].task


def create_integration(component: AsyncTaskComponent, settings: Settings) -> AggregatedIntegration:
    """All integrations of the application: the same in the web process and in the workers. Add yours."""
    return AggregatedIntegration(NanoBanana2ImageIntegration(component, settings))
