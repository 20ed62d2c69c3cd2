"""Calls from other threads: none is lost, and few wake-ups bring them."""

import asyncio
import contextvars
import threading
from collections.abc import Callable

import pytest

from temporal_async_task.engine.mailbox import Mailbox, WokenOnceEventLoop

who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")


class Counted:
    """A mailbox of the running loop that counts how often the loop is woken."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.wakes = 0
        self.mailbox = Mailbox(self._loop, self._wake)

    def _wake(self, call: Callable[[], None]) -> None:
        self.wakes += 1
        self._loop.call_soon_threadsafe(call)


def in_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()  # blocks the event loop, on purpose


async def test_what_is_posted_while_the_loop_is_busy_comes_in_order_with_one_wake_up():
    counted, got = Counted(), []

    def post_all() -> None:
        for n in range(100):
            counted.mailbox.post(got.append, n)

    in_thread(post_all)
    await asyncio.sleep(0)
    assert got == list(range(100))
    assert counted.wakes == 1


async def test_what_is_posted_by_a_posted_call_comes_too():
    counted, got = Counted(), []
    counted.mailbox.post(lambda: counted.mailbox.post(got.append, "second"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert got == ["second"]


async def test_of_what_many_threads_post_at_once_nothing_is_lost():
    counted, got, done = Counted(), [], asyncio.Event()
    total = 4 * 5_000

    def receive(item: tuple[int, int]) -> None:
        got.append(item)
        if len(got) == total:
            done.set()

    def post_all(thread: int) -> None:
        for n in range(total // 4):
            counted.mailbox.post(receive, (thread, n))

    threads = [threading.Thread(target=post_all, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.wait_for(done.wait(), 30)
    for thread in threads:
        thread.join()
    for number in range(4):
        assert [n for thread, n in got if thread == number] == list(range(total // 4))


async def test_a_call_that_was_cancelled_is_not_made():
    counted, got = Counted(), []
    counted.mailbox.post(got.append, "cancelled").cancel()
    counted.mailbox.post(got.append, "kept")
    await asyncio.sleep(0)
    assert got == ["kept"]


async def test_a_call_that_fails_stops_no_other():
    counted, got, reported = Counted(), [], []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

    def fail() -> None:
        raise ValueError("of one call")

    try:
        counted.mailbox.post(fail)
        counted.mailbox.post(got.append, "next")
        await asyncio.sleep(0)
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert got == ["next"]
    assert [str(error) for error in reported] == ["of one call"]


async def test_a_call_has_the_context_of_who_posts_it_or_the_one_it_is_given():
    counted, got = Counted(), []
    given = contextvars.copy_context()
    given.run(who.set, "given")

    def post() -> None:
        who.set("poster")
        counted.mailbox.post(lambda: got.append(who.get()))
        counted.mailbox.post(lambda: got.append(who.get()), context=given)

    in_thread(post)
    await asyncio.sleep(0)
    assert got == ["poster", "given"]


def test_a_closed_loop_takes_nothing():
    loop = WokenOnceEventLoop()
    loop.call_soon_threadsafe(loop.stop)
    loop.run_forever()
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon_threadsafe(print)


def test_asyncio_s_own_ways_between_threads_work_on_a_loop_that_is_woken_once():
    loop = WokenOnceEventLoop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def work(n: int) -> int:
        return await loop.run_in_executor(None, lambda: n * 2)

    futures = [asyncio.run_coroutine_threadsafe(work(n), loop) for n in range(200)]
    assert [future.result(10) for future in futures] == [n * 2 for n in range(200)]
    asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
