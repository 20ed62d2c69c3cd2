"""The connection to the server, as the engine uses it; and what the server refuses, as this library's errors."""

from __future__ import annotations

from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from temporal_async_task.engine import wire
from temporal_async_task.errors import AsyncTaskError, ServerUnavailableError


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
