"""A middleware that refuses bodies over a limit, as soon as they are."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Args: the application, and the most bytes that a request's body may have."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # Raised inside of the route that reads, and answered by the application as its other errors are.
                raise HTTPException(413, f"The body is over {self._max_bytes:,} bytes.")
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)
