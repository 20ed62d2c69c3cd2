"""The connection to the server, as the engine uses it; and what the server refuses, as this library's errors."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire
from temporal_async_task.errors import AsyncTaskError, ServerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger("temporal_async_task")
T = TypeVar("T")

RPC_TIMEOUT = timedelta(seconds=5)
"""For one try of a call that is repeated until it gets through."""
RETRY_DELAYS = (0.1, 0.2, 0.5, 1.0)
_FINAL = {RPCStatusCode.NOT_FOUND, RPCStatusCode.ALREADY_EXISTS, RPCStatusCode.FAILED_PRECONDITION}


class AttemptGoneError(Exception):
    """The server knows this attempt no more: it was superseded, or its run has ended."""


def raw_client(client: Client) -> Client:
    """The same connection, for payloads as they are. What is the user's is encoded by ``PayloadValues``."""
    config = client.config()
    config["data_converter"] = wire.RAW
    return Client(**config)


def translated(error: RPCError, client: Client) -> AsyncTaskError:
    """The server's refusal, in this library's words."""
    address = client.service_client.config.target_host
    # The connection was torn, by a server that was killed.
    torn = error.status == RPCStatusCode.UNKNOWN and "transport error" in str(error)
    if torn or error.status in {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED}:
        return ServerUnavailableError(
            f"The Temporal server at {address} does not answer ({error}). Nothing was lost: try again when it is back."
        )
    return AsyncTaskError(f"The Temporal server at {address} refused the call: {error.status.name}: {error}")


async def insist(call: Callable[[], Awaitable[T]], what: str) -> T:
    """Repeat a call until it gets through.

    The client's own retries give up after about 10 s, and a finished call's result would be lost with them.

    Raises:
        AttemptGoneError: The server answers that it does not know the attempt.
    """
    failures = 0
    while True:
        try:
            return await call()
        except (TypeError, AttributeError, NameError):  # of the code, and no better the next time
            raise
        except Exception as error:  # the server's, or of a codec that asks a key service
            if isinstance(error, RPCError) and error.status in _FINAL:
                raise AttemptGoneError(str(error)) from error
            if failures % 10 == 0:
                logger.warning("Cannot %s (%s: %s); trying again", what, type(error).__name__, error)
            await asyncio.sleep(RETRY_DELAYS[min(failures, len(RETRY_DELAYS) - 1)])
            failures += 1
