"""What a tier asks of an eviction policy. Policies see slot numbers in prefix order; they own no memory and take no locks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders the slots of a tier. Called with the tier's lock held; never blocks.

    Batches are in prefix order: `slots[i]` is an ancestor of `slots[i + 1]`. A policy must offer a tail before its head.
    """

    def insert(self, slots: Sequence[int]) -> None:
        """New chunks, evictable from now on."""

    def touch(self, slots: Sequence[int]) -> None:
        """Used now. Pinned slots and slots it has never seen are ignored."""

    def pin(self, slots: Sequence[int]) -> None:
        """Used now and not evictable until `unpin`. Each slot is evictable before this call."""

    def unpin(self, slots: Sequence[int]) -> None:
        """Evictable again. Each slot is pinned before this call."""

    def remove(self, slots: Sequence[int]) -> None:
        """Gone for another reason than eviction; pinned or not."""

    def victims(self, count: int, keep: Collection[int]) -> list[int]:
        """Up to `count` slots to evict, none of `keep`, and forget them. Amortised O(count)."""
