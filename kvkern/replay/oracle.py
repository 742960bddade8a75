"""The exact offline optimum of the prefix hit ratio: Belady's MIN by chunk, with bypass, the deepest first among ties.

    at a request's end keep the chunks whose next use is nearest; do not keep a chunk that is never used again

A parent's next use is never after its child's, so the set that MIN keeps is prefix-closed. No policy that hits on prefixes
can do better: the optimum for single chunks bounds it from above, and MIN reaches that bound.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from ..kernels.jit import compiled
from .trace import Trace

_NEVER = 1 << 60


def min_hits(trace: Trace, capacity: int) -> int:
    """Return the number of chunks that hit under the optimum."""
    return int(_min_hits(trace.chunks.astype(np.int64), trace.ends, trace.num_unique, capacity))


def infinite_hits(trace: Trace) -> int:
    """Return the number of chunks that hit in a cache that keeps everything."""
    return int(_min_hits(trace.chunks.astype(np.int64), trace.ends, trace.num_unique, trace.num_unique + 1))


@compiled()
def _min_hits(chunks: Any, ends: Any, num_unique: int, capacity: int) -> int:
    next_use = np.empty(len(chunks), dtype=np.int64)  # the request that uses the same chunk next
    upcoming = np.full(num_unique, _NEVER)
    at = len(chunks) - 1
    for request in range(len(ends) - 1, -1, -1):
        begin = ends[request - 1] if request > 0 else 0
        for i in range(begin, ends[request]):
            next_use[i] = upcoming[chunks[i]]
        for i in range(begin, ends[request]):
            upcoming[chunks[i]] = request
        at = begin
    kept = np.full(num_unique, _NEVER)  # next use of each resident chunk; _NEVER: not resident
    depth = np.zeros(num_unique, dtype=np.int64)
    heap = [(-at, -at, at)]  # the farthest next use first, then the deepest; it may hold stale entries
    heap.clear()
    size = 0
    hits = 0
    for request in range(len(ends)):
        begin = ends[request - 1] if request > 0 else 0
        whole = True
        for i in range(begin, ends[request]):
            whole = whole and kept[chunks[i]] != _NEVER
            hits += whole
        for i in range(begin, ends[request]):
            c = chunks[i]
            before = kept[c]
            if before == next_use[i]:
                continue
            size += int(before == _NEVER) - int(next_use[i] == _NEVER)
            kept[c] = next_use[i]
            depth[c] = i - begin
            if next_use[i] != _NEVER:
                heapq.heappush(heap, (-next_use[i], -(i - begin), c))
        while size > capacity:
            use, _, c = heapq.heappop(heap)
            if kept[c] == -use:
                kept[c] = _NEVER
                size -= 1
        if len(heap) > 4 * size + 1000:
            heap = [(-kept[c], -depth[c], c) for c in range(num_unique) if kept[c] != _NEVER]
            heapq.heapify(heap)
    return hits
