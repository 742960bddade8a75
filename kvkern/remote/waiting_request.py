"""A request that waits for chunks from the store: what it has, what it lacks, and until when it waits."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..policy.base import Use
from ..tiers.base import Lease


@dataclass
class WaitingRequest:
    """A request that waits."""

    keys: list[bytes]  # of its sequence
    use: Use
    prefix: bool
    held: list[Lease]
    chunk_tokens: int = 0  # 0: not known yet
    answer: Future[Lease] = field(default_factory=Future)
    question_s: float = 0.0  # that its questions have taken: what is read for others in between makes them several
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # of its reads: one at a time, in order
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.answer.set_running_or_notify_cancel()  # so that nobody can cancel it: its leases would be nobody's

    def waits(self) -> bool:
        """Whether it has not been answered."""
        return not self.answer.done()

    def wait(self, seconds: float) -> None:
        """From now on for so long, whatever was said before; then it is answered. On the tier's loop."""
        self.rest()
        if seconds > 0:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.reply)
        else:
            self.reply()

    def rest(self) -> None:
        """End what `wait` has begun."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reply(self) -> None:
        """With what there is."""
        if not self.answer.done():
            keys = tuple(key for lease in self.held for key in lease.keys)
            self.answer.set_result(Lease(keys, tuple(slot for lease in self.held for slot in lease.slots)))

    def missing(self) -> list[bytes]:
        """What the first lease lacks."""
        (first,) = self.held
        if self.prefix:
            return self.keys[len(first.keys) :]
        there = set(first.keys)
        return [key for key in self.keys if key not in there]
