"""Models of the remote tier for a two-tier replay: one with LRU, as a store would have it, and one that knows the future.

They hold keys only.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

NEVER = 1 << 62  # next use of a chunk that is not used again
FOREVER_S = 1e6  # residency of a remote that has evicted nothing yet: it has room, so a write displaces nothing
_SMOOTH = 0.05  # weight of the newest eviction's age in `residency_s`


class RemoteModel(Protocol):
    """What a two-tier replay asks of its second tier."""

    written: int  # chunks written so far

    def __contains__(self, key: object) -> bool: ...

    def use(self, keys: Iterable[bytes], now_s: float) -> None:
        """Count the chunks that it has as used. Call with tails first."""

    def write(self, keys: Iterable[bytes], now_s: float) -> None:
        """Write the chunks that it does not have yet, and evict chunks over capacity. Call with tails first."""


class LRURemote:
    """Least recently used, tail first."""

    def __init__(self, capacity: int) -> None:
        self.written = 0
        self._capacity = capacity
        self._used: OrderedDict[bytes, float] = OrderedDict()  # key -> time of the last use, the oldest first
        self.residency_s = FOREVER_S  # how long it keeps a chunk that is not used: the age at eviction, smoothed

    def __contains__(self, key: object) -> bool:
        return key in self._used

    def use(self, keys: Iterable[bytes], now_s: float) -> None:
        """See RemoteModel."""
        for key in filter(self._used.__contains__, keys):
            self._used[key] = now_s
            self._used.move_to_end(key)

    def write(self, keys: Iterable[bytes], now_s: float) -> None:
        """See RemoteModel."""
        for key in keys:
            if key not in self._used:
                self.written += 1
                self._used[key] = now_s
        while len(self._used) > self._capacity:
            age_s = now_s - self._used.popitem(last=False)[1]
            known = self.residency_s < FOREVER_S
            self.residency_s = self.residency_s + _SMOOTH * (age_s - self.residency_s) if known else age_s


class OracleRemote:
    """Keeps the chunks that are used soonest and refuses a chunk that would be evicted first.

    It is greedy at each write, so it is not an optimum.
    """

    def __init__(
        self,
        capacity: int,
        upcoming: dict[bytes, int],  # key -> position of its next use; the caller keeps it up to date
    ) -> None:
        self.written = 0
        self._capacity = capacity
        self._upcoming = upcoming
        self._held: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []  # the farthest next use first; it may hold stale entries

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def use(self, keys: Iterable[bytes], now_s: float) -> None:
        """See RemoteModel. Drops chunks that are not used again."""
        for key in filter(self._held.__contains__, keys):
            if self._upcoming[key] == NEVER:
                del self._held[key]
            else:
                self._hold(key)

    def write(self, keys: Iterable[bytes], now_s: float) -> None:
        """See RemoteModel. Takes a chunk only if it is used before the chunk that it displaces."""
        for key in keys:
            if key not in self._held and self._upcoming[key] != NEVER and self._make_room_for(self._upcoming[key]):
                self._hold(key)
                self.written += 1

    def _make_room_for(self, following: int) -> bool:
        """Make room for a chunk with that next use. Returns False if every cached chunk is used sooner."""
        if len(self._held) < self._capacity:
            return True
        while self._held.get(self._heap[0][1]) != -self._heap[0][0]:
            heapq.heappop(self._heap)
        if -self._heap[0][0] <= following:
            return False
        del self._held[heapq.heappop(self._heap)[1]]
        return True

    def _hold(self, key: bytes) -> None:
        self._held[key] = self._upcoming[key]
        heapq.heappush(self._heap, (-self._upcoming[key], key))
