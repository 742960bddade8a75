"""Shares of an arena: every namespace has an eviction order of its own, and who holds most gives way first.

    order of a share: any EvictionPolicy
    victims(n):       from the largest share until another is as large, then from both by turns, and so on

A tenant that scans through new prompts evicts its own chunks once it holds more than anybody else; a small one keeps
what it has. Caps are the tier's to enforce, with `victims_of`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

from .base import EvictionPolicy


class Shares:
    """`EvictionPolicy` over one policy a share. O(1) a slot, and O(shares) a call of `victims`."""

    def __init__(
        self,
        make: Callable[[], EvictionPolicy],
        share_of: Callable[[int], Hashable],  # asked once for a slot, when it is inserted
    ) -> None:
        self._make, self._share_of = make, share_of
        self._shares: dict[int, Hashable] = {}  # slot -> share, of every slot inserted and not gone
        self._policies: dict[Hashable, EvictionPolicy] = {}
        self._sizes: Counter[Hashable] = Counter()

    def size(self, share: Hashable) -> int:
        """Slots of a share, pinned ones too."""
        return self._sizes[share]

    def insert(self, slots: Sequence[int]) -> None:
        """See EvictionPolicy."""
        for slot in slots:
            share = self._shares[slot] = self._share_of(slot)
            self._sizes[share] += 1
            if share not in self._policies:
                self._policies[share] = self._make()
        for share, mine in self._by_share(slots):
            self._policies[share].insert(mine)

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
        self._forget(slots)

    def victims(self, count: int, keep: Collection[int]) -> list[int]:
        """See EvictionPolicy."""
        chosen: list[int] = []
        exhausted: set[Hashable] = set()
        while len(chosen) < count:
            sizes = sorted(
                ((size, index, share) for index, (share, size) in enumerate(self._sizes.items())), reverse=True
            )
            ranked = [(size, share) for size, _, share in sizes if share not in exhausted]
            if not ranked:
                break
            size, share = ranked[0]
            step = max(1, size - ranked[1][0]) if len(ranked) > 1 else size
            found = self.victims_of(share, min(step, count - len(chosen)), keep)
            if not found:
                exhausted.add(share)
            chosen += found
        return chosen

    def victims_of(self, share: Hashable, count: int, keep: Collection[int]) -> list[int]:
        """Up to `count` slots of one share to evict, none of `keep`, and forget them."""
        policy = self._policies.get(share)
        found = policy.victims(count, keep) if policy is not None and count > 0 else []
        self._forget(found)
        return found

    def _by_share(self, slots: Sequence[int]) -> Iterator[tuple[Hashable, list[int]]]:
        """Slots that are known, by their share, each in the given order."""
        groups: dict[Hashable, list[int]] = {}
        for slot in slots:
            if (share := self._shares.get(slot)) is not None:
                groups.setdefault(share, []).append(slot)
        yield from groups.items()

    def _forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if (share := self._shares.pop(slot, None)) is not None:
                self._sizes[share] -= 1
                if not self._sizes[share]:
                    del self._sizes[share], self._policies[share]
