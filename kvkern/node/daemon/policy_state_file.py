"""What the daemon's policy has learned, in a file: read at start, written now and then and at the end.

A daemon that starts again knows at once how soon chunks of which kind come back, and the file of one node serves another.
It holds statistics only: no keys, no tokens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ...policy import make_model

if TYPE_CHECKING:
    from ...policy.grit_model import GritModel

logger = logging.getLogger("kvkern")

SAVE_S = 60.0
MAX_NBYTES = 16 << 20  # far above every class there can be


class PolicyStateFile:
    """The model of a policy, and the file it is kept in. Only one daemon may have the file."""

    def __init__(self, policy: str, path: Path | None) -> None:
        self.model: GritModel | None = None  # None: not loaded, or a policy that learns nothing
        self.still: AbstractContextManager[object] = nullcontext()  # in a block of it the cache does not use the model
        self._policy, self._path = policy, path
        self._saved_s = time.monotonic()
        self._saving: asyncio.Task[None] | None = None
        self._failing = False

    def load(self) -> None:
        """Make the model, of the file if there is one. Raises ConfigError for a file that cannot be read, used or written."""
        if self.model is None:
            self.model = make_model(self._policy)
        if self._path is None:
            return
        if self.model is None:
            raise ConfigError(f"policy {self._policy} learns nothing to keep in {self._path}; leave out --policy-state")
        try:
            data = _read(self._path)
            if data:
                self.model.load(data)
                logger.info("kvkern: the policy goes on with what %s has", self._path)
            _write(self._path, self.model.dump())
        except OSError as error:
            raise ConfigError(
                f"policy state {self._path}: {error.strerror}; create the folder, or give another --policy-state"
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error}") from error

    def save_when_due(self) -> None:
        """Begin to write the file if it is time to; a slow disk delays no request."""
        idle = self._saving is None or self._saving.done()
        if idle and self._path is not None and time.monotonic() - self._saved_s >= SAVE_S:
            self._saving = asyncio.get_running_loop().create_task(self._save())

    async def close(self) -> None:
        """Write the file a last time."""
        if self._saving is not None:
            await self._saving
        await self._save()

    async def _save(self) -> None:
        """What fails is logged once, until it works again."""
        self._saved_s = time.monotonic()
        if self._path is None or self.model is None:
            return
        try:
            with self.still:
                data = self.model.dump()
            await asyncio.to_thread(_write, self._path, data)
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning("kvkern: policy state %s cannot be written: %s", self._path, error.strerror)
            self._failing = True


def _read(path: Path) -> bytes:
    """The file's bytes; none if there is no file. Raises OSError, and ConfigError for one that is no policy state."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except FileNotFoundError:
        return b""
    if len(data) > MAX_NBYTES:
        raise ConfigError(f"above {MAX_NBYTES} bytes, so no policy state; give another --policy-state")
    return data


def _write(path: Path, data: bytes) -> None:
    """Replace the file in one step: who reads it, or copies it, has the old or the new one. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
