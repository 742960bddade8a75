"""Keeps a device's calibration between starts: one JSON file per device, in the user's cache directory.

GPU, driver, link and NUMA nodes name a file, and the file contains them too. A file that is damaged, of another version or of
another device is ignored with one warning, and the device is measured again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from .link_table import Calibration, Costs, HostLink
from .numa import process_nodes
from .nvml import GpuInfo

logger = logging.getLogger("kvkern")

# The version of the file, of the meaning of its numbers, and of the measured kernels. Raise it by hand when you change a probe,
# the planner's formulas, or the speed of a kernel (kernels/paged_copy_triton.py, or the Triton that compiles it).
VERSION = 2
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class DeviceId:
    """The GPU, driver, link and NUMA nodes that a calibration is valid for."""

    name: str
    driver: str
    link: HostLink
    gpu_node: int | None = None  # the memory node next to the GPU; None: not known
    cpu_nodes: tuple[int, ...] = ()  # the nodes that this process runs on: pinned memory comes from there

    @classmethod
    def for_this_process(cls, info: GpuInfo) -> DeviceId:
        """Return the id of a GPU as this process reaches it."""
        return cls(info.name, info.driver, info.link, info.numa_node, process_nodes())

    @property
    def file_name(self) -> str:
        """The name of its calibration file: letters, digits, dots and dashes."""
        link = "c2c" if self.link.c2c else f"pcie{self.link.generation}x{self.link.width}"
        words = f"{self.name} {self.driver} {link}{self._nodes}"
        return re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-.") + ".json"

    def __str__(self) -> str:
        link = "NVLink-C2C" if self.link.c2c else f"PCIe {self.link.generation} x{self.link.width}"
        return f"{self.name}, {link}, driver {self.driver}{self._nodes}"

    @property
    def _nodes(self) -> str:
        of_gpu = "" if self.gpu_node is None else f", on NUMA node {self.gpu_node}"
        of_process = f", used from NUMA node {' '.join(map(str, self.cpu_nodes))}" if self.cpu_nodes else ""
        return of_gpu + of_process


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    device: DeviceId
    d2h: Costs
    h2d: Costs


def path_of(device: DeviceId, folder: Path) -> Path:
    """Return the path of the device's file, below the user's cache directory."""
    return folder / "calibration" / device.file_name


@contextmanager
def measuring_lock(folder: Path, wait_s: float) -> Iterator[bool]:
    """Hold the host's measuring lock until the context ends. Yields False if another process holds it for `wait_s`.

    All devices have one lock, because they share the memory and often the link of one host. The lock ends with its process. If
    no lock can be made, because the folder cannot be written or its file system has no locks, it yields True.
    """
    try:
        (folder / "calibration").mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "calibration" / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield True
        return
    try:
        yield _acquire_lock(fd, time.monotonic() + wait_s)
    finally:
        os.close(fd)


def _acquire_lock(fd: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        except OSError:  # a file system without locks
            return True
        else:
            return True


def load(device: DeviceId, seeds: Calibration, folder: Path, warn: bool = True) -> Calibration | None:
    """Return `seeds` with this device's saved costs; its abilities stay. None if there is no valid file.

    Logs one warning if there is a file but it is not valid.
    """
    path = path_of(device, folder)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        why = str(error)
    else:
        if found.version == VERSION and found.device == device:
            return replace(seeds, d2h=found.d2h, h2d=found.h2d)
        why = f"it is version {found.version} of {found.device}; expected version {VERSION} of {device}"
    if warn:
        logger.warning(
            "kvkern: the calibration file %(path)s is ignored: %(why)s. The device is measured again.",
            {"event": "calibration_ignored", "path": path, "why": why},
        )
    return None


def save(device: DeviceId, table: Calibration, folder: Path) -> None:
    """Write the whole file or nothing. If the folder cannot be written, log a warning: the next start measures again."""
    path = path_of(device, folder)
    data = msgspec.json.format(msgspec.json.encode(_File(VERSION, device, table.d2h, table.h2d)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        logger.warning(
            "kvkern: the calibration was not saved in %(folder)s: %(error)s. The next start measures again; make the folder "
            "writable to keep the result.", {"event": "calibration_not_saved", "folder": path.parent, "error": error},
        )  # fmt: skip
