"""The calls that reach libcuda: a stub of the library executes their arguments on host memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kvkern.transfer.gpu import cuda_driver as D
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.dma_runs import Runs
from kvkern.transfer.gpu.link_table import Direction

STREAM = 0x5EED


class Libcuda:
    """A stub that really copies. The batch call goes through its C signature."""

    def __init__(self, batch_api: bool = True, fail: int = 0) -> None:
        self.calls: list[str] = []
        self.order = 0
        self.attributes = {75: 9, 91: 1}  # an H100 that sees registered memory at the host's address
        self._fail = fail
        self._pointer = D._BATCH(self._batch)
        self._batch_api = batch_api

    def cuGetProcAddress_v2(self, name: bytes, found: Any, version: Any, flags: Any, status: Any) -> int:
        assert (name, version.value, flags.value) == (b"cuMemcpyBatchAsync", 12080, 0)
        if self._batch_api:
            found._obj.value = ctypes.cast(self._pointer, ctypes.c_void_p).value
        status._obj.value = 0 if self._batch_api else 2
        return 0

    def cuMemcpyAsync(self, dst: Any, src: Any, nbytes: Any, stream: Any) -> int:
        assert stream.value == STREAM
        self.calls.append("copy")
        ctypes.memmove(dst.value, src.value, nbytes.value)
        return self._fail

    def cuGetErrorName(self, code: Any, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_INVALID_VALUE"
        return 0

    def cuMemHostRegister_v2(self, address: Any, nbytes: Any, flags: Any) -> int:
        self.calls.append(f"register {address.value:#x} {nbytes.value} {flags.value}")
        return self._fail

    def cuMemHostUnregister(self, address: Any) -> int:
        self.calls.append(f"unregister {address.value:#x}")
        return self._fail

    def cuMemHostGetDevicePointer_v2(self, found: Any, address: Any, flags: Any) -> int:
        found._obj.value = address.value + 16
        return self._fail

    def cuCtxGetStreamPriorityRange(self, least: Any, greatest: Any) -> int:
        least._obj.value, greatest._obj.value = 0, -5
        return self._fail

    def cuStreamCreateWithPriority(self, stream: Any, flags: Any, priority: Any) -> int:
        assert (flags.value, priority.value) == (1, 0)  # non-blocking, the least
        stream._obj.value = STREAM
        return self._fail

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        self.calls.append(f"destroy {stream.value:#x}")
        return self._fail

    def cuDeviceGet(self, device: Any, index: Any) -> int:
        device._obj.value = index.value
        return self._fail

    def cuDeviceGetAttribute(self, found: Any, attribute: Any, device: Any) -> int:
        found._obj.value = self.attributes.get(attribute.value, attribute.value * 10 + device.value)
        return self._fail

    def cuDeviceGetPCIBusId(self, found: Any, size: Any, device: Any) -> int:
        assert size.value == len(found)
        found.value = f"0000:3B:0{device.value}.0".encode()
        return self._fail

    def _batch(
        self,
        dst: int,
        src: int,
        nbytes: int,
        count: int,
        attributes: int,
        first: int,
        num: int,
        failed: int,
        stream: int,
    ) -> int:
        assert (num, stream, ctypes.c_size_t.from_address(first).value) == (1, STREAM, 0)
        self.calls.append(f"batch of {count}")
        self.order = D._Attributes.from_address(attributes).srcAccessOrder
        arrays = [(ctypes.c_uint64 * count).from_address(a) for a in (dst, src, nbytes)]
        for to, at, size in zip(*arrays, strict=True):
            ctypes.memmove(to, at, size)
        return self._fail


@pytest.mark.parametrize(("batch_api", "count", "calls"), [
    (True, 1, ["copy"]), (True, 3, ["batch of 3"]), (False, 3, ["copy"] * 3), (True, 0, []),
])  # fmt: skip
@pytest.mark.parametrize(("direction", "order"), [(Direction.D2H, 1), (Direction.H2D, 3)])
def test_copies(batch_api: bool, count: int, calls: list[str], direction: Direction, order: int) -> None:
    """A store's sources are read in stream order, a load's sources at any time."""
    src, dst = np.arange(1, 41, dtype=np.uint8), np.zeros(40, dtype=np.uint8)
    at = np.arange(count) * 10
    lib = Libcuda(batch_api)
    D.Driver(lib).copy(Runs.of(dst.ctypes.data + at, src.ctypes.data + at, 5), direction, STREAM)
    assert lib.calls == calls
    for i in range(4):
        want = src[i * 10 : i * 10 + 5] if i < count else 0
        assert (dst[i * 10 : i * 10 + 5] == want).all()
        assert (dst[i * 10 + 5 : i * 10 + 10] == 0).all()
    if calls == ["batch of 3"]:
        assert lib.order == order


def test_a_batch_call_is_limited_in_size() -> None:
    src, dst = np.arange(2 * D.MAX_BATCH + 1, dtype=np.uint16), np.zeros(2 * D.MAX_BATCH + 1, dtype=np.uint16)
    at = np.arange(len(src)) * 2
    lib = Libcuda()
    D.Driver(lib).copy(Runs.of(dst.ctypes.data + at, src.ctypes.data + at, 2), Direction.H2D, STREAM)
    assert lib.calls == [f"batch of {D.MAX_BATCH}"] * 2 + ["batch of 1"]
    np.testing.assert_array_equal(dst, src)


@pytest.mark.parametrize(("attribute", "value", "trusted"), [
    (75, 8, True), (75, 9, True), (75, 10, False), (75, 12, False), (91, 0, False),
])  # fmt: skip
def test_batches_are_left_out_where_they_fail(attribute: int, value: int, trusted: bool) -> None:
    lib = Libcuda()
    lib.attributes[attribute] = value
    driver = D.Driver(lib)
    driver.limit_to_device(0)
    assert driver.batch_api == trusted
    src, dst = np.arange(2, dtype=np.uint64), np.zeros(2, dtype=np.uint64)
    driver.copy(Runs.of(dst.ctypes.data + 8 * src, src.ctypes.data + 8 * src, 8), Direction.D2H, STREAM)
    np.testing.assert_array_equal(dst, src)
    assert lib.calls == (["batch of 2"] if trusted else ["copy"] * 2)


def test_an_old_driver_has_no_batches() -> None:
    lib = Libcuda()
    lib.cuGetProcAddress_v2 = None  # type: ignore[method-assign,assignment]
    assert not D.Driver(lib).batch_api


def test_the_attributes_are_laid_out_as_cudas() -> None:
    assert ctypes.sizeof(D._Attributes) == 24  # an enum, two locations of two ints, flags


def test_registration_and_streams() -> None:
    lib = Libcuda()
    driver = D.Driver(lib)
    driver.register(0x7000, 8192)
    driver.unregister(0x7000)
    assert lib.calls == ["register 0x7000 8192 3", "unregister 0x7000"]  # portable and mapped
    assert driver.device_address(0x7000) == 0x7010
    assert driver.stream() == STREAM
    driver.destroy(STREAM)
    assert lib.calls[2:] == [f"destroy {STREAM:#x}"]
    assert driver.attribute(16, 2) == 162
    assert driver.host_pointers(2)
    assert driver.bus_id(2) == "0000:3b:02.0"
    assert driver.batch_api
    assert not D.Driver(Libcuda(batch_api=False)).batch_api


def test_every_refusal_is_named() -> None:
    driver = D.Driver(Libcuda(fail=1))
    one, two = (Runs.of(np.zeros(n, dtype=np.uint64), 0, 0) for n in (1, 2))
    for call in (
        lambda: driver.copy(one, Direction.D2H, STREAM),
        lambda: driver.copy(Runs(two.dst, two.dst, two.nbytes), Direction.D2H, STREAM),
        lambda: driver.register(4096, 4096),
        lambda: driver.unregister(4096),
        lambda: driver.device_address(4096),
        driver.stream,
        lambda: driver.destroy(STREAM),
        lambda: driver.attribute(91, 0),
        lambda: driver.bus_id(0),
    ):
        with pytest.raises(DeviceError, match=r"cu\w+ failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
            call()


def test_a_host_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DeviceError, match=r"libcuda\.so\.1 cannot be loaded.*driver visible"):
        D.load_libcuda()
