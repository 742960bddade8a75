"""Maps a shared file at a 2 MiB boundary, so that the kernel can back it with huge pages. Knows addresses, not slots.

Python's own mmap chooses any 4 KiB boundary, and there a tmpfs file never gets huge pages. With huge pages, copies between
the engine's pages and the arena have fewer TLB misses. Touching every page at start takes a fraction of the time. See
docs/benchmarks.md.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

HUGE_PAGE = 2 << 20
_COLLAPSE_NBYTES = 64 << 20  # of one system call: an interrupt or a kill takes effect between two calls
_PROT_NONE, _MAP_FIXED = 0, 0x10
_MADV_DONTDUMP = 16
_MADV_COLLAPSE = 25  # Linux 6.1
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_EHWPOISON = 133  # errno has no name for it
_NO_PAGE = (errno.ENOMEM, errno.EFAULT, _EHWPOISON)
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_shared(
    fd: int,
    nbytes: int,  # of the file, from its start
    dump: bool = False,  # core dumps of this process hold the mapping; else they stay small, and nobody's prompts leave in them
) -> npt.NDArray[np.uint8]:
    """Map the file, readable and writable, as [nbytes] uint8. It is unmapped with its last view. Raises OSError."""
    reserved = nbytes + HUGE_PAGE
    start = _mmap(None, reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-start // HUGE_PAGE) * HUGE_PAGE
    try:
        _mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)
        if not dump and _libc.madvise(address, nbytes, _MADV_DONTDUMP):
            raise OSError(code := ctypes.get_errno(), os.strerror(code))
    except OSError:
        _libc.munmap(start, reserved)
        raise
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(buffer, _libc.munmap, start, reserved).atexit = False  # threads may still copy at exit
    return np.ndarray((nbytes,), np.uint8, memoryview(buffer))


def populate(memory: npt.NDArray[np.uint8]) -> None:
    """Touch every page of a mapping from `map_shared`. Uses huge pages if this kernel and file system have them.

    Raises OSError if a page cannot be had: memory is short or broken. An access to it would be a SIGBUS.
    """
    address, nbytes = memory.ctypes.data, len(memory)
    for at in range(0, nbytes - nbytes % HUGE_PAGE, _COLLAPSE_NBYTES):
        if _libc.madvise(address + at, min(_COLLAPSE_NBYTES, nbytes - nbytes % HUGE_PAGE - at), _MADV_COLLAPSE):
            break  # this kernel does not know the call, or has no memory in one piece: small pages work too
    # With another code than these the kernel does not know the call, and pages fault in on first use.
    if _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) and ctypes.get_errno() in _NO_PAGE:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if result == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
