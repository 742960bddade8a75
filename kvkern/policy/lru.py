"""Least recently used, tail first.

    order: evictable chunks, oldest first
    access, insert, unpin (a, b, c in prefix order):  move c, then b, then a to the newest end
    insert of what was accessed last:                 then the whole sequence again, so its new tail is its oldest part
    victims(n):                                       take from the oldest end

A whole sequence is used at once, its tail first, so an ancestor is always newer than its descendants and leaves last.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import islice

from .base import Keys, Use


class LRU:
    """`EvictionPolicy` in one ordered dict; every operation is O(1) a chunk. Learns nothing from requests."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()
        self._latest: tuple[bytes, ...] = ()  # what was accessed last

    def __len__(self) -> int:
        return len(self._order)

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        if chain:
            self._latest = tuple(chain)
            self._renew()

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        self.unpin(keys)
        if not frozenset(keys).isdisjoint(self._latest):
            self._renew()

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        deque(map(self._order.pop, keys), maxlen=0)

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._order.update(dict.fromkeys(reversed(keys)))

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        for key in keys:
            self._order.pop(key, None)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        chosen = list(islice(self._order, max(count, 0)))
        self.remove(chosen)
        return chosen

    def _renew(self) -> None:
        """What is evictable of the sequence accessed last becomes the newest, its first chunk the very newest."""
        order = self._order
        deque(map(order.move_to_end, filter(order.__contains__, reversed(self._latest))), maxlen=0)
