"""The HBM tier: slots on the GPU, their headers on the host. States, index and leases are those of the DRAM tier.

    FREE -> WRITING -> READY      as in DRAM, but no chunk is evicted for a new one: without a free slot it goes to DRAM
    READY -> READY and pinned     pin_least_recent: the least recently used chunks, pinned to be copied down
    READY -> FREE                 dropped, when DRAM has it

A chunk that moves between tiers keeps its header, except generation and owner. Its checksums are sealed again, but not
computed again. So if a copy spoils a byte, the chunk fails its checksum when it is read. This module knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..arena.file import ArenaSpec, Slots
from ..arena.slots import HEAD, IDENTITY, SlotGeometry, SlotState, seal
from ..config import format_nbytes
from ..errors import ArenaError, ConfigError
from ..policy.base import Use
from ..policy.lru import LRU
from .base import Lease
from .dram import DramTier


class SlotMover(Protocol):
    """Copies parts of slots between the tiers. Both methods return when all bytes are copied. Any thread may call them."""

    def copy_down(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """Copy the parts of slots `hbm[i]` to slots `dram[i]`."""

    def copy_up(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """Copy the parts of slots `dram[i]` to slots `hbm[i]`."""

    def close(self) -> None:
        """End the mover. Call it in a thread that may copy."""


class HostSlotMover:
    """`SlotMover` for a host that can read both tiers."""

    def __init__(self, hbm: Slots, dram: Slots) -> None:
        self._hbm, self._dram = hbm.parts(0), dram.parts(0)
        self._nbytes = hbm.spec.geometry.part_nbytes

    def copy_down(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """See SlotMover."""
        self._copy(self._hbm, hbm, self._dram, dram)

    def copy_up(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """See SlotMover."""
        self._copy(self._dram, dram, self._hbm, hbm)

    def close(self) -> None:
        """See SlotMover."""

    def _copy(
        self,
        rows: npt.NDArray[np.uint8],
        at: npt.NDArray[np.int64],
        out: npt.NDArray[np.uint8],
        to: npt.NDArray[np.int64],
    ) -> None:
        for source, target in zip(at.tolist(), to.tolist(), strict=True):
            np.copyto(out[target, : self._nbytes], rows[source, : self._nbytes])


class HbmSlots:
    """`Slots` whose parts are rows of a buffer on a device. Like an arena, but without a file."""

    def __init__(
        self,
        geometry: SlotGeometry,
        rows: npt.NDArray[
            np.uint8
        ],  # [num_slots, part_stride] uint8; on a GPU only its address counts: the host must not read it
        owner: object = None,  # owner of the buffer; kept alive as long as this object
    ) -> None:
        self.spec = ArenaSpec(geometry, len(rows))
        self.headers: npt.NDArray[np.void] = np.zeros(len(rows), dtype=geometry.dtype)
        self.identities = self._starts(IDENTITY)
        self.heads = self._starts(np.dtype(f"V{HEAD.itemsize}"))
        self.bytes: npt.NDArray[np.uint8] = rows.reshape(-1)
        self._rows, self._owner = rows, owner

    def _starts(self, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
        return np.ndarray(self.headers.shape, dtype, self.headers.data, strides=self.headers.strides)

    def parts(
        self,
        rank: int,
    ) -> npt.NDArray[np.uint8]:  # [num_slots, part_stride] uint8 view
        """See `Arena.parts`. Raises ArenaError for the parts of other ranks, because they are on other GPUs."""
        if rank:
            raise ArenaError(f"rank {rank}'s parts of the HBM tier are on another GPU; use rank 0, or leave hbm out")
        return self._rows

    def mark_bad(self, slots: npt.NDArray[np.int64]) -> None:
        """See `Arena.mark_bad`."""
        self.headers["state"][slots] = SlotState.BAD


def count_slots(geometry: SlotGeometry, nbytes: int) -> int:
    """Return how many slots fit into `nbytes` of device memory. Only parts count: headers are on the host.

    Raises ConfigError if no slot fits.
    """
    if geometry.world_size != 1:
        raise ConfigError(
            f"hbm with {geometry.world_size} ranks is not possible: a GPU holds the parts of one rank only; leave hbm out"
        )
    if not (count := nbytes // geometry.part_stride):
        raise ConfigError(
            f"hbm {format_nbytes(nbytes)} holds no chunk: one takes {format_nbytes(geometry.part_stride)}; raise hbm, or "
            f"use fewer blocks per chunk"
        )
    return count


class HbmTier(DramTier):
    """Index, free list and leases over slots on a GPU. See DramTier.

    Its policy is LRU. DRAM's policy decides which chunks are worth keeping.
    """

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots, LRU())

    def pin_least_recent(self, count: int) -> Lease:
        """Pin up to `count` chunks, the least recently used. They stay READY until the caller drops them."""
        idle = [key for key in self._policy.victims(count) if key in self._index and not self._pins[self._index[key]]]
        self._policy.insert(idle, Use())  # `victims` made the policy forget them
        return self._lease(idle)

    def _make_room(self, wanted: int, offered: Sequence[bytes]) -> tuple[list[bytes], set[bytes]]:
        return [], set()


def begin_moved_slots(
    source: Slots,
    at: npt.NDArray[np.int64],  # [n] int64, READY and leased
    target: Slots,
    to: npt.NDArray[np.int64],  # [n] int64, granted to the caller
    generations: npt.NDArray[np.uint64],  # [n] uint64, of the grant
    owner: tuple[int, int],  # pid and start time of the process that copies
) -> None:
    """Write the chunks' names into the headers of the target slots, before the copy."""
    heads = source.heads[at].view(HEAD)
    heads["generation"], heads["state"] = generations, SlotState.WRITING
    heads["owner_pid"], heads["owner_start"] = owner
    target.heads[to] = heads.view(target.heads.dtype)


def finish_moved_slots(
    source: Slots,
    at: npt.NDArray[np.int64],  # as for begin_moved_slots
    target: Slots,
    to: npt.NDArray[np.int64],
    generations: npt.NDArray[np.uint64],
) -> None:
    """Seal the checksums of copied chunks for their new slots, then mark the new slots written."""
    old, new = source.headers, target.headers
    keys: npt.NDArray[np.void] = old["key"][at]
    change = seal(keys, old["generation"][at]) ^ seal(keys, generations)
    new["checksum"][to] = old["checksum"][at] ^ change[:, None, None]
    new["plane_nbytes"][to] = old["plane_nbytes"][at]
    new["written"][to] = generations[:, None]
