"""Keeps what a device was measured at between starts: one JSON file a device, in the user's cache directory.

A file is named by GPU, driver and link, and says so inside too. One that is damaged, of another version or another device's
is as good as none, with one warning: the device is measured again.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from .table import Calibration, Costs, Link

logger = logging.getLogger("kvkern")

VERSION = 1  # of the file, and of what its numbers mean: raise it when a kernel or a probe changes


@dataclass(frozen=True, slots=True)
class DeviceId:
    """What a measurement holds for."""

    name: str
    driver: str
    link: Link

    @property
    def file_name(self) -> str:
        """Of its file: letters, digits, dots and dashes."""
        link = "c2c" if self.link.c2c else f"pcie{self.link.generation}x{self.link.width}"
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.name} {self.driver} {link}").strip("-.") + ".json"

    def __str__(self) -> str:
        link = "NVLink-C2C" if self.link.c2c else f"PCIe {self.link.generation} x{self.link.width}"
        return f"{self.name}, {link}, driver {self.driver}"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    device: DeviceId
    d2h: Costs
    h2d: Costs


def path_of(device: DeviceId, folder: Path) -> Path:
    """Where its file is, below the user's cache directory."""
    return folder / "calibration" / device.file_name


def load(device: DeviceId, seeds: Calibration, folder: Path) -> Calibration | None:
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
