"""Times the operations that `calibrate` asks for on a device: plain copies, batches and the kernels over pages of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from ..kernels.layout import from_pages
from ..kernels.paged_copy import PagedTensors
from .calibrate import BUFFER_NBYTES
from .device import Device, Stream
from .dma import Runs
from .table import Direction

_PAGE = 32 << 10  # of L8B's K of a layer and 16 tokens: the usual run
_PER_CHUNK = 16
_PART = _PAGE * _PER_CHUNK


class Stopwatch:
    """See calibrate.Timed. Holds three buffers of device memory and one of pinned memory until it is dropped."""

    def __init__(self, device: Device, batch_api: bool, host_pointers: bool, warm_up: bool = True) -> None:
        self._device = device
        self._stream: Stream = device.stream("calibrate")
        self._host = device.host(BUFFER_NBYTES)
        self._rows = device.memory(BUFFER_NBYTES)
        pages = device.memory(BUFFER_NBYTES).view(-1, _PAGE)
        self._paged = PagedTensors.bind(from_pages([pages], block_tokens=16), [pages])
        chunks = BUFFER_NBYTES // _PART
        on = self._rows.device
        self._ids = torch.arange(chunks * _PER_CHUNK, dtype=torch.int32, device=on).view(chunks, _PER_CHUNK)
        self._row_ids = torch.arange(chunks, device=on)
        self._sums = torch.empty((chunks, 1), dtype=torch.uint64, device=on)
        self._stream.wait(device.computed())  # the ids are made on the current stream
        if warm_up:
            self._warm_up(batch_api, host_pointers)

    def copy(self, direction: Direction, nbytes: int) -> float:
        """See Timed."""
        return self._time(lambda: self._stream.copy(self._runs(direction, 1, nbytes), direction), done=True)

    def submit_copy(self, direction: Direction) -> float:
        """See Timed."""
        runs = self._runs(direction, 1, 4096)
        return self._time(lambda: self._stream.copy(runs, direction), done=False)

    def submit_batch(self, direction: Direction, count: int) -> float:
        """See Timed."""
        runs = self._runs(direction, count, 4096)
        return self._time(lambda: self._stream.copy(runs, direction), done=False)

    def launch(self) -> float:
        """See Timed."""
        ids, sums = self._ids[:1], self._sums[:1]
        return self._time(lambda: self._stream.checksum(self._paged, ids, sums, 1), done=False)

    def zero_copy(self, direction: Direction, ctas: int, nbytes: int) -> float:
        """See Timed."""
        return self._kernel(direction, ctas, nbytes, torch.from_numpy(self._host))

    def relayout(self, direction: Direction, ctas: int, nbytes: int) -> float:
        """See Timed."""
        return self._kernel(direction, ctas, nbytes, self._rows)

    def _kernel(self, direction: Direction, ctas: int, nbytes: int, rows: torch.Tensor) -> float:
        n = max(1, nbytes // _PART)
        run = self._stream.gather if direction is Direction.D2H else self._stream.scatter
        arguments = (self._paged, self._ids[:n], rows.view(-1, _PART), self._row_ids[:n], self._sums[:n], ctas)
        return self._time(lambda: run(*arguments), done=True)

    def _runs(self, direction: Direction, count: int, nbytes: int) -> Runs:
        at = np.arange(count) * 2 * nbytes  # runs that do not touch
        device, host = self._rows.data_ptr() + at, self._host.ctypes.data + at
        return Runs.of(host, device, nbytes) if direction is Direction.D2H else Runs.of(device, host, nbytes)

    def _time(self, work: Callable[[], None], done: bool) -> float:
        begin = time.perf_counter()
        work()
        submitted = time.perf_counter()
        self._stream.record("timed").synchronize()
        return (time.perf_counter() if done else submitted) - begin

    def _warm_up(self, batch_api: bool, host_pointers: bool) -> None:
        """Compile and load what will be timed."""
        for direction in Direction:
            self.submit_copy(direction)
            if batch_api:
                self.submit_batch(direction, 2)
            self.relayout(direction, 16, _PART)
            if host_pointers:
                self.zero_copy(direction, 4, _PART)
        self.launch()
