"""What textbook policies have in common: they evict inside every access to a chunk; a tier asks at a request's end.

    access(chain):  each resident chunk is a textbook hit, and each that
    insert(keys)    names is a textbook miss, in one pass; what the textbook evicts is condemned
    victims(n):     the condemned first, then what the textbook would evict next; pinned ones wait until they are let go

A condemned chunk is still resident: when it is used before the tier asks, it is a textbook miss that finds its slot. On
streams of single chunks every decision is the textbook's. A request uses a chunk once, however often it is told of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import filterfalse, islice, repeat
from typing import Protocol

from .base import Keys, Use

Condemned = dict[bytes, None]  # resident; the first to go first


class Textbook(Protocol):
    """A policy as its paper has it, with `capacity` chunks."""

    def use(self, keys: Iterable[bytes], condemned: Condemned) -> None:
        """Each is a hit, or a miss: it comes in, out of `condemned` if it is there, and what leaves for it is condemned."""

    def evict(self) -> bytes | None:
        """What leaves next, for room that is needed elsewhere; None: nothing is left."""

    def discard(self, key: bytes) -> None:
        """The chunk is gone; unknown ones are ignored."""


class Classic:
    """`EvictionPolicy` over a textbook. `tail_first`: a request's chunks are taken from the last to the first."""

    def __init__(self, textbook: Textbook, tail_first: bool) -> None:
        self._textbook = textbook
        self._tail_first = tail_first
        self._used_by: dict[bytes, int] = {}  # resident chunk -> the request that used it last
        self._condemned: Condemned = {}
        self._spared: Condemned = {}  # condemned and pinned when their turn came
        self._pinned: set[bytes] = set()
        self._waiting: Keys = ()  # the chain of the last access, until it is taken
        self._request = 0  # whose it is; 0: one of its own
        self._num_unnamed = 0

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy. Its chunks wait for `insert`, to be taken in one order, hits and misses."""
        if not (use.request and use.request == self._request and len(chain) >= len(self._waiting)):
            self._take(())
        self._request = use.request
        self._waiting = list(chain)  # the caller's may grow

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        if use.request != self._request:
            self._take(())
            self._request = use.request
        self._take(keys)

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._pinned.update(filter(self._used_by.__contains__, keys))

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._pinned.difference_update(keys)
        self._release(keys)

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._take(())
        self._pinned.difference_update(keys)
        for key in keys:
            if self._used_by.pop(key, None) is not None:
                self._condemned.pop(key, None)
                self._spared.pop(key, None)
                self._textbook.discard(key)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        self._take(())
        condemned, pinned, chosen = self._condemned, self._pinned, list[bytes]()
        while (left := count - len(chosen)) > 0:
            batch = list(islice(condemned, left))
            if not batch:
                if (key := self._textbook.evict()) is None:
                    break
                batch = [key]
            deque(map(condemned.pop, batch, repeat(None)), maxlen=0)
            if not pinned.isdisjoint(batch):
                self._spared.update(dict.fromkeys(key for key in batch if key in pinned))
                batch = [key for key in batch if key not in pinned]
            chosen += batch
        deque(map(self._used_by.pop, chosen), maxlen=0)
        return chosen

    def _take(self, new: Keys) -> None:
        """Hits of the chain that waits, and misses of what is new, in the textbook's order."""
        chain, used_by, request = self._waiting, self._used_by, self._request
        if not chain and not new:
            return
        self._waiting = ()
        if not request:
            self._num_unnamed += 1
            request = -self._num_unnamed
        used_by.update(dict.fromkeys(filterfalse(used_by.__contains__, new), 0))
        keys = dict.fromkeys([*chain, *new])  # what is new stands in the chain; if not, it is its tail
        order = reversed(keys) if self._tail_first else keys
        used = [key for key in order if used_by.get(key, request) != request]
        used_by.update(dict.fromkeys(used, request))
        self._release(used)
        self._textbook.use(used, self._condemned)

    def _release(self, keys: Keys) -> None:
        """Those that were spared are condemned as before."""
        for key in self._spared.keys() & keys if self._spared else ():
            del self._spared[key]
            self._condemned[key] = None
