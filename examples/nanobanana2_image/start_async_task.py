"""The worker process: ``python -m nanobanana2_image.start_async_task``. Run as many as you like, anywhere.

It needs no port and no registration: it asks Temporal for work until SIGTERM or Ctrl-C, then finishes its calls and
hands the rest over.
"""

import asyncio
import logging
import sys

from temporal_async_task import AsyncTaskComponent, AsyncTaskComponentConfig, AsyncTaskError

from .integration import create_integration
from .logs import log_json
from .settings import Settings

log = logging.getLogger("nanobanana2_image")


async def work() -> None:
    settings = Settings.from_env()
    if not settings.ark_api_key:
        raise ValueError("ARK_API_KEY is not set: a worker calls the vendor's API.")
    config = AsyncTaskComponentConfig.load()
    log.info(
        "configuration",
        extra={
            "temporal": config.temporal_address,
            "namespace": config.namespace,
            "task_queue": config.task_queue,
            "ark": settings.ark_base_url,
            "media": str(settings.media_dir.absolute()),
        },
    )
    component = AsyncTaskComponent(config)
    tasks = create_integration(component, settings).create_async_tasks()
    component.register_all(tasks)
    log.info("tasks found", extra={"tasks": [task.workflow_type for task in tasks]})
    await component.run()
    log.info("stopped")


def main() -> None:
    log_json()
    try:
        asyncio.run(work())
    except (AsyncTaskError, ValueError) as error:  # what the one who starts it can mend
        log.error("not started: %s", error)  # noqa: TRY400 - a traceback would not help
        sys.exit(1)


if __name__ == "__main__":
    main()
