"""What is known of keys without asking the store. Bounded. Used on the tier's loop.

absent     the store said so in the last ABSENT_S, and the key was not written since; nothing else makes a key absent
written    when this node wrote the key, until the key is found gone: tells how long the store keeps values
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..bounded_dict import BoundedDict
from .cost_model import CostModel

ABSENT_S = 1.0  # an absent key is not asked for again so soon: the writes of other nodes take as long
MAX_ABSENT = 65_536
MAX_REMEMBERED = 65_536  # chunks whose time of writing is known


class PresenceCache:
    """Known keys of one store. Call `is_absent` from any thread."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self.absent: BoundedDict[bytes, float] = BoundedDict(MAX_ABSENT)  # key -> until when kvkern does not ask for it
        self.written_at: BoundedDict[bytes, float] = BoundedDict(MAX_REMEMBERED)

    def is_absent(self, key: bytes) -> bool:
        """Return True if the store was found to lack `key` so lately that asking again is too soon."""
        until = self.absent.get(key)
        return until is not None and time.monotonic() < until

    def note_absent(self, key: bytes) -> None:
        """Note that the store does not have `key`."""
        now = time.monotonic()
        if (written := self.written_at.pop(key, None)) is not None:
            self._costs.note_gone(now - written)
        self.absent.put(key, now + ABSENT_S)

    def note_found(self, keys: Sequence[bytes]) -> None:
        """Note that the store had `keys`, at least one."""
        now = time.monotonic()
        self._costs.note_still_there(now - min(self.written_at.get(key, now) for key in keys))

    def note_written(self, keys: Sequence[bytes]) -> None:
        """Note that the store has taken `keys`."""
        now = time.monotonic()
        for key in keys:
            self.written_at.put(key, now)
            self.absent.pop(key, None)
