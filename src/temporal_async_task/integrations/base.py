"""What ties tasks to a web application: integrations, and the aggregate that both kinds of process build.

No web framework in here. An aggregate is applied to any application object that has ``include_router`` and
``add_middleware``, as FastAPI's has.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from typing import TYPE_CHECKING, Any, Protocol

from temporal_async_task.errors import ConfigError, ServerUnavailableError
from temporal_async_task.registry import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from temporal_async_task.component import AsyncTaskComponent
    from temporal_async_task.task import TemporalAsyncTask

logger = logging.getLogger("temporal_async_task")

RECONNECT_DELAY = 1.0
"""Seconds between two tries of a web process to reach the Temporal server."""
_PARTS = (
    "configure",
    "setup",
    "teardown",
    "create_side_effects",
    "create_apis",
    "create_middlewares",
    "create_async_tasks",
)


class SideEffect(Protocol):
    """Something that is to happen when records change, as ``RecordMutationSideEffect``."""

    def install(self) -> None:
        """Begin to listen. Doing it twice is doing it once."""
        ...

    def remove(self) -> None:
        """Listen no more."""
        ...


class Integration(Protocol):
    """How an application uses an outside service. Derive from it, and write the parts that are needed.

    Any object that has some of these methods will do. The web process uses all parts; a worker process takes
    ``create_async_tasks`` only, so none of the others may be needed by the tasks.
    """

    async def configure(self) -> None:
        """Before anything else in the web process: check settings, make clients."""

    async def setup(self, app: Any) -> None:
        """As the web process starts, with the application object: begin what runs beside it."""

    async def teardown(self, app: Any) -> None:
        """As the web process stops: end what ``setup`` began."""

    def create_side_effects(self) -> Sequence[SideEffect]:
        """What happens when records change."""
        return ()

    def create_apis(self) -> Sequence[Any]:
        """Routers, of the application's framework."""
        return ()

    def create_middlewares(self) -> Sequence[Any]:
        """Middlewares, as the application's framework describes them (``starlette.middleware.Middleware``)."""
        return ()

    def create_async_tasks(self) -> Sequence[TemporalAsyncTask[Any, Any]]:
        """The tasks that the integration submits, and that a worker runs."""
        return ()


class AggregatedIntegration:
    """All integrations of an application, as one. The web process and the worker process build the same.

    In the web process::

        app = FastAPI(lifespan=integration.lifespan(component))  # or: async with integration.running(app, component)
        integration.mount(app)                                   # routers and middlewares

    In the worker process::

        component.register_all(integration.create_async_tasks())

    Args:
        integrations: Objects with some or all of the parts of an ``Integration``.

    Raises:
        ConfigError: One of them has none of these parts.
    """

    def __init__(self, *integrations: object) -> None:
        for one in integrations:
            if isinstance(one, type) or not any(hasattr(one, part) for part in _PARTS):
                raise ConfigError(f"{one!r} is no integration: it needs one of the methods {', '.join(_PARTS)}.")
        self.integrations = integrations
        self._tasks: tuple[TemporalAsyncTask[Any, Any], ...] | None = None

    def create_async_tasks(self) -> tuple[TemporalAsyncTask[Any, Any], ...]:
        """The tasks of all of them; the same objects each time.

        Raises:
            DuplicateTaskError: Two integrations have different tasks of one name.
        """
        if self._tasks is None:
            tasks: Registry[TemporalAsyncTask[Any, Any]] = Registry()
            for task in self._collect("create_async_tasks"):
                tasks.add(task)
            self._tasks = tuple(tasks)
        return self._tasks

    def create_side_effects(self) -> tuple[SideEffect, ...]:
        """The side effects of all of them."""
        return tuple(self._collect("create_side_effects"))

    def create_apis(self) -> tuple[Any, ...]:
        """The routers of all of them."""
        return tuple(self._collect("create_apis"))

    def create_middlewares(self) -> tuple[Any, ...]:
        """The middlewares of all of them; the first is the outermost."""
        return tuple(self._collect("create_middlewares"))

    async def configure(self) -> None:
        """Configure each, in order."""
        for one in self.integrations:
            await _call(one, "configure")

    async def setup(self, app: Any) -> None:
        """Set each up, in order. If one fails, those before it are torn down."""
        for done, one in enumerate(self.integrations):
            try:
                await _call(one, "setup", app)
            except BaseException:
                await self._teardown(app, self.integrations[:done])
                raise

    async def teardown(self, app: Any) -> None:
        """Tear each down, the last first. An error of one is logged, and does not keep the others up."""
        await self._teardown(app, self.integrations)

    async def _teardown(self, app: Any, integrations: Sequence[object]) -> None:
        for one in reversed(integrations):
            try:
                await _call(one, "teardown", app)
            except Exception:
                logger.exception("The teardown of %r failed", one)

    def mount(self, app: Any) -> None:
        """Add all routers and middlewares to a FastAPI application, before it starts."""
        for router in self.create_apis():
            app.include_router(router)
        for middleware in reversed(self.create_middlewares()):  # the last that is added is the outermost
            app.add_middleware(middleware.cls, *middleware.args, **middleware.kwargs)

    @contextlib.asynccontextmanager
    async def running(self, app: Any, component: AsyncTaskComponent) -> AsyncGenerator[None]:
        """The web process's part, while it serves: a client, no worker.

        The process starts whether the Temporal server answers or not: it goes on trying to connect.
        """
        if not component.is_started:
            for task in self.create_async_tasks():
                component.register(task)
        await self.configure()
        connecting = asyncio.create_task(connect(component))
        effects = self.create_side_effects()
        try:
            for effect in effects:
                effect.install()
            await self.setup(app)
            try:
                yield
            finally:
                await self.teardown(app)
        finally:
            for effect in effects:
                effect.remove()
            connecting.cancel()
            await asyncio.wait((connecting,))

    def lifespan(self, component: AsyncTaskComponent) -> Callable[[Any], AbstractAsyncContextManager[None]]:
        """``FastAPI(lifespan=integration.lifespan(component))``."""
        return lambda app: self.running(app, component)

    def _collect(self, part: str) -> Iterable[Any]:
        for one in self.integrations:
            create = getattr(one, part, None)
            if create is not None:
                yield from create()


async def connect(component: AsyncTaskComponent) -> None:
    """Connect a component, however long the server is away."""
    told = False
    while True:
        try:
            await component.connect()
        except (ServerUnavailableError, ConfigError) as error:
            if not told:
                logger.warning("Not connected yet, trying again: %s", error)
                told = True
            await asyncio.sleep(RECONNECT_DELAY)
        else:
            return


async def _call(integration: object, part: str, *args: Any) -> None:
    method = getattr(integration, part, None)
    if method is not None:
        answer = method(*args)
        if inspect.isawaitable(answer):
            await answer
