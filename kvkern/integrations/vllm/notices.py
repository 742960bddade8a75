"""Logs what an operator has to know of a running cache, and no line twice: states, not events. Scheduler's thread."""

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
            shim.logger.warning("%s", line)

    def note_reset(self) -> None:
        """Note that the cache was emptied."""
        self._never_hits = NeverHits(self._chunk_tokens)

    def log_due(self) -> None:
        """Log the lines whose time has come."""
        now_s = time.monotonic()
        if line := self._room.ended(now_s):
            shim.logger.info("%s", line)
        if self._never_hits.is_due(now_s) and (
            line := self._never_hits.line(now_s, self._cache.counters, self._cache.usage())
        ):
            shim.logger.warning("%s", line)
