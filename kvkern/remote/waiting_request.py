"""A request that waits for chunks from the store: its leases, its missing chunks, and how long it waits."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..policy.base import Use
from ..tiers.base import Lease


@dataclass
class WaitingRequest:
    """One such request. Used on the tier's loop, apart from `answer`."""

    keys: list[bytes]  # of its sequence, in prefix order
    use: Use
    prefix: bool
    leases: list[Lease]  # what it has got so far; first what DRAM had
    chunk_tokens: int = 0  # 0: not known yet
    num_new: int = 0  # of the chunks that DRAM lacked, those that count: its earlier questions have not counted them
    why_not: str = "not_found"  # why it gets no more than it has so far, a reason of observability/catalogue.py
    answer: Future[Lease] = field(default_factory=Future)
    question_s: float = (
        0.0  # spent on its questions so far; reads for other requests in between can make it ask several times
    )
    read_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # its reads go one at a time, in order
    num_answered: int = 0  # chunks of the answer beyond the first lease
    timed_out: bool = False  # answered because waiting longer was not worth it
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.answer.set_running_or_notify_cancel()  # so that nobody can cancel it: then nobody would release its leases

    def is_waiting(self) -> bool:
        """Return True if it has not been answered yet."""
        return not self.answer.done()

    def wait_at_most(self, seconds: float) -> None:
        """Answer it `seconds` from now, whatever limit was set before. Answers at once if `seconds` is 0 or less."""
        self.stop_timer()
        if seconds > 0:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._give_up)
        else:
            self._give_up()

    def _give_up(self) -> None:
        self.timed_out = self.timed_out or self.is_waiting()
        self.reply()

    def stop_timer(self) -> None:
        """Drop the limit of `wait_at_most`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reply(self) -> None:
        """Answer it with all leases it has. Does nothing if it is answered already."""
        if not self.answer.done():
            keys = tuple(key for lease in self.leases for key in lease.keys)
            self.num_answered = len(keys) - len(self.leases[0].keys)
            self.answer.set_result(Lease(keys, tuple(slot for lease in self.leases for slot in lease.slots)))

    def missing(self) -> list[bytes]:
        """Return the keys that the first lease lacks. Call it before there is a second one."""
        (first,) = self.leases
        if self.prefix:
            return self.keys[len(first.keys) :]
        there = set(first.keys)
        return [key for key in self.keys if key not in there]
