"""Times the operations of `calibrate.TimedOperations` on a device: plain copies, batches, and the kernels over its own pages.

until submitted   the host's clock around the call
until done        the device's clock: events before and after on its stream. Kernels are enqueued while the stream waits,
                  because launching takes Python longer than some kernels run. Copies are not enqueued behind a wait: a batch
                  that is submitted slowly is done slowly
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from ...kernels.layout import from_pages
from ...kernels.paged_tensors import PagedTensors
from .calibrate import DEVICE_NBYTES, HOST_NBYTES, SHORT_RUN_NBYTES
from .device import Device, Stream
from .dma_runs import Runs
from .link_table import Direction

_PAGE_NBYTES = 32 << 10  # K of one layer and 16 tokens of Llama-3.1-8B: the usual run
_BLOCKS_PER_CHUNK = 16
_PART_NBYTES = _PAGE_NBYTES * _BLOCKS_PER_CHUNK


class TimedStream(Stream, Protocol):
    """A stream with a clock."""

    def seconds(self, work: Callable[[], None], behind_wait: bool) -> float:
        """Time the work that the closure enqueues on this stream, by the device's clock. Blocks until it has run.

        With `behind_wait` the stream first waits some 0.1 ms, so that all work is enqueued when the clock starts.
        """


class TimedDevice(Device, Protocol):
    """A device whose streams have clocks."""

    def stream(self, name: str) -> TimedStream:
        """See Device."""


class Stopwatch:
    """See calibrate.TimedOperations. Until dropped it holds 128 MiB of the device, as staging does later, and 16 MiB pinned."""

    def __init__(self, device: TimedDevice, batch_api: bool, host_pointers: bool, warm_up: bool = True) -> None:
        self._device = device
        self._stream = device.stream("calibrate")
        self._host = device.allocate_pinned(HOST_NBYTES)
        self._rows = device.allocate(DEVICE_NBYTES)
        pages = device.allocate(DEVICE_NBYTES).view(-1, _PAGE_NBYTES)
        self._paged = PagedTensors.bind(from_pages([pages], block_tokens=16), [pages])
        chunks = DEVICE_NBYTES // _PART_NBYTES
        on = self._rows.device
        self._ids = torch.arange(chunks * _BLOCKS_PER_CHUNK, dtype=torch.int32, device=on).view(
            chunks, _BLOCKS_PER_CHUNK
        )
        self._row_ids = torch.arange(chunks, device=on)
        self._sums = torch.empty((chunks, 1), dtype=torch.uint64, device=on)
        self._stream.wait(device.record_computed())  # the ids are made on the current stream
        if warm_up:
            self._warm_up(batch_api, host_pointers)

    def copy(self, direction: Direction, nbytes: int) -> float:
        """See TimedOperations."""
        runs = self._runs(direction, 1, nbytes)
        return self._stream.seconds(lambda: self._stream.copy(runs, direction), behind_wait=False)

    def submit_copy(self, direction: Direction) -> float:
        """See TimedOperations."""
        runs = self._runs(direction, 1, 4096)
        return self._submitted(lambda: self._stream.copy(runs, direction))

    def submit_batch(self, direction: Direction, count: int) -> float:
        """See TimedOperations."""
        runs = self._runs(direction, count, 4096)
        return self._submitted(lambda: self._stream.copy(runs, direction))

    def short_runs(self, direction: Direction, count: int) -> float:
        """See TimedOperations."""
        runs = self._runs(direction, count, SHORT_RUN_NBYTES)
        return self._stream.seconds(lambda: self._stream.copy(runs, direction), behind_wait=False)

    def launch(self) -> float:
        """See TimedOperations."""
        ids, sums = self._ids[:1], self._sums[:1]
        return self._submitted(lambda: self._stream.checksum(self._paged, ids, sums, 1))

    def zero_copy(self, direction: Direction, ctas: int, nbytes: int) -> float:
        """See TimedOperations."""
        return self._kernel(direction, ctas, nbytes, torch.from_numpy(self._host))

    def relayout(self, direction: Direction, ctas: int, nbytes: int) -> float:
        """See TimedOperations."""
        return self._kernel(direction, ctas, nbytes, self._rows)

    def _kernel(self, direction: Direction, ctas: int, nbytes: int, rows: torch.Tensor) -> float:
        n = max(1, nbytes // _PART_NBYTES)
        run = self._stream.gather if direction is Direction.D2H else self._stream.scatter
        arguments = (self._paged, self._ids[:n], rows.view(-1, _PART_NBYTES), self._row_ids[:n], self._sums[:n], ctas)
        return self._stream.seconds(lambda: run(*arguments), behind_wait=True)

    def _runs(self, direction: Direction, count: int, nbytes: int) -> Runs:
        at = np.arange(count) * 2 * nbytes  # a gap after every run, so that no two runs touch
        device, host = self._rows.data_ptr() + at, self._host.ctypes.data + at
        return Runs.of(host, device, nbytes) if direction is Direction.D2H else Runs.of(device, host, nbytes)

    def _submitted(self, work: Callable[[], None]) -> float:
        begin = time.perf_counter()
        work()
        end = time.perf_counter()
        self._stream.synchronize()
        return end - begin

    def _warm_up(self, batch_api: bool, host_pointers: bool) -> None:
        """Compile and load the operations that will be timed."""
        for direction in Direction:
            self.submit_copy(direction)
            if batch_api:
                self.submit_batch(direction, 2)
                self.short_runs(direction, 2)
            self.relayout(direction, 16, _PART_NBYTES)
            if host_pointers:
                self.zero_copy(direction, 4, _PART_NBYTES)
        self.launch()
