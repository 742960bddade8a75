"""The device interface of the GPU copier: streams, events, copies and three kernels. An implementation decides nothing.

Enqueuing never blocks. Work on one stream runs in order. Work on two streams runs in any order that events do not forbid.
`cuda_device.py` is the real device, `dry_run_device.py` runs on the host, and the tests have one that runs every allowed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from ...kernels.paged_copy import Backend
    from ...kernels.paged_tensors import PagedTensors
    from .dma_runs import Runs
    from .link_table import Direction

# Names of events. stream_lanes.py says which stream or thread waits for which event.
COMPUTED = "computed"  # the engine's stream, when the job was submitted
UPLOADED = "uploaded"  # an index table has left its pinned memory
GATHERED = "gathered"  # a store's blocks are in staging, or in the slots
SUMMED = "summed"  # a store's blocks have been read for their checksums
STORED = "stored"  # payload and checksums are in host memory
ARRIVED = "arrived"  # a load's payload is on the device
LOADED = "loaded"  # a load's blocks are written and their checksums are in host memory


class DeviceError(RuntimeError):
    """The driver refused a call; the message is the driver's. In a job this is a fault, and so a miss, not the caller's error.

    After one failed kernel all later calls fail, so every later job is a miss.
    """


class Event(Protocol):
    """A point in a stream. Recorded once."""

    def query(self) -> bool:
        """Return True if all work before the event has run. Never blocks. Any thread may call it."""

    def synchronize(self) -> None:
        """Block this thread, without spinning, until all work before the event has run."""


class Stream(Protocol):
    """A queue of work. One thread enqueues. Arguments must stay alive and unchanged until the work has run."""

    def record(self, name: str) -> Event:
        """Return a new event after all work enqueued so far."""

    def wait(self, event: Event) -> None:
        """Let all work enqueued from now on run after `event`. The host does not wait."""

    def synchronize(self) -> None:
        """Block until the stream is empty."""

    def close(self) -> None:
        """Destroy the stream. It must be empty, and no thread may enqueue any more. Idempotent. Raises DeviceError."""

    def copy(self, runs: Runs, direction: Direction) -> None:
        """Copy runs between device memory and pinned or registered host memory. The order of the runs is not defined.

        D2H reads its sources in stream order. H2D may read them from the call on, so host memory must be ready at the call.
        """

    def gather(
        self,
        paged: PagedTensors,
        block_ids: torch.Tensor,  # [n, blocks_per_chunk] int32 on the device
        rows: torch.Tensor,  # [num_rows, >= part_nbytes] uint8, on the device, or registered memory at its `device_address`
        row_ids: torch.Tensor,  # [n] int64 on the device
        sums: torch.Tensor,  # out: [n, planes] uint64 on the device
        max_ctas: int,
    ) -> None:
        """See `paged_copy_triton.gather_chunks`."""

    def scatter(
        self,
        paged: PagedTensors,
        block_ids: torch.Tensor,  # as for gather
        rows: torch.Tensor,
        row_ids: torch.Tensor,
        sums: torch.Tensor,
        max_ctas: int,
    ) -> None:
        """See `paged_copy_triton.scatter_chunks`."""

    def checksum(
        self,
        paged: PagedTensors,
        block_ids: torch.Tensor,  # [n, blocks_per_chunk] int32 on the device
        sums: torch.Tensor,  # out: [n, planes] uint64 on the device
        max_ctas: int,
    ) -> None:
        """See `paged_copy_triton.checksum_chunks`."""


class Device(Protocol):
    """One GPU, and the host memory that it can reach."""

    @property
    def backend(self) -> Backend:
        """The kernels that run on this device, for the self-test."""

    def attach(self) -> None:
        """Make this device current in the calling thread. A thread calls it before its first use of the device."""

    def stream(self, name: str) -> Stream:
        """Create a stream of low priority. It is never the default stream."""

    def record_computed(self) -> Event:
        """Return a new event in the calling thread's current stream, which is the engine's."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return [nbytes] uint8 on the device, aligned to 256. Raises DeviceError if there is no room."""

    def allocate_pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return [nbytes] uint8 of pinned host memory, aligned to 64. Raises DeviceError."""

    def write_pinned(self, out: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> None:
        """Set `out[:] = values` on the host. `out` is memory of `allocate_pinned`."""

    def read_pinned(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return a copy of `values`, made by the host. `values` is memory of `allocate_pinned`."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin pages of this process, for copies and kernels. Raises DeviceError."""

    def unregister(self, address: int) -> None:
        """Undo a `register`. Raises DeviceError."""

    def device_address(self, address: int) -> int:
        """Return the device's address of registered host memory. Under WSL2 the host's address differs. Raises DeviceError."""

    def numa_node(self) -> int | None:
        """Return the host memory node nearest to the device; None if the system does not say."""
