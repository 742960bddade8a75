"""The CUDA device forwards each call to the right call of torch, Triton or the driver. Runs without a GPU, on test doubles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvkern.kernels import paged_copy_triton
from kvkern.transfer.gpu import cuda_device
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.dma_runs import Runs
from kvkern.transfer.gpu.link_table import Direction
from kvkern.transfer.gpu.nvml import Gpus
from tests.transfer.gpu.test_cuda_driver import STREAM, Libcuda

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All calls, in order."""
    calls: list[Any] = []

    class Event:
        def __init__(self, blocking: bool, enable_timing: bool = False) -> None:
            assert blocking
            self.times = enable_timing

        def record(self, stream: Any) -> None:
            calls.append(("record", stream.name))

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            calls.append(("wait for", "event"))

        def elapsed_time(self, end: Any) -> float:
            assert self.times
            assert end.times
            assert end is not self
            return 2.5  # ms

    class Stream:
        def __init__(self, name: Any, device: int = 1) -> None:
            assert device == 1
            self.name = name

        def wait_event(self, event: Any) -> None:
            calls.append(("wait", self.name))

        def synchronize(self) -> None:
            calls.append(("synchronize", self.name))

        def query(self) -> bool:
            return True

    @contextmanager
    def use(stream: Stream) -> Iterator[None]:
        calls.append(("use", stream.name))
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index=1: Stream("engine", index))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(("device", index)))
    monkeypatch.setattr(cuda_device, "load_libcuda", Libcuda)
    monkeypatch.setattr(
        cuda_device, "read_gpus", lambda: Gpus((SimpleNamespace(bus_id="0000:3b:01.0", numa_node=3),), "")
    )  # type: ignore[arg-type]
    for name in ("gather_chunks", "scatter_chunks", "checksum_chunks"):
        monkeypatch.setattr(paged_copy_triton, name, lambda *args, name=name: calls.append((name, *args)))
    return calls


def test_each_call_reaches_its_counterpart(log: list[Any]) -> None:
    device = cuda_device.CudaDevice(DEVICE)
    assert (device.numa_node(), device.host_pointers, device.batch_api, device.backend) == (3, True, True, "triton")
    device.record_computed()
    stream = device.stream("any")
    event = stream.record("any")
    stream.wait(event)
    stream.synchronize()
    stream.gather(*"abcde", 7)  # type: ignore[arg-type,call-arg]
    stream.scatter(*"abcde", 8)  # type: ignore[arg-type,call-arg]
    stream.checksum(*"abc", 9)  # type: ignore[arg-type,call-arg]
    assert log == [
        ("device", 1), ("record", "engine"), ("record", STREAM), ("wait", STREAM), ("synchronize", STREAM),
        ("use", STREAM), ("gather_chunks", *"abcde", 7), ("use", STREAM), ("scatter_chunks", *"abcde", 8),
        ("use", STREAM), ("checksum_chunks", *"abc", 9),
    ]  # fmt: skip


def test_the_device_s_clock_starts_when_all_is_enqueued(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("sleep", cycles > 0)), raising=False)
    stream = cuda_device.CudaDevice(DEVICE).stream("any")
    log.clear()
    timed = [("record", STREAM), "work", ("record", STREAM), ("wait for", "event")]
    assert stream.seconds(lambda: log.append("work"), behind_wait=False) == 2.5e-3
    assert log == timed
    log.clear()
    stream.seconds(lambda: log.append("work"), behind_wait=True)
    assert log == [("use", STREAM), ("sleep", True), *timed]


def test_a_stream_is_given_back_once(log: list[Any]) -> None:
    device = cuda_device.CudaDevice(DEVICE)
    stream = device.stream("any")
    stream.close()
    stream.close()
    assert device._driver._lib.calls == [f"destroy {STREAM:#x}"]
    with pytest.raises(AssertionError, match="closed"):
        stream.copy(Runs.of(0, 0, 8), Direction.D2H)


def test_a_device_without_a_number_is_the_current_one(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The benches and the tests on a GPU name it `torch.device("cuda")`."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    device = cuda_device.CudaDevice(torch.device("cuda"))
    device.record_computed()
    assert log == [("device", 1), ("record", "engine")]
    assert device.numa_node() == 3


def test_a_device_that_cannot_be_used_is_named(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "set_device", broken)
    with pytest.raises(DeviceError, match="out of memory"):
        cuda_device.CudaDevice(DEVICE)


def test_copies_are_the_drivers(log: list[Any]) -> None:
    device = cuda_device.CudaDevice(DEVICE)
    src, dst = np.arange(8, dtype=np.uint8), np.zeros(8, dtype=np.uint8)
    device.stream("any").copy(Runs.of(dst.ctypes.data, src.ctypes.data, 8), Direction.D2H)
    np.testing.assert_array_equal(dst, src)
    device.write_pinned(dst, src[::-1])
    np.testing.assert_array_equal(device.read_pinned(dst), src[::-1])
    device.register(4096, 8192)
    device.unregister(4096)
    assert device.device_address(4096) == 4112


def test_new_memory_waits_for_its_former_owner(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device, empty = cuda_device.CudaDevice(DEVICE), torch.empty
    monkeypatch.setattr(torch, "empty", lambda nbytes, dtype, device: empty(nbytes, dtype=dtype))
    assert len(device.allocate(100)) == 100
    assert log[-1] == ("synchronize", "engine")

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        DeviceError, match=r"no 100 B of GPU memory for staging: CUDA out of memory.*gpu_memory_utilization"
    ):
        device.allocate(100)
    with pytest.raises(DeviceError, match="out of memory"):
        device.allocate_pinned(100)


def test_torch_errors_become_device_errors(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cuda_device.CudaDevice(DEVICE).stream("any")

    def broken(self: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(stream._stream), "synchronize", broken)
    with pytest.raises(DeviceError, match="illegal memory access"):
        stream.synchronize()
