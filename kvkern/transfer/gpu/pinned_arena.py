"""Registers an arena with the driver, so that copies run without blocking the host and kernels reach the arena.

It registers regions of at most 64 GiB, because one call for 512 GiB fails (vLLM issue 51080). Regions end between slots, so
that no copy crosses two registrations. The registered size is exact, unlike an allocator's pinned memory, which grows to
powers of two. Registration takes about 0.1 s a GB.

With several ranks, each rank registers the whole arena, though it moves only its own parts. Its parts lie in every slot, one
slot's length apart, so they would need as many registrations as there are slots. Pages that are pinned twice use memory once.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from pathlib import Path

from ...arena.file import Arena
from ...arena.room import Progress
from ...arena.slots import PAGE
from ...config import format_nbytes
from ...errors import ArenaError
from .device import Device, DeviceError

MAX_REGION_NBYTES = 64 << 30

logger = logging.getLogger("kvkern")


def split_into_regions(
    num_slots: int,
    slot_nbytes: int,
    max_nbytes: int = MAX_REGION_NBYTES,
) -> list[tuple[int, int]]:
    """Return (first byte, bytes) of each region: whole slots, and the file's header page in the first. No slot is cut."""
    per_region = max(1, (max_nbytes - PAGE) // slot_nbytes)
    out = []
    for first in range(0, num_slots, per_region):
        last = min(first + per_region, num_slots)
        begin = PAGE + first * slot_nbytes if first else 0
        out.append((begin, PAGE + last * slot_nbytes - begin))
    return out


class PinnedArena:
    """An arena's registration. Call `close` before the arena's last view is gone."""

    def __init__(
        self,
        arena: Arena,
        device: Device,
        progress: Progress = lambda line: None,
        max_nbytes: int = MAX_REGION_NBYTES,
    ) -> None:
        """Register the whole arena or nothing. Raises ArenaError, whose message says what to change."""
        self._device = device
        self._registered: list[int] = []
        self.shift: int | None = 0  # the device sees host address a at a + shift; None: the shift differs among regions
        start, base = time.monotonic(), arena.bytes.ctypes.data
        whole = arena.spec.nbytes
        try:
            for begin, nbytes in split_into_regions(arena.spec.num_slots, arena.spec.geometry.slot_nbytes, max_nbytes):
                device.register(base + begin, nbytes)
                self._registered.append(base + begin)
                seconds = time.monotonic() - start
                progress(
                    f"gpu: {format_nbytes(begin + nbytes)} of {format_nbytes(whole)} registered after {seconds:.1f} s"
                )
            shifts = {device.device_address(address) - address for address in self._registered}
        except DeviceError as error:
            self.close()
            raise ArenaError(_refusal_message(whole, error)) from error
        except BaseException:
            self.close()
            raise
        self.shift = shifts.pop() if len(shifts) == 1 else None
        if (node := device.numa_node()) is not None:
            progress(_nearness_line(node, pages_per_numa_node(base)))

    def close(self) -> None:
        """Unregister the regions, last region first. Idempotent.

        It attaches the calling thread to the device: without a context the driver refuses every region. A region that the
        driver refuses to unregister is logged, and stays registered until the process ends.
        """
        if self._registered:
            try:
                self._device.attach()
            except DeviceError as error:
                logger.warning(
                    "kvkern: this thread cannot use the GPU, so the arena may stay registered: %(error)s",
                    {"event": "arena_stays_registered", "error": error},
                )
        while self._registered:
            try:
                self._device.unregister(self._registered.pop())
            except DeviceError as error:
                logger.warning(
                    "kvkern: a region of the arena cannot be unregistered: %(error)s. It stays registered until "
                    "this process ends.",
                    {"event": "region_stays_registered", "error": error},
                )


def _refusal_message(nbytes: int, error: DeviceError) -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    words = "unlimited" if limit == resource.RLIM_INFINITY else format_nbytes(limit)
    return (
        f"the arena of {format_nbytes(nbytes)} cannot be registered with the GPU's driver: {error}. This process may lock "
        f"{words} of memory. Raise that limit (ulimit -l unlimited, docker run --ulimit memlock=-1), lower `capacity`, or "
        f"check whether the driver is older than the CUDA that torch was built for."
    )


def pages_per_numa_node(address: int, numa_maps: Path = Path("/proc/self/numa_maps")) -> dict[int, int]:
    """Return {memory node: number of pages} of the mapping that starts at this address; {} if the system does not say."""
    try:
        lines = os.fsdecode(numa_maps.read_bytes()).splitlines()  # it names mapped files, which may be no UTF-8
    except OSError:
        return {}
    for line in lines:
        start, *words = line.split()
        if int(start, 16) == address:
            counts = (word[1:].split("=") for word in words if word[0] == "N" and word[1:2].isdigit())
            return {int(node): int(pages) for node, pages in counts}
    return {}


def _nearness_line(node: int, pages: dict[int, int]) -> str:
    if not pages:
        return f"gpu: the GPU is near memory node {node}; the system does not say where the arena is"
    near = pages.get(node, 0) / sum(pages.values())
    advice = "" if near > 0.9 else f"; start the engine with numactl --membind={node} to have all of it near"
    return f"gpu: {near:.0%} of the arena is on the GPU's memory node {node}{advice}"
