"""Says when stored chunks begin to find no free slot, and when they find slots again. One line a change of state."""

from __future__ import annotations

QUIET_S = 60.0  # without a chunk that found no slot, until the state counts as over


class RoomNotice:
    """The state of one engine's stores."""

    def __init__(self) -> None:
        self._dropped = 0  # chunks without a slot in the present state; 0: there is room
        self._last_s = 0.0  # time of the last such chunk

    def note_dropped(self, dropped: int, now_s: float, num_slots: int) -> str | None:
        """Note chunks that got no slot. Return the line to log, or None if the state is known."""
        if not dropped:
            return None
        begins = not self._dropped
        self._dropped += dropped
        self._last_s = now_s
        if not begins:
            return None
        return (
            f"kvkern: {dropped} chunks of a request are not stored, because none of the {num_slots} slots is free for them: "
            f"loads and stores under way hold them all. Replies stay right. Give the cache more memory (capacity), or run "
            f"fewer requests at a time (max_num_seqs). The next line comes when there is room again."
        )

    def ended(self, now_s: float) -> str | None:
        """Return the line to log if there has been room for QUIET_S, or None."""
        if not self._dropped or now_s - self._last_s < QUIET_S:
            return None
        line = f"kvkern: chunks find free slots again. {self._dropped} chunks were not stored meanwhile."
        self._dropped = 0
        return line
