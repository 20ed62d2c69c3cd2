"""The judge: was a finished step called again? It goes by what the API saw, not by what the library says it did."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

STEPS = ("generate", "download", "upload")
CHECKPOINT_SECONDS = 1.0
"""A result that the API has answered is durable after so long, at most. It takes milliseconds."""

SeenFinished = Mapping[tuple[str, str], float]
"""By run and step: when a status first showed it finished."""


@dataclass(frozen=True)
class Call:
    """A call as the API saw it. Times are seconds since the epoch."""

    task_id: str
    step: str
    idempotency_key: str
    began_at: float
    answered_at: float
    status: int

    @property
    def succeeded(self) -> bool:
        return self.status // 100 == 2  # noqa: PLR2004 - HTTP's 2xx


@dataclass(frozen=True)
class Kill:
    """The end of the first worker."""

    pid: int
    at: float
    replaced_at: float
    """When the second one was started: what was called before, the first one has called."""


def read_calls(log: Path) -> list[Call]:
    """The API's log."""
    return [Call(**json.loads(line)) for line in log.read_text().splitlines()]


def cut_off(call: Call, seen_finished: SeenFinished, kill: Kill) -> bool:
    """Whether the kill has come between the call and the checkpoint of its result."""
    durable = seen_finished.get((call.task_id, call.step), math.inf) < kill.replaced_at
    by_first_worker = call.began_at < kill.replaced_at
    return by_first_worker and call.answered_at > kill.at - CHECKPOINT_SECONDS and not durable


def complaints(task_ids: Iterable[str], calls: Iterable[Call], seen_finished: SeenFinished, kill: Kill) -> list[str]:
    """What went wrong, in sentences. None is what the library promises.

    A step is called once. Only a call that the kill has cut off is made again, once; and calls that failed.

    Args:
        task_ids: The runs that were submitted.
        calls: All that the API saw.
        seen_finished: From when on each step must not be called any more.
        kill: When the first worker died.
    """
    calls = list(calls)
    found = []
    for task_id in task_ids:
        for step in STEPS:
            name = f"Step {step!r} of {task_id}"
            made = [call for call in calls if (call.task_id, call.step) == (task_id, step)]
            if any(call.began_at > seen_finished.get((task_id, step), math.inf) for call in made):
                found.append(f"{name} was called again after it had finished.")
            succeeded = [call for call in made if call.succeeded]
            if not succeeded:
                found.append(f"{name} was never called with success.")
            by_first_worker = [call for call in succeeded if call.began_at < kill.replaced_at]
            repeatable = len(by_first_worker) == 1 and cut_off(by_first_worker[0], seen_finished, kill)
            if len(succeeded) > 1 + repeatable:
                found.append(f"{name} was called with success {len(succeeded)} times.")
            if len({call.idempotency_key for call in made}) > 1:
                found.append(f"{name} was called with different idempotency keys.")
    if len({call.idempotency_key for call in calls}) < len({(call.task_id, call.step) for call in calls}):
        found.append("Different steps were called with the same idempotency key.")
    if not any(call.began_at < kill.at < call.answered_at for call in calls):
        found.append("The worker was killed while the API was answering no call: that proves nothing.")
    return found
