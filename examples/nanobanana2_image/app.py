"""The web process: ``uvicorn --factory nanobanana2_image.app:create_app``."""

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from temporal_async_task import AsyncTaskComponent, AsyncTaskComponentConfig

from .integration import create_integration
from .logs import log_json
from .settings import Settings

PAGE = Path(__file__).with_name("web")


def create_app(settings: Settings | None = None, config: AsyncTaskComponentConfig | None = None) -> FastAPI:
    """The application. It is a client of Temporal only, and starts whether Temporal is up or not."""
    log_json()
    component = AsyncTaskComponent(config or AsyncTaskComponentConfig.load())
    integration = create_integration(component, settings or Settings.from_env())
    app = FastAPI(title="Nano Banana 2", lifespan=integration.lifespan(component))
    integration.mount(app)

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        """What is wrong, in a sentence, and without what was sent: that may be 100 kB of prompt."""
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse({"detail": f"The body is no JSON: {first['ctx']['error']}"}, 422)
        where = ".".join(str(part) for part in first["loc"][1:] if part not in {"picture", "video"})
        return JSONResponse({"detail": f"{where or 'The body'}: {first['msg'].removeprefix('Value error, ')}"}, 422)

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> JSONResponse:
        """Starlette logs the error. What is inside is nobody's business outside."""
        return JSONResponse({"detail": "Something went wrong here. It was logged."}, 500)

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app
