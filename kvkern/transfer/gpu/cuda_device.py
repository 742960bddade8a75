"""The CUDA device: torch's streams and events, Triton's kernels, the driver's copies. It forwards calls and decides nothing.

stream_lanes.py decides the order of these calls, and tests prove that order without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from ...config import format_nbytes
from ...errors import UnsupportedError
from ...kernels import paged_copy_triton
from ...kernels.paged_copy import Backend
from ...kernels.paged_tensors import PagedTensors
from .cuda_driver import Driver, load_libcuda
from .device import DeviceError, Event
from .dma_runs import Runs
from .link_table import Direction
from .nvml import GpuInfo, read_gpus

HEAD_START_CYCLES = 200_000  # 0.1 to 0.15 ms at full clock: Python needs less to launch a kernel


@contextmanager
def _cuda_errors() -> Iterator[None]:
    """Raise a RuntimeError of torch as DeviceError: torch reports CUDA's errors as RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(str(error)) from error


class CudaStream:
    """A non-blocking stream of the lowest priority. See device.Stream."""

    def __init__(self, driver: Driver, index: int) -> None:
        self._driver = driver
        self._handle: int | None = driver.stream()
        self._stream = torch.cuda.ExternalStream(self._handle, device=index)

    def record(self, name: str) -> Event:
        """See device.Stream. The event is of the blocking kind: a thread that waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        with _cuda_errors():
            event.record(self._stream)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        with _cuda_errors():
            self._stream.wait_event(event)

    def synchronize(self) -> None:
        with _cuda_errors():
            self._stream.synchronize()

    def seconds(self, work: Callable[[], None], behind_wait: bool) -> float:
        """See stopwatch.TimedStream."""
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        with _cuda_errors():
            if behind_wait:
                with torch.cuda.stream(self._stream):
                    torch.cuda._sleep(HEAD_START_CYCLES)
            begin.record(self._stream)
            work()
            end.record(self._stream)
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._driver.destroy(handle)

    def copy(self, runs: Runs, direction: Direction) -> None:
        assert self._handle is not None, "the stream is closed"
        self._driver.copy(runs, direction, self._handle)

    def gather(
        self, paged: PagedTensors, block_ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, max_ctas: int,
    ) -> None:  # fmt: skip
        with _cuda_errors(), torch.cuda.stream(self._stream):
            paged_copy_triton.gather_chunks(paged, block_ids, rows, row_ids, sums, max_ctas)

    def scatter(
        self, paged: PagedTensors, block_ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, max_ctas: int,
    ) -> None:  # fmt: skip
        with _cuda_errors(), torch.cuda.stream(self._stream):
            paged_copy_triton.scatter_chunks(paged, block_ids, rows, row_ids, sums, max_ctas)

    def checksum(self, paged: PagedTensors, block_ids: torch.Tensor, sums: torch.Tensor, max_ctas: int) -> None:
        with _cuda_errors(), torch.cuda.stream(self._stream):
            paged_copy_triton.checksum_chunks(paged, block_ids, sums, max_ctas)


class CudaDevice:
    """See device.Device. Create it in the engine's thread, while the engine's device is current."""

    backend: Backend = "triton"

    def __init__(
        self,
        device: torch.device,  # without an index: the current one
    ) -> None:
        if torch.version.hip is not None:
            raise UnsupportedError(
                f"this torch ({torch.__version__}) is built for ROCm, but kvkern copies to and from CUDA GPUs only. Use a "
                f"torch built for CUDA, or leave kvkern out."
            )
        index: int | None = device.index
        with _cuda_errors():
            self._index = torch.cuda.current_device() if index is None else index
        self.attach()
        self._driver = Driver(load_libcuda())
        self._driver.limit_to_device(self._index)
        self.info: GpuInfo | None = read_gpus().by_bus_id(self._driver.bus_id(self._index))

    @property
    def name(self) -> str:
        """The name of the GPU's model, for hosts where NVML does not show the GPU."""
        return torch.cuda.get_device_name(self._index)

    @property
    def batch_api(self) -> bool:
        """Whether one call of the driver makes many copies."""
        return self._driver.batch_api

    @property
    def host_pointers(self) -> bool:
        """Whether kernels see registered memory at the host's address. False under WSL2."""
        return self._driver.host_pointers(self._index)

    def attach(self) -> None:
        with _cuda_errors():
            torch.cuda.set_device(self._index)
            torch.cuda.current_stream().query()  # makes the context current, for the driver's calls

    def stream(self, name: str) -> CudaStream:
        return CudaStream(self._driver, self._index)

    def record_computed(self) -> Event:
        event = torch.cuda.Event(blocking=True)
        with _cuda_errors():
            event.record(torch.cuda.current_stream(self._index))
        return event

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            made = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{self._index}")
        except RuntimeError as error:
            raise DeviceError(
                f"no {format_nbytes(nbytes)} of GPU memory for staging: {error}. Let the engine take less GPU memory (in vLLM: "
                f"gpu_memory_utilization)."
            ) from error
        with _cuda_errors():  # the allocator may return memory that work still queued on this stream uses
            torch.cuda.current_stream(self._index).synchronize()
        return made

    def allocate_pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        with _cuda_errors():
            pinned: npt.NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned

    def write_pinned(self, out: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> None:
        out[:] = values

    def read_pinned(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return values.copy()

    def register(self, address: int, nbytes: int) -> None:
        self._driver.register(address, nbytes)

    def unregister(self, address: int) -> None:
        self._driver.unregister(address)

    def device_address(self, address: int) -> int:
        return self._driver.device_address(address)

    def numa_node(self) -> int | None:
        return None if self.info is None else self.info.numa_node
