"""The breaker alone, on a clock that the test moves."""

from __future__ import annotations

import pytest

from kvkern.remote.circuit_breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, CircuitBreaker
from tests.remote.conftest import Clock


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("r", clock, lambda: 1.0)  # always draws the longest pause


def pause_s(breaker: CircuitBreaker, clock: Clock) -> float:
    """Return the seconds until the breaker allows a call."""
    began = clock.now
    while not breaker.allows_call():
        clock.now += 0.01
        assert clock.now - began < 2 * LONGEST_PAUSE_S
    return clock.now - began


def test_failures_in_a_row_open_it(breaker: CircuitBreaker) -> None:
    for _ in range(FAILURES - 1):
        assert breaker.begin_call()
        breaker.failed("x")
    breaker.succeeded()
    for _ in range(FAILURES):
        assert not breaker.is_open
        assert breaker.begin_call()
        breaker.failed("x")
    assert breaker.is_open
    assert not breaker.begin_call()


def test_one_call_tries_and_the_pause_doubles_up_to_a_limit(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.trip("x")
    expected = FIRST_PAUSE_S
    for _ in range(10):
        assert pause_s(breaker, clock) == pytest.approx(expected, abs=0.02)
        assert breaker.begin_call()
        assert not breaker.begin_call()
        breaker.failed("x")
        expected = min(2 * expected, LONGEST_PAUSE_S)
    pause_s(breaker, clock)
    assert breaker.begin_call()
    breaker.succeeded()
    assert not breaker.is_open
    breaker.trip("x")
    assert pause_s(breaker, clock) == pytest.approx(FIRST_PAUSE_S, abs=0.02)


def test_calls_that_were_under_way_do_not_lengthen_the_pause(breaker: CircuitBreaker, clock: Clock) -> None:
    """When a store hangs, all calls that wait for it fail at once."""
    assert all(breaker.begin_call() for _ in range(200))
    for _ in range(200):
        breaker.failed("no answer")
    assert pause_s(breaker, clock) == pytest.approx(FIRST_PAUSE_S, abs=0.02)


def test_answers_in_part_end_no_row_and_begin_none(breaker: CircuitBreaker) -> None:
    for _ in range(FAILURES - 1):
        assert breaker.begin_call()
        breaker.failed("x")
        for _ in range(FAILURES):
            assert breaker.begin_call()
            breaker.partly_answered()
        assert not breaker.is_open
    breaker.failed("x")
    assert breaker.is_open
    breaker.partly_answered()  # it began before the breaker opened
    assert breaker.is_open


def test_an_answer_in_part_to_the_one_that_tries(breaker: CircuitBreaker, clock: Clock) -> None:
    """The store is asked again, but one more failure opens the breaker."""
    breaker.trip("x")
    pause_s(breaker, clock)
    assert breaker.begin_call()
    breaker.partly_answered()
    assert not breaker.is_open
    assert breaker.begin_call()
    breaker.failed("x")
    assert breaker.is_open
    assert pause_s(breaker, clock) == pytest.approx(2 * FIRST_PAUSE_S, abs=0.02)
    assert breaker.begin_call()
    breaker.succeeded()
    for _ in range(FAILURES - 1):
        breaker.failed("x")
    assert not breaker.is_open


def test_a_late_failure_lets_nobody_else_try_at_once(breaker: CircuitBreaker, clock: Clock) -> None:
    assert all(breaker.begin_call() for _ in range(FAILURES + 1))
    for _ in range(FAILURES):
        breaker.failed("x")
    pause_s(breaker, clock)
    assert breaker.begin_call()
    breaker.failed("begun long ago")
    assert not breaker.allows_call()
    breaker.succeeded()  # and the trial call works
    assert not breaker.is_open
