"""Logs what an operator has to know: states of the cache, not events, and what became of a request. Scheduler's thread."""

from __future__ import annotations

import time

from ...cache.base import ChunkCache
from . import shim
from .never_hits import NeverHits
from .room_notice import RoomNotice


class Notices:
    """The notices of one engine. Call `log_due` in every step."""

    def __init__(self, cache: ChunkCache, chunk_tokens: int) -> None:
        self._cache = cache
        self._chunk_tokens = chunk_tokens
        self._room = RoomNotice()
        self._never_hits = NeverHits(chunk_tokens)

    def note_request(self, root: bytes, found: int, served: int) -> None:
        """Note a request that has asked for chunks: how many were cached, and how many of these the engine has loaded."""
        self._never_hits.note_request(root, found, served)

    def note_dropped(self, dropped: int) -> None:
        """Note how many chunks of a store found no free slot. The loss of a daemon has a line of its own."""
        usage = self._cache.usage()
        if not dropped or not usage.get("connected", True):
            return
        if line := self._room.note_dropped(dropped, time.monotonic(), usage["slots"]):
            shim.logger.warning("%(line)s", {"event": "no_free_slots", "line": line})

    def note_reset(self) -> None:
        """Note that the cache was emptied."""
        self._never_hits = NeverHits(self._chunk_tokens)

    def log_due(self) -> None:
        """Log the lines whose time has come."""
        now_s = time.monotonic()
        if line := self._room.ended(now_s):
            shim.logger.info("%(line)s", {"event": "free_slots_again", "line": line})
        if self._never_hits.is_due(now_s) and (
            line := self._never_hits.line(now_s, self._cache.counters, self._cache.usage())
        ):
            shim.logger.warning("%(line)s", {"event": "never_hits", "line": line})


def log_load_without_hit(req_id: str, chunks: int, missing: int) -> None:
    """Log that vLLM has asked to load chunks that were no hit."""
    shim.logger.error(
        "kvkern: vLLM asked to load %(chunks)d chunks of request %(request)r, but %(missing)d of them were no hit. The request "
        "is computed instead. Please report this as a bug.",
        {"event": "load_without_hit", "request": req_id, "chunks": chunks, "missing": missing},
    )


def log_failed_load(req_id: str) -> None:
    """Log that chunks of a request were not loaded."""
    shim.logger.warning(
        "kvkern: a load of request %(request)r failed. The request is computed, and loads nothing more. If this goes on, see "
        "the lines about verification.",
        {"event": "load_failed", "request": req_id},
    )


def log_stores_nothing(reason: str) -> None:
    """Log that this engine stores nothing until it is reset."""
    shim.logger.warning(
        "kvkern: from now on this engine stores nothing: %(why)s.", {"event": "stores_nothing", "why": reason}
    )
