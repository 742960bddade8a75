"""Ends processes: those of a group without leaving their shared memory behind, and a helper together with its parent.

Python's resource tracker is a process that removes named shared memory and semaphores when every process that made some has
ended. It belongs to the group that it serves. So the others are killed first, and the tracker ends by itself.

Knows /proc; knows nothing of engines.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

TRACKER = b"multiprocessing.resource_tracker"  # in its command line
TRACKER_LIMIT_S = 5.0
PAUSE_S = 0.02
_PR_SET_PDEATHSIG = 1


def end(
    group: int,
    tracker_limit_s: float = TRACKER_LIMIT_S,  # a tracker that still runs after this time is killed too
) -> None:
    """Kill every process of the group except resource trackers, and wait until those have ended.

    The caller reaps its own children.
    """
    deadline = time.monotonic() + tracker_limit_s
    while members := list(_members(group)):
        for pid in members:
            if time.monotonic() > deadline or not _is_tracker(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)


def _members(group: int) -> Iterator[int]:
    """Yield the group's processes. One that has ended and waits to be reaped does not count."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it has just ended
            # Bytes, because a process's name may be anything.
            state, _, its_group = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state not in b"ZX":
                yield int(folder.name)


def _is_tracker(pid: int) -> bool:
    with suppress(OSError):
        return TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that forked it ends, even if that is killed. For `preexec_fn`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
