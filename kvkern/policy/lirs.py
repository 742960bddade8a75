"""LIRS (Jiang and Zhang, SIGMETRICS '02), tail first. Keeps the chunks with the shortest time between their last two uses.

LIR: chunks with a short reuse interval, always resident; HIR: all others
S: stack of LIR, HIR and some ghosts by recency; its bottom is always LIR. Q: queue of resident HIR
hit LIR:             to the top of S; prune
hit HIR in S:        becomes LIR, to the top; S's bottom becomes HIR, to Q's end; prune
hit HIR not in S:    to the top of S, to Q's end
miss:                Q's oldest is evicted; it is a ghost while it is in S. The new chunk goes into S as LIR if LIR has
                     room or the chunk was a ghost (then S's bottom becomes HIR); else as HIR, to Q's end
prune:               drop HIR and ghosts from S's bottom
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from .textbook_adapter import Condemned, TextbookPolicy

_HIR_SHARE = 0.05
_GHOSTS_PER_SLOT = 10


class Lirs(TextbookPolicy):
    """An `EvictionPolicy`. It remembers ten ghosts a slot and drops the oldest."""

    def __init__(self, capacity: int) -> None:
        super().__init__(LirsAlgorithm(capacity), tail_first=True)


class LirsAlgorithm:
    """See TextbookAlgorithm."""

    def __init__(self, capacity: int) -> None:
        self._capacity = max(capacity, 1)
        self._max_ghosts = _GHOSTS_PER_SLOT * self._capacity
        self._max_lir = max(capacity - max(int(capacity * _HIR_SHARE), 1), 0)
        self._stack: OrderedDict[bytes, None] = OrderedDict()  # the top is last
        self._lir: set[bytes] = set()
        self._queue: OrderedDict[bytes, None] = OrderedDict()  # resident HIR
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()  # in the stack, not resident

    def use(self, keys: Iterable[bytes], condemned: Condemned) -> None:
        """See TextbookAlgorithm."""
        stack, lir, queue, ghosts = self._stack, self._lir, self._queue, self._ghosts
        for key in keys:
            if key in lir:
                stack.move_to_end(key)
                if next(iter(stack)) not in lir:
                    self._prune()
                continue
            in_queue = key in queue
            if not in_queue:
                condemned.pop(key, None)
                if len(lir) + len(queue) >= self._capacity and (left := self.evict()):
                    condemned[left] = None
            promoted = key in stack or (not in_queue and len(lir) < self._max_lir)
            ghosts.pop(key, None)
            stack[key] = None
            stack.move_to_end(key)
            if promoted:
                queue.pop(key, None)
                self._promote(key)
            else:
                queue[key] = None
                queue.move_to_end(key)

    def evict(self) -> bytes | None:
        """See TextbookAlgorithm."""
        if not self._queue:
            if not self._lir:
                return None
            self._demote_bottom()
        key = self._queue.popitem(last=False)[0]
        if key in self._stack:
            self._ghosts[key] = None
            if len(self._ghosts) > self._max_ghosts:
                del self._stack[self._ghosts.popitem(last=False)[0]]
        return key

    def discard(self, key: bytes) -> None:
        """See TextbookAlgorithm."""
        if key in self._lir or key in self._queue:
            self._lir.discard(key)
            self._queue.pop(key, None)
            self._stack.pop(key, None)
            self._prune()

    def _promote(self, key: bytes) -> None:
        self._lir.add(key)
        while len(self._lir) > max(self._max_lir, 1):
            self._demote_bottom()
        self._prune()

    def _demote_bottom(self) -> None:
        self._prune()
        key = self._stack.popitem(last=False)[0]
        self._lir.discard(key)
        self._queue[key] = None
        self._prune()

    def _prune(self) -> None:
        """Drop entries from the bottom of the stack until the bottom is LIR."""
        stack = self._stack
        while stack and (key := next(iter(stack))) not in self._lir:
            del stack[key]
            self._ghosts.pop(key, None)
