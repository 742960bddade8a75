"""Lets HTTP requests begin one at a time, so that they never take much of the daemon's only thread from its engines.

    idle     a request begins at once
    busy     a request begins every GAP_S; remote addresses take turns, so a flood from one delays itself

It knows no costs. A request takes about a millisecond of the thread, its connection included, and 4 ms if it is made to be
costly. What would take longer has a ration of its own: see ChunkScan, the rendered text of /metrics in apps, and Overview. So
a flood takes about a tenth of the thread, and an acquire waits for one request, or one turn of a scan, at most.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Protocol

GAP_S = 0.01


class Asking(Protocol):
    """A connection that has a complete request."""

    address: str  # of the other side

    def begin(self) -> None:
        """Answer the request."""


class Pacer:
    """Use it from the event loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: OrderedDict[str, deque[Asking]] = OrderedDict()  # by address, the next one first
        self._next_s = 0.0  # when the next request may begin, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, connection: Asking) -> None:
        """Begin the connection's request, now or in its turn."""
        if not self._waiting and self._loop.time() >= self._next_s:
            self._begin(connection)
            return
        self._waiting.setdefault(connection.address, deque()).append(connection)
        self._wait()

    def forget(self, connection: Asking) -> None:
        """The connection has ended."""
        queue = self._waiting.get(connection.address)
        if queue is not None and connection in queue:
            queue.remove(connection)
            if not queue:
                del self._waiting[connection.address]

    def close(self) -> None:
        """Begin nothing more."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, connection: Asking) -> None:
        self._next_s = self._loop.time() + GAP_S
        connection.begin()

    def _wait(self) -> None:
        if self._waiting and self._timer is None:
            self._timer = self._loop.call_at(self._next_s, self._next)

    def _next(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        address, queue = self._waiting.popitem(last=False)
        connection = queue.popleft()
        if queue:
            self._waiting[address] = queue  # at the end
        self._next_s = self._loop.time() + GAP_S
        self._wait()  # before the request, so that a fault in it stops nobody
        connection.begin()
