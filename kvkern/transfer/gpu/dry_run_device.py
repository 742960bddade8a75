"""A device on this host that runs every operation at once, in the order of the calls. For dry runs of benches and tests.

It shows that a script works from end to end. It does not test the order of operations: tests/transfer/gpu/fake_device.py
does. Its times mean nothing.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.paged_copy import Backend, checksum_chunks, gather_chunks, scatter_chunks
from ...kernels.paged_tensors import PagedTensors
from .dma_runs import Runs
from .link_table import Direction


class DryRunEvent:
    """An event that has always happened."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class DryRunStream:
    """See kvkern.transfer.gpu.device.Stream."""

    def record(self, name: str) -> DryRunEvent:
        return DryRunEvent()

    def wait(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass

    def copy(self, runs: Runs, direction: Direction) -> None:
        for dst, src, nbytes in zip(runs.dst, runs.src, runs.nbytes, strict=True):
            ctypes.memmove(int(dst), int(src), int(nbytes))

    def gather(
        self, paged: PagedTensors, block_ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, max_ctas: int,
    ) -> None:  # fmt: skip
        gather_chunks(paged, block_ids.numpy(), rows.numpy(), row_ids.numpy(), sums.numpy())

    def scatter(
        self, paged: PagedTensors, block_ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, max_ctas: int,
    ) -> None:  # fmt: skip
        scatter_chunks(paged, block_ids.numpy(), rows.numpy(), row_ids.numpy(), sums.numpy())

    def checksum(self, paged: PagedTensors, block_ids: torch.Tensor, sums: torch.Tensor, max_ctas: int) -> None:
        checksum_chunks(paged, block_ids.numpy(), sums.numpy())


class DryRunDevice:
    """See kvkern.transfer.gpu.device.Device."""

    backend: Backend = "numba"

    def attach(self) -> None:
        pass

    def stream(self, name: str) -> DryRunStream:
        return DryRunStream()

    def record_computed(self) -> DryRunEvent:
        return DryRunEvent()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.from_numpy(self.allocate_pinned(nbytes))

    def allocate_pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        raw = np.zeros(nbytes + 256, dtype=np.uint8)
        return raw[-raw.ctypes.data % 256 :][:nbytes]

    def write_pinned(self, out: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> None:
        out[:] = values

    def read_pinned(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return values.copy()

    def register(self, address: int, nbytes: int) -> None:
        pass

    def unregister(self, address: int) -> None:
        pass

    def device_address(self, address: int) -> int:
        return address

    def numa_node(self) -> int | None:
        return None
