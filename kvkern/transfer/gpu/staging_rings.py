"""Buffers that the pieces of a lane use in turn, and the event after which each buffer may be used again.

table     block and row ids: pinned host memory, and its copy on the device. The host refills it after it has waited for
          UPLOADED. One stream reads and overwrites the copy, in stream order.
staging   rows of payload on the device, and the checksums. The stream that writes it first waits for the last event of its
          former piece.
sums      pinned host memory that checksums are copied down to. It is reused when its piece has ended.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .device import UPLOADED, Device, DeviceError, Event, Stream
from .dma_runs import Runs
from .link_table import Direction

MAX_STAGING_NBYTES = 32 << 20  # of a buffer, and so of a launch: the engine waits for one launch at most
MAX_LAUNCH_NBYTES = 64_000_000  # a larger launch starved decode for half a second: pegaflow pull request 422
MAX_PIECE_CHUNKS = 4096
_ALIGN = 16  # of every kernel argument: for a less aligned address Triton compiles again, in the middle of a job


@dataclass(frozen=True, slots=True)
class RingDepths:
    """The number of buffers of each kind. The window is wider than the buffers, so that the device never waits for the host."""

    staging_nbytes: int = MAX_STAGING_NBYTES  # payload bytes of a piece
    staging: int = 2
    payload: bool = True  # False: staging has no room for payload, for a copier that only chooses ZERO_COPY
    tables: int = 2
    window: int = 4  # pieces that are enqueued but not ended


@dataclass(slots=True)
class DeviceTable:
    """The ids of one launch. See above."""

    host: npt.NDArray[np.uint8]
    device: torch.Tensor  # [same] uint8
    uploaded: Event | None = None

    def upload(
        self,
        device: Device,
        stream: Stream,
        block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
        row_ids: npt.NDArray[np.int64],  # [n] int64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Upload (block ids, row ids), for work on `stream` only. May block until the former ids have left pinned memory."""
        n, rows_nbytes = len(row_ids), row_ids.nbytes
        pad = -rows_nbytes % _ALIGN
        begin, nbytes = rows_nbytes + pad, rows_nbytes + pad + block_ids.nbytes
        if self.uploaded is not None:
            self.uploaded.synchronize()
        ids_bytes = np.ascontiguousarray(block_ids).reshape(-1).view(np.uint8)
        device.write_pinned(
            self.host[:nbytes], np.concatenate([row_ids.view(np.uint8), np.zeros(pad, np.uint8), ids_bytes])
        )
        stream.copy(Runs.of(self.device.data_ptr(), self.host.ctypes.data, nbytes), Direction.H2D)
        self.uploaded = stream.record(UPLOADED)
        ids = self.device[begin:nbytes].view(torch.int32).view(n, -1)
        return ids, self.device[:rows_nbytes].view(torch.int64)


@dataclass(slots=True)
class Staging:
    """A staging buffer on the device. See above."""

    memory: torch.Tensor | None  # [bytes of rows] uint8; None: nothing is staged
    sums_memory: torch.Tensor  # [bytes of sums] uint8
    free_after: Event | None = None  # no work uses the buffer after this event

    def rows(self, n: int, part_nbytes: int) -> torch.Tensor:
        """[n, part_nbytes] uint8"""
        if self.memory is None:
            raise DeviceError(
                "this copier cannot stage a piece, because it has no staging memory (RingDepths.payload is False). Choose "
                "ZERO_COPY."
            )
        return self.memory[: n * part_nbytes].view(n, part_nbytes)

    def sums(self, n: int, planes: int) -> torch.Tensor:
        """[n, planes] uint64"""
        return self.sums_memory[: n * planes * 8].view(torch.uint64).view(n, planes)


class Rings:
    """The buffers of one lane. Only the lane's thread calls it."""

    def __init__(self, device: Device, depths: RingDepths, chunks: int, blocks_per_chunk: int, planes: int) -> None:
        table_nbytes, sums_nbytes = chunks * (8 + 4 * blocks_per_chunk) + _ALIGN, chunks * planes * 8
        self._tables = deque(
            DeviceTable(device.allocate_pinned(table_nbytes), device.allocate(table_nbytes))
            for _ in range(depths.tables)
        )
        self._staging = deque(
            Staging(device.allocate(depths.staging_nbytes) if depths.payload else None, device.allocate(sums_nbytes))
            for _ in range(depths.staging)
        )
        self.sums = deque(
            device.allocate_pinned(sums_nbytes) for _ in range(depths.window)
        )  # those that no piece has taken

    def next_table(self) -> DeviceTable:
        """Return the least recently used table."""
        self._tables.rotate(-1)
        return self._tables[-1]

    def next_staging(self) -> Staging:
        """Return the least recently used staging buffer."""
        self._staging.rotate(-1)
        return self._staging[-1]
