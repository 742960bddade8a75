"""Says that lookups never hit although chunks are stored, with the likeliest reason. Knows counts, not requests."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from ...metrics import CacheCounters

LINE_S = 60.0  # seconds between two lines, and from the first lookup to the first line; doubles with every line
MAX_LINE_S = 3600.0
MIN_REQUESTS = 10  # with fewer, a new engine has simply not seen a prompt twice


class NeverHits:
    """Watches one engine from its start, or its last reset, to its first hit."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._hit = False
        self._requests = 0  # that have asked for chunks
        self._found = 0  # chunks that were cached when a request asked for them
        self._tenants: set[bytes] = set()  # roots of those requests, as long as there was no hit
        self._next_line_s = math.inf  # a minute after the first request
        self._pause_s = LINE_S

    def note_request(self, root: bytes, found: int, served: int) -> None:
        """Note a request that has asked for chunks: how many were cached, and how many of these the engine has loaded."""
        if self._hit:
            return
        if not self._requests:
            self._next_line_s = time.monotonic() + LINE_S
        self._hit = served > 0
        self._requests += 1
        self._found += found
        if len(self._tenants) < MIN_REQUESTS:
            self._tenants.add(root)

    def is_due(self, now_s: float) -> bool:
        """Return True if enough requests and time have passed for a line. Costs next to nothing; `line` does not."""
        return not self._hit and now_s >= self._next_line_s and self._requests >= MIN_REQUESTS

    def line(self, now_s: float, counters: CacheCounters, usage: Mapping[str, int]) -> str | None:
        """Return the line to log now, or None if nothing is stored. Call it if `is_due`; `usage` is that of the cache."""
        if not counters.stored_chunks + counters.failed_chunks + usage.get("known_chunks", 0):
            return None
        self._pause_s = min(2 * self._pause_s, MAX_LINE_S)
        self._next_line_s = now_s + self._pause_s
        asked = f"kvkern: {self._requests} requests have asked for cached chunks, and none was served."
        return f"{asked} {self._reason(counters, usage)}"

    def _reason(self, counters: CacheCounters, usage: Mapping[str, int]) -> str:
        """Return the likeliest reason and what to do about it. The surest signs come first."""
        if not usage.get("connected", 1):
            return "The daemon does not answer. Look at its log, and start it if it is gone."
        if counters.failed_chunks and not counters.stored_chunks:
            return (
                f"Of {counters.failed_chunks} chunks to be stored, not one was written by every worker. Look for the workers' "
                f"errors in this log, and start the engine anew."
            )
        if counters.bad_chunks:
            return (
                f"{counters.bad_chunks} chunks failed verification. Check the host's memory, and look for the workers' errors "
                f"in this log."
            )
        if self._found:
            return (
                f"{self._found} chunks were found, but vLLM loaded none: a request needs chunks of all KV groups of the model, "
                f"and inside MultiConnector an earlier connector may have its prompt. Otherwise give the cache more memory, "
                f"and leave blocks_per_chunk at 1."
            )
        if len(self._tenants) >= MIN_REQUESTS:
            return (
                "The first requests had a cache_salt or an adapter each, and tenants share nothing. Give requests that may "
                "share a prompt the same cache_salt."
            )
        if not counters.stored_chunks:
            return (
                "The daemon holds chunks, but this engine has stored none, and its requests name others. Compare its model, "
                "weights and version of vLLM with those of the other engines (`kvkern stat`)."
            )
        if counters.evicted_chunks:
            return (
                f"The cache has {usage.get('slots', 0)} slots, and {counters.evicted_chunks} chunks were evicted before they "
                f"could be used. Give it more memory."
            )
        return (
            f"No prompt began with the same {self._chunk_tokens} tokens as an earlier one. Often a date, a name or a number "
            f"stands at the start of every prompt: put it at the end."
        )
