"""The journal: what is stored comes back, stays within its limit, and is refused when it is damaged."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer

from temporal_async_task import PayloadTooLargeError, ResultError, RetryPolicy, StepState, async_task, progress, step
from temporal_async_task.engine.journal import MAX_BYTES, ErrorInfo, Journal, Snapshot, StepRecord
from temporal_async_task.testing import TaskRun

SERVER_LIMIT = 2 * 1024 * 1024
"""What the server takes of an activity's heartbeat details, in bytes; it fails the activity for good beyond that."""


def finished(*results: tuple[str, bytes]) -> Journal:
    """A journal of finished steps."""
    journal = Journal()
    for n, (key, result) in enumerate(results):
        journal.complete(journal.open(key), result, now=float(n))
    return journal


def parts(journal: Journal) -> tuple[Any, ...]:
    """All that a journal holds, for comparison."""
    return (
        journal.started,
        journal.attempt,
        journal.earlier,
        journal.body,
        journal.progress,
        journal.cancel_reason,
        list(journal),
        [record.key for record in journal.done()],
    )


# Whole milliseconds, which is what a journal keeps.
moments = st.integers(min_value=0, max_value=10**13).map(lambda ms: ms / 1000)
times = st.none() | moments
counts = st.integers(min_value=0, max_value=10**6)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
open_states = st.sampled_from([state for state in StepState if state is not StepState.COMPLETED])
errors = st.none() | st.builds(ErrorInfo, texts, texts)
records = st.builds(
    StepRecord,
    key=texts,
    state=open_states,
    calls=counts,
    failures=counts,
    lost=counts,
    started=times,
    finished=times,
    due=times,
    error=errors,
)


@st.composite
def journals(draw: st.DrawFn) -> Journal:
    journal = Journal(
        started=draw(times),
        attempt=draw(counts),
        earlier=draw(counts),
        body=draw(records),
        progress=draw(st.none() | st.tuples(st.none() | st.floats(0, 1), texts)),
        cancel_reason=draw(st.none() | texts),
    )
    for template in draw(st.lists(records, max_size=6, unique_by=lambda record: record.key)):
        record = journal.open(template.key)
        for field in ("state", "calls", "failures", "lost", "started", "finished", "due", "error"):
            setattr(record, field, getattr(template, field))
        if draw(st.booleans()):
            lost = journal.body.lost
            journal.complete(
                record, draw(st.binary(max_size=40)), now=draw(times.filter(lambda time: time is not None))
            )
            journal.body.lost = lost
    return journal


class MeasuredRun(TaskRun[Any]):
    """A run whose stored journals are measured."""

    largest = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "saved" and value is not None:
            self.largest = max(self.largest, value.size)
        super().__setattr__(name, value)


class TestRoundTrip:
    @settings(deadline=None)
    @given(journals())
    def test_a_restored_journal_holds_what_was_stored(self, journal: Journal):
        assert parts(Journal.restore(journal.snapshot())) == parts(journal)

    @settings(deadline=None)
    @given(journals())
    def test_a_restored_journal_is_stored_as_it_was(self, journal: Journal):
        snapshot = journal.snapshot()
        assert Journal.restore(snapshot).snapshot() == snapshot

    @settings(deadline=None)
    @given(journals())
    def test_the_header_alone_tells_all_but_the_results(self, journal: Journal):
        read = Journal.of_header(journal.snapshot().header)
        for record in journal:
            record.result = None
        assert parts(read) == parts(journal)

    @settings(deadline=None)
    @given(journals())
    def test_a_headers_json_is_read_by_any_parser(self, journal: Journal):
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        json.loads(journal.snapshot().header.decode(), parse_constant=refuse)

    def test_an_empty_journal_comes_back_empty(self):
        journal = Journal.restore(Journal().snapshot())
        assert len(journal) == 0
        assert journal.started is None

    def test_times_are_kept_to_the_millisecond(self):
        journal = Journal(started=1_700_000_000.123_456)
        assert Journal.restore(journal.snapshot()).started == 1_700_000_000.123

    def test_a_step_that_is_due_at_no_time_is_stored_without_one(self):
        journal = Journal()
        journal.open("approval").due = float("inf")
        [record] = Journal.restore(journal.snapshot())
        assert record.due is None

    def test_text_of_any_script_is_stored_as_it_is(self):
        journal = Journal()
        journal.open("Größe 🖼")
        assert "Größe 🖼".encode() in journal.snapshot().header

    def test_steps_come_back_in_the_order_in_which_they_finished(self):
        journal = Journal()
        for key in "abc":
            journal.open(key)
        for now, key in enumerate("cab"):
            journal.complete(journal.open(key), b"", now=now)
        assert [record.key for record in Journal.restore(journal.snapshot()).done()] == ["c", "a", "b"]

    def test_a_restored_journal_goes_on(self):
        journal = Journal.restore(finished(("a", b"1")).snapshot())
        journal.complete(journal.open("b"), b"2", now=9)
        again = Journal.restore(journal.snapshot())
        assert [(record.key, record.result) for record in again.done()] == [("a", b"1"), ("b", b"2")]

    def test_a_snapshot_does_not_change_with_its_journal(self):
        journal = finished(("a", b"1"))
        before = journal.snapshot()
        journal.complete(journal.open("b"), b"2", now=9)
        assert [record.key for record in Journal.restore(before)] == ["a"]

    def test_progress_that_is_no_number_does_not_reach_the_header(self):
        @async_task
        async def task() -> None:
            progress(float("nan"), "half")
            await step("a", str)

        run = TaskRun(task)
        run.execute()
        assert run.saved is not None
        assert b"NaN" not in run.saved.header


class TestCompleting:
    def test_a_completed_step_is_finished_and_owes_nothing(self):
        journal = Journal()
        record = journal.open("a")
        record.due, record.error = 7.0, ErrorInfo("OSError", "down")
        journal.complete(record, b"result", now=5.0)
        [done] = journal.done()
        assert (done.key, done.state, done.result, done.finished) == ("a", StepState.COMPLETED, b"result", 5.0)
        assert (done.due, done.error) == (None, None)

    def test_a_completed_step_is_found_by_its_key(self):
        journal = finished(("a", b"1"), ("b", b"2"))
        assert journal.get("b") is journal.done()[1]
        assert journal.get("c") is None

    def test_an_unfinished_step_has_one_record(self):
        journal = Journal()
        assert journal.open("a") is journal.open("a") is journal.get("a")
        assert len(journal) == 1

    @settings(deadline=None)
    @given(st.lists(st.binary(max_size=50), min_size=2, max_size=8))
    def test_each_checkpoint_repeats_the_results_before_it_byte_for_byte(self, results: list[bytes]):
        journal, before = Journal(), b""
        for n, result in enumerate(results):
            journal.complete(journal.open(f"s{n}"), result, now=n)
            stored = journal.snapshot().results
            assert stored.startswith(before)
            assert stored.endswith(result)
            assert len(stored) > len(before)
            before = stored

    def test_a_finished_steps_part_of_the_header_is_made_once(self):
        journal = finished(("a", b"1"))
        [record] = journal.done()
        record.calls = 99  # nobody changes a finished step; if someone did, nothing would be made anew
        journal.complete(journal.open("b"), b"2", now=9)
        restored = Journal.restore(journal.snapshot())
        assert [step.calls for step in restored.done()] == [0, 0]


def complete_as_many_as_fit(journal: Journal, *, key: str, result: bytes) -> None:
    with contextlib.suppress(PayloadTooLargeError):
        for n in range(100_000):
            journal.complete(journal.open(f"{key}{n}"), result, now=n)


class TestLimit:
    def test_the_limit_leaves_room_below_the_servers(self):
        assert SERVER_LIMIT * 0.9 < MAX_BYTES < SERVER_LIMIT

    def test_a_journal_may_grow_up_to_the_limit(self):
        journal = finished(("a", b"x" * (MAX_BYTES - 10_000)))
        assert MAX_BYTES - 10_000 < journal.snapshot().size < MAX_BYTES

    def test_a_result_over_the_limit_is_refused_with_its_size(self):
        journal = Journal()
        with pytest.raises(PayloadTooLargeError, match=r"A result of 3,000,000 bytes would bring"):
            journal.complete(journal.open("large"), b"x" * 3_000_000, now=1.0)

    def test_a_refused_result_leaves_the_journal_as_it_was(self):
        journal = finished(("a", b"1"))
        journal.body.lost = 3
        record = journal.open("large")
        record.state, record.error = StepState.RUNNING, ErrorInfo("OSError", "down")
        before = journal.snapshot()
        with pytest.raises(PayloadTooLargeError):
            journal.complete(record, b"x" * MAX_BYTES, now=1.0)
        assert journal.snapshot() == before
        assert [record.key for record in journal.done()] == ["a"]

    def test_a_smaller_result_is_taken_after_a_refused_one(self):
        journal = Journal()
        with pytest.raises(PayloadTooLargeError):
            journal.complete(journal.open("a"), b"x" * MAX_BYTES, now=1.0)
        journal.complete(journal.open("a"), b"small", now=2.0)
        assert Journal.restore(journal.snapshot()).done()[0].result == b"small"

    def test_many_small_results_are_refused_where_they_would_pass_the_limit(self):
        journal = Journal()
        complete_as_many_as_fit(journal, key="s", result=b"x" * 10_000)
        assert MAX_BYTES - 20_000 < journal.snapshot().size < SERVER_LIMIT

    def test_keys_count_as_much_as_results(self):
        journal = Journal()
        complete_as_many_as_fit(journal, key="🖼" * 60, result=b"")
        assert MAX_BYTES - 20_000 < journal.snapshot().size < SERVER_LIMIT

    def test_a_restored_journal_knows_its_size(self):
        journal = Journal.restore(finished(("a", b"x" * 1_500_000)).snapshot())
        with pytest.raises(PayloadTooLargeError):
            journal.complete(journal.open("b"), b"x" * 600_000, now=1.0)

    def test_errors_of_any_script_count_by_their_bytes(self):
        journal = Journal()
        for n in range(100):
            journal.open(f"page-{n}").error = ErrorInfo.of(OSError("🖼" * 1_000))  # 4 bytes each
        complete_as_many_as_fit(journal, key="s", result=b"x" * 10_000)
        assert MAX_BYTES - 20_000 < journal.snapshot().size < SERVER_LIMIT

    def test_many_steps_that_fail_at_once_do_not_bring_a_journal_over_what_the_server_takes(self):
        @async_task(retry_policy=RetryPolicy(initial_delay=60, max_delay=60))
        async def task() -> None:
            await asyncio.gather(*(step(f"page-{n}", str) for n in range(600)))

        run = MeasuredRun(task)
        for n in range(600):
            run.on(f"page-{n}").raises(OSError("🖼" * 1_000))
        run.execute()
        assert run.largest < SERVER_LIMIT

    def test_an_error_that_a_result_causes_is_kept_short_too(self):
        class Verbose(BaseModel):
            pages: int = 1

            @field_serializer("pages")
            def refuse(self, _: int) -> int:
                raise ValueError("no " * 1_000_000)

        @async_task
        async def task() -> None:
            await step("a", Verbose)

        run = TaskRun(task)
        with pytest.raises(ResultError):
            run.execute()
        assert run.journal.get("a") is not None
        assert run.saved is not None
        assert run.saved.size < 10_000


class TestLostAttempts:
    @staticmethod
    def with_states(**states: StepState) -> Journal:
        journal = finished(("done", b""))
        for key, state in states.items():
            journal.open(key).state = state
        return journal

    def lost(self, journal: Journal) -> dict[str, int]:
        return {record.key: record.lost for record in [*journal, journal.body]}

    def test_a_lost_attempt_counts_against_every_step_that_ran(self):
        journal = self.with_states(a=StepState.RUNNING, b=StepState.RUNNING)
        journal.count_lost(1)
        assert self.lost(journal) == {"done": 0, "a": 1, "b": 1, "": 0}

    @pytest.mark.parametrize("state", [StepState.RETRYING, StepState.WAITING, StepState.FAILED])
    def test_a_lost_attempt_does_not_count_against_a_step_that_did_not_run(self, state: StepState):
        journal = self.with_states(a=StepState.RUNNING, b=state)
        journal.count_lost(1)
        assert self.lost(journal) == {"done": 0, "a": 1, "b": 0, "": 0}

    def test_with_no_step_running_it_counts_against_the_body(self):
        journal = self.with_states(a=StepState.RETRYING)
        journal.count_lost(1)
        assert self.lost(journal) == {"done": 0, "a": 0, "": 1}

    def test_lost_attempts_add_up(self):
        journal = self.with_states(a=StepState.RUNNING)
        journal.count_lost(2)
        journal.count_lost(3)
        assert self.lost(journal)["a"] == 5

    def test_no_lost_attempt_counts_as_none(self):
        journal = self.with_states(a=StepState.RUNNING)
        journal.count_lost(0)
        assert self.lost(journal) == {"done": 0, "a": 0, "": 0}

    def test_a_finished_step_clears_what_was_counted_against_the_body(self):
        journal = Journal()
        journal.count_lost(9)
        journal.complete(journal.open("a"), b"", now=1.0)
        assert journal.body.lost == 0


class TestReopening:
    @staticmethod
    def ended() -> Journal:
        """A run that failed at its fourth step."""
        journal = finished(("a", b"1"), ("b", b"2"), ("c", b"3"))
        failed = journal.open("d")
        failed.state, failed.calls, failed.failures, failed.lost = StepState.FAILED, 4, 4, 2
        failed.error = ErrorInfo("OSError", "down")
        journal.started, journal.attempt, journal.cancel_reason = 5.0, 7, "the customer left"
        journal.body.failures, journal.body.lost = 3, 9
        journal.progress = (0.5, "half")
        return journal

    def test_finished_steps_keep_their_results(self):
        journal = self.ended().reopen()
        assert [(record.key, record.result) for record in journal.done()] == [("a", b"1"), ("b", b"2"), ("c", b"3")]

    def test_failed_steps_begin_anew(self):
        journal = self.ended().reopen()
        assert journal.get("d") is None
        assert journal.open("d") == StepRecord("d")

    def test_the_body_begins_anew_and_its_cancellation_is_over(self):
        journal = self.ended().reopen()
        assert journal.body == StepRecord("")
        assert journal.cancel_reason is None

    def test_attempts_and_the_begin_go_on(self):
        journal = self.ended().reopen()
        assert (journal.started, journal.attempt) == (5.0, 7)

    def test_steps_that_are_to_be_done_again_begin_anew_and_no_other(self):
        journal = self.ended().reopen({"b"})
        assert [(record.key, record.result) for record in journal.done()] == [("a", b"1"), ("c", b"3")]
        assert journal.get("b") is None

    def test_a_reopened_journal_can_be_stored(self):
        journal = Journal.restore(self.ended().reopen({"b"}).snapshot())
        assert [(record.key, record.result) for record in journal.done()] == [("a", b"1"), ("c", b"3")]

    @pytest.mark.parametrize("state", [StepState.RUNNING, StepState.WAITING])
    def test_a_step_that_was_not_over_stays_where_it_was_with_its_retries_given_back(self, state: StepState):
        journal = self.ended()
        record = journal.open("e")
        record.state, record.failures, record.lost, record.started, record.due = state, 3, 9, 4.0, 99.0
        reopened = journal.reopen().get("e")
        assert reopened is not None
        assert (reopened.state, reopened.started, reopened.due) == (state, 4.0, 99.0)
        assert (reopened.failures, reopened.lost) == (0, 0)

    def test_a_step_that_backed_off_begins_anew(self):
        journal = self.ended()
        record = journal.open("e")
        record.state, record.failures, record.due = StepState.RETRYING, 3, 99.0
        assert journal.reopen().get("e") is None

    def test_a_step_whose_outcome_is_unknown_stays_failed(self):
        reopened = self.of_unknown_outcome().reopen().get("charge")
        assert reopened is not None
        assert reopened.state is StepState.FAILED

    @pytest.mark.parametrize("key", ["charge", "running", "d"])
    def test_a_step_that_is_named_begins_anew_whatever_became_of_it(self, key: str):
        journal = self.of_unknown_outcome()
        journal.open("running").state = StepState.RUNNING
        assert journal.reopen({key}).get(key) is None

    def of_unknown_outcome(self) -> Journal:
        """A run with an at-most-once step whose outcome was lost."""
        journal = self.ended()
        record = journal.open("charge")
        record.state = StepState.FAILED
        record.error = ErrorInfo("StepOutcomeUnknownError", "its outcome was lost with its worker")
        return Journal.restore(journal.snapshot())  # by a version that did not mark it

    def test_the_journal_itself_stays_as_it_was(self):
        journal = self.of_unknown_outcome()
        running = journal.open("running")
        running.state, running.failures, running.lost = StepState.RUNNING, 3, 9
        before = journal.snapshot()
        journal.reopen({"b"})
        assert journal.snapshot() == before

    def test_a_step_that_is_not_known_cannot_be_done_again(self):
        with pytest.raises(KeyError, match="never heard of"):
            self.ended().reopen(["a", "never heard of"])


class TestDamaged:
    def test_a_version_that_is_not_known_is_refused(self):
        header = json.loads(Journal().snapshot().header)
        header["v"] = 2
        with pytest.raises(ValueError, match="has version 2, this library reads 1"):
            Journal.of_header(json.dumps(header).encode())

    @pytest.mark.parametrize(
        "damage",
        [
            lambda _: b"",
            lambda results: results[:2],  # within a length
            lambda results: results[:-1],  # within a result
            lambda results: results + b"x",
            lambda results: results + results,
            lambda results: b"\xff" + results[1:],  # a length of gigabytes
        ],
        ids=["none", "cut in a length", "cut in a result", "one byte more", "twice", "a length past the end"],
    )
    def test_results_that_do_not_fit_the_header_are_refused(self, damage: Any):
        header, results, _ = finished(("a", b"first"), ("b", b"second")).snapshot()
        with pytest.raises(ValueError, match="do not fit"):
            Journal.restore(Snapshot(header, damage(results)))

    @pytest.mark.parametrize("header", [b"", b"\xff\xfe", b"{", b"[]", b"null", b'"text"', b"{}", b'{"v":1}'])
    def test_what_is_no_journal_is_refused(self, header: bytes):
        with pytest.raises(ValueError):  # noqa: PT011 - the parser's own, too
            Journal.restore(Snapshot(header, b""))


class TestErrors:
    @settings(deadline=None)
    @given(st.text(max_size=50))
    @example("lone \ud800 surrogate")
    def test_an_error_of_any_text_can_be_stored(self, text: str):
        journal = Journal()
        journal.open("a").error = ErrorInfo.of(OSError(text))
        [record] = Journal.restore(journal.snapshot())
        assert record.error is not None
        assert record.error.type == "OSError"

    def test_text_that_can_be_stored_is_kept_as_it_is(self):
        assert ErrorInfo.of(OSError("Größe 🖼\n")).message == "Größe 🖼\n"

    def test_lone_surrogates_are_shown_escaped(self):
        assert ErrorInfo.of(OSError("bad \ud800 text")).message == r"bad \ud800 text"

    def test_a_long_text_is_cut_and_says_so(self):
        message = ErrorInfo.of(OSError("x" * 5_000)).message
        assert message == "x" * 1_000 + "…"

    def test_an_error_shows_its_type_and_its_text(self):
        assert str(ErrorInfo.of(OSError("down"))) == "OSError: down"

    def test_an_error_without_a_text_shows_its_type(self):
        assert str(ErrorInfo.of(TimeoutError())) == "TimeoutError"

    def test_an_error_whose_text_cannot_be_made_is_told_by_its_type(self):
        class SpeechlessError(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no text either")

        assert ErrorInfo.of(SpeechlessError()).type == "SpeechlessError"
