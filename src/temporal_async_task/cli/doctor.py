"""The command that looks at everything a run needs, and says what is wrong and what to do."""

from __future__ import annotations

import asyncio
import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeNamespaceRequest,
    DescribeTaskQueueRequest,
    DescribeTaskQueueResponse,
    GetSystemInfoRequest,
    PollActivityTaskQueueRequest,
)
from temporalio.service import RPCError

from temporal_async_task.cli.exits import CommandError, ExitStatus
from temporal_async_task.cli.output import table
from temporal_async_task.config import AsyncTaskComponentConfig, misspelt_variables
from temporal_async_task.engine.journal import MAX_BYTES
from temporal_async_task.engine.values import MAX_PAYLOAD
from temporal_async_task.errors import AsyncTaskError

if TYPE_CHECKING:
    from temporalio.client import Client

    from temporal_async_task.cli.output import Output
    from temporal_async_task.cli.reference import Application

State = Literal["ok", "warning", "problem"]

OLDEST_SERVER = (1, 28)
"""Older ones cannot pause activities, which cancelling needs."""
CLOCK_WARNING = 1.0
CLOCK_PROBLEM = 5.0
"""Seconds; what the engine allows for where it compares times of different machines."""
POLLER_SEEN = 90.0
"""Seconds since a worker's last poll up to which it counts as there: a poll takes up to 60 or 70."""
_CLOCK_QUEUE = "async-task-doctor"
"""Nobody's task queue: the server notes when it was polled, by its own clock."""
_RPC_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    advice: str = ""


@dataclass
class Findings:
    """All that was found."""

    settings: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    checks: list[Check] = field(default_factory=list[Check])

    def add(self, name: str, state: State, found: str, advice: str = "") -> None:
        self.checks.append(Check(name, state, found, advice))

    @property
    def is_well(self) -> bool:
        return all(check.state != "problem" for check in self.checks)


async def diagnose(load: Callable[[], Application], output: Output) -> ExitStatus:
    """Look at settings, application, server, namespace, clock, limits and queues.

    Args:
        load: Gives the application, or raises what is wrong with it or with the configuration.
        output: Where the findings are printed.
    """
    findings = Findings()
    for name, meant in misspelt_variables(os.environ).items():
        findings.add("environment", "warning", f"{name} is set, and nothing reads it.", f"Did you mean {meant}?")
    try:
        app = load()
    except AsyncTaskError as error:
        findings.add("configuration", "problem", *_first_line(str(error)))
    except CommandError as error:
        findings.add("application", "problem", *_first_line(str(error)))
    else:
        await _look(app, findings)
    if output.as_json:
        output.document({"ok": findings.is_well, "settings": findings.settings, "checks": findings.checks})
    else:
        _print(findings, output)
    return ExitStatus.SUCCESS if findings.is_well else ExitStatus.FAILED


async def _look(app: Application, findings: Findings) -> None:
    config = app.component.config
    findings.settings = _settings(config)
    if app.tasks:
        told = ", ".join(f"{task.name} on {task.task_queue}" for task in app.tasks)
        findings.add("application", "ok", f"{app.reference}: {told}.")
    else:
        findings.add(
            "application", "ok", "None was named.", "With --app or ASYNC_TASK_APP, its tasks and queues are looked at."
        )
    begin = time.monotonic()
    try:
        await app.component.connect()
    except AsyncTaskError as error:
        findings.add("server", "problem", *_first_line(str(error)))
        return
    took = time.monotonic() - begin
    client = app.component.client
    await _look_at_server(client, f"{config.temporal_address} answers (connected in {took * 1000:.0f} ms)", findings)
    await _look_at_namespace(client, findings)
    await _look_at_clock(client, findings)
    findings.add(
        "limits",
        "ok",
        f"{MAX_PAYLOAD:,} bytes for params, for a result; {MAX_BYTES:,} for params and all step results of a run; "
        f"ids and keys 255 bytes.",
    )
    queues = sorted({task.task_queue for task in app.tasks} or {config.task_queue})
    for queue in queues:
        await _look_at_queue(client, queue, app.reference, findings)


def _settings(config: AsyncTaskComponentConfig) -> list[dict[str, str]]:
    sources = config.sources
    return [{"name": name, "value": config.shown(name), "source": source} for name, source in sources.items()]


async def _look_at_server(client: Client, found: str, findings: Findings) -> None:
    try:
        info = await client.workflow_service.get_system_info(GetSystemInfoRequest(), timeout=_RPC_TIMEOUT)
    except RPCError as error:
        findings.add("server", "warning", f"{found}, but does not tell its version: {error}.")
        return
    findings.checks.append(server_check(found, info.server_version))


def server_check(found: str, version: str) -> Check:
    """Whether a server's version will do."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        advice = f"Cancelling needs {oldest} or newer, which can pause activities. Upgrade the server."
        return Check("server", "problem", f"{found}, version {version}.", advice)
    return Check("server", "ok", f"{found}, version {version or 'unknown'}.")


async def _look_at_namespace(client: Client, findings: Findings) -> None:
    try:
        found = await client.workflow_service.describe_namespace(
            DescribeNamespaceRequest(namespace=client.namespace), timeout=_RPC_TIMEOUT
        )
    except RPCError as error:
        findings.add("namespace", "warning", f"{client.namespace}: the server does not tell of it: {error}.")
        return
    days = found.config.workflow_execution_retention_ttl.ToTimedelta().total_seconds() / 86400
    told = f"{client.namespace}: runs that have ended are kept for {days:g} day{'' if days == 1 else 's'}."
    limit = found.namespace_info.limits.blob_size_limit_error
    if 0 < limit < MAX_PAYLOAD:
        findings.add(
            "namespace",
            "warning",
            f"{told} It takes {limit:,} bytes a payload, less than the library's limit.",
            "Keep params and results below that, or raise limit.blobSize.error in the server's configuration.",
        )
    else:
        findings.add("namespace", "ok", told)


async def _look_at_clock(client: Client, findings: Findings) -> None:
    try:
        difference = await _clock_difference(client)
    except (RPCError, TimeoutError) as error:
        findings.add("clock", "warning", f"The server's clock cannot be read: {error or 'no answer'}.")
    else:
        findings.checks.append(clock_check(difference))


async def _clock_difference(client: Client) -> float:
    """Seconds by which the server's clock is ahead of this machine's.

    No call of Temporal's tells the time. But the server notes by its clock when a task queue was polled last.
    """
    identity = f"async-task-doctor-{uuid.uuid4().hex}"
    before = time.time()
    poll = asyncio.create_task(
        client.workflow_service.poll_activity_task_queue(
            PollActivityTaskQueueRequest(
                namespace=client.namespace, task_queue=TaskQueue(name=_CLOCK_QUEUE), identity=identity
            ),
            timeout=_RPC_TIMEOUT,
        )
    )
    try:
        async with asyncio.timeout(_RPC_TIMEOUT.total_seconds()):
            while True:
                found = await _described(client, _CLOCK_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY)
                after = time.time()
                for poller in found.pollers:
                    if poller.identity == identity:
                        seen = poller.last_access_time.ToDatetime(UTC).timestamp()
                        # Polled between `before` and `after`: what lies within is no difference.
                        return min(seen - before, 0.0) if seen < before else max(seen - after, 0.0)
                if poll.done():
                    poll.result()
                    raise TimeoutError("the poll came back too soon")
                await asyncio.sleep(0.05)
    finally:
        poll.cancel()
        await asyncio.gather(poll, return_exceptions=True)


def clock_check(difference: float) -> Check:
    """Whether two clocks are near enough; ``difference`` in seconds."""
    size = abs(difference)
    if size < 0.1:  # noqa: PLR2004 - a poll takes as long
        return Check("clock", "ok", "The server's and this machine's agree.")
    way = "ahead of" if difference > 0 else "behind"
    state: State = "problem" if size > CLOCK_PROBLEM else "warning" if size > CLOCK_WARNING else "ok"
    advice = "" if state == "ok" else "Set both by NTP: deadlines and times in the status are wrong by as much."
    return Check("clock", state, f"The server's is {size:.1f} s {way} this machine's.", advice)


async def _look_at_queue(client: Client, queue: str, reference: str, findings: Findings) -> None:
    try:
        workflows, activities = [
            await _described(client, queue, kind)
            for kind in (TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY)
        ]
    except RPCError as error:
        findings.add("queue", "warning", f"{queue}: the server does not tell of it: {error}.")
        return
    pollers = _pollers(workflows) & _pollers(activities)
    backlog = workflows.stats.approximate_backlog_count + activities.stats.approximate_backlog_count
    waiting = f", about {backlog:,} waiting" if backlog else ""
    if pollers:
        workers = "1 worker" if len(pollers) == 1 else f"{len(pollers)} workers"
        findings.add("queue", "ok", f"{queue}: {workers} ({', '.join(sorted(pollers))}){waiting}.")
    else:
        findings.add(
            "queue",
            "problem",
            f"{queue}: no worker polls it{waiting}.",
            f"Start one with `async-task worker {reference or 'module:attribute'}`; until then, runs wait.",
        )


async def _described(client: Client, queue: str, kind: TaskQueueType.ValueType) -> DescribeTaskQueueResponse:
    request = DescribeTaskQueueRequest(
        namespace=client.namespace, task_queue=TaskQueue(name=queue), task_queue_type=kind, report_stats=True
    )
    return await client.workflow_service.describe_task_queue(request, timeout=_RPC_TIMEOUT)


def _pollers(found: DescribeTaskQueueResponse) -> set[str]:
    now = datetime.now(UTC)
    return {
        one.identity
        for one in found.pollers
        if (now - one.last_access_time.ToDatetime(UTC)).total_seconds() < POLLER_SEEN
    }


def _first_line(message: str) -> tuple[str, str]:
    """What is wrong, and the rest."""
    first, _, rest = message.partition("\n")
    return first, rest


def _print(findings: Findings, output: Output) -> None:
    if findings.settings:
        rows = [(one["name"], one["value"], one["source"]) for one in findings.settings]
        output.show(table(["SETTING", "VALUE", "FROM"], rows))
        output.text("")
    rows = [(check.name, check.state, check.found) for check in findings.checks]
    output.show(table(["CHECK", "STATE", "FOUND"], rows))
    advice = [check for check in findings.checks if check.advice and check.state != "ok"]
    if advice:
        output.text("\nWhat to do")
        for check in advice:
            output.text(f"- {check.name}: {check.advice}")
