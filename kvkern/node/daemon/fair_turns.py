"""Divides the daemon's only thread among its clients, so that none waits long for another. Knows no messages and no sockets.

    turn       a client's requests are carried out for TURN_S, at least one of them; then other clients come first
    order      of the clients that wait, the one that has used the thread least of late
    no queue   while little is going on, a client's turn is at once and costs no pass of the event loop

Between two turns the event loop looks at all sockets and signals. So a client that asks for little waits for one turn of a
client that asks for much, whatever the number of such clients.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from typing import Protocol

from ...bounded_dict import BoundedDict

TURN_S = 0.00025
HALF_LIFE_S = 1.0  # what was used so long ago counts half
WINDOW_S = 0.001  # in such a time
MAX_REMEMBERED = 1024  # processes whose connections have ended
AT_ONCE_S = 0.0005  # so much is done at once; whoever asks for more waits for a turn


class Usage:
    """Seconds of the thread, of which the recent ones count most."""

    __slots__ = ("_at_s", "_seconds")

    def __init__(self, seconds: float = 0.0, now_s: float = 0.0) -> None:
        self._seconds, self._at_s = seconds, now_s

    def at(self, now_s: float) -> float:
        """Return what is left of the usage at this time."""
        return self._seconds * math.exp2((self._at_s - now_s) / HALF_LIFE_S)

    def add(self, seconds: float, now_s: float) -> None:
        """Count more usage."""
        self._seconds, self._at_s = self.at(now_s) + seconds, now_s


class Worker(Protocol):
    """A client that has something to do."""

    usage: Usage
    queued: bool  # it waits for a turn; only this module changes it

    def work(self, until_s: float) -> bool:
        """Carry out at least one request, and more until this time (perf_counter). Return True if some are left."""


class FairTurns:
    """Use it from one thread."""

    def __init__(
        self,
        call_soon: Callable[[Callable[[], None]], object],  # calls a function after one look at all sockets
    ) -> None:
        self._call_soon = call_soon
        self._queue: list[tuple[float, int, Worker]] = []  # a heap of (usage, serial number, client)
        self._serial = itertools.count()
        self._scheduled = False
        self._window_began_s = self._done_at_once_s = 0.0
        # pid -> usage of its connections that have ended: who hangs up and connects again does not begin anew
        self._ended: BoundedDict[int, Usage] = BoundedDict(MAX_REMEMBERED)

    def begin(self, pid: int) -> Usage:
        """Return the usage of a new connection of this process."""
        now_s = time.perf_counter()
        before = self._ended.get(pid)
        return Usage(before.at(now_s) if before is not None else 0.0, now_s)

    def end(self, pid: int, usage: Usage) -> None:
        """A connection has ended."""
        now_s = time.perf_counter()
        before = self._ended.get(pid)
        if before is None or before.at(now_s) < usage.at(now_s):
            self._ended.put(pid, usage)

    def ask(self, worker: Worker) -> None:
        """Give the client a turn, now or soon. Call it when the client has something to do."""
        if worker.queued:
            return
        now_s = time.perf_counter()
        if now_s - self._window_began_s > WINDOW_S:
            self._window_began_s, self._done_at_once_s = now_s, 0.0
        if self._queue or self._done_at_once_s > AT_ONCE_S:
            self._enqueue(worker, now_s)
        else:
            self._done_at_once_s += self._give_turn(worker, now_s)

    def _give_turn(self, worker: Worker, now_s: float) -> float:
        """Return how long the turn took. If the client has more to do, it waits for the next turn."""
        began_s, more = now_s, False
        try:
            more = worker.work(began_s + TURN_S)
        finally:
            now_s = time.perf_counter()
            worker.usage.add(now_s - began_s, now_s)
        if more:
            self._enqueue(worker, now_s)
        return now_s - began_s

    def _enqueue(self, worker: Worker, now_s: float) -> None:
        worker.queued = True
        heapq.heappush(self._queue, (worker.usage.at(now_s), next(self._serial), worker))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self._give_turns)

    def _give_turns(self) -> None:
        """Give turns until TURN_S is over."""
        self._scheduled = False
        now_s = time.perf_counter()
        until_s = now_s + TURN_S
        while self._queue and now_s < until_s:
            worker = heapq.heappop(self._queue)[2]
            worker.queued = False
            if self._queue:
                self._schedule()  # before the turn, so that a fault in it does not stop the others
            now_s += self._give_turn(worker, now_s)
