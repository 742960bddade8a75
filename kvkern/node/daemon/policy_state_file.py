"""The file with the statistics of the daemon's policy: read at start, written every SAVE_S and at the end.

With it a restarted daemon knows at once how soon chunks of each kind come back. The file of one node serves another node
too. It holds statistics only, no keys and no tokens.
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
from ...regular_files import NotRegularError, open_regular, write_regular

if TYPE_CHECKING:
    from ...policy.grit_model import GritModel

logger = logging.getLogger("kvkern")

SAVE_S = 60.0
MAX_NBYTES = 16 << 20  # far above the size of a model with every possible class


class PolicyStateFile:
    """The model of a policy, and the file that keeps it. Only one daemon may use the file: hold its lock."""

    def __init__(self, policy: str, path: Path | None) -> None:
        self.model: GritModel | None = None  # None: not loaded yet, or the policy learns nothing
        # While it is held the cache does not use the model.
        self.model_lock: AbstractContextManager[object] = nullcontext()
        self._policy, self._path = policy, path
        self._saved_s = time.monotonic()
        self._saving: asyncio.Task[None] | None = None
        self._failing = False

    def load(self) -> None:
        """Make the model, from the file if there is one, and write the file once.

        Raises ConfigError if the file cannot be read, used or written, or if the policy learns nothing.
        """
        if self.model is None:
            self.model = make_model(self._policy)
        if self._path is None:
            return
        if self.model is None:
            raise ConfigError(
                f"policy {self._policy} learns nothing to keep in {self._path}; leave out --policy-state, or use --policy grit"
            )
        try:
            data = _read(self._path)
            if data:
                self.model.load(data)
                logger.info(
                    "kvkern: the policy starts with the statistics in %(path)s",
                    {"event": "policy_state_read", "path": self._path},
                )
            _write(self._path, self.model.dump())
        except NotRegularError as error:
            raise ConfigError(f"policy state {self._path}: {error.strerror}") from error
        except OSError as error:
            raise ConfigError(
                f"policy state {self._path}: {error.strerror}; create the folder, or give another --policy-state"
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error}") from error

    def save_when_due(self) -> None:
        """Start to write the file if SAVE_S have passed. It is written in a thread, so a slow disk delays no request."""
        idle = self._saving is None or self._saving.done()
        if idle and self._path is not None and time.monotonic() - self._saved_s >= SAVE_S:
            self._saving = asyncio.get_running_loop().create_task(self._save())

    async def close(self) -> None:
        """Write the file for the last time."""
        if self._saving is not None:
            await self._saving
        await self._save()

    async def _save(self) -> None:
        """Write the file. A failure is logged once; the next one only after a success."""
        self._saved_s = time.monotonic()
        if self._path is None or self.model is None:
            return
        try:
            with self.model_lock:
                data = self.model.dump()
            await asyncio.to_thread(_write, self._path, data)
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "kvkern: policy state %(path)s cannot be written (%(error)s) and is tried again every "
                    "%(every_s).0f s; make room on its disk, or make the folder writable",
                    {"event": "policy_state_not_written", "path": self._path, "error": error.strerror, "every_s": SAVE_S},
                )  # fmt: skip
            self._failing = True


def _read(path: Path) -> bytes:
    """Return the file's bytes; empty if there is no file. Raises OSError; ConfigError if the file is too large."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except FileNotFoundError:
        return b""
    if len(data) > MAX_NBYTES:
        raise ConfigError(
            f"the file is above {MAX_NBYTES} bytes, so it is no policy state; give another --policy-state"
        )
    return data


def _write(path: Path, data: bytes) -> None:
    """Replace the file in one step: a process that reads or copies it gets the old or the new one. Raises OSError."""
    write_regular(path, data, 0o666, sync=True)  # less the umask; it holds statistics only
