"""Keeps what a device was measured at between starts: one JSON file a device, in the user's cache directory.

A file is named by GPU, driver, link and NUMA nodes, and says so inside too. One that is damaged, of another version or another
device's is as good as none, with one warning: the device is measured again.
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

# Of the file, of what its numbers mean, and of the kernels they were measured with: nothing raises it but whoever changes the
# speed of a kernel (kvkern/kernels/paged_copy_triton.py, or the Triton that compiles it), a probe or the planner's formulas.
VERSION = 2
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class DeviceId:
    """What a measurement holds for."""

    name: str
    driver: str
    link: HostLink
    gpu_node: int | None = None  # memory node next to it; None: not known
    cpu_nodes: tuple[int, ...] = ()  # those that this process runs on: pinned memory comes from there

    @classmethod
    def for_this_process(cls, info: GpuInfo) -> DeviceId:
        """Of a GPU as this process reaches it."""
        return cls(info.name, info.driver, info.link, info.numa_node, process_nodes())

    @property
    def file_name(self) -> str:
        """Of its file: letters, digits, dots and dashes."""
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
    """Where its file is, below the user's cache directory."""
    return folder / "calibration" / device.file_name


@contextmanager
def measuring_lock(folder: Path, wait_s: float) -> Iterator[bool]:
    """Whether nobody else on this host measures, of any device, until the context ends. Waits `wait_s` for that.

    All devices have one lock, as they share the memory and often the link of one host; it ends with the process that holds it.
    Where no lock can be had, in a folder that cannot be written, the answer is yes.
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
    """The table with this device's saved costs, its abilities those of `seeds`; None if there is no good file.

    Logs one warning if there is a file but not a good one.
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
        logger.warning("kvkern: calibration %s is ignored, the device is measured again: %s", path, why)
    return None


def save(device: DeviceId, table: Calibration, folder: Path) -> None:
    """Write it whole or not at all. A folder that cannot be written is a warning: the next start measures again."""
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
        logger.warning("kvkern: calibration not saved in %s: %s; the next start measures again", path.parent, error)
