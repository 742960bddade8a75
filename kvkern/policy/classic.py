"""What textbook policies have in common: they evict inside every access to a chunk; a tier asks at a request's end.

    access(chain):  each resident chunk is a textbook hit, and each that
    insert(keys)    names is a textbook miss, in one pass; what the textbook evicts is condemned
    victims(n):     the condemned first, then what the textbook would evict next; pinned ones are passed over

A condemned chunk is still resident: when it is used before the tier asks, it is a textbook miss that finds its slot. On
streams of single chunks every decision is the textbook's.
"""

from __future__ import annotations

from typing import Protocol

from .base import Keys, Use


class Textbook(Protocol):
    """A policy as its paper has it, with `capacity` chunks. Keys it evicts are returned, once."""

    def hit(self, key: bytes) -> None:
        """The chunk is in the cache."""

    def miss(self, key: bytes) -> list[bytes]:
        """The chunk comes into the cache; what leaves for it."""

    def evict(self) -> bytes | None:
        """What leaves next, for room that is needed elsewhere; None: nothing is left."""

    def discard(self, key: bytes) -> None:
        """The chunk is gone; unknown ones are ignored."""

    def __contains__(self, key: bytes) -> bool:
        """Whether the chunk is in the cache."""


class Classic:
    """`EvictionPolicy` over a textbook. `tail_first`: a request's chunks are taken from the last to the first."""

    def __init__(self, textbook: Textbook, tail_first: bool) -> None:
        self._textbook = textbook
        self._tail_first = tail_first
        self._condemned: dict[bytes, None] = {}
        self._pinned: set[bytes] = set()
        self._waiting: Keys = ()  # the chain of the last access, until it is taken

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy. Its chunks wait for `insert`, to be taken in one order, hits and misses."""
        self._take(())
        self._waiting = list(chain)  # the caller's may grow

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        self._take(keys)

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._pinned.update(keys)

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._pinned.difference_update(keys)

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._take(())
        for key in keys:
            self._condemned.pop(key, None)
            self._pinned.discard(key)
            self._textbook.discard(key)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        self._take(())
        chosen: list[bytes] = []
        spared: list[bytes] = []
        while len(chosen) < count:
            key = next(iter(self._condemned), None) if self._condemned else self._textbook.evict()
            if key is None:
                break
            self._condemned.pop(key, None)
            (spared if key in self._pinned else chosen).append(key)
        self._condemned.update(dict.fromkeys(spared))
        return chosen

    def _take(self, new: Keys) -> None:
        """Hits of the chain that waits, and misses of what is new, in the textbook's order."""
        textbook, condemned, chain = self._textbook, self._condemned, self._waiting
        if not chain and not new:
            return
        self._waiting = ()
        misses = set(new)
        if not misses.issubset(chain):
            known = set(chain)
            chain = [*chain, *(key for key in new if key not in known)]
        for key in reversed(chain) if self._tail_first else chain:
            if key in textbook:
                textbook.hit(key)
            elif key in condemned or key in misses:
                condemned.pop(key, None)
                misses.discard(key)
                condemned.update(dict.fromkeys(textbook.miss(key)))
