"""Which prefixes engines ask for again and again, by the key of their first chunk. Holds keys, never content.

two windows of WINDOW_S: what is shown is the sum of both, so it is of the last 30 to 60 minutes
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from ...bounded_dict import BoundedDict

WINDOW_S = 1800.0
MAX_PREFIXES = 1024  # in a window; the one used longest ago is forgotten

_Counts = tuple[int, int, int]  # hits, chunks given, the longest prefix in chunks


class HotPrefixes:
    """Use it from one thread. `note` costs the same for every number of keys."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now = BoundedDict[bytes, _Counts](MAX_PREFIXES)
        self._before = BoundedDict[bytes, _Counts](MAX_PREFIXES)
        self._began_s = now_s

    def note(self, keys: Sequence[bytes]) -> None:
        """An engine was given these chunks, the first ones of a sequence."""
        if keys:
            hits, chunks, longest = self._now.get(keys[0], (0, 0, 0))
            self._now.put(keys[0], (hits + 1, chunks + len(keys), max(longest, len(keys))))

    def turn(self, now_s: float) -> None:
        """Begin a new window if the present one is over. Call it regularly."""
        if now_s - self._began_s >= WINDOW_S:
            self._before, self._now, self._began_s = self._now, BoundedDict(MAX_PREFIXES), now_s

    def hottest(self, count: int) -> list[dict[str, int | str]]:
        """Return the prefixes that gave most chunks: key in hex, hits, chunks, and chunks of the longest one."""
        merged = dict(self._before.items())
        for key, (hits, chunks, longest) in self._now.items():
            before = merged.get(key, (0, 0, 0))
            merged[key] = before[0] + hits, before[1] + chunks, max(before[2], longest)
        best = heapq.nlargest(count, merged.items(), key=lambda item: (item[1][1], item[0]))
        return [
            {"key": key.hex(), "hits": hits, "chunks": chunks, "longest": longest}
            for key, (hits, chunks, longest) in best
        ]
