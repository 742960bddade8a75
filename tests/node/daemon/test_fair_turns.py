"""Turns of the daemon's thread: who comes first, and how long one client can keep it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from kvkern.node.daemon import fair_turns
from kvkern.node.daemon.fair_turns import TURN_S, FairTurns

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
        self.turns_end_s, self.queued, self.left = loop.turns.begin(pid), False, 0

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
    honest.ask()
    while "honest" not in loop.done:  # its first turn is behind those who wait already
        loop.once()
    assert loop.done.index("honest") < 31 * (TURN_S / REQUEST_S + 1) + 50 * 3 + 30 * 3
    for _ in range(100):
        loop.once()
    for _ in range(100):  # it asks for less than a thirtieth of the thread
        before = len(loop.done)
        honest.ask()
        while "honest" not in loop.done[before:]:
            loop.once()
        assert len(loop.done) - before <= TURN_S / REQUEST_S + 2
        for _ in range(20):
            loop.once()


def test_a_steady_client_comes_before_thirty_new_floods(loop: Loop) -> None:
    """What it has used before, while the thread was free, does not count against it."""
    honest = Client(loop, "honest")
    for _ in range(1000):
        honest.ask()
        loop.now_s += 0.02
    for _ in range(30):
        Client(loop, "flood").ask(1000)
    loop.done.clear()
    honest.ask()
    loop.run()
    assert loop.done.index("honest") <= TURN_S / REQUEST_S + 1


def test_who_always_asks_does_not_starve(loop: Loop) -> None:
    """Those who come again and again have their turn and no more."""
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
    calm.ask()
    for _ in range(200):
        for client in busy:  # each sends its next request when it has been answered
            if not client.left:
                client.ask()
        loop.once()
    before = len(loop.done)
    calm.ask()
    while "calm" not in loop.done[before:]:
        loop.once()
    assert len(loop.done) - before <= TURN_S / REQUEST_S + 2


def test_who_hangs_up_and_comes_again_does_not_begin_anew(loop: Loop) -> None:
    flood = Client(loop, "flood", pid=7)
    flood.ask(1000)
    loop.run()
    loop.turns.end(7, flood.turns_end_s)
    stays = Client(loop, "stays", pid=9)
    stays.ask(1000)
    loop.once()
    again, other = Client(loop, "again", pid=7), Client(loop, "other", pid=8)
    loop.turns.end(7, again.turns_end_s + 50 * TURN_S)
    again = Client(loop, "again", pid=7)
    assert again.turns_end_s >= other.turns_end_s + 45 * TURN_S
    for client in (again, other):
        client.ask(20)
    loop.run()
    assert loop.done.index("other") < loop.done.index("again")


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
