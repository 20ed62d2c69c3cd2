"""Every error that this library raises.

::

    AsyncTaskError
    ├── ConfigError                 the configuration cannot be used
    │   ├── DuplicateTaskError      a second task with a name that is taken
    │   └── TaskNotRegisteredError  a task that this process does not know
    ├── NotConnectedError           no client yet: the component was not started
    ├── ServerUnavailableError      nothing answers at the server's address
    ├── ParamsError                 params that do not fit, or cannot be serialised
    ├── ResultError                 a result that cannot be serialised, or does not fit its annotation
    │   └── StoredValueLostError    ... or is not in the external storage any more
    ├── PayloadTooLargeError        a value over Temporal's limits, refused before it is sent
    ├── DecryptionError             a stored value that cannot be decrypted here
    ├── StorageError                an externally stored value that cannot be written or read
    ├── InvalidKeyError             text that cannot be a name, an id or a step's key
    ├── TaskNotFoundError           no such run of this task
    ├── TaskConflictError           the task id is in use with other params, or in a state that forbids the call
    ├── TaskFailedError             the run ended in failure
    │   └── TaskCancelledError      the run was cancelled
    ├── StepUsageError              a step used in a way that cannot work
    │   └── DuplicateStepError      the same key asked for twice in one run
    ├── StepFailedError             a step is out of retries, or failed for good
    │   ├── WorkerLostError         ... because it took its worker down, again and again
    │   ├── StepOutcomeUnknownError an at-most-once step's outcome was lost with its worker
    │   ├── PollTimeoutError        a poll was not ready in time
    │   └── WaitTimeoutError        an event did not come in time
    ├── TaskTimeoutError            the task as a whole did not finish within its timeout
    ├── ReportError                 a report has not reached the application yet
    │   └── ReportRefusedError      ... and never will: the application has refused it
    ├── SignatureError              a callback that was not signed with the secret, or long ago
    ├── NonRetryableError           raised by user code: do not try again
    └── RetryableError              raised by user code: try again, and when
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import timedelta


def in_words(error_type: str, message: str) -> str:
    """``Type: message``, or the type alone if there is no message."""
    return f"{error_type}: {message}" if message else error_type


class AsyncTaskError(Exception):
    """The root of all errors of this library."""


class ConfigError(AsyncTaskError):
    """The configuration cannot be used as it stands."""


class DuplicateTaskError(ConfigError):
    """Two tasks have the same name. Names are unique in an application: rename one."""


class TaskNotRegisteredError(ConfigError):
    """A task that this process does not know. Register it with the component before ``start()``."""


class NotConnectedError(AsyncTaskError):
    """A task was used before its component was connected.

    Register the task and ``await component.connect()`` (web process) or ``component.start()`` (worker) first,
    or give it a client with ``task.set_client(client)``.
    """


class ServerUnavailableError(AsyncTaskError):
    """No Temporal server answers at the configured address."""


class ParamsError(AsyncTaskError):
    """Params that do not fit the task's annotation, or that cannot be serialised."""


class ResultError(AsyncTaskError):
    """A result that cannot be serialised, or that does not fit its own annotation.

    Where a step's result was serialised but does not fit, it stays in the journal: mend the annotation, resume the
    run, and the step is not called again.
    """


class PayloadTooLargeError(AsyncTaskError):
    """A value over what Temporal takes (2 MB a payload, 2 MB a run's journal), refused before it is sent.

    Store large values elsewhere (a bucket, the data converter's external storage) and pass on a reference.
    """


class StoredValueLostError(ResultError):
    """An externally stored value is there no more, or is not what was stored.

    Of a step's result: have the step done again, with ``resume(task_id, redo=[key])``.
    """


class DecryptionError(AsyncTaskError):
    """A stored value cannot be decrypted here: its key, or the codec, is not known, or it is damaged.

    A run is not failed by it. It is left to a worker that has them.
    """


class StorageError(AsyncTaskError):
    """The external storage cannot be used just now: its folder is not mounted, it is full, or it is refused.

    A run is not failed by it: its worker tries again, or leaves it to another.
    """


class InvalidKeyError(AsyncTaskError, ValueError):
    """Text that cannot be a task's name, a task id or a step's key: empty, too long, or not plain text."""


class TaskNotFoundError(AsyncTaskError):
    """No run of this task has this id: it was never submitted, or its retention on the server is over."""


class TaskConflictError(AsyncTaskError):
    """The task id stands for a run with other params, or the run's state forbids the call."""


class TaskFailedError(AsyncTaskError):
    """The run ended in failure.

    Attributes:
        task_id: The run's id.
        error_type: The name of the error's class, as in ``TaskResult.error_type``.
        message: The error's own message.
    """

    def __init__(self, task_id: str, error_type: str, message: str) -> None:
        super().__init__(f"Task run {task_id!r} failed: {in_words(error_type, message)}")
        self.task_id = task_id
        self.error_type = error_type
        self.message = message


class TaskCancelledError(TaskFailedError):
    """The run was cancelled. ``message`` holds the reason that was given."""

    def __init__(self, task_id: str, error_type: str, message: str) -> None:
        super().__init__(task_id, error_type, message)
        self.args = (f"Task run {task_id!r} was cancelled" + (f": {message}" if message else ""),)


class StepUsageError(AsyncTaskError):
    """A step was used in a way that cannot work: outside of a task, or inside of another step."""


class DuplicateStepError(StepUsageError):
    """The same key was asked for twice in one run. Steps are found by key: number them, as in ``f"page-{n}"``."""


class StepFailedError(AsyncTaskError):
    """A step is out of retries, or failed for good.

    Raised into the task's body, which may catch it and compensate; uncaught, it fails the task. ``__cause__`` is the
    original error in the attempt in which it happened. An attempt that comes later (after a crash, say) knows the
    error by its type's name and message only, so decide by ``error_type`` and not by the cause's class.

    Attributes:
        key: The step's key.
        attempts: How often it was called.
        error_type: The name of the last error's class.
        message: The last error's message.
        idempotency_key: What the step's calls were given (``current_step().idempotency_key``), to ask the API by.
        once: Whether its call is not made again, even if the run is resumed, unless ``redo`` names the step: it has
            ``at_most_once=True``, and the error does not say that nothing was done (``RetryableError``).
    """

    idempotency_key: str | None = None
    once: bool = False

    def __init__(self, key: str, attempts: int, error_type: str, message: str) -> None:
        calls = {0: "", 1: " after 1 attempt"}.get(attempts, f" after {attempts} attempts")
        super().__init__(f"Step {key!r} failed{calls}: {in_words(error_type, message)}")
        self.key = key
        self.attempts = attempts
        self.error_type = error_type
        self.message = message


class WorkerLostError(StepFailedError):
    """The step's worker was lost with it too many times. Look for what kills the process: memory, a segfault."""


class StepOutcomeUnknownError(StepFailedError):
    """The outcome of a step with ``at_most_once=True`` was lost with its worker.

    The call was made, or was about to be. It is not made again: ask the API whether it was, by the step's
    idempotency key.
    """


class PollTimeoutError(StepFailedError, TimeoutError):
    """What a ``poll`` asks for was not ready within its timeout."""


class WaitTimeoutError(StepFailedError, TimeoutError):
    """The event of a ``wait_for`` did not come within its timeout."""


class TaskTimeoutError(AsyncTaskError, TimeoutError):
    """The task as a whole did not finish within its ``timeout``."""


class ReportError(AsyncTaskError):
    """The application has not acknowledged a report of a run's status. It is sent again."""


class ReportRefusedError(ReportError):
    """The application has refused a report for good.

    Attributes:
        code: Why, as one word: ``malformed``, ``too_large``, ``unknown_record`` or ``out_of_order``.
        detail: Why, as a sentence.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class SignatureError(AsyncTaskError):
    """A callback that was not signed with the secret, or whose signature is too old.

    Attributes:
        code: Why, as one word: ``signature_missing``, ``signature_wrong``, ``timestamp_old`` or ``timestamp_ahead``.
        detail: Why, as a sentence.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class NonRetryableError(AsyncTaskError):
    """Raise it (or derive from it) in a step or a task to say that another try would not help."""


class RetryableError(AsyncTaskError):
    """Raise it (or derive from it) in a step or a task to ask for another try, whatever the kind of error.

    The number of tries is still the policy's.

    Args:
        message: What went wrong.
        retry_after: The delay before the next try, in seconds or as a ``timedelta``, instead of the policy's.
    """

    def __init__(self, message: str = "", *, retry_after: float | timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def unreadable_result(error_type: str | None, message: str) -> AsyncTaskError:
    """The error of a run that has completed with a result that cannot be read, by the error's type in its status."""
    return (StorageError if error_type == StorageError.__name__ else ResultError)(message)
