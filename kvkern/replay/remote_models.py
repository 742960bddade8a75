"""The second tier of a two-tier replay: LRU as a store would have it, and one that knows the future. Keys only."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

NEVER = 1 << 62  # the next use of what is not used again
FOREVER_S = 1e6  # residency of a remote that has evicted nothing yet: where there is room, a write displaces nothing
_SMOOTH = 0.05  # weight of a new eviction's age


class Remote(Protocol):
    """What a two-tier replay asks of its second tier."""

    written: int  # chunks

    def __contains__(self, key: object) -> bool: ...

    def use(self, keys: Iterable[bytes], now_s: float) -> None:
        """Those it has count as used; call with tails first."""

    def write(self, keys: Iterable[bytes], now_s: float) -> None:
        """Take in what is not there yet, and evict what no longer fits; call with tails first."""


class LRURemote:
    """Least recently used, tail first."""

    def __init__(self, capacity: int) -> None:
        self.written = 0
        self._capacity = capacity
        self._used: OrderedDict[bytes, float] = OrderedDict()  # key -> time, the oldest first
        self.residency_s = FOREVER_S  # how long it keeps what nobody uses: the age at eviction, smoothed

    def __contains__(self, key: object) -> bool:
        return key in self._used

    def use(self, keys: Iterable[bytes], now_s: float) -> None:
        """See Remote."""
        for key in filter(self._used.__contains__, keys):
            self._used[key] = now_s
            self._used.move_to_end(key)

    def write(self, keys: Iterable[bytes], now_s: float) -> None:
        """See Remote."""
        for key in keys:
            if key not in self._used:
                self.written += 1
                self._used[key] = now_s
        while len(self._used) > self._capacity:
            age_s = now_s - self._used.popitem(last=False)[1]
            known = self.residency_s < FOREVER_S
            self.residency_s = self.residency_s + _SMOOTH * (age_s - self.residency_s) if known else age_s


class OracleRemote:
    """Keeps what is used soonest and refuses what would be the first to go: greedy at each write, hence no optimum."""

    def __init__(
        self,
        capacity: int,
        upcoming: dict[bytes, int],  # the caller's: when a chunk is used next, as of now
    ) -> None:
        self.written = 0
        self._capacity = capacity
        self._upcoming = upcoming
        self._held: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []  # the farthest first; entries that no longer hold stay

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def use(self, keys: Iterable[bytes], now_s: float) -> None:
        """See Remote. What is not used again leaves."""
        for key in filter(self._held.__contains__, keys):
            if self._upcoming[key] == NEVER:
                del self._held[key]
            else:
                self._hold(key)

    def write(self, keys: Iterable[bytes], now_s: float) -> None:
        """See Remote. Takes only what is used before that which it pushes out."""
        for key in keys:
            if key not in self._held and self._upcoming[key] != NEVER and self._room_for(self._upcoming[key]):
                self._hold(key)
                self.written += 1

    def _room_for(self, following: int) -> bool:
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
