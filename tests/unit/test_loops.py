"""Where the user's code runs, and how it is stopped: event loops, threads, and the tasks that an attempt makes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import inspect
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from temporalio import activity
from temporalio.testing import ActivityEnvironment

from support import wait_until
from temporal_async_task import RetryPolicy, StepFailedError, async_task, step
from temporal_async_task.engine.loops import STALL, UserLoop, UserLoops
from temporal_async_task.engine.threads import DaemonThreads
from temporal_async_task.engine.unwind import Unwind, prepare, scope
from temporal_async_task.testing import TaskRun

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


@pytest.fixture
def loop() -> Iterator[UserLoop]:
    loop = UserLoop()
    yield loop
    loop.stop()


class Blocker:
    """Code that holds its thread until it is released."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._released = threading.Event()

    def hold(self) -> None:
        self.entered.set()
        self._released.wait(10)

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def blocker() -> Iterator[Blocker]:
    blocker = Blocker()
    yield blocker
    blocker.release()


async def blocks(blocker: Blocker) -> str:
    """Async code that should not, but does."""
    blocker.hold()
    return "released"


async def is_reported(loop: UserLoop) -> None:
    await wait_until(lambda: loop.check() > STALL + 0.05)


class TestUserLoop:
    def test_code_runs_in_a_daemon_thread_of_its_own(self, loop: UserLoop):
        async def where() -> tuple[int, bool]:
            return threading.get_ident(), threading.current_thread().daemon

        ident, daemon = loop.run(where()).result(5)
        assert ident != threading.get_ident()
        assert daemon

    def test_code_of_one_loop_shares_a_thread(self, loop: UserLoop):
        async def where() -> int:
            return threading.get_ident()

        assert loop.run(where()).result(5) == loop.run(where()).result(5)

    def test_an_error_is_raised_where_the_result_is_asked_for(self, loop: UserLoop):
        async def fails() -> None:
            raise OSError("down")

        with pytest.raises(OSError, match="down"):
            loop.run(fails()).result(5)

    def test_the_callers_context_variables_are_seen(self, loop: UserLoop):
        async def read() -> str:
            return tenant.get()

        tenant.set("acme")
        assert loop.run(read()).result(5) == "acme"

    def test_the_sdks_activity_is_not(self, loop: UserLoop):
        async def read() -> bool:
            return activity.in_activity()

        def in_an_activity() -> tuple[bool, bool]:
            return activity.in_activity(), loop.run(read()).result(5)

        assert ActivityEnvironment().run(in_an_activity) == (True, False)

    def test_a_call_is_made_on_the_loops_thread(self, loop: UserLoop):
        made: concurrent.futures.Future[int] = concurrent.futures.Future()
        loop.call_soon(lambda: made.set_result(threading.get_ident()))
        assert made.result(5) != threading.get_ident()

    def test_a_loop_that_was_stopped_runs_nothing_more_and_may_be_stopped_again(self):
        made: list[str] = []
        loop = UserLoop()
        loop.stop()
        loop.call_soon(made.append, "called")  # as an attempt does that is told of the shutdown too late
        loop.stop()
        assert made == []

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
    def test_a_callback_that_would_end_the_process_does_not_end_the_loop(
        self, loop: UserLoop, error: BaseException, caplog: pytest.LogCaptureFixture
    ):
        def leave() -> None:
            raise error

        waiting = loop.run(asyncio.sleep(0.1, "woken"))
        loop.call_soon(leave)
        assert waiting.result(5) == "woken"
        assert loop.run(asyncio.sleep(0, "served")).result(5) == "served"
        assert f"raised {type(error).__name__}; it cannot end the worker" in caplog.text

    def test_nor_does_it_take_what_was_posted_with_it_along(self, loop: UserLoop, blocker: Blocker):
        def leave() -> None:
            raise SystemExit(3)

        loop.call_soon(blocker.hold)
        blocker.entered.wait(5)
        loop.call_soon(leave)
        posted = loop.run(asyncio.sleep(0, "served"))
        blocker.release()
        assert posted.result(5) == "served"

    async def test_stopping_does_not_wait_for_code_that_blocks(self, blocker: Blocker):
        loop = UserLoop()
        blocked = loop.run(blocks(blocker))
        blocker.entered.wait(5)
        began = time.monotonic()
        loop.stop(timeout=0.05)
        assert time.monotonic() - began < 2
        assert not blocked.done()
        blocker.release()
        assert await asyncio.wrap_future(blocked) == "released"
        loop.stop()


class TestWatch:
    async def test_code_that_blocks_is_reported_once_with_its_task_and_its_line(
        self, loop: UserLoop, blocker: Blocker, caplog: pytest.LogCaptureFixture
    ):
        async def named() -> str:
            current = asyncio.current_task()
            assert current is not None
            current.set_name("task 'report'")
            return await blocks(blocker)

        blocked = loop.run(named())
        blocker.entered.wait(5)
        await is_reported(loop)
        for _ in range(10):
            loop.check()
        [record] = caplog.records
        assert record.levelname == "WARNING"
        message = record.getMessage()
        assert "Blocking code in async code of task 'report'" in message
        assert f"{__file__}:" in message
        assert not blocked.done()
        blocker.release()
        await asyncio.wrap_future(blocked)

    async def test_the_line_is_where_the_users_code_calls_what_blocks(
        self, loop: UserLoop, caplog: pytest.LogCaptureFixture
    ):
        async def sleeps() -> None:
            subprocess.run(["sleep", str(STALL + 1)], check=True)  # noqa: ASYNC221 - that is the point

        blocked = loop.run(sleeps())
        await is_reported(loop)
        await asyncio.wrap_future(blocked)
        line = inspect.getsourcelines(sleeps)[1] + 1  # and none of the standard library's, which this goes through
        assert f"{__file__}:{line} in sleeps" in caplog.text

    async def test_a_callback_that_blocks_is_reported_as_one(
        self, loop: UserLoop, blocker: Blocker, caplog: pytest.LogCaptureFixture
    ):
        loop.call_soon(blocker.hold)
        await is_reported(loop)
        assert "of a callback" in caplog.text

    async def test_code_that_blocks_again_is_reported_again(self, loop: UserLoop, caplog: pytest.LogCaptureFixture):
        for _ in range(2):
            blocker = Blocker()
            blocked = loop.run(blocks(blocker))
            blocker.entered.wait(5)
            await is_reported(loop)
            blocker.release()
            await asyncio.wrap_future(blocked)
            await wait_until(lambda: loop.check() == 0.0)
        assert len(caplog.records) == 2

    async def test_code_that_awaits_is_not_reported(self, loop: UserLoop, caplog: pytest.LogCaptureFixture):
        waiting = loop.run(asyncio.sleep(STALL + 0.2))
        while not waiting.done():
            assert loop.check() < STALL
            await asyncio.sleep(0.02)
        assert caplog.records == []

    async def test_code_that_blocks_a_thread_is_not_reported(
        self, loop: UserLoop, blocker: Blocker, caplog: pytest.LogCaptureFixture
    ):
        running = loop.run(asyncio.to_thread(blocker.hold))
        blocker.entered.wait(5)
        end = time.monotonic() + STALL + 0.1
        while time.monotonic() < end:
            loop.check()
            await asyncio.sleep(0.02)
        blocker.release()
        await asyncio.wrap_future(running)
        assert caplog.records == []

    async def test_the_watch_reports_by_itself(self, blocker: Blocker, caplog: pytest.LogCaptureFixture):
        loops = UserLoops()
        watching = asyncio.create_task(loops.watch())
        blocked = loops.pick().run(blocks(blocker))
        await wait_until(lambda: "Blocking code" in caplog.text)
        watching.cancel()
        blocker.release()
        await asyncio.wrap_future(blocked)
        loops.stop()
        assert f"{__file__}:" in caplog.text


class TestUserLoops:
    @pytest.fixture
    def loops(self) -> Iterator[UserLoops]:
        loops = UserLoops()
        yield loops
        loops.stop()

    def test_all_code_shares_one_loop_as_long_as_it_answers(self, loops: UserLoops):
        assert len({id(loops.pick()) for _ in range(20)}) == 1

    async def test_what_begins_while_the_loop_is_blocked_gets_another(self, loops: UserLoops, blocker: Blocker):
        first = loops.pick()
        blocked = first.run(blocks(blocker))
        blocker.entered.wait(5)
        await wait_until(lambda: loops.pick() is not first)
        assert loops.pick().run(asyncio.sleep(0, "served")).result(5) == "served"
        assert not blocked.done()
        blocker.release()
        await asyncio.wrap_future(blocked)

    async def test_code_comes_back_to_the_first_loop_once_it_answers(self, loops: UserLoops, blocker: Blocker):
        first = loops.pick()
        blocked = first.run(blocks(blocker))
        blocker.entered.wait(5)
        await wait_until(lambda: loops.pick() is not first)
        blocker.release()
        await asyncio.wrap_future(blocked)
        await wait_until(lambda: loops.pick() is first)

    async def test_what_could_not_begin_on_a_loop_begins_once_on_another(self, loops: UserLoops, blocker: Blocker):
        begun = []

        async def begin(loop: UserLoop) -> str:
            begun.append(loop)
            return "served"

        blocked = loops.pick().run(blocks(blocker))
        blocker.entered.wait(5)
        first = loops.pick()  # nobody has noticed yet
        assert await asyncio.wait_for(loops.run(begin), 5) == "served"
        assert not blocked.done()
        blocker.release()
        await asyncio.wrap_future(blocked)
        await asyncio.wrap_future(first.run(asyncio.sleep(0)))
        assert len(begun) == 1
        assert begun[0] is not first

    async def test_code_that_takes_its_time_is_begun_once(self, loops: UserLoops):
        begun = []

        async def begin(loop: UserLoop) -> None:
            begun.append(loop)
            await asyncio.sleep(3 * STALL)

        await loops.run(begin)
        assert begun == [loops.pick()]

    async def test_nothing_that_async_code_does_holds_up_the_loop_for_sync_code(
        self, loops: UserLoops, blocker: Blocker
    ):
        blocked = loops.pick().run(blocks(blocker))
        blocker.entered.wait(5)
        assert loops.for_sync_code().run(asyncio.sleep(0, "served")).result(5) == "served"
        blocker.release()
        await asyncio.wrap_future(blocked)

    async def test_a_loop_of_its_own_is_shared_with_nobody_at_the_same_time_and_taken_again_after(self):
        loops, begun = UserLoops(shared=False), []
        both = asyncio.Barrier(3)

        async def begin(loop: UserLoop) -> None:
            begun.append(loop)
            await asyncio.sleep(0.2)

        async def one() -> None:
            await both.wait()
            await loops.run(begin)

        await asyncio.gather(one(), one(), one())
        assert len(set(begun)) == 3
        await loops.run(begin)
        assert len(set(begun)) == 3
        loops.stop()

    async def test_code_that_blocks_on_a_loop_of_its_own_holds_up_nobody(self, blocker: Blocker):
        loops = UserLoops(shared=False)
        go_on = threading.Event()

        async def block(loop: UserLoop) -> None:
            blocker.hold()

        async def wait(loop: UserLoop) -> str:
            await wait_until(go_on.is_set, interval=0.001)
            return "on time"

        waits = asyncio.create_task(loops.run(wait))
        blocks = asyncio.create_task(loops.run(block))
        await asyncio.to_thread(blocker.entered.wait, 5)
        go_on.set()
        assert await asyncio.wait_for(waits, 5) == "on time"
        assert not blocks.done()
        blocker.release()
        await blocks
        loops.stop()

    async def test_an_error_is_raised_where_it_is_awaited(self, loops: UserLoops):
        async def fail(loop: UserLoop) -> None:
            raise LookupError("of the task")

        with pytest.raises(LookupError, match="of the task"):
            await loops.run(fail)


class Rendezvous:
    """Calls that come back only once so many of them are being made at the same time."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties, timeout=5)

    def __call__(self) -> str:
        self._barrier.wait()
        return threading.current_thread().name


@contextlib.contextmanager
def pool(max_workers: int) -> Iterator[DaemonThreads]:
    """A pool, let go in the end."""
    threads = DaemonThreads(max_workers)
    try:
        yield threads
    finally:
        threads.shutdown()


def results(futures: list[concurrent.futures.Future[Any]]) -> list[Any]:
    return [future.result(10) for future in futures]


class TestDaemonThreads:
    def test_as_many_calls_run_at_once_as_there_are_workers(self):
        with pool(8) as threads:
            meet = Rendezvous(8)
            names = results([threads.submit(meet) for _ in range(8)])
        assert len(set(names)) == 8

    def test_no_more_calls_run_at_once_than_there_are_workers(self):
        running, most, lock = 0, 0, threading.Lock()

        def call() -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.005)
            with lock:
                running -= 1

        with pool(3) as threads:
            results([threads.submit(call) for _ in range(30)])
        assert most == 3

    def test_an_idle_thread_takes_the_next_call(self):
        with pool(10) as threads:
            names = set()
            for _ in range(50):
                names.add(threads.submit(lambda: threading.current_thread().name).result(5))
                time.sleep(0.001)  # the thread is idle some moments after its result is there
        assert len(names) <= 2

    def test_no_thread_is_made_before_there_is_a_call(self):
        before = threading.active_count()
        threads = DaemonThreads(10)
        assert threading.active_count() == before
        threads.shutdown()

    def test_the_threads_do_not_hold_the_process_at_its_exit(self):
        with pool(1) as threads:
            assert threads.submit(lambda: threading.current_thread().daemon).result(5)

    def test_a_thousand_quick_calls_are_all_answered(self):
        with pool(4) as threads:
            assert results([threads.submit(pow, n, 2) for n in range(1_000)]) == [n * n for n in range(1_000)]

    def test_calls_from_many_threads_are_all_answered(self):
        def flood(threads: DaemonThreads, answers: list[int]) -> None:
            answers += results([threads.submit(pow, n, 1) for n in range(250)])

        answers: list[list[int]] = [[] for _ in range(4)]
        with pool(4) as threads:
            callers = [threading.Thread(target=flood, args=(threads, mine)) for mine in answers]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join(20)
        assert answers == [list(range(250))] * 4

    def test_a_backlog_does_not_keep_later_calls_from_running_at_once(self):
        with pool(5) as threads:
            results([threads.submit(time.sleep, 0.001) for _ in range(50)])
            meet = Rendezvous(5)
            assert len(set(results([threads.submit(meet) for _ in range(5)]))) == 5

    @pytest.mark.parametrize("error", [OSError("down"), SystemExit(3), KeyboardInterrupt()])
    def test_whatever_a_call_raises_is_raised_where_it_is_awaited(self, error: BaseException):
        def call() -> None:
            raise error

        with pool(1) as threads:
            with pytest.raises(type(error)) as raised:
                threads.submit(call).result(5)
            assert raised.value is error
            assert threads.submit(str, "still there").result(5) == "still there"

    def test_a_cancelled_call_is_not_made(self, blocker: Blocker):
        made: list[str] = []
        with pool(1) as threads:
            first = threads.submit(blocker.hold)
            cancelled = threads.submit(made.append, "cancelled")
            last = threads.submit(made.append, "last")
            assert cancelled.cancel()
            blocker.release()
            results([first, last])
        assert made == ["last"]

    async def test_a_call_that_hangs_and_was_left_takes_no_thread_from_the_others(self, blocker: Blocker):
        with pool(1) as threads:
            loop = asyncio.get_running_loop()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(loop.run_in_executor(threads, blocker.hold), 0.1)
            assert await asyncio.wait_for(loop.run_in_executor(threads, str, 1), 5) == "1"

    async def test_nor_does_it_after_a_backlog(self):
        def flood(threads: DaemonThreads) -> None:
            for _ in range(20):
                results([threads.submit(pow, n, 2) for n in range(10)])

        with pool(3) as threads:
            await asyncio.gather(*(asyncio.to_thread(flood, threads) for _ in range(4)))
            blockers = [Blocker() for _ in range(3)]
            for hanging in blockers:
                call = threads.submit(hanging.hold)
                assert await asyncio.to_thread(hanging.entered.wait, 5)
                call.cancel()
            meet = Rendezvous(3)
            assert len(set(results([threads.submit(meet) for _ in range(3)]))) == 3
            for hanging in blockers:
                hanging.release()

    async def test_calls_that_wait_for_a_thread_get_one_when_those_before_them_are_left(self, blocker: Blocker):
        with pool(1) as threads:
            loop = asyncio.get_running_loop()
            hangs = loop.run_in_executor(threads, blocker.hold)
            blocker.entered.wait(5)
            waits = loop.run_in_executor(threads, str, 1)
            hangs.cancel()
            assert await asyncio.wait_for(waits, 5) == "1"

    async def test_there_are_no_more_threads_than_before_once_calls_that_were_left_have_ended(self):
        with pool(1) as threads:
            loop = asyncio.get_running_loop()
            blockers, used = [Blocker() for _ in range(3)], []

            def hold(blocker: Blocker) -> None:
                used.append(threading.current_thread())
                blocker.hold()

            for blocker in blockers:
                call = loop.run_in_executor(threads, hold, blocker)
                await asyncio.to_thread(blocker.entered.wait, 5)
                call.cancel()
            assert len(set(used)) == 3
            for blocker in blockers:
                blocker.release()
            await wait_until(lambda: sum(thread.is_alive() for thread in used) <= 1)
            assert await asyncio.wait_for(loop.run_in_executor(threads, str, 1), 5) == "1"

    def test_arguments_are_passed_on(self):
        with pool(1) as threads:
            assert threads.submit(sorted, [1, 3, 2], reverse=True).result(5) == [3, 2, 1]

    async def test_it_serves_an_event_loop(self):
        with pool(2) as threads:
            running = asyncio.get_running_loop()
            assert await running.run_in_executor(threads, sum, [1, 2, 3]) == 6

    async def test_its_threads_end_at_shutdown(self):
        threads = DaemonThreads(3)
        meet = Rendezvous(3)
        workers = [threads.submit(lambda: (meet(), threading.current_thread())[1]) for _ in range(3)]
        threads.shutdown()
        await wait_until(lambda: not any(thread.is_alive() for thread in results(workers)))

    def test_shutdown_does_not_wait(self, blocker: Blocker):
        threads = DaemonThreads(1)
        held = threads.submit(blocker.hold)
        blocker.entered.wait(5)
        threads.shutdown(wait=True)
        assert not held.done()

    def test_after_shutdown_no_call_is_made(self):
        """By code of an attempt that was given up, say, and that had been blocked until then."""
        threads = DaemonThreads(1)
        threads.shutdown()
        with pytest.raises(RuntimeError, match="has stopped"):
            threads.submit(sum, [1, 2, 3])


class Attempt:
    """What owns the tasks of some code, as an attempt does."""

    def __init__(self) -> None:
        self.unwinding = False
        self.tasks: list[asyncio.Task[Any]] = []

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self.tasks.append(task)

    def cancel(self) -> None:
        """Cancel the first of them, as a body is cancelled."""
        self.tasks[0].cancel()

    def unwind(self) -> None:
        self.unwinding = True
        for task in self.tasks:
            task.cancel()


def prepared_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    prepare(loop)
    return loop


def run_in(attempt: Attempt, code: Callable[[], Coroutine[Any, Any, Any]], *then: Callable[[], object]) -> Any:
    """Run code as an attempt's; once it waits, do ``then``. Returns what it returned, or the error that it raised."""

    async def run() -> Any:
        context = contextvars.copy_context()
        context.run(scope.set, attempt)
        task = asyncio.get_running_loop().create_task(code(), context=context)
        for act in then:
            for _ in range(5):
                await asyncio.sleep(0)
            act()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        return outcome

    with asyncio.Runner(loop_factory=prepared_loop) as runner:
        return runner.run(run())


class Told:
    """What was raised where code waits."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    async def wait(self) -> None:
        try:
            await asyncio.sleep(100)
        except BaseException as error:
            self.errors.append(type(error).__name__)
            raise

    async def gathered(self) -> None:
        await asyncio.gather(self.wait(), self.wait())

    async def grouped(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.wait())
            group.create_task(self.wait())

    async def in_a_timeout(self) -> None:
        async with asyncio.timeout(50):
            await self.wait()

    async def in_wait_for(self) -> None:
        await asyncio.wait_for(self.wait(), 50)

    async def shielded(self) -> None:
        await asyncio.shield(self.wait())


shapes = pytest.mark.parametrize("shape", ["wait", "gathered", "grouped", "in_a_timeout", "in_wait_for", "shielded"])


class TestUnwinding:
    @shapes
    def test_code_that_is_unwound_is_not_told_of_a_cancellation(self, shape: str):
        attempt, told = Attempt(), Told()
        run_in(attempt, getattr(told, shape), attempt.unwind)
        assert set(told.errors) == {"Unwind"}

    @pytest.mark.parametrize("shape", ["wait", "gathered", "grouped", "in_a_timeout", "in_wait_for"])
    def test_code_that_is_cancelled_is_told_so(self, shape: str):
        attempt, told = Attempt(), Told()
        outcome = run_in(attempt, getattr(told, shape), attempt.cancel)
        assert isinstance(outcome, asyncio.CancelledError)
        assert set(told.errors) == {"CancelledError"}

    def test_a_child_that_is_cancelled_by_its_parent_is_told_so(self):
        attempt, told = Attempt(), Told()

        async def code() -> str:
            child = asyncio.create_task(told.wait())
            await asyncio.sleep(0)
            child.cancel()
            try:
                await child
            except asyncio.CancelledError:
                return "cancelled"
            return "not cancelled"

        assert run_in(attempt, code) == "cancelled"
        assert told.errors == ["CancelledError"]

    def test_unwinding_runs_finally_blocks_and_context_managers(self):
        attempt, left = Attempt(), []

        @contextlib.asynccontextmanager
        async def client() -> Any:
            try:
                yield
            finally:
                left.append("client")

        async def code() -> None:
            try:
                async with client():
                    await asyncio.sleep(100)
            finally:
                left.append("body")

        run_in(attempt, code, attempt.unwind)
        assert left == ["client", "body"]

    def test_unwinding_is_no_exception_that_a_body_would_handle(self):
        attempt, handled = Attempt(), []

        async def code() -> None:
            try:
                await asyncio.sleep(100)
            except Exception as error:
                handled.append(error)

        assert isinstance(run_in(attempt, code, attempt.unwind), Unwind)
        assert handled == []

    def test_every_task_that_an_attempts_code_makes_belongs_to_it(self):
        attempt = Attempt()

        async def leaf() -> None:
            await asyncio.sleep(0)

        async def branch() -> None:
            await asyncio.gather(leaf(), leaf())

        async def code() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(branch())
                group.create_task(branch())

        run_in(attempt, code)
        assert len(attempt.tasks) == 1 + 2 + 4

    def test_tasks_of_other_code_do_not(self):
        async def code() -> bool:
            return asyncio.current_task() in attempt.tasks

        attempt = Attempt()
        with asyncio.Runner(loop_factory=prepared_loop) as runner:
            assert runner.run(code()) is False
        assert attempt.tasks == []

    def test_two_attempts_on_one_loop_are_unwound_apart(self):
        first, second, told = Attempt(), Attempt(), Told()

        async def code() -> list[Any]:
            tasks = []
            for attempt in (first, second):
                context = contextvars.copy_context()
                context.run(scope.set, attempt)
                tasks.append(asyncio.get_running_loop().create_task(told.gathered(), context=context))
            await asyncio.sleep(0.01)
            first.unwind()
            second.tasks[0].cancel()
            return [type(outcome) for outcome in await asyncio.gather(*tasks, return_exceptions=True)]

        with asyncio.Runner(loop_factory=prepared_loop) as runner:
            assert runner.run(code()) == [Unwind, asyncio.CancelledError]
        assert sorted(told.errors) == ["CancelledError", "CancelledError", "Unwind", "Unwind"]

    def test_asyncios_timeouts_still_work(self):
        async def code() -> str:
            try:
                async with asyncio.timeout(0.01):
                    await asyncio.gather(asyncio.sleep(100), asyncio.sleep(100))
            except TimeoutError:
                return "timed out"
            return "done"

        assert run_in(Attempt(), code) == "timed out"

    def test_children_see_the_context_variables_of_their_parents(self):
        async def read() -> str:
            return tenant.get()

        async def code() -> list[str]:
            tenant.set("acme")
            return list(await asyncio.gather(read(), read()))

        assert run_in(Attempt(), code) == ["acme", "acme"]

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
    @pytest.mark.parametrize("handling_another", [True, False])
    def test_a_child_that_would_end_the_process_fails_with_an_error(self, error: BaseException, handling_another: bool):
        async def leave() -> None:
            if handling_another:
                down = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_soon(down.set_exception, OSError("down"))
                with contextlib.suppress(OSError):
                    await down
            raise error

        async def code() -> str:
            try:
                await asyncio.gather(leave())
            except RuntimeError as refused:
                return str(refused)
            return "left"

        refused = f"The task's code raised {type(error).__name__}; it cannot end the worker."
        assert run_in(Attempt(), code) == refused

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
    def test_so_does_a_child_of_a_call_and_the_call_with_it(self, error: BaseException):
        async def leave() -> None:
            raise error

        async def call() -> str:
            await asyncio.gather(leave(), asyncio.sleep(100))
            return "left"

        @async_task(retry_policy=RetryPolicy(max_retries=0))
        async def task() -> str:
            return await step("call", call)

        with pytest.raises(StepFailedError, match=f"raised {type(error).__name__}; it cannot end the worker"):
            TaskRun(task).execute()

    def test_a_task_shows_the_users_function(self):
        shown: list[str] = []

        async def charge() -> None:
            shown.append(repr(asyncio.current_task()))

        async def code() -> None:
            await asyncio.gather(charge())

        run_in(Attempt(), code)
        assert "charge" in shown[0]


class TestQuietEnds:
    @pytest.mark.parametrize("how", ["gather", "group"])
    def test_an_attempt_that_ends_early_leaves_no_error_in_the_log(self, how: str, caplog: pytest.LogCaptureFixture):
        async def one() -> int:
            return 1

        @async_task(retry_policy=RetryPolicy(initial_delay=60, max_delay=60))
        async def task() -> None:
            if how == "gather":
                await asyncio.gather(*(step(key, one) for key in "abc"))
            else:
                async with asyncio.TaskGroup() as group:
                    for key in "abc":
                        group.create_task(step(key, one))

        run = TaskRun(task)
        run.on("a").raises(OSError("down"))
        run.on("b").raises(OSError("down"))
        run.on("c").takes(5)
        run.interrupt(at=2)
        run.execute()
        assert [record.getMessage() for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []

    def test_an_error_that_nobody_awaits_is_still_logged(self, caplog: pytest.LogCaptureFixture):
        async def fails() -> None:
            raise OSError("nobody looks at this")

        async def code() -> None:
            task = asyncio.create_task(fails())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            del task

        run_in(Attempt(), code)
        gc.collect()
        assert "nobody looks at this" in caplog.text
