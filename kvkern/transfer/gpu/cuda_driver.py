"""The few calls of the CUDA driver that torch has no name for: plain and batch copies, registration, streams of low priority.

Straight from libcuda, which comes with the driver: descriptors go there as arrays, where a binding would make a Python object
of each. Knows addresses; decides nothing but which of two copy calls to use.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .device import DeviceError
from .dma import Runs
from .link_table import Direction

_BATCH_VERSION = 12080  # of CUDA: the signature with failIdx, which later drivers go on answering to
MAX_BATCH = 4096  # copies of a call: 50,000 have ended a process (vLLM issue 49276)
_BLACKWELL = 10  # compute capability
# CU_DEVICE_ATTRIBUTE_: COMPUTE_CAPABILITY_MAJOR, CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_CAPABILITY, _HOST_POINTERS = 75, 91
_STREAM_NON_BLOCKING = 1  # no order with the legacy default stream
_REGISTER_PORTABLE, _REGISTER_MAPPED = 1, 2
# Who may read the source when: D2H after what is before it in the stream; H2D any time, the host has finished with it.
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
    """Whether batch copies may be used on a GPU of this compute capability, if the driver has them.

    They take registered memory's host address for the device's, where plain copies look it up: an illegal access where the
    two differ (SGLang issue 40232). On Blackwell they have crashed and hung: lmdeploy leaves them out there, vLLM issue 49276.
    """
    return host_pointers and capability < _BLACKWELL


def load_libcuda() -> Any:
    """Raises DeviceError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"libcuda.so.1 cannot be loaded: {error}; is the NVIDIA driver visible in here?") from error


class Driver:
    """Calls in the calling thread's current context. All raise DeviceError."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self._batch = self._find_batch()

    @property
    def batch_api(self) -> bool:
        """Whether many copies go in one call (CUDA 12.8)."""
        return self._batch is not None

    def limit_to_device(self, index: int) -> None:
        """Do without batch copies from now on where a device cannot be trusted with them."""
        if not trusts_batches(self.host_pointers(index), self.attribute(_CAPABILITY, index)):
            self._batch = None

    def host_pointers(self, index: int) -> bool:
        """Whether a device sees registered memory at the host's address: not under WSL2."""
        return bool(self.attribute(_HOST_POINTERS, index))

    def copy(self, runs: Runs, direction: Direction, stream: int) -> None:
        """Enqueue copies: one call for some thousands, or one a run where there is no other. May fail half-way."""
        if self._batch is not None and len(runs.dst) > 1:
            for at in range(0, len(runs.dst), MAX_BATCH):
                part = slice(at, at + MAX_BATCH)
                self._copy_batch(Runs(runs.dst[part], runs.src[part], runs.nbytes[part]), direction, stream)
            return
        for dst, src, nbytes in zip(runs.dst.tolist(), runs.src.tolist(), runs.nbytes.tolist(), strict=True):
            self._check(self._lib.cuMemcpyAsync(_PTR(dst), _PTR(src), _SIZE(nbytes), _PTR(stream)), "cuMemcpyAsync")

    def stream(self) -> int:
        """A new stream of the lowest priority there is."""
        least, greatest, handle = ctypes.c_int(), ctypes.c_int(), _PTR()
        code = self._lib.cuCtxGetStreamPriorityRange(ctypes.byref(least), ctypes.byref(greatest))
        self._check(code, "cuCtxGetStreamPriorityRange")
        code = self._lib.cuStreamCreateWithPriority(ctypes.byref(handle), ctypes.c_uint(_STREAM_NON_BLOCKING), least)
        self._check(code, "cuStreamCreateWithPriority")
        return int(handle.value or 0)

    def destroy(self, stream: int) -> None:
        """Give a stream back."""
        self._check(self._lib.cuStreamDestroy_v2(_PTR(stream)), "cuStreamDestroy")

    def register(self, address: int, nbytes: int) -> None:
        """Pin and map pages, for every context."""
        flags = ctypes.c_uint(_REGISTER_PORTABLE | _REGISTER_MAPPED)
        self._check(self._lib.cuMemHostRegister_v2(_PTR(address), _SIZE(nbytes), flags), "cuMemHostRegister")

    def unregister(self, address: int) -> None:
        """Undo it."""
        self._check(self._lib.cuMemHostUnregister(_PTR(address)), "cuMemHostUnregister")

    def device_address(self, address: int) -> int:
        """The device's address of registered memory."""
        found = ctypes.c_uint64()
        code = self._lib.cuMemHostGetDevicePointer_v2(ctypes.byref(found), _PTR(address), ctypes.c_uint(0))
        self._check(code, "cuMemHostGetDevicePointer")
        return found.value

    def attribute(self, attribute: int, index: int) -> int:
        """A CUdevice_attribute of a device."""
        found = ctypes.c_int()
        code = self._lib.cuDeviceGetAttribute(ctypes.byref(found), ctypes.c_int(attribute), self._device(index))
        self._check(code, "cuDeviceGetAttribute")
        return found.value

    def bus_id(self, index: int) -> str:
        """Its PCI address, as sysfs writes it."""
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
        if find is None:  # a driver of before CUDA 12
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
            raise DeviceError(f"{call}: {(name.value or b'error').decode()} ({code})")
