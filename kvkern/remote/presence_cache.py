"""What is known of keys without asking: found absent just now, written at some time. Bounded; of the tier's loop.

absent     for ABSENT_S after it was found so, unless it was written since; nothing else makes a key absent
written    until it is found gone: how long the store has kept it
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..bounded_dict import BoundedDict
from .cost_model import CostModel

ABSENT_S = 1.0  # what was just not there is not asked for again so soon: others' writes take as long
MAX_ABSENT = 65_536
MAX_REMEMBERED = 65_536  # chunks whose time of writing is known


class PresenceCache:
    """Of one store. `is_absent` may be asked from any thread."""

    def __init__(self, speeds: CostModel) -> None:
        self._speeds = speeds
        self.absent: BoundedDict[bytes, float] = BoundedDict(MAX_ABSENT)  # key -> until when it is not asked for
        self.written_at: BoundedDict[bytes, float] = BoundedDict(MAX_REMEMBERED)

    def is_absent(self, key: bytes) -> bool:
        """Whether asking for it again would be too soon."""
        until = self.absent.get(key)
        return until is not None and time.monotonic() < until

    def note_absent(self, key: bytes) -> None:
        """The store has said that it is not there."""
        now = time.monotonic()
        if (written := self.written_at.pop(key, None)) is not None:
            self._speeds.note_gone(now - written)
        self.absent.put(key, now + ABSENT_S)

    def note_there(self, keys: Sequence[bytes]) -> None:
        """These have come, one at least."""
        now = time.monotonic()
        self._speeds.note_there(now - min(self.written_at.get(key, now) for key in keys))

    def note_written(self, keys: Sequence[bytes]) -> None:
        """The store has taken them."""
        now = time.monotonic()
        for key in keys:
            self.written_at.put(key, now)
            self.absent.pop(key, None)
