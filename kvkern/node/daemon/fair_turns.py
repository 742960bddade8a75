"""Divides the daemon's only thread among its clients, so that none waits long for another. Knows no messages and no sockets.

    turn       a client's requests are carried out for TURN_S, at least one of them; then other clients come first
    tag        start of a turn = max(greatest start so far - CREDIT_S, end of the client's last turn)
               end of a turn = its start + the seconds it took
    order      of the clients that wait, the one with the smallest start (start-time fair queueing, with a credit for
               clients that were calm)
    no queue   while little is going on, a client's turn is at once and costs no pass of the event loop

Between two turns the event loop looks at all sockets and signals. So a client that asks for less than its share of the
thread waits for one turn of a client that asks for more, whatever the number of such clients.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol

from ...bounded_dict import BoundedDict

TURN_S = 0.00025
CREDIT_S = 4 * TURN_S  # who was calm comes before all others for so long: an engine's step takes less
WINDOW_S = 0.001  # in such a time
AT_ONCE_S = 0.0005  # so much is done at once; whoever asks for more waits for a turn
MAX_REMEMBERED = 1024  # processes whose connections have ended


class Worker(Protocol):
    """A client that has something to do."""

    turns_end_s: float  # end tag of its last turn, from `FairTurns.begin`; only this module changes it
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
        self._queue: list[tuple[float, int, Worker]] = []  # a heap of (start tag, serial number, client)
        self._serial = itertools.count()
        self._scheduled = False
        self._start_s = 0.0  # the greatest start tag so far
        self._window_began_s = self._done_at_once_s = 0.0
        # pid -> end tag of its connections that have ended: who hangs up and connects again does not begin anew
        self._ended: BoundedDict[int, float] = BoundedDict(MAX_REMEMBERED)

    def begin(self, pid: int) -> float:
        """Return the first end tag of a new connection of this process: a turn behind those who are there already."""
        return max(self._start_s + TURN_S, self._ended.get(pid, 0.0))

    def end(self, pid: int, turns_end_s: float) -> None:
        """A connection has ended."""
        self._ended.put(pid, max(turns_end_s, self._ended.get(pid, 0.0)))

    def charge(self, worker: Worker, seconds: float) -> None:
        """Count time that the thread spent on a client outside its turns, for example to let it in or to end its session."""
        worker.turns_end_s = max(self._start_s - CREDIT_S, worker.turns_end_s) + seconds

    def ask(self, worker: Worker) -> None:
        """Give the client a turn, now or soon. Call it when the client has something to do."""
        if worker.queued:
            return
        now_s, start_s = time.perf_counter(), max(self._start_s - CREDIT_S, worker.turns_end_s)
        if now_s - self._window_began_s > WINDOW_S:
            self._window_began_s, self._done_at_once_s = now_s, 0.0
        if self._queue or self._done_at_once_s > AT_ONCE_S:
            self._enqueue(worker, start_s)
        else:
            self._done_at_once_s += self._give_turn(worker, start_s, now_s)

    def _give_turn(self, worker: Worker, start_s: float, now_s: float) -> float:
        """Return how long the turn took. If the client has more to do, it waits for the next turn."""
        more, took_s = False, 0.0
        self._start_s = max(self._start_s, start_s)
        try:
            more = worker.work(now_s + TURN_S)
        finally:
            took_s = time.perf_counter() - now_s
            worker.turns_end_s = start_s + took_s
            if not self._queue:
                self._start_s = max(self._start_s, worker.turns_end_s)  # nobody waits, so no use of the thread counts
        if more:
            self._enqueue(worker, worker.turns_end_s)
        return took_s

    def _enqueue(self, worker: Worker, start_s: float) -> None:
        worker.queued = True
        heapq.heappush(self._queue, (start_s, next(self._serial), worker))
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
            start_s, _, worker = heapq.heappop(self._queue)
            worker.queued = False
            if self._queue:
                self._schedule()  # before the turn, so that a fault in it does not stop the others
            now_s += self._give_turn(worker, start_s, now_s)
