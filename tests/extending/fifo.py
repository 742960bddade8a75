"""First in, first out: the oldest chunk goes, whether it is used or not. The textbook baseline, and the example of a policy.

    insert (a, b, c in prefix order):  append c, then b, then a
    victims(n):                        take from the front; a pinned chunk that stands there goes to the back

The tail of a sequence goes before its head. A chunk keeps its place while it is pinned.
"""

from __future__ import annotations

from collections import OrderedDict

from .base import Keys, Use


class Fifo:
    """`EvictionPolicy` in one ordered dict. Learns nothing from requests."""

    def __init__(self, capacity: int) -> None:
        self._pinned: OrderedDict[bytes, bool] = (
            OrderedDict()
        )  # every resident chunk, oldest first -> whether it is pinned
        self._num_pinned = 0

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy."""

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        self._pinned.update(dict.fromkeys(reversed(keys), False))

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._pinned.update(dict.fromkeys(keys, True))
        self._num_pinned += len(keys)

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._num_pinned -= sum(self._pinned.get(key, False) for key in keys)
        self._pinned.update(dict.fromkeys(reversed(keys), False))

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._num_pinned -= sum(self._pinned.pop(key, False) for key in keys)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        chosen: list[bytes] = []
        while len(chosen) < count and len(self._pinned) > self._num_pinned:
            key, pinned = self._pinned.popitem(last=False)
            if pinned:
                self._pinned[key] = True
            else:
                chosen.append(key)
        return chosen
