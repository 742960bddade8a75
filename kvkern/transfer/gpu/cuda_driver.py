"""The few calls of the CUDA driver that torch does not offer: plain and batch copies, registration, streams of low priority.

It calls libcuda directly, which comes with the driver. So descriptors go to the driver as arrays; a binding would make a Python
object of each. It knows addresses. Its only decision is which of two copy calls to use.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .device import DeviceError
from .dma_runs import Runs
from .link_table import Direction

_BATCH_VERSION = 12080  # the CUDA version whose signature has failIdx; later drivers still offer this version
MAX_BATCH = 4096  # copies per call: a call with 50,000 has ended a process (vLLM issue 49276)
_BLACKWELL = 10  # compute capability, major
# CU_DEVICE_ATTRIBUTE_: COMPUTE_CAPABILITY_MAJOR, CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_CAPABILITY, _HOST_POINTERS = 75, 91
_STREAM_NON_BLOCKING = 1  # no order with the legacy default stream
_REGISTER_PORTABLE, _REGISTER_MAPPED = 1, 2
# When the driver may read the source. D2H: in stream order. H2D: at any time, because the host has finished writing it.
_ACCESS_ORDER = {Direction.D2H: 1, Direction.H2D: 3}


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))  # 0, 0: no hint


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes"""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", _Location),
        ("dstLocHint", _Location),
        ("flags", ctypes.c_uint),
    )


_PTR, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_BATCH = ctypes.CFUNCTYPE(ctypes.c_int, _PTR, _PTR, _PTR, _SIZE, _PTR, _PTR, _SIZE, _PTR, _PTR)


def trusts_batches(host_pointers: bool, capability: int) -> bool:
    """Return True if batch copies may be used on a GPU of this compute capability, provided that the driver has them.

    Batch copies take the host address of registered memory for its device address; plain copies look the device address up. If
    the two differ, a batch copy is an illegal access (SGLang issue 40232). On Blackwell batch copies have crashed and hung
    (vLLM issue 49276), and lmdeploy does not use them there.
    """
    return host_pointers and capability < _BLACKWELL


def load_libcuda() -> Any:
    """Load the driver's library. Raises DeviceError if there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(
            f"libcuda.so.1 cannot be loaded: {error}. Install the NVIDIA driver, or make the host's driver visible in this "
            f"container."
        ) from error


class Driver:
    """Calls into the driver, in the calling thread's current context. All of them raise DeviceError."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self._batch = self._find_batch()

    @property
    def batch_api(self) -> bool:
        """Whether one call makes many copies (CUDA 12.8)."""
        return self._batch is not None

    def limit_to_device(self, index: int) -> None:
        """Stop using batch copies if they are not safe on this device. See `trusts_batches`."""
        if not trusts_batches(self.host_pointers(index), self.attribute(_CAPABILITY, index)):
            self._batch = None

    def host_pointers(self, index: int) -> bool:
        """Return True if the device sees registered memory at the host's address. False under WSL2."""
        return bool(self.attribute(_HOST_POINTERS, index))

    def copy(self, runs: Runs, direction: Direction, stream: int) -> None:
        """Enqueue copies: one call per MAX_BATCH runs, or one call per run if there is no batch API. May fail half-way."""
        if self._batch is not None and len(runs.dst) > 1:
            for at in range(0, len(runs.dst), MAX_BATCH):
                part = slice(at, at + MAX_BATCH)
                self._copy_batch(Runs(runs.dst[part], runs.src[part], runs.nbytes[part]), direction, stream)
            return
        for dst, src, nbytes in zip(runs.dst.tolist(), runs.src.tolist(), runs.nbytes.tolist(), strict=True):
            self._check(self._lib.cuMemcpyAsync(_PTR(dst), _PTR(src), _SIZE(nbytes), _PTR(stream)), "cuMemcpyAsync")

    def stream(self) -> int:
        """Create a stream of the lowest priority that the device offers, and return its handle."""
        least, greatest, handle = ctypes.c_int(), ctypes.c_int(), _PTR()
        code = self._lib.cuCtxGetStreamPriorityRange(ctypes.byref(least), ctypes.byref(greatest))
        self._check(code, "cuCtxGetStreamPriorityRange")
        code = self._lib.cuStreamCreateWithPriority(ctypes.byref(handle), ctypes.c_uint(_STREAM_NON_BLOCKING), least)
        self._check(code, "cuStreamCreateWithPriority")
        return int(handle.value or 0)

    def destroy(self, stream: int) -> None:
        """Destroy a stream."""
        self._check(self._lib.cuStreamDestroy_v2(_PTR(stream)), "cuStreamDestroy")

    def register(self, address: int, nbytes: int) -> None:
        """Pin host pages and map them into every context."""
        flags = ctypes.c_uint(_REGISTER_PORTABLE | _REGISTER_MAPPED)
        self._check(self._lib.cuMemHostRegister_v2(_PTR(address), _SIZE(nbytes), flags), "cuMemHostRegister")

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        self._check(self._lib.cuMemHostUnregister(_PTR(address)), "cuMemHostUnregister")

    def device_address(self, address: int) -> int:
        """Return the device's address of registered host memory."""
        found = ctypes.c_uint64()
        code = self._lib.cuMemHostGetDevicePointer_v2(ctypes.byref(found), _PTR(address), ctypes.c_uint(0))
        self._check(code, "cuMemHostGetDevicePointer")
        return found.value

    def attribute(self, attribute: int, index: int) -> int:
        """Return a CUdevice_attribute of a device."""
        found = ctypes.c_int()
        code = self._lib.cuDeviceGetAttribute(ctypes.byref(found), ctypes.c_int(attribute), self._device(index))
        self._check(code, "cuDeviceGetAttribute")
        return found.value

    def bus_id(self, index: int) -> str:
        """Return the device's PCI address, as sysfs writes it."""
        found = ctypes.create_string_buffer(32)
        code = self._lib.cuDeviceGetPCIBusId(found, ctypes.c_int(len(found)), self._device(index))
        self._check(code, "cuDeviceGetPCIBusId")
        return found.value.decode().lower()

    def _device(self, index: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._check(self._lib.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)), "cuDeviceGet")
        return device

    def _copy_batch(self, runs: Runs, direction: Direction, stream: int) -> None:
        assert self._batch is not None
        arrays = [np.ascontiguousarray(a, dtype=np.uint64) for a in (runs.dst, runs.src, runs.nbytes)]
        attributes = _Attributes(srcAccessOrder=_ACCESS_ORDER[direction])
        first, failed = _SIZE(0), _SIZE(0)
        code = self._batch(
            *(a.ctypes.data for a in arrays), len(arrays[0]),
            ctypes.addressof(attributes), ctypes.addressof(first), 1, ctypes.addressof(failed), stream,
        )  # fmt: skip
        self._check(code, "cuMemcpyBatchAsync")

    def _find_batch(self) -> Any | None:
        found, status = _PTR(), ctypes.c_int()
        find = getattr(self._lib, "cuGetProcAddress_v2", None)
        if find is None:  # a driver older than CUDA 12
            return None
        code = find(
            b"cuMemcpyBatchAsync",
            ctypes.byref(found),
            ctypes.c_int(_BATCH_VERSION),
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
        return _BATCH(found.value) if code == 0 and status.value == 0 and found.value else None

    def _check(self, code: int, call: str) -> None:
        if code:
            name = ctypes.c_char_p()
            self._lib.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
            raise DeviceError(f"{call} failed: {(name.value or b'error').decode()} ({code})")
