"""Shares of an arena: every namespace has an eviction order of its own, and who holds most gives way first.

    order of a share: any EvictionPolicy
    victims(n):       from the largest share until another is as large, then from both by turns, and so on

    heap:             (-size, tick, share), the smallest first: of equal shares the one whose size changed longest ago.
                      A size that changes leaves a stale entry, dropped when it is met or when half of all are stale

A tenant that scans through new prompts evicts its own chunks once it holds more than anybody else; a small one keeps
what it has. Caps are the tier's to enforce, with `victims_of`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

from .base import EvictionPolicy

_Entry = tuple[int, int, Hashable]
_FEW = 64  # stale entries that are not worth a sweep


class Shares:
    """`EvictionPolicy` over one policy a share. O(1) a slot, and O(log shares) a share that a call changes or exhausts."""

    def __init__(
        self,
        make: Callable[[], EvictionPolicy],
        share_of: Callable[[int], Hashable],  # asked once for a slot, when it is inserted
    ) -> None:
        self._make, self._share_of = make, share_of
        self._shares: dict[int, Hashable] = {}  # slot -> share, of every slot inserted and not gone
        self._policies: dict[Hashable, EvictionPolicy] = {}
        self._sizes: Counter[Hashable] = Counter()
        self._heap: list[_Entry] = []
        self._ticks: dict[Hashable, int] = {}  # of every share's entry in the heap that is not stale
        self._tick = 0

    def size(self, share: Hashable) -> int:
        """Slots of a share, pinned ones too."""
        return self._sizes[share]

    def insert(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        for slot in slots:
            self._shares[slot] = self._share_of(slot)
        for share, mine in self._by_share(slots):
            if share not in self._policies:
                self._policies[share] = self._make()
            self._policies[share].insert(mine)
            self._grow(share, len(mine))

    def touch(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        for share, mine in self._by_share(slots):
            self._policies[share].touch(mine)

    def pin(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        for share, mine in self._by_share(slots):
            self._policies[share].pin(mine)

    def unpin(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        for share, mine in self._by_share(slots):
            self._policies[share].unpin(mine)

    def remove(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        for share, mine in self._by_share(slots):
            self._policies[share].remove(mine)
            self._forget(share, mine)

    def victims(self, count: int, keep: Collection[int]) -> list[int]:
        """See EvictionPolicy."""
        chosen: list[int] = []
        exhausted: list[_Entry] = []
        while len(chosen) < count and (largest := self._largest()) is not None:
            heapq.heappop(self._heap)
            size, _, share = largest
            second = self._largest()
            step = max(1, second[0] - size) if second is not None else -size
            found = self.victims_of(share, min(step, count - len(chosen)), keep)
            if not found:
                exhausted.append(largest)
            chosen += found
        for entry in exhausted:
            heapq.heappush(self._heap, entry)
        return chosen

    def victims_of(self, share: Hashable, count: int, keep: Collection[int]) -> list[int]:
        """Up to `count` slots of one share to evict, none of `keep`, and forget them."""
        policy = self._policies.get(share)
        found = policy.victims(count, keep) if policy is not None and count > 0 else []
        if found:
            self._forget(share, found)
        return found

    def _by_share(self, slots: Sequence[int]) -> Iterator[tuple[Hashable, list[int]]]:
        """Slots that are known, by their share, each in the given order."""
        groups: dict[Hashable, list[int]] = {}
        for slot in slots:
            if (share := self._shares.get(slot)) is not None:
                groups.setdefault(share, []).append(slot)
        yield from groups.items()

    def _forget(self, share: Hashable, slots: Sequence[int]) -> None:
        self._grow(share, -sum(self._shares.pop(slot, None) is not None for slot in slots))

    def _grow(self, share: Hashable, count: int) -> None:
        self._sizes[share] += count
        if self._sizes[share]:
            self._tick += 1
            self._ticks[share] = self._tick
            heapq.heappush(self._heap, (-self._sizes[share], self._tick, share))
        else:
            del self._sizes[share], self._policies[share], self._ticks[share]
        if len(self._heap) > 2 * len(self._ticks) + _FEW:
            self._heap = [entry for entry in self._heap if self._is_fresh(entry)]
            heapq.heapify(self._heap)

    def _largest(self) -> _Entry | None:
        """The first entry of the heap that is not stale, left there."""
        while self._heap and not self._is_fresh(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def _is_fresh(self, entry: _Entry) -> bool:
        return self._ticks.get(entry[2]) == entry[1]
