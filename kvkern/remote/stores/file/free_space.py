"""How many bytes a directory may still take from its file system, so that others find a share of it free. Knows no values.

    kept free    the larger of `percent` of the file system and FLOOR_NBYTES, of a small file system at most FLOOR_PERCENT
    headroom     what is free for users without privileges, less what is kept free

What is free is measured again after MEASURE_S, and before a write that would take an eighth of the headroom or more. In
between each write is subtracted. So what others write counts at once, wherever it matters.
"""

from __future__ import annotations

import os
import threading
import time

PERCENT = 5
FLOOR_NBYTES, FLOOR_PERCENT = 1 << 30, 10
MEASURE_S = 0.25


class FreeSpace:
    """The free space of the file system that holds `root`. Use it from any thread. Raises OSError."""

    def __init__(self, root: str, percent: int = PERCENT) -> None:
        self._root, self._percent = root, percent
        self._lock = threading.Lock()
        self._headroom_nbytes = 0
        self._measured_s = float("-inf")

    def kept_nbytes(self) -> int:
        """Return the bytes that stay free for others."""
        disk = os.statvfs(self._root)
        return self._kept(disk.f_frsize * disk.f_blocks)

    def headroom(self, wanted_nbytes: int) -> int:
        """Return how many bytes may be written; negative if others have taken a part of what is kept free.

        A caller that wants few of them gets what was measured lately, less what `wrote` has counted since.
        """
        with self._lock:
            if time.monotonic() - self._measured_s >= MEASURE_S or 8 * wanted_nbytes >= self._headroom_nbytes:
                disk = os.statvfs(self._root)
                size_nbytes = disk.f_frsize * disk.f_blocks
                # A file system that does not know its size keeps nothing free: it does not know that either.
                self._headroom_nbytes = (
                    disk.f_frsize * disk.f_bavail - self._kept(size_nbytes) if size_nbytes else 1 << 62
                )
                self._measured_s = time.monotonic()
            return self._headroom_nbytes

    def wrote(self, nbytes: int) -> None:
        """Count a value that this process has written."""
        with self._lock:
            self._headroom_nbytes -= nbytes

    def _kept(self, size_nbytes: int) -> int:
        if not self._percent:
            return 0
        floor_nbytes = min(FLOOR_NBYTES, size_nbytes * FLOOR_PERCENT // 100)
        return max(size_nbytes * self._percent // 100, floor_nbytes)
