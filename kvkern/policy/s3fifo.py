"""S3-FIFO (Yang et al., SOSP '23) with AIBrix's setting. A small queue filters out chunks used once. Evicts heads first.

small (30 % of the capacity), main: FIFO queues; ghosts: keys evicted from small
hit:     uses += 1, 3 at most
miss:    into main if the chunk is a ghost, else into small
evict:   if small has reached its size, take its oldest: move it to main if it was used again, else evict it to the ghosts
         otherwise take main's oldest: move it to the end with one use less; if it has no uses, evict it
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from .textbook_adapter import Condemned, TextbookPolicy

_MAX_USES = 3
_GHOSTS_PER_SLOT = 32  # AIBrix drops none; with 32 the decisions are almost the same


class S3Fifo(TextbookPolicy):
    """An `EvictionPolicy`. It remembers 32 ghosts a slot and drops the oldest."""

    def __init__(self, capacity: int, small: float = 0.3, threshold: int = 1) -> None:
        super().__init__(S3FifoAlgorithm(capacity, small, threshold), tail_first=False)


class S3FifoAlgorithm:
    """See TextbookAlgorithm."""

    def __init__(
        self,
        capacity: int,
        small: float,  # share of the capacity
        threshold: int,  # uses after the first that move a chunk from small to main
    ) -> None:
        self._capacity = max(capacity, 1)
        self._small_size = max(int(capacity * small), 1)
        self._max_ghosts = _GHOSTS_PER_SLOT * self._capacity
        self._threshold = threshold
        self._small: OrderedDict[bytes, int] = OrderedDict()  # key -> uses after the first
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def use(self, keys: Iterable[bytes], condemned: Condemned) -> None:
        """See TextbookAlgorithm."""
        small, main, ghosts = self._small, self._main, self._ghosts
        for key in keys:
            if key in main:
                if (uses := main[key]) < _MAX_USES:
                    main[key] = uses + 1
            elif key in small:
                if (uses := small[key]) < _MAX_USES:
                    small[key] = uses + 1
            else:
                condemned.pop(key, None)
                if len(small) + len(main) >= self._capacity and (left := self.evict()):
                    condemned[left] = None
                if key in ghosts:
                    del ghosts[key]
                    main[key] = 0
                else:
                    small[key] = 0

    def evict(self) -> bytes | None:
        """See TextbookAlgorithm."""
        small, main = self._small, self._main
        while small or main:
            if small and (len(small) >= self._small_size or not main):
                key, uses = small.popitem(last=False)
                if uses >= self._threshold:
                    main[key] = 0
                    continue
                self._ghosts[key] = None
                if len(self._ghosts) > self._max_ghosts:
                    self._ghosts.popitem(last=False)
                return key
            key, uses = main.popitem(last=False)
            if not uses:
                return key
            main[key] = uses - 1
        return None

    def discard(self, key: bytes) -> None:
        """See TextbookAlgorithm."""
        self._small.pop(key, None)
        self._main.pop(key, None)
