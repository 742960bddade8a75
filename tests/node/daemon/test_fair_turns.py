"""Turns of the daemon's thread: who comes first, and how long one client can keep it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from kvkern.node.daemon import fair_turns
from kvkern.node.daemon.fair_turns import HALF_LIFE_S, TURN_S, FairTurns, Usage

REQUEST_S = 0.0001


class Loop:
    """A clock that only work advances, and an event loop without sockets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.soon: deque[Callable[[], None]] = deque()
        self.done: list[str] = []  # names of clients, one for each request
        monkeypatch.setattr(fair_turns.time, "perf_counter", lambda: self.now_s)
        self.turns = FairTurns(self.soon.append)

    def once(self) -> None:
        """One pass of the event loop."""
        for _ in range(len(self.soon)):
            self.soon.popleft()()

    def run(self) -> None:
        while self.soon:
            self.once()


class Client:
    def __init__(self, loop: Loop, name: str, cost_s: float = REQUEST_S, pid: int = 1) -> None:
        self.loop, self.name, self.cost_s, self.pid = loop, name, cost_s, pid
        self.usage, self.queued, self.left = loop.turns.begin(pid), False, 0

    def ask(self, requests: int = 1) -> None:
        self.left += requests
        self.loop.turns.ask(self)

    def work(self, until_s: float) -> bool:
        while self.left:
            self.left -= 1
            self.loop.now_s += self.cost_s
            self.loop.done.append(self.name)
            if self.loop.now_s >= until_s:
                break
        return self.left > 0


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(monkeypatch)


def test_a_client_alone_is_served_at_once(loop: Loop) -> None:
    Client(loop, "a").ask()
    assert loop.done == ["a"]
    assert not loop.soon


def test_a_turn_ends(loop: Loop) -> None:
    """And a request that takes longer than a turn ends it."""
    flood, slow = Client(loop, "flood"), Client(loop, "slow", cost_s=10 * TURN_S)
    flood.ask(10_000)
    assert 1 <= len(loop.done) <= TURN_S / REQUEST_S + 1
    slow.ask(2)
    loop.once()
    assert loop.done.count("slow") <= 1
    loop.run()
    assert (loop.done.count("slow"), loop.done.count("flood")) == (2, 10_000)


def test_a_new_client_waits_for_one_turn_of_thirty_floods(loop: Loop) -> None:
    floods = [Client(loop, "flood") for _ in range(30)]
    for flood in floods:
        flood.ask(100_000)
    for _ in range(50):
        loop.once()
    honest = Client(loop, "honest")
    for _ in range(100):  # it asks for less than a thirtieth of the thread
        before = len(loop.done)
        honest.ask()
        while "honest" not in loop.done[before:]:
            loop.once()
        assert len(loop.done) - before <= TURN_S / REQUEST_S + 2
        for _ in range(20):
            loop.once()


def test_who_always_asks_does_not_starve(loop: Loop) -> None:
    """Its usage is what counts, so those who come again and again have their turn and no more."""
    flood, others = Client(loop, "flood"), [Client(loop, "other") for _ in range(3)]
    flood.ask(1000)
    for _ in range(400):
        for other in others:
            other.ask(2)
        loop.once()
    assert loop.done.count("flood") >= 200


def test_many_who_ask_for_little_are_not_all_served_at_once(loop: Loop) -> None:
    """Thirty busy clients that each send one request at a time do not come before a client that was calm."""
    busy, calm = [Client(loop, f"busy {number}") for number in range(30)], Client(loop, "calm")
    for _ in range(20):
        for client in busy:
            client.ask()
        loop.once()
    loop.run()
    loop.done.clear()
    for client in busy:
        client.ask()
    calm.ask()
    loop.run()
    assert loop.done.index("calm") <= (fair_turns.AT_ONCE_S + TURN_S) / REQUEST_S + 2


def test_who_hangs_up_and_comes_again_does_not_begin_anew(loop: Loop) -> None:
    flood = Client(loop, "flood", pid=7)
    flood.ask(1000)
    loop.run()
    loop.turns.end(7, flood.usage)
    again, other = Client(loop, "again", pid=7), Client(loop, "other", pid=8)
    assert again.usage.at(loop.now_s) == pytest.approx(flood.usage.at(loop.now_s))
    assert other.usage.at(loop.now_s) == 0
    loop.now_s += 100 * HALF_LIFE_S
    assert Client(loop, "late", pid=7).usage.at(loop.now_s) < 1e-9


def test_usage_fades() -> None:
    usage = Usage(0.0, 5.0)
    usage.add(1.0, 5.0)
    usage.add(1.0, 5.0 + HALF_LIFE_S)
    assert usage.at(5.0 + HALF_LIFE_S) == pytest.approx(1.5)
    assert usage.at(5.0 + 2 * HALF_LIFE_S) == pytest.approx(0.75)
    assert usage.at(5e6) == 0


def test_a_fault_in_a_turn_does_not_stop_the_others(loop: Loop) -> None:
    class Broken(Client):
        def work(self, until_s: float) -> bool:
            raise ZeroDivisionError

    flood, broken, other = Client(loop, "flood"), Broken(loop, "broken"), Client(loop, "other")
    flood.ask(5)
    broken.ask()
    other.ask()
    with pytest.raises(ZeroDivisionError):
        loop.run()
    loop.run()
    assert sorted(loop.done) == ["flood"] * 5 + ["other"]
