"""The HBM tier: slots on the GPU, their headers on the host. Same states, index and leases as DRAM's; knows no device.

    FREE -> WRITING -> READY      as in DRAM, but nothing is evicted to make room: what finds none goes to DRAM at once
    READY -> READY and pinned     pin_least_recent: what is least recently used, for who copies it down
    READY -> FREE                 dropped, when DRAM has it

A chunk that moves between tiers keeps its header but for generation and owner. Its checksums are sealed anew, not summed
anew: what a copy spoils does not verify when it is read.
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
    """Moves parts of slots between the tiers. Both return when the bytes are where they belong; any thread."""

    def copy_down(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """Copy the parts of slots `hbm[i]` to slots `dram[i]`."""

    def copy_up(self, hbm: npt.NDArray[np.int64], dram: npt.NDArray[np.int64]) -> None:
        """The other way."""

    def close(self) -> None:
        """Nothing is moved any more. By a thread that has moved, or may."""


class HostSlotMover:
    """`SlotMover` where the host reads both tiers."""

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
    """`Slots` whose parts are rows of a buffer on a device: what is there of an arena without a file."""

    def __init__(
        self,
        geometry: SlotGeometry,
        rows: npt.NDArray[np.uint8],  # [num_slots, part_stride] uint8; on a GPU for its address: no host may read it
        owner: object = None,  # kept as long as the rows are needed
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
        """See `Arena.parts`. Raises ArenaError for other ranks' parts: they are on other GPUs."""
        if rank:
            raise ArenaError(f"rank {rank}'s parts of the HBM tier are on another GPU")
        return self._rows

    def mark_bad(self, slots: npt.NDArray[np.int64]) -> None:
        """See `Arena.mark_bad`."""
        self.headers["state"][slots] = SlotState.BAD


def count_slots(geometry: SlotGeometry, nbytes: int) -> int:
    """Slots that fit into so much device memory: parts only, headers are the host's. Raises ConfigError if none does."""
    if geometry.world_size != 1:
        raise ConfigError(f"hbm with {geometry.world_size} ranks: a GPU holds one rank's parts only; leave hbm out")
    if not (count := nbytes // geometry.part_stride):
        raise ConfigError(
            f"hbm {format_nbytes(nbytes)} holds no chunk: one takes {format_nbytes(geometry.part_stride)}; raise hbm, or "
            f"use fewer blocks per chunk"
        )
    return count


class HbmTier(DramTier):
    """Index, free list and leases over slots on a GPU. See DramTier; LRU, as DRAM's policy says what is worth keeping."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots, LRU())

    def pin_least_recent(self, count: int) -> Lease:
        """Pin up to `count` chunks, the least recently used. They stay READY until who asked has dropped them."""
        idle = [key for key in self._policy.victims(count) if key in self._index and not self._pins[self._index[key]]]
        self._policy.insert(idle, Use())  # naming them has made the policy forget them
        return self._lease(idle)

    def _make_room(self, wanted: int, offered: Sequence[bytes]) -> tuple[list[bytes], set[bytes]]:
        return [], set()


def begin_moved_slots(
    source: Slots,
    at: npt.NDArray[np.int64],  # [n] int64, READY and leased
    target: Slots,
    to: npt.NDArray[np.int64],  # [n] int64, granted to the caller
    generations: npt.NDArray[np.uint64],  # [n] uint64, of the grant
    owner: tuple[int, int],  # pid and start time of who copies
) -> None:
    """Name the chunks that are about to be copied, in the headers they go to."""
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
    """Seal the checksums of copied chunks for their new slots, then mark these written."""
    old, new = source.headers, target.headers
    keys: npt.NDArray[np.void] = old["key"][at]
    change = seal(keys, old["generation"][at]) ^ seal(keys, generations)
    new["checksum"][to] = old["checksum"][at] ^ change[:, None, None]
    new["plane_nbytes"][to] = old["plane_nbytes"][at]
    new["written"][to] = generations[:, None]
