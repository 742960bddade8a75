"""Least recently used, tail first.

    order: evictable chunks, oldest first
    access, insert, unpin (a, b, c in prefix order):  move c, then b, then a to the newest end
    insert of chunks of the last accessed sequence:   then move that whole sequence again: its new tail is its oldest part
    victims(n):                                       take from the oldest end

A whole sequence is used at once, its tail first. So an ancestor is always newer than its descendants and is evicted last.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import islice

from .base import Keys, Use


class LRU:
    """An `EvictionPolicy` in one ordered dict. Every operation is O(1) a chunk. It learns nothing from requests."""

    def __init__(self, capacity: int = 0) -> None:  # the capacity is not needed: the tier says how many have to go
        self._order: OrderedDict[bytes, None] = OrderedDict()
        self._last_chain: tuple[bytes, ...] = ()  # the sequence accessed last

    def __len__(self) -> int:
        return len(self._order)

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        if chain:
            self._last_chain = tuple(chain)
            self._renew_last_chain()

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        self.unpin(keys)
        if not frozenset(keys).isdisjoint(self._last_chain):
            self._renew_last_chain()

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

    def _renew_last_chain(self) -> None:
        """Move the evictable chunks of the sequence accessed last to the newest end, its first chunk to the very end."""
        order = self._order
        deque(map(order.move_to_end, filter(order.__contains__, reversed(self._last_chain))), maxlen=0)
