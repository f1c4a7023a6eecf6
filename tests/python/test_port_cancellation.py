"""Interrupting a user's function, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest

from tinker_custom_loss import CancelledError
from tinker_custom_loss.port.cancellation import (
    InlineTurn,
    Interrupted,
    Request,
    current_request,
    interruptible,
)


@pytest.fixture
def request_in_flight():
    request = Request(1)
    token = current_request.set(request)
    yield request
    current_request.reset(token)


def test_a_function_keeps_its_name_its_arguments_and_its_result(request_in_flight):
    @interruptible
    def term(data, logprobs, *, scale):
        """What it does."""
        return data, logprobs, scale

    assert term([1], [2], scale=3) == ([1], [2], 3)
    assert (term.__name__, term.__doc__) == ("term", "What it does.")


def test_a_function_is_not_entered_once_its_request_is_cancelled(request_in_flight):
    request_in_flight.cancel()
    with pytest.raises(CancelledError):
        interruptible(pytest.fail)("entered")


def test_a_function_that_loops_is_interrupted(request_in_flight):
    looping = threading.Event()
    threading.Thread(target=lambda: (looping.wait(), request_in_flight.cancel())).start()

    def loops():
        looping.set()
        while True:
            pass

    with pytest.raises(Interrupted):
        interruptible(loops)()


def test_without_a_request_there_is_nothing_to_interrupt():
    assert interruptible(lambda: 7)() == 7


def test_an_interruption_never_leaves_the_function(request_in_flight):
    """Cancelled at any moment, a thread is interrupted inside the function or not at all."""
    requests: list[Request] = []
    done = threading.Event()

    def cancel_the_latest():
        while not done.is_set():
            with contextlib.suppress(IndexError):
                requests.pop().cancel()

    canceller = threading.Thread(target=cancel_the_latest)
    canceller.start()
    interrupted = 0
    try:
        for number in itertools.count():
            if number >= 5000 and (interrupted or number >= 1_000_000):
                break  # on a busy machine the canceller may be late for all of the first
            request = Request(number)
            current_request.set(request)
            requests.append(request)
            for _ in range(20):  # outside: an interruption here fails the test
                pass
            try:
                interruptible(sum)(range(50))
            except (Interrupted, CancelledError):
                interrupted += 1
            for _ in range(20):
                pass
    finally:
        done.set()
        canceller.join()
    assert interrupted > 0


def test_who_waits_for_a_turn_stops_when_cancelled(request_in_flight):
    turn = InlineTurn()
    with turn:
        threading.Timer(0.05, request_in_flight.cancel).start()
        with pytest.raises(CancelledError), turn:
            pytest.fail("two had the turn")
    with turn:
        pass
