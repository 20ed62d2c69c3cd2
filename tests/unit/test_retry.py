"""Is this error worth another try, and when: the rules, without a network."""

import dataclasses
import json
import math
import os
import socket
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.client import IncompleteRead

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from temporal_async_task.errors import (
    ConfigError,
    DuplicateStepError,
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
    TaskNotFoundError,
    WorkerLostError,
)
from temporal_async_task.http_errors import explicit_causes, retry_after
from temporal_async_task.retry import RetryDecision, RetryPolicy, Verdict, decide

EXACT = RetryPolicy(jitter=0)  # 1 s, 2 s, 4 s: no chance in it

# A loaded machine may take its time for an example; it is not what is tested.
thoroughly = settings(deadline=None, max_examples=300)


class VendorError(Exception):
    """An error of a vendor's SDK: any attributes."""

    def __init__(self, *args, **attributes):
        super().__init__(*args)
        vars(self).update(attributes)


class Response:
    def __init__(self, status_code=None, **headers):
        self.status_code = status_code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def caused_by(cause, error=None):
    error = error or VendorError("the vendor failed")
    error.__cause__ = cause
    return error


# The policy ----------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_contract():
    policy = RetryPolicy()
    assert (policy.max_retries, policy.initial_delay, policy.max_delay, policy.backoff_multiplier) == (
        3,
        1,
        30,
        2,
    )


def test_delays_may_be_timedeltas_and_are_read_back_in_seconds():
    policy = RetryPolicy(initial_delay=timedelta(milliseconds=250), max_delay=timedelta(minutes=2))
    assert (policy.initial_delay, policy.max_delay) == (0.25, 120.0)


def test_a_policy_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetryPolicy().max_retries = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_retries", value) for value in (-1, 1.5, math.inf, True, "3", None)),
        *(("initial_delay", value) for value in (-1, math.nan, math.inf, True, "1", timedelta(seconds=-1))),
        *(("max_delay", value) for value in (-1, math.nan, math.inf, 10**400, timedelta(days=366), None)),
        *(("backoff_multiplier", value) for value in (0.5, math.nan, math.inf, 10**400, True, "2")),
        *(("jitter", value) for value in (-0.1, 1.1, math.nan, True, None)),
        *(("non_retryable", value) for value in (ValueError, "Error", [ValueError], (int,), (1,), ("a.B",), ("",))),
        ("classify", True),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(ConfigError) as refusal:
        RetryPolicy(**{field: value})
    assert f"RetryPolicy.{field} is {value!r}. Give a" in str(refusal.value)


def test_a_max_delay_below_the_initial_delay_is_refused():
    with pytest.raises(ConfigError, match=r"max_delay is 5 s, less than initial_delay \(10 s\)\. Raise max_delay"):
        RetryPolicy(initial_delay=10, max_delay=5)


def test_the_backoff_grows_by_the_multiplier_up_to_its_limit():
    assert [RetryPolicy().backoff(n) for n in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


def test_an_initial_delay_of_zero_stays_zero_after_any_number_of_failures():
    assert [RetryPolicy(initial_delay=0).backoff(n) for n in (1, 2, 10**6)] == [0, 0, 0]


limits = st.floats(0, 365 * 86400)
counts = st.integers(1, 100) | st.integers(1, 10**400)


@st.composite
def policies(draw):
    initial, longest = sorted((draw(limits), draw(limits)))
    return RetryPolicy(
        max_retries=10**400,
        initial_delay=initial,
        max_delay=longest,
        backoff_multiplier=draw(st.floats(1, 1000) | st.integers(1, 1000)),
        jitter=draw(st.floats(0, 1)),
    )


@thoroughly
@given(policies(), counts)
def test_the_backoff_stays_within_its_bounds_and_never_shrinks(policy, failures):
    assert policy.initial_delay <= policy.backoff(failures) <= policy.backoff(failures + 1) <= policy.max_delay


@thoroughly
@given(policies(), counts, st.floats(0, 1))
def test_jitter_never_lifts_the_delay_over_the_limit_nor_below_zero(policy, failures, luck):
    assert 0 <= decide(OSError(), policy, failures, random=lambda: luck).delay <= policy.max_delay


@pytest.mark.parametrize(("luck", "delay"), [(0.0, 7.5), (0.5, 10.0), (1.0, 12.5)])
def test_jitter_spreads_the_backoff_to_both_sides(luck, delay):
    policy = RetryPolicy(initial_delay=10, jitter=0.25)
    assert decide(OSError(), policy, 1, random=lambda: luck).delay == delay


@pytest.mark.parametrize(("luck", "delay"), [(0.0, 60.0), (0.5, 67.5), (1.0, 75.0)])
def test_jitter_only_lengthens_a_delay_that_was_asked_for(luck, delay):
    policy = RetryPolicy(jitter=0.25)
    assert decide(RetryableError(retry_after=60), policy, 1, random=lambda: luck).delay == delay


def test_without_a_source_of_randomness_the_delays_differ():
    assert len({decide(OSError(), RetryPolicy(), 1).delay for _ in range(20)}) > 1


# Counting ------------------------------------------------------------------------------------------------


def test_three_retries_are_four_calls():
    decisions = [decide(OSError(), EXACT, failures) for failures in (1, 2, 3, 4)]
    assert [decision.retry for decision in decisions] == [True, True, True, False]
    assert [decision.delay for decision in decisions] == [1, 2, 4, 0]
    assert decisions[-1].reason == "out of retries"


def test_no_retries_is_one_call():
    assert not decide(RetryableError(retry_after=1), RetryPolicy(max_retries=0), 1).retry


def test_an_error_that_is_final_is_called_so_on_the_last_call_too():
    assert decide(TypeError(), RetryPolicy(max_retries=0), 1).reason == "programming error"


# The user's word -----------------------------------------------------------------------------------------


def test_classify_comes_before_every_other_rule():
    policy = RetryPolicy(classify=lambda _: Verdict(retry=True, delay=timedelta(minutes=5), reason="quota"), jitter=0)
    assert decide(NonRetryableError(), policy, 1) == RetryDecision(retry=True, delay=300, reason="quota")


def test_classify_can_end_the_retries_of_what_would_be_retried():
    policy = RetryPolicy(classify=lambda error: Verdict(retry=False) if "quota" in str(error) else None)
    assert not decide(RetryableError("quota"), policy, 1).retry
    assert decide(RetryableError("busy"), policy, 1).retry


def test_a_verdict_without_a_delay_leaves_the_backoff_to_the_policy():
    assert decide(TypeError(), RetryPolicy(classify=lambda _: Verdict(retry=True), jitter=0), 3).delay == 4


@pytest.mark.parametrize("delay", [-1, math.nan, "5"])
def test_a_verdict_refuses_what_is_not_a_delay(delay):
    with pytest.raises(ConfigError, match=r"Verdict\.delay is"):
        Verdict(retry=True, delay=delay)


def test_a_classifier_that_fails_is_logged_and_the_default_rules_decide(caplog):
    policy = RetryPolicy(classify=lambda error: error.no_such_attribute)
    assert decide(OSError("the call's own error"), policy, 1).retry
    assert not decide(TypeError(), policy, 1).retry
    assert "classify failed on a OSError" in caplog.text
    assert "no_such_attribute" in caplog.text


def test_what_an_error_says_is_not_in_the_log_of_a_classifier_that_fails_on_it(caplog):
    policy = RetryPolicy(classify=lambda error: error.no_such_attribute)

    def call() -> None:
        raise OSError("the call's own error")

    try:
        call()
    except OSError as error:
        decision = decide(error, policy, 1)
    assert decision.retry
    assert "no_such_attribute" in caplog.text
    assert "the call's own error" not in caplog.text


def test_a_classifier_that_returns_no_verdict_is_logged_and_the_default_rules_decide(caplog):
    assert decide(OSError(), RetryPolicy(classify=lambda _: False), 1).retry  # type: ignore[arg-type,return-value]
    assert "classify returned False, not a Verdict or None" in caplog.text


@pytest.mark.parametrize("entry", [LookupError, "KeyError", "LookupError"])
def test_a_type_or_name_among_the_non_retryable_stands_for_subclasses_too(entry):
    policy = RetryPolicy(non_retryable=(BufferError, entry))
    assert decide(KeyError(), policy, 1) == RetryDecision(retry=False, delay=0, reason="non-retryable by the policy")


@pytest.mark.parametrize("entry", [KeyError, "KeyError", "Lookup"])
def test_a_type_or_name_among_the_non_retryable_does_not_stand_for_others(entry):
    assert decide(LookupError(), RetryPolicy(non_retryable=(entry,)), 1).retry


def test_the_policy_s_non_retryable_come_before_a_retryable_error():
    class BusyError(RetryableError):
        pass

    assert not decide(BusyError(), RetryPolicy(non_retryable=(BusyError,)), 1).retry


def test_non_retryable_error_ends_the_retries_whatever_its_cause():
    assert decide(caused_by(ConnectionError(), NonRetryableError("no")), EXACT, 1) == RetryDecision(
        retry=False, delay=0, reason="NonRetryableError"
    )


@pytest.mark.parametrize(
    ("asked", "delay"),
    [(5, 5), (0.5, 0.5), (timedelta(hours=2), 7200), (0, 0), (timedelta(days=365), 365 * 86400)],
)
def test_retryable_error_sets_the_delay_even_over_the_policy_s_limit(asked, delay):
    assert decide(RetryableError(retry_after=asked), EXACT, 3).delay == delay


@pytest.mark.parametrize("asked", [None, -1, math.nan, math.inf, 1e300, timedelta(seconds=-1), "5", True])
def test_retryable_error_with_what_is_no_delay_leaves_it_to_the_policy(asked):
    assert decide(RetryableError(retry_after=asked), EXACT, 3) == RetryDecision(
        retry=True, delay=4, reason="RetryableError"
    )


def test_retryable_error_is_retried_whatever_its_cause():
    assert decide(caused_by(VendorError(status_code=400), RetryableError("again")), EXACT, 1).retry


# Errors by their kind ------------------------------------------------------------------------------------


def validation_error():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("x")
    return caught.value


def json_error():
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("<html>")
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        ConnectionResetError(),
        BrokenPipeError(),
        TimeoutError(),
        socket.gaierror(),
        ssl.SSLError(),
        IncompleteRead(b""),
    ],
    ids=repr,
)
def test_a_network_error_is_retried(error):
    assert decide(error, EXACT, 1) == RetryDecision(retry=True, delay=1, reason="network error")


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLCertVerificationError(),
        caused_by(ssl.SSLCertVerificationError(), ConnectionError()),
        ConnectionError(ConnectionError("connection failed", ssl.SSLCertVerificationError())),
    ],
    ids=repr,
)
def test_a_certificate_that_does_not_verify_is_not_tried_again(error):
    assert decide(error, EXACT, 1) == RetryDecision(retry=False, delay=0, reason="request that cannot work")


@pytest.mark.parametrize(
    "error",
    [
        TypeError(),
        AttributeError(),
        NameError(),
        UnboundLocalError(),
        ImportError(),
        ModuleNotFoundError(),
        SyntaxError(),
        NotImplementedError(),
        RecursionError(),
        AssertionError(),
    ],
    ids=repr,
)
def test_a_programming_error_is_not_retried(error):
    assert decide(error, EXACT, 1) == RetryDecision(retry=False, delay=0, reason="programming error")


def test_a_programming_error_while_an_http_error_was_handled_is_still_one():
    assert decide(caused_by(VendorError(status_code=503), TypeError()), EXACT, 1).reason == "programming error"


@pytest.mark.parametrize(
    "error",
    [
        ParamsError(),
        ResultError(),
        PayloadTooLargeError(),
        InvalidKeyError(),
        ConfigError(),
        StepUsageError(),
        DuplicateStepError(),
        caused_by(ConnectionError(), StepFailedError("download", 4, "ConnectionError", "")),
        WorkerLostError("download", 10, "WorkerLostError", ""),
        TaskFailedError("child", "ValueError", ""),
        TaskConflictError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_this_library_that_cannot_get_better_is_not_retried(error):
    assert decide(error, EXACT, 1) == RetryDecision(retry=False, delay=0, reason=type(error).__name__)


@pytest.mark.parametrize(
    "error",
    [
        Exception(),
        RuntimeError(),
        ValueError(),
        KeyError("images"),
        IndexError(),
        FileNotFoundError(),
        json_error(),
        validation_error(),
        TaskNotFoundError(),
        VendorError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_anything_else_is_retried(error):
    assert decide(error, EXACT, 1) == RetryDecision(retry=True, delay=1, reason="may be temporary")


# Groups --------------------------------------------------------------------------------------------------


def test_a_group_is_retried_if_all_its_errors_are_and_after_the_longest_delay():
    group = ExceptionGroup("", [OSError(), ExceptionGroup("", [RetryableError(retry_after=9), OSError()])])
    assert decide(group, EXACT, 1) == RetryDecision(retry=True, delay=9, reason="RetryableError")


def test_a_group_waits_for_the_backoff_where_that_is_the_longest_delay():
    group = ExceptionGroup("", [RetryableError(retry_after=2), ConnectionError()])
    assert decide(group, EXACT, 3) == RetryDecision(retry=True, delay=4, reason="network error")


def test_a_group_with_one_final_error_is_final():
    group = ExceptionGroup("", [OSError(), ExceptionGroup("", [OSError(), NameError()])])
    assert decide(group, EXACT, 1) == RetryDecision(retry=False, delay=0, reason="programming error")


def test_the_user_s_rules_see_the_group_and_each_error_in_it():
    seen = []
    group = ExceptionGroup("both", [OSError("first"), OSError("second")])
    decide(group, RetryPolicy(classify=seen.append), 1)
    assert seen == [group, *group.exceptions]
    assert not decide(group, RetryPolicy(non_retryable=(ExceptionGroup,)), 1).retry
    assert not decide(group, RetryPolicy(non_retryable=(OSError,)), 1).retry


# HTTP errors by their shape ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 599])
@pytest.mark.parametrize(
    "error",
    [
        lambda status: VendorError(status_code=status),
        lambda status: VendorError(response=Response(status)),
        lambda status: VendorError(status=status, headers={}),
        lambda status: VendorError(code=status, status="UNAVAILABLE", response=Response(status)),
        lambda status: VendorError(code=status, status="UNAVAILABLE", headers={}),
    ],
)
def test_a_vendor_s_error_with_a_temporary_status_is_retried(status, error):
    assert decide(error(status), EXACT, 1) == RetryDecision(retry=True, delay=1, reason=f"HTTP {status}")


@pytest.mark.parametrize("status", [304, 400, 401, 403, 404, 409, 422])
@pytest.mark.parametrize(
    "error",
    [
        lambda status: VendorError(status_code=status),
        lambda status: VendorError(response=Response(status)),
        lambda status: VendorError(status=status, headers={}),
        lambda status: VendorError(code=status, headers={}),
    ],
)
def test_a_vendor_s_error_with_any_other_status_is_not_retried(status, error):
    assert decide(error(status), EXACT, 1) == RetryDecision(retry=False, delay=0, reason=f"HTTP {status}")


class Unreadable(Exception):  # noqa: N818 - the point is its property
    @property
    def response(self):
        raise RuntimeError("not here")


@pytest.mark.parametrize(
    "error",
    [
        VendorError(status=404),
        VendorError(code=404),
        VendorError(status_code="404"),
        VendorError(status_code=True),
        VendorError(status_code=200, headers={}),
        VendorError(status_code=1006, headers={}),
        VendorError(code=lambda: 404, headers={}),
        VendorError(code=404, headers="none"),
        VendorError(response={"ResponseMetadata": {}}),
        Unreadable(),
    ],
    ids=lambda error: str(list(vars(error))),
)
def test_what_only_looks_like_a_status_is_not_taken_for_one(error):
    assert decide(error, EXACT, 1).reason == "may be temporary"


def test_the_response_s_status_comes_before_a_code_of_the_vendor_s_own():
    assert decide(VendorError(code=404, headers={}, response=Response(503)), EXACT, 1).reason == "HTTP 503"


def test_retry_after_sets_the_delay_of_a_status_that_is_retried():
    assert decide(VendorError(response=Response(429, Retry_After="45")), EXACT, 1) == RetryDecision(
        retry=True, delay=45, reason="HTTP 429"
    )


def test_retry_after_does_not_make_a_final_status_a_temporary_one():
    assert not decide(VendorError(response=Response(404, Retry_After="45")), EXACT, 1).retry


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "120"}, 120),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"RETRY-AFTER": 3}, 3),
        ({"Retry-After": "999999"}, 86400),
        ({"Retry-After": "9" * 5000}, 86400),
        ({"Retry-After": "0"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "1e3"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "3, 3"}, None),
        ({"Retry-After": "\u0661"}, None),
        ({"Retry-After": ""}, None),
        ({}, None),
        (  # the three forms of an HTTP date in RFC 9110, section 5.6.7
            {"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT", "Date": "Sun, 06 Nov 1994 08:48:37 GMT"},
            60,
        ),
        ({"Retry-After": "Sunday, 06-Nov-94 08:49:37 GMT", "date": "Sun, 06 Nov 1994 08:48:37 GMT"}, 60),
        ({"Retry-After": "Sun Nov  6 08:49:37 1994", "Date": "Sun, 06 Nov 1994 08:48:37 GMT"}, 60),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT", "Date": "Sun, 06 Nov 1994 09:00:00 GMT"}, None),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT", "Date": "Mon, 06 Nov 1989 08:49:37 GMT"}, 86400),
        ({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}, None),
        ({"Retry-After": "Sun, 31 Feb 2094 08:49:37 GMT"}, None),
        ({"Retry-After": "Sun, 06 Nov 99999999999999999999 08:49:37 GMT"}, None),
    ],
)
def test_retry_after_is_read_in_seconds_and_as_a_date_and_else_ignored(headers, seconds):
    assert retry_after(VendorError(headers=headers)) == seconds


@pytest.mark.parametrize("date", [{}, {"Date": "unreadable"}])
def test_without_the_answer_s_date_a_retry_after_date_counts_from_now(date):
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    seconds = retry_after(VendorError(headers={"Retry-After": until, **date}))
    assert seconds is not None
    assert 50 < seconds <= 60


@thoroughly
@given(st.text() | st.from_regex(r"\w{3}, [0-9]{1,5} \w{3} [0-9]{1,5} [0-9]{1,3}:[0-9]{2}:[0-9]{2}( GMT)?"))
def test_no_header_whatever_is_in_it_breaks_the_decision(text):
    seconds = retry_after(VendorError(headers={"Retry-After": text, "Date": text[::-1]}))
    assert seconds is None or 0 < seconds <= 86400


# Causes --------------------------------------------------------------------------------------------------


def test_an_error_raised_from_an_http_error_is_judged_by_it():
    error = caused_by(caused_by(VendorError(response=Response(429, Retry_After="7"))))
    assert decide(error, EXACT, 1) == RetryDecision(retry=True, delay=7, reason="HTTP 429")
    assert decide(caused_by(VendorError(status_code=404)), EXACT, 1).reason == "HTTP 404"
    assert decide(caused_by(ConnectionResetError()), EXACT, 1).reason == "network error"


def test_of_several_causes_the_nearest_decides():
    assert decide(caused_by(caused_by(ConnectionError(), VendorError(status_code=404))), EXACT, 1).reason == "HTTP 404"


def test_an_error_s_own_status_comes_before_its_cause_s():
    assert decide(caused_by(ConnectionError(), VendorError(status_code=404)), EXACT, 1).reason == "HTTP 404"
    certificate = ssl.SSLCertVerificationError()
    assert decide(caused_by(certificate, VendorError(status_code=503)), EXACT, 1).reason == "HTTP 503"


def test_a_status_comes_before_the_kind_of_the_error():
    class VendorTypeError(VendorError, TypeError):
        pass

    assert decide(VendorTypeError(status_code=503), EXACT, 1).reason == "HTTP 503"


@pytest.mark.parametrize(
    "error", [VendorError("failed", VendorError(status_code=404)), VendorError(reason=VendorError(status_code=404))]
)
def test_a_cause_may_also_be_an_argument_or_the_reason(error):
    assert decide(error, EXACT, 1).reason == "HTTP 404"


def test_a_timeout_raised_from_a_404_is_a_timeout():
    assert decide(caused_by(VendorError(status_code=404), TimeoutError("never ready")), EXACT, 1).retry


def test_an_error_that_merely_happened_while_another_was_handled_is_judged_alone():
    error = VendorError()
    error.__context__ = VendorError(status_code=404)
    assert decide(error, EXACT, 1).reason == "may be temporary"


def test_a_programming_error_as_the_cause_does_not_decide():
    assert decide(caused_by(TypeError()), EXACT, 1).retry


def test_causes_that_go_round_in_a_circle_come_to_an_end():
    first, second = VendorError("first"), VendorError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(explicit_causes(first)) == [second]
    assert decide(first, EXACT, 1).retry


# Imports -------------------------------------------------------------------------------------------------


def test_no_http_client_is_imported():
    clients = {"httpx", "httpcore", "requests", "aiohttp", "urllib3"}
    script = f"import sys, temporal_async_task.retry; print({clients} & set(sys.modules))"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=path)
    assert ran.stdout.strip() == "set()"
