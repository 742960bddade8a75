"""How many slots each client may be granted. Reads sessions and quarantines, changes nothing.

    all clients   may hold one slot in GRANTED_SHARE, or one in EMPTY_SHARE of those without a chunk if that is more
    a user        has an even share of that
    a writer      has an even share of its user's, at least one slot. What its own process has in quarantine counts
    beyond that   a user may be granted, quarantine included, half of the slots that hold no chunk, and MOST_SHARES shares of
                  one slot in GRANTED_SHARE: these *extra* slots may cost chunks. Then it gets no more

So a new writer gets its slots at once, while earlier writers or gone processes of its user still hold a whole share; and
however many connections a user opens and closes, most of the cache stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

GRANTED_SHARE = 8  # one slot in 8 of the arena
EMPTY_SHARE = 2  # one slot in 2 of those that hold no chunk, granted ones included
MOST_SHARES = 2

Process = tuple[int, int]  # pid and start time


class Writer(Protocol):
    """A session, as far as shares depend on it."""

    uid: int
    process: Process
    writer: bool
    granted: dict[int, int]
    extra: int


class HeldBack(Protocol):
    """A quarantine, as far as shares depend on it."""

    uid: int | None
    holder: Process | None
    slots: list[int]
    extra: int


class Shares:
    """The shares of one moment."""

    def __init__(
        self,
        sessions: Iterable[Writer],
        quarantines: Iterable[HeldBack],
        num_slots: int,
        unused: int,  # free slots that may be granted
    ) -> None:
        self._writers: Counter[int] = Counter()  # by uid
        self._extra: Counter[int | None] = Counter()  # extra slots, granted or in quarantine, by uid
        self._plain: Counter[int | None] = Counter()  # the others, by uid
        self._left_by: Counter[Process | None] = Counter()  # slots in quarantine, by the process that was granted them
        granted = 0
        for session in sessions:
            self._writers[session.uid] += session.writer
            self._extra[session.uid] += session.extra
            self._plain[session.uid] += len(session.granted) - session.extra
            granted += len(session.granted)
        for held in quarantines:
            self._extra[held.uid] += held.extra
            self._plain[held.uid] += len(held.slots) - held.extra
            self._left_by[held.holder] += len(held.slots)
        users = max(1, sum(count > 0 for count in self._writers.values()))
        of_all = max(num_slots // GRANTED_SHARE, (unused + granted) // EMPTY_SHARE)
        self._share = max(1, of_all // users)  # of a user
        self._extra_share = MOST_SHARES * max(1, num_slots // GRANTED_SHARE // users)
        self._free_share = (unused + self._plain.total()) // EMPTY_SHARE // users

    def limit(self, session: Writer) -> int:
        """Return how many granted slots a session may hold; for a writer at least one."""
        return max(1, self._share // max(1, self._writers[session.uid])) if session.writer else 0

    def room(self, session: Writer) -> tuple[int, int]:
        """Return how many more slots a session may be granted now, and how many of these are not extra."""
        if not session.writer:
            return 0, 0
        mine = self.limit(session) - len(session.granted) - self._left_by[session.process]
        free = max(0, self._free_share - self._plain[session.uid])
        extra = max(0, self._extra_share - self._extra[session.uid])
        return max(0, min(mine, free + extra)), free
