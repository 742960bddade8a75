"""The clock that gives the files of a directory their times. Knows no values.

A file server stamps files with its own clock, and the clock of this machine may be far from it. So a file's time is compared
with the file system's clock only: kvkern touches a directory of its own and reads the time that it got. Between two
measurements the process's monotonic clock counts on, so nobody who sets a clock makes a file look old.
"""

from __future__ import annotations

import os
import time


class FileSystemClock:
    """The clock of one file system. Call `measure` from one thread, and `now_ns` from any."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._ahead_ns: int | None = None  # of this process's monotonic clock

    def measure(self) -> None:
        """Read the clock. If this directory cannot be touched now, what was measured before stays."""
        try:
            os.utime(self._directory)  # without times: the file system sets them
            self._ahead_ns = os.stat(self._directory).st_mtime_ns - time.monotonic_ns()
        except OSError:
            return

    def now_ns(self) -> int | None:
        """Return the time that a file written now would get, in ns. None: not known, and no file's age is either."""
        ahead_ns = self._ahead_ns
        return None if ahead_ns is None else time.monotonic_ns() + ahead_ns
