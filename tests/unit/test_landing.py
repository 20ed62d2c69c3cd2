"""The way of a call's result into the journal, and who gives up first."""

from concurrent.futures import Future

from temporal_async_task.engine.landing import Landing


def landed() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def test_there_is_nothing_before_the_call_has_ended():
    assert Landing().landed is None


def test_a_result_that_comes_in_time_is_on_its_way():
    landing, future = Landing(), landed()
    landing.begin(lambda: future)
    assert landing.landed is future


def test_whoever_leaves_after_the_result_is_told_of_it():
    landing, future = Landing(), landed()
    landing.begin(lambda: future)
    assert landing.leave() is future


def test_a_result_that_comes_after_its_step_has_left_is_dropped():
    landing, begun = Landing(), []
    assert landing.leave() is None
    landing.begin(lambda: begun.append("begun") or landed())
    assert not begun
    assert landing.landed is None
