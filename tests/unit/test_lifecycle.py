"""Where a record stands follows from its events."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temporal_async_task.integrations.lifecycle import Event, RecordState, RecordStatus, state_after

START = datetime(2026, 1, 1, tzinfo=UTC)
QUEUED, PROCESSING = RecordStatus.QUEUED, RecordStatus.PROCESSING
COMPLETED, FAILED = RecordStatus.COMPLETED, RecordStatus.FAILED


def events(*steps: RecordStatus | tuple[RecordStatus, dict]) -> list[Event]:
    pairs = [step if isinstance(step, tuple) else (step, {}) for step in steps]
    return [Event(kind, START + timedelta(seconds=n), payload) for n, (kind, payload) in enumerate(pairs)]


def test_a_record_without_events_is_pending():
    assert state_after([]) == RecordState(RecordStatus.PENDING)


def test_a_run_that_completes():
    state = state_after(events(QUEUED, PROCESSING, (PROCESSING, {"external_id": "job-1"}), (COMPLETED, {"result": 5})))
    assert state == RecordState(
        COMPLETED,
        attempts=1,
        external_id="job-1",
        response=5,
        started_at=START + timedelta(seconds=1),
        completed_at=START + timedelta(seconds=3),
    )


def test_another_try_begins_anew_and_keeps_the_vendors_id():
    first = events(QUEUED, PROCESSING, (PROCESSING, {"external_id": "job-1"}), (FAILED, {"error": "503"}))
    assert (state_after(first).status, state_after(first).error) == (FAILED, "503")
    again = state_after([*first, *events(QUEUED)])
    assert again == RecordState(QUEUED, attempts=2, external_id="job-1")


def test_another_try_may_be_refused_before_it_begins():
    state = state_after(events(QUEUED, (FAILED, {"error": "503"}), (FAILED, {"error": "no such field"})))
    assert (state.status, state.attempts, state.error) == (FAILED, 1, "no such field")


@pytest.mark.parametrize(
    "steps",
    [
        (PROCESSING,),
        (COMPLETED,),
        (QUEUED, QUEUED),
        (QUEUED, PROCESSING, COMPLETED, FAILED),
        (QUEUED, PROCESSING, COMPLETED, QUEUED),
        (QUEUED, FAILED, PROCESSING),
        (QUEUED, FAILED, COMPLETED),
    ],
)
def test_what_cannot_follow_is_refused(steps: tuple[RecordStatus, ...]):
    with pytest.raises(ValueError, match="cannot become"):
        state_after(events(*steps))


@given(st.lists(st.sampled_from([QUEUED, PROCESSING, COMPLETED, FAILED]), max_size=12))
def test_the_status_is_the_last_events_and_nothing_follows_on_a_completed_one(steps: list[RecordStatus]):
    try:
        state = state_after(events(*steps))
    except ValueError:
        return
    assert state.status == (steps[-1] if steps else RecordStatus.PENDING)
    assert COMPLETED not in steps[:-1]
    assert state.attempts == steps.count(QUEUED)
