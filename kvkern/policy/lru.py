"""Least recently used, tail first.

    order: evictable slots, oldest first
    insert, touch, unpin (a, b, c in prefix order):  move c, then b, then a to the newest end
    victims(n):                                      take from the oldest end

A whole sequence is touched at once, its tail first, so an ancestor is always newer than its descendants and leaves last.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from itertools import filterfalse


class LRU:
    """`EvictionPolicy` in one ordered dict; every operation is O(1) a slot."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def insert(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        self._order.update(dict.fromkeys(reversed(slots)))

    unpin = insert

    def touch(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        order = self._order
        deque(map(order.move_to_end, filter(order.__contains__, reversed(slots))), maxlen=0)

    def pin(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        deque(map(self._order.pop, slots), maxlen=0)

    def remove(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        for slot in slots:
            self._order.pop(slot, None)

    def victims(self, count: int, keep: Collection[int]) -> list[int]:
        """See EvictionPolicy. Callers touch `keep` first, so it lies at the newest end and the walk is O(count)."""
        chosen: list[int] = []
        for slot in filterfalse(keep.__contains__, self._order):
            if len(chosen) == count:
                break
            chosen.append(slot)
        self.remove(chosen)
        return chosen
