"""What tiers and their users hand each other: leases, reservations, what has changed. Knows no slot's bytes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..policy.base import EvictionPolicy, Keys


@dataclass(frozen=True, slots=True)
class Lease:
    """Read rights to the slots of a prefix. They stay as they are until `release`; release exactly once."""

    keys: tuple[bytes, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Write rights to free slots for chunks nobody has. Ends with `commit` or `abort`, exactly once."""

    keys: tuple[bytes, ...]
    slots: tuple[int, ...]
    generations: tuple[int, ...]  # what each rank writes into the header's `written`
    dropped: int = 0  # chunks that found no room: everything else is leased or being written
    declined: int = 0  # chunks that the policy holds to be worth less than what it would evict for them
    evicted: tuple[bytes, ...] = ()
    chain: tuple[bytes, ...] = field(default=(), repr=False)  # the sequence from its first chunk on


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Header fields that are the same for every chunk of a KV group; the sizes are the arena's."""

    namespace: bytes  # 32-byte root
    group: int
    chunk_tokens: int
    private: bool = False  # no other engine will ever name these chunks: nothing of them goes to a remote store


@dataclass(slots=True)
class IndexChanges:
    """What has become of an index since somebody took them: the last word on every key that came or went."""

    ready: dict[bytes, bool] = field(default_factory=dict)  # the last to change is last

    def note(self, keys: Iterable[bytes], ready: bool) -> None:
        """These have come, or gone."""
        for key in keys:
            self.ready.pop(key, None)
            self.ready[key] = ready

    @property
    def added(self) -> list[bytes]:
        """Keys that are READY now."""
        return [key for key, ready in self.ready.items() if ready]

    @property
    def removed(self) -> list[bytes]:
        """Keys that are not READY any more."""
        return [key for key, ready in self.ready.items() if not ready]


@dataclass(frozen=True, slots=True)
class AdoptionResult:
    """What a restarted daemon found in its arena."""

    ready: int  # verified and served again
    torn: int  # said to be READY, but did not verify: freed
    unfinished: dict[int, tuple[int, int]]  # slot -> (pid, start) of its writer; not free until `give_back`
    unserved: tuple[int, ...]  # whole, but cleared or marked BAD while somebody read them; not free until `give_back`


def prefix_length(keys: Keys, index: Container[bytes]) -> int:
    """How many of `keys`, from the first on, are in `index` without a gap."""
    hits = map(index.__contains__, keys)
    return next((count for count, hit in enumerate(hits) if not hit), len(keys))


class Outbox(Protocol):
    """Takes chunks to a remote store. Called with the cache's lock held; never blocks."""

    def stored(self, keys: Keys, slots: Sequence[int]) -> None:
        """These were computed and are READY now."""

    def hit(self, keys: Keys, slots: Sequence[int]) -> None:
        """These are leased to a reader."""

    def admit(self, keys: Keys, policy: EvictionPolicy) -> list[bytes]:
        """Those of what the policy declines that are to be stored all the same, since they are to be written."""

    def choose(self, keys: Keys, policy: EvictionPolicy) -> list[bytes]:
        """Those of what is evicted that are to be written first; `depart` follows at once."""

    def depart(self, keys: Keys, slots: Sequence[int]) -> list[int]:
        """These slots are no chunk's any more, and stay as they are until `DramTier.departed`. Returns those it does not
        need: their chunks are on the way already."""

    def lost(self, keys: Keys) -> None:
        """These are evicted unwritten: their slots are needed at once."""

    def recall(self, count: int) -> list[int]:
        """Up to `count` slots that have departed and are not being read yet: what is worth least, given up."""

    def forget(self, keys: Keys, namespace: bytes | None) -> list[int]:
        """These chunks are cleared, and with them what has departed of their namespace, or of all: what waits is not
        written. Returns the slots that had departed."""
