"""Adapts textbook eviction algorithms to `EvictionPolicy`. They evict at every miss; a tier asks at a request's end.

    access(chain):  remember the chain; its resident chunks are textbook hits
    insert(keys):   these chunks are textbook misses; hits and misses go to the algorithm in one pass
                    a chunk that the algorithm evicts is condemned
    victims(n):     condemned chunks first, then the chunks that the algorithm would evict next
                    pinned chunks are passed over; they are condemned again when they are unpinned

A condemned chunk is still resident. If a request uses it before the tier asks for victims, it is a textbook miss and keeps
its slot. On streams of single chunks every decision is the textbook's. A chunk counts once per request, however many
calls name it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import filterfalse, islice, repeat
from typing import Protocol

from .base import Keys, Use

Condemned = dict[bytes, None]  # resident chunks that the algorithm has evicted, in the order of eviction


class TextbookAlgorithm(Protocol):
    """An eviction algorithm as its paper describes it, for a cache of single chunks."""

    def use(self, keys: Iterable[bytes], condemned: Condemned) -> None:
        """Use each chunk: a hit, or a miss that inserts it.

        A miss takes the chunk out of `condemned` if it is there. A chunk evicted to make room is added to `condemned`.
        """

    def evict(self) -> bytes | None:
        """Evict the next chunk and return it. Returns None if no chunk is left."""

    def discard(self, key: bytes) -> None:
        """Forget a chunk that was removed from the cache. Unknown chunks are ignored."""


class TextbookPolicy:
    """An `EvictionPolicy` over a textbook algorithm."""

    def __init__(
        self,
        algorithm: TextbookAlgorithm,
        tail_first: bool,  # give a request's chunks to the algorithm from the last to the first
    ) -> None:
        self._algorithm = algorithm
        self._tail_first = tail_first
        self._used_by: dict[bytes, int] = {}  # resident chunk -> the request that used it last
        self._condemned: Condemned = {}
        self._spared: Condemned = {}  # condemned chunks that were pinned when `victims` reached them
        self._pinned: set[bytes] = set()
        self._waiting: Keys = ()  # the chain of the last access, until the algorithm has used it
        self._request = 0  # the number of its request; 0: a request of its own
        self._num_unnamed = 0  # requests without a number so far

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy. The chunks wait for `insert`, so that hits and misses are used in one order."""
        if not (use.request and use.request == self._request and len(chain) >= len(self._waiting)):
            self._use_waiting(())
        self._request = use.request
        self._waiting = list(chain)  # a copy: the caller's list may grow

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        if use.request != self._request:
            self._use_waiting(())
            self._request = use.request
        self._use_waiting(keys)

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._pinned.update(filter(self._used_by.__contains__, keys))

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._pinned.difference_update(keys)
        self._condemn_again(keys)

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._use_waiting(())
        self._pinned.difference_update(keys)
        for key in keys:
            if self._used_by.pop(key, None) is not None:
                self._condemned.pop(key, None)
                self._spared.pop(key, None)
                self._algorithm.discard(key)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        self._use_waiting(())
        condemned, pinned, chosen = self._condemned, self._pinned, list[bytes]()
        while (left := count - len(chosen)) > 0:
            batch = list(islice(condemned, left))
            if not batch:
                if (key := self._algorithm.evict()) is None:
                    break
                batch = [key]
            deque(map(condemned.pop, batch, repeat(None)), maxlen=0)
            if not pinned.isdisjoint(batch):
                self._spared.update(dict.fromkeys(key for key in batch if key in pinned))
                batch = [key for key in batch if key not in pinned]
            chosen += batch
        deque(map(self._used_by.pop, chosen), maxlen=0)
        return chosen

    def _use_waiting(self, new: Keys) -> None:
        """Give the waiting chain (hits) and the chunks of `new` (misses) to the algorithm, in its order."""
        chain, used_by, request = self._waiting, self._used_by, self._request
        if not chain and not new:
            return
        self._waiting = ()
        if not request:
            self._num_unnamed += 1
            request = -self._num_unnamed
        used_by.update(dict.fromkeys(filterfalse(used_by.__contains__, new), 0))
        keys = dict.fromkeys([*chain, *new])  # new chunks are part of the chain, else its tail
        order = reversed(keys) if self._tail_first else keys
        used = [key for key in order if used_by.get(key, request) != request]
        used_by.update(dict.fromkeys(used, request))
        self._condemn_again(used)
        self._algorithm.use(used, self._condemned)

    def _condemn_again(self, keys: Keys) -> None:
        """Condemn again those of `keys` that were spared."""
        for key in self._spared.keys() & keys if self._spared else ():
            del self._spared[key]
            self._condemned[key] = None
