"""Memory that transfers take turns in, and what must have happened before the next turn.

table     block and row ids: pinned host memory, and its copy on the device.  Refilled after UPLOADED, waited for by the
          host; the copy is read and overwritten by one stream, in its order.
staging   rows of payload on the device, and the checksums.  Reused after the last event of its former user, waited for
          by the stream that writes it first.
sums      pinned host memory that checksums come down to.  Reused when its piece has ended.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .device import UPLOADED, Device, DeviceError, Event, Stream
from .dma import Runs
from .link_table import Direction

MAX_STAGING_NBYTES = 32 << 20  # of a buffer, which is a launch: the engine waits that long at most
MAX_LAUNCH_NBYTES = 64_000_000  # one launch of more starved decode for half a second: pegaflow pull request 422
MAX_PIECE_CHUNKS = 4096
_ALIGN = 16  # of every argument: for an address that is less aligned Triton compiles anew, in the middle of a transfer


@dataclass(frozen=True, slots=True)
class RingDepths:
    """How many pieces share what. A lane's window is wider than its buffers: the device never waits for the host."""

    staging_nbytes: int = MAX_STAGING_NBYTES  # of payload a piece
    staging: int = 2
    payload: bool = True  # False: no room for payload, for a transfer that only ever chooses ZERO_COPY
    tables: int = 2
    window: int = 4  # pieces enqueued and not ended


@dataclass(slots=True)
class DeviceTable:
    """Ids of one launch. See above."""

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
        """(block ids, row ids) on the device, for work on `stream` only. May block until the former ids have left."""
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
    """A buffer on the device. See above."""

    memory: torch.Tensor | None  # [bytes of rows] uint8; None: nothing is staged
    sums_memory: torch.Tensor  # [bytes of sums] uint8
    free_after: Event | None = None  # after it nobody uses the buffer

    def rows(self, n: int, part_nbytes: int) -> torch.Tensor:
        """[n, part_nbytes] uint8"""
        if self.memory is None:
            raise DeviceError("a piece is to be staged where no memory was taken for that")
        return self.memory[: n * part_nbytes].view(n, part_nbytes)

    def sums(self, n: int, planes: int) -> torch.Tensor:
        """[n, planes] uint64"""
        return self.sums_memory[: n * planes * 8].view(torch.uint64).view(n, planes)


class Rings:
    """The memory of one lane, whose thread alone calls it."""

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
        """The one not used for longest."""
        self._tables.rotate(-1)
        return self._tables[-1]

    def next_staging(self) -> Staging:
        """The one not used for longest."""
        self._staging.rotate(-1)
        return self._staging[-1]
