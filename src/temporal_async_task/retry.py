"""When a failed call is made again: is this error worth another try, and after which delay.

No Temporal in here: ``decide`` is a pure function of an error, a policy and the number of failed calls.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard, cast

from temporal_async_task.checks import seconds
from temporal_async_task.errors import (
    ConfigError,
    InvalidKeyError,
    NonRetryableError,
    ParamsError,
    PayloadTooLargeError,
    ResultError,
    RetryableError,
    StepFailedError,
    StepUsageError,
    TaskConflictError,
    TaskFailedError,
)
from temporal_async_task.http_errors import (
    explicit_causes,
    http_status,
    is_hopeless,
    is_network_error,
    retry_after,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

_DEFAULT_MAX_DELAY = 30.0
LONGEST_DELAY = timedelta(days=365).total_seconds()
"""No delay may be longer, in seconds: Temporal's timers do not take any number that a float may hold."""

# They come from the code and not from the world. Not among them are LookupError (KeyError, IndexError) and
# ValueError (with JSON's and pydantic's errors): a vendor under load often answers with something else.
_PROGRAMMING_ERRORS = (
    TypeError,
    AttributeError,
    NameError,
    ImportError,
    SyntaxError,
    NotImplementedError,
    RecursionError,
    AssertionError,
)
# Errors of this library that another try cannot mend. A run that has ended (TaskFailedError) stays ended.
_FINAL_ERRORS = (
    ParamsError,
    ResultError,
    PayloadTooLargeError,
    InvalidKeyError,
    ConfigError,
    StepUsageError,
    StepFailedError,
    TaskConflictError,
    TaskFailedError,
)
# RFC 9110: Request Timeout; RFC 8470: Too Early; RFC 6585: Too Many Requests.
_RETRYABLE_4XX = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What ``RetryPolicy.classify`` says of an error.

    Attributes:
        retry: Whether another try may help.
        delay: The wait before it, in seconds or as a ``timedelta``; ``None`` for the policy's backoff.
        reason: A few words for the logs.

    Raises:
        ConfigError: The delay is not one.
    """

    retry: bool
    delay: float | timedelta | None = None
    reason: str = "classified by the policy"

    def __post_init__(self) -> None:
        if self.delay is not None:
            object.__setattr__(self, "delay", _checked_delay("Verdict.delay", self.delay))


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, when and after which errors a failed call is made again.

    Delays are given in seconds or as ``timedelta``, and read back in seconds.

    Attributes:
        max_retries: Tries after the first one: 3 means up to 4 calls, 0 means one call.
        initial_delay: The delay after the first failed call.
        max_delay: The backoff's upper limit, jitter included; ``initial_delay`` if that is over the default of 30 s.
            A delay that was asked for (``Retry-After``,
            ``RetryableError``, ``classify``) may be longer.
        backoff_multiplier: What each further failure multiplies the delay by, from 1 to 1000.
        jitter: A fraction from 0 to 1, so that tasks that failed together do not come back together.
            A backoff is multiplied by a random factor from ``1 - jitter`` to ``1 + jitter``. A delay that was
            asked for is a minimum: it is only lengthened, by up to ``jitter`` of it.
        non_retryable: Exception types (with their subclasses), or names of classes for types that cannot be
            imported here, as in ``(ValueError, "QuotaExceeded")``. A name stands for subclasses too.
        classify: Asked first, about every error. It returns a ``Verdict``, or ``None`` for no opinion.

    Raises:
        ConfigError: A value that makes no sense. The message names the field.
    """

    max_retries: int = 3
    initial_delay: float | timedelta = 1.0
    max_delay: float | timedelta = _DEFAULT_MAX_DELAY
    backoff_multiplier: float = 2.0
    jitter: float = 0.1
    non_retryable: tuple[type[BaseException] | str, ...] = ()
    classify: Callable[[BaseException], Verdict | None] | None = None

    def __post_init__(self) -> None:
        initial = _checked_delay("RetryPolicy.initial_delay", self.initial_delay)
        longest = _checked_delay("RetryPolicy.max_delay", self.max_delay)
        if longest == _DEFAULT_MAX_DELAY:
            longest = max(longest, initial)  # who asks for a long first delay need not ask for it twice
        object.__setattr__(self, "initial_delay", initial)
        object.__setattr__(self, "max_delay", longest)
        if longest < initial:
            raise ConfigError(
                f"RetryPolicy.max_delay is {longest:g} s, less than initial_delay ({initial:g} s). "
                "Raise max_delay, or lower initial_delay."
            )
        whole = type(self.max_retries) is int  # a bool is not meant as a number
        checks = (
            ("max_retries", whole and self.max_retries >= 0, "a whole number from 0 on (0: no retries)"),
            ("backoff_multiplier", _is_number(self.backoff_multiplier, 1, 1000), "a number from 1 to 1000"),
            ("jitter", _is_number(self.jitter, 0, 1), "a fraction from 0 to 1 (0.1: ten per cent)"),
            ("non_retryable", _are_errors(self.non_retryable), "a tuple of exception types and class names"),
            ("classify", self.classify is None or callable(self.classify), "a function to Verdict or None"),
        )
        for field, fits, wanted in checks:
            if not fits:
                raise ConfigError(f"RetryPolicy.{field} is {getattr(self, field)!r}. Give {wanted}.")

    def backoff(self, failures: int) -> float:
        """The delay in seconds after the ``failures``-th failed call (1 is the first), without jitter."""
        initial, longest = seconds(self.initial_delay), seconds(self.max_delay)
        try:
            return min(initial * float(self.backoff_multiplier) ** (failures - 1), longest)
        except OverflowError:
            return longest if initial else 0.0


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """Whether a call is made again.

    Attributes:
        retry: Whether it is.
        delay: The wait before, in seconds; 0 if it is not.
        reason: A few words for the logs, as ``"HTTP 404"`` or ``"out of retries"``.
    """

    retry: bool
    delay: float
    reason: str


def decide(
    error: BaseException,
    policy: RetryPolicy,
    failures: int,
    *,
    random: Callable[[], float] = random.random,
) -> RetryDecision:
    """Decide whether a call that failed is made again, and when.

    The first row that fits the error holds:

    ==========================================================  ======================================
    error                                                       another try?
    ==========================================================  ======================================
    the policy's ``classify`` has an opinion                    as it says, with its delay
    one of the policy's ``non_retryable``                       no
    ``NonRetryableError``                                       no
    ``RetryableError``                                          yes, after its ``retry_after`` [1]_
    an ``ExceptionGroup``                                       if for all in it; the longest delay
    an HTTP request that cannot work: a bad URL, too many       no
    redirects, a certificate that does not verify
    HTTP status 408, 425, 429 or 5xx                            yes, after its ``Retry-After`` [2]_
    any other HTTP status from 300 on                           no
    a network error or timeout, builtin or of an HTTP client    yes, unless it comes from a request that
                                                                cannot work (see above)
    a programming error: ``TypeError``, ``AttributeError``,     no
    ``NameError``, ``ImportError``, ``SyntaxError``,
    ``AssertionError``, ``NotImplementedError``,
    ``RecursionError``
    an error of this library that cannot get better             no
    an error with an explicit cause that fits an HTTP row       as that row says
    above (``raise VendorError(...) from error``)
    anything else                                               yes
    ==========================================================  ======================================

    .. [1] If it is a delay from 0 to 365 days; else after the policy's backoff.
    .. [2] As in ``http_errors.retry_after``; after the policy's backoff if there is none.

    Only an ``Exception`` is judged. ``CancelledError``, ``KeyboardInterrupt`` and ``SystemExit`` are meant
    for the process and tell nothing of the call: do not pass them.

    Args:
        error: What the call raised.
        policy: How often, and after which delay.
        failures: The number of failed calls, this one included.
        random: The source of jitter: numbers from 0 to 1.
    """
    verdicts = list(_verdicts(error, policy))
    for verdict in verdicts:
        if not verdict.retry:
            return RetryDecision(retry=False, delay=0.0, reason=verdict.reason)
    if failures > policy.max_retries:
        return RetryDecision(retry=False, delay=0.0, reason="out of retries")
    luck = random()
    delays = [_delay(verdict, policy, failures, luck) for verdict in verdicts]
    delay = max(delays)
    return RetryDecision(retry=True, delay=delay, reason=verdicts[delays.index(delay)].reason)


def _delay(verdict: Verdict, policy: RetryPolicy, failures: int, luck: float) -> float:
    if verdict.delay is not None:
        return seconds(verdict.delay) * (1 + policy.jitter * luck)
    factor = 1 + policy.jitter * (2 * luck - 1)
    return min(policy.backoff(failures) * factor, seconds(policy.max_delay))


def _verdicts(error: BaseException, policy: RetryPolicy) -> Iterator[Verdict]:
    """One verdict for an error, one for each leaf of a group."""
    if opinion := _ask(policy, error):
        yield opinion
    elif _is_listed(error, policy.non_retryable):
        yield Verdict(retry=False, reason="non-retryable by the policy")
    elif isinstance(error, NonRetryableError):
        yield Verdict(retry=False, reason="NonRetryableError")
    elif isinstance(error, RetryableError):
        delay = _seconds_or_none(error.retry_after)
        yield Verdict(retry=True, delay=delay, reason="RetryableError")
    elif isinstance(error, BaseExceptionGroup):
        for leaf in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _verdicts(leaf, policy)
    else:
        yield _http_verdict(error) or _own_verdict(error) or _verdict_of_causes(error)


def _ask(policy: RetryPolicy, error: BaseException) -> Verdict | None:
    if policy.classify is None:
        return None
    try:
        opinion = cast("object", policy.classify(error))  # typed, but not every application is type-checked
    except Exception as slip:
        # The call's error is what matters, and must not be hidden by a slip in the classifier. What it says is not for
        # the log, where what is stored is encrypted: neither here, nor as the context of the slip.
        slip.__suppress_context__ = True
        logger.exception("RetryPolicy.classify failed on a %s; the default rules decide", type(error).__name__)
        return None
    if opinion is None or isinstance(opinion, Verdict):
        return opinion
    logger.error("RetryPolicy.classify returned %r, not a Verdict or None; the default rules decide", opinion)
    return None


def _is_listed(error: BaseException, listed: tuple[type[BaseException] | str, ...]) -> bool:
    bases = type(error).__mro__
    return any(entry in bases or any(entry == base.__name__ for base in bases) for entry in listed)


def _http_verdict(error: BaseException) -> Verdict | None:
    network = is_network_error(error)
    if is_hopeless(error) or (network and any(map(is_hopeless, explicit_causes(error)))):
        return Verdict(retry=False, reason="request that cannot work")
    if status := http_status(error):
        retry = status >= 500 or status in _RETRYABLE_4XX  # noqa: PLR2004
        return Verdict(retry=retry, delay=retry_after(error) if retry else None, reason=f"HTTP {status}")
    return Verdict(retry=True, reason="network error") if network else None


def _own_verdict(error: BaseException) -> Verdict | None:
    if isinstance(error, _PROGRAMMING_ERRORS):
        return Verdict(retry=False, reason="programming error")
    if isinstance(error, _FINAL_ERRORS):
        return Verdict(retry=False, reason=type(error).__name__)
    return None


def _verdict_of_causes(error: BaseException) -> Verdict:
    for cause in explicit_causes(error):
        if verdict := _http_verdict(cause):
            return verdict
    return Verdict(retry=True, reason="may be temporary")


def _seconds_or_none(value: object) -> float | None:
    """Seconds from 0 to ``LONGEST_DELAY``; ``None`` for what is not such a delay."""
    delay = value.total_seconds() if isinstance(value, timedelta) else value
    return float(delay) if _is_number(delay, 0, LONGEST_DELAY) else None


def _checked_delay(field: str, value: object) -> float:
    delay = _seconds_or_none(value)
    if delay is None:
        raise ConfigError(f"{field} is {value!r}. Give a delay from 0 to 365 days, in seconds or as a timedelta.")
    return delay


def _is_number(value: object, low: float, high: float) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _are_errors(entries: object) -> bool:
    return isinstance(entries, tuple) and all(map(_is_error, cast("tuple[object, ...]", entries)))


def _is_error(entry: object) -> bool:
    if isinstance(entry, str):
        return entry.isidentifier()  # the class's own name; a dotted path would never match
    return isinstance(entry, type) and issubclass(entry, BaseException)
