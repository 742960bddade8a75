"""Which temporary files have no writer any more: their writer was killed.

    leftover    older than LEFTOVER_S by the file system's clock, and not changed for WATCHED_S by this process's own

Some file systems, such as CephFS, give files the time of the node that writes. There a file of a node whose clock is behind
looks old at once, so its age alone does not make a leftover.
"""

from __future__ import annotations

import os
import time

from .clock import FileSystemClock

LEFTOVER_S = 900.0
WATCHED_S = 30.0
MAX_WATCHED = 32_768  # temporary files; further ones are watched later

_State = tuple[int, int]  # last change in ns, bytes


class Leftovers:
    """Looks at the temporary files of each scan. Not thread-safe."""

    def __init__(self, clock: FileSystemClock) -> None:
        self._clock = clock
        self._before: dict[str, tuple[_State, float]] = {}  # path -> state, and since when this process sees it so
        self._now: dict[str, tuple[_State, float]] = {}

    def begin_scan(self) -> None:
        """Forget the files that the last scan did not meet."""
        self._before, self._now = self._now, {}

    def is_leftover(self, path: str, found: os.stat_result) -> bool:
        """Return True if nobody writes this file any more. Call it once for each file in a scan."""
        state, now_s, now_ns = (found.st_mtime_ns, found.st_size), time.monotonic(), self._clock.now_ns()
        before, since_s = self._before.get(path, (state, now_s))
        if before != state:
            since_s = now_s
        if len(self._now) < MAX_WATCHED:
            self._now[path] = state, since_s
        is_old = now_ns is not None and now_ns - found.st_mtime_ns > LEFTOVER_S * 1e9
        return is_old and now_s - since_s >= WATCHED_S
