"""What the GPU copier asks of a device: streams, events, copies and the three kernels. Nothing is decided behind it.

Enqueuing never blocks; work on one stream runs in order, work on two streams in any order that events do not forbid.
`cuda.py` is the real one; the tests have one that runs every allowed order on host memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from ...kernels.paged_copy import Backend
    from ...kernels.paged_tensors import PagedTensors
    from .dma import Runs
    from .link_table import Direction

# Names of events. Who waits for which is in lanes.py.
COMPUTED = "computed"  # the engine's stream, when the job was submitted
UPLOADED = "uploaded"  # an index table has left its pinned memory
GATHERED = "gathered"  # a store's blocks are in staging, or in the slots
SUMMED = "summed"  # a store's blocks have been read for their checksums
STORED = "stored"  # payload and checksums are in host memory
ARRIVED = "arrived"  # a load's payload is on the device
LOADED = "loaded"  # a load's blocks are written and their checksums are in host memory


class DeviceError(RuntimeError):
    """The driver refused, in its own words. In a job that is a fault like any other: a miss, not the caller's error.

    After a kernel that failed all later calls do: every transfer is then a miss.
    """


class Event(Protocol):
    """A place in a stream. Recorded once."""

    def query(self) -> bool:
        """Whether everything before it has run. Never blocks; any thread."""

    def synchronize(self) -> None:
        """Block this thread, without spinning, until everything before it has run."""


class Stream(Protocol):
    """A queue of work. One thread enqueues; arguments stay alive and unchanged until the work has run."""

    def record(self, name: str) -> Event:
        """A new event here."""

    def wait(self, event: Event) -> None:
        """What is enqueued from now on runs after `event`. The host does not wait."""

    def synchronize(self) -> None:
        """Block until the stream is empty."""

    def close(self) -> None:
        """Give the stream back, when it is empty and nobody enqueues any more. Idempotent. Raises DeviceError."""

    def copy(self, runs: Runs, direction: Direction) -> None:
        """Copy runs between device memory and pinned or registered host memory, in any order among themselves.

        Of D2H the sources are read in stream order; of H2D from the call on: host memory must be ready at the call.
        """

    def gather(
        self,
        paged: PagedTensors,
        block_ids: torch.Tensor,  # [n, blocks_per_chunk] int32 on the device
        rows: torch.Tensor,  # [num_rows, >= part_nbytes] uint8, on the device or an `device_address` of registered memory
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
    """One GPU, and host memory it can reach."""

    @property
    def backend(self) -> Backend:
        """Which kernels run here, for the self-test."""

    def attach(self) -> None:
        """Called by a thread before its first use of the device."""

    def stream(self, name: str) -> Stream:
        """A new stream of low priority, never the default one."""

    def record_computed(self) -> Event:
        """A new event in the calling thread's current stream: the engine's."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 on the device, aligned to 256. Raises DeviceError if there is no room."""

    def allocate_pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """[nbytes] uint8 pinned host memory, aligned to 64. Raises DeviceError."""

    def write_pinned(self, out: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> None:
        """`out[:] = values`, by the host, into memory of `allocate_pinned`."""

    def read_pinned(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A copy, by the host, out of memory of `allocate_pinned`."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin pages of this process, for copies and kernels. Raises DeviceError."""

    def unregister(self, address: int) -> None:
        """Undo a `register`. Raises DeviceError."""

    def device_address(self, address: int) -> int:
        """Where the device sees registered host memory; under WSL2 not at the host's address. Raises DeviceError."""

    def numa_node(self) -> int | None:
        """The host memory node nearest to the device; None where the system does not say."""
