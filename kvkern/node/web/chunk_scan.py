"""Looks for chunks by the beginning of their key, a few slots at a time, so that engines' requests come in between.

    slice      SLICE slots: their keys are compared, and the chunks that match described
    turn       slices for TURN_S; the next turn, of this scan or of another, is SHARE - 1 times as long as this one later
    one scan   at a time

So scans take a tenth of the daemon's thread at most, however many chunks there are and however often somebody asks, and an
acquire waits for one turn of some 2 ms at most. A scan of a million slots takes a second or a few. It ends early when it has
found enough. It sees each chunk that is there all the time; of others it may see some.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from ..daemon.operator_requests import Row
from ..daemon.sessions import Sessions

SLICE = 128  # slots; describing as many chunks takes about a millisecond
TURN_S = 0.001
SHARE = 10


class Busy(Exception):
    """Another scan is under way."""


class Scanned(Protocol):
    """What a scan asks of the daemon."""

    sessions: Sessions | None


class ChunkScan:
    """Use it from the event loop's thread."""

    def __init__(self, daemon: Scanned) -> None:
        self._daemon = daemon
        self._busy = False
        self._free_s = 0.0  # when the next turn may begin

    async def rows(self, prefix: bytes, limit: int) -> list[Row]:
        """Return rows of up to `limit` cached chunks whose key starts with `prefix`. Raises Busy."""
        if self._busy:
            raise Busy
        self._busy = True
        try:
            return await self._scan(prefix, limit)
        finally:
            self._busy = False

    async def _scan(self, prefix: bytes, limit: int) -> list[Row]:
        state, found, at = self._daemon.sessions, list[Row](), 0
        num_slots = 0 if state is None else state.arena.spec.num_slots
        while state is not None and at < num_slots and len(found) < limit:
            if (wait_s := self._free_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
                if state is not self._daemon.sessions:
                    break  # there is another arena
            began_s = now_s = time.perf_counter()
            while True:
                keys = [key for key in state.cache.keys_in(range(at, at + SLICE)) if key.startswith(prefix)]
                found += [dict(row) for row in state.cache.describe_chunks(keys[: limit - len(found)])]
                at, now_s = at + SLICE, time.perf_counter()
                if at >= num_slots or len(found) >= limit or now_s - began_s >= TURN_S:
                    break
            self._free_s = now_s + (SHARE - 1) * (now_s - began_s)
        return found
