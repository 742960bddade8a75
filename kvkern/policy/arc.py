"""ARC (Megiddo and Modha, FAST '03), tail first. Balances recency and frequency by the hits their ghosts would have had.

T1: chunks used once; T2: chunks used more often; B1, B2: ghosts of T1 and T2; p: the target size of T1; c: capacity
hit:            to the newest end of T2
miss in B1:     p += max(|B2| / |B1|, 1); replace; into T2
miss in B2:     p -= max(|B1| / |B2|, 1); replace; into T2
other miss:     |T1| + |B1| = c: drop B1's oldest and replace, or T1's oldest if B1 is empty
                else, when all lists hold 2c: drop B2's oldest; when they hold c: replace
                into T1
replace:        T1's oldest to B1 if |T1| > p (or = p for a miss in B2), else T2's oldest to B2
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from .textbook_adapter import Condemned, TextbookPolicy

_List = OrderedDict[bytes, None]


class Arc(TextbookPolicy):
    """An `EvictionPolicy`. It remembers at most `capacity` ghosts."""

    def __init__(self, capacity: int) -> None:
        super().__init__(ArcAlgorithm(capacity), tail_first=True)


class ArcAlgorithm:
    """See TextbookAlgorithm."""

    def __init__(self, capacity: int) -> None:
        self._c = max(capacity, 1)
        self._p = 0.0
        self._t1: _List = OrderedDict()
        self._t2: _List = OrderedDict()
        self._b1: _List = OrderedDict()
        self._b2: _List = OrderedDict()

    def use(self, keys: Iterable[bytes], condemned: Condemned) -> None:
        """See TextbookAlgorithm."""
        t1, t2 = self._t1, self._t2
        for key in keys:
            if key in t2:
                t2.move_to_end(key)
            elif key in t1:
                del t1[key]
                t2[key] = None
            else:
                condemned.pop(key, None)
                self._miss(key, condemned)

    def evict(self) -> bytes | None:
        """See TextbookAlgorithm."""
        return self._replace(in_b2=False) if self._t1 or self._t2 else None

    def discard(self, key: bytes) -> None:
        """See TextbookAlgorithm."""
        self._t1.pop(key, None)
        self._t2.pop(key, None)

    def _miss(self, key: bytes, condemned: Condemned) -> None:
        t1, b1, b2, c = self._t1, self._b1, self._b2, self._c
        if key in b1:
            self._p = min(c, self._p + max(len(b2) / len(b1), 1))
            del b1[key]
            self._make_room(condemned)
            self._t2[key] = None
        elif key in b2:
            self._p = max(0, self._p - max(len(b1) / len(b2), 1))
            del b2[key]
            self._make_room(condemned, in_b2=True)
            self._t2[key] = None
        else:
            if len(t1) + len(b1) >= c:
                if b1:
                    b1.popitem(last=False)
                    self._make_room(condemned)
                else:
                    condemned[t1.popitem(last=False)[0]] = None
            else:
                if len(t1) + len(self._t2) + len(b1) + len(b2) >= 2 * c and b2:
                    b2.popitem(last=False)
                self._make_room(condemned)
            t1[key] = None

    def _make_room(self, condemned: Condemned, in_b2: bool = False) -> None:
        if len(self._t1) + len(self._t2) >= self._c:
            condemned[self._replace(in_b2)] = None

    def _replace(self, in_b2: bool) -> bytes:
        t1, t2 = self._t1, self._t2
        if t1 and (len(t1) > self._p or (in_b2 and len(t1) == self._p) or not t2):
            key = t1.popitem(last=False)[0]
            self._b1[key] = None
        else:
            key = t2.popitem(last=False)[0]
            self._b2[key] = None
        if len(self._b1) + len(self._b2) > self._c:  # happens only if chunks also left by `evict` or `discard`
            (self._b1 or self._b2).popitem(last=False)
        return key
