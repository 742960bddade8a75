"""The values that tiers exchange with their users: leases, reservations, changes of the index. Knows no bytes of slots."""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..policy.base import EvictionPolicy, Keys


@dataclass(frozen=True, slots=True)
class Lease:
    """Read rights to the slots of a prefix. The slots do not change until `release`. Release exactly once."""

    keys: tuple[bytes, ...]
    slots: tuple[int, ...]
    # [slots] uint64, what a daemon recorded of the headers when the chunks were published, see arena.slots.fingerprints.
    # None: nobody but this engine writes the slots
    fingerprints: npt.NDArray[np.uint64] | None = field(default=None, repr=False, compare=False)

    def places(self) -> Iterator[tuple[bytes, tuple[int, int | None]]]:
        """Yield (key, (slot, fingerprint)) for each chunk."""
        known = [None] * len(self.slots) if self.fingerprints is None else self.fingerprints.tolist()
        return zip(self.keys, zip(self.slots, known, strict=True), strict=True)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Write rights to slots for chunks that are not cached yet. Ends with `commit` or `abort`, exactly once."""

    keys: tuple[bytes, ...]
    slots: tuple[int, ...]
    generations: tuple[int, ...]  # each rank writes it into the header's `written` when its part is complete
    dropped: int = 0  # chunks without a slot, because all other slots are leased or being written
    declined: int = 0  # chunks without a slot, because the policy holds every cached chunk to be worth more
    evicted: tuple[bytes, ...] = ()
    chain: tuple[bytes, ...] = field(default=(), repr=False)  # the sequence from its first chunk on


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Header fields that are equal for all chunks of a KV group. The arena's geometry has the sizes."""

    namespace: bytes  # 32-byte root
    group: int
    chunk_tokens: int
    private: bool = False  # no other engine can name these chunks, so none of them goes to a remote store


@dataclass(slots=True)
class IndexChanges:
    """The keys that an index gained or lost since the changes were last taken. For each key, the last change counts."""

    ready: dict[bytes, bool] = field(default_factory=dict)  # key -> is it READY now; the newest change is last

    def note(self, keys: Iterable[bytes], ready: bool) -> None:
        """Record that these keys became READY, or ceased to be."""
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

    ready: int  # slots that verified and are served again
    torn: int  # slots whose header said READY, but that did not verify; they are freed
    unfinished: dict[int, tuple[int, int]]  # slot -> (pid, start) of its writer; not free until `give_back`
    unserved: tuple[
        int, ...
    ]  # complete, but cleared or marked BAD while a process read them; not free until `give_back`


def slot_array(slots: Iterable[int]) -> npt.NDArray[np.int64]:
    """Return slots as an int64 array. For a tuple or list of Python's integers this is 2 to 3 times as fast as np.array."""
    return np.asarray(array("q", slots))


def prefix_length(keys: Keys, index: Container[bytes]) -> int:
    """Return how many of `keys`, from the first on and without a gap, are in `index`."""
    return sum(takewhile(bool, map(index.__contains__, keys)))


class Outbox(Protocol):
    """The write-behind queue of a remote store. Called with the cache's lock held. Never blocks.

    A slot *departs* when its chunk is evicted but still waits to be written. The queue then owns the slot until
    `DramTier.free_departed`.
    """

    def stored(self, keys: Keys, slots: Sequence[int]) -> None:
        """Note that these chunks were computed and are READY now."""

    def hit(self, keys: Keys, slots: Sequence[int]) -> None:
        """Note that these chunks are leased to a reader."""

    def admit(self, keys: Keys, policy: EvictionPolicy) -> list[bytes]:
        """Return the chunks that get a slot although the policy declines them, because they are to be written."""

    def choose(self, keys: Keys, policy: EvictionPolicy) -> list[bytes]:
        """Return the evicted chunks that are to be written first. `depart` follows at once."""

    def depart(self, keys: Keys, slots: Sequence[int]) -> list[int]:
        """Take over the slots of evicted chunks. They do not change until `DramTier.free_departed`.

        Returns the slots that it does not need, because their chunks are being written already.
        """

    def lost(self, keys: Keys) -> None:
        """Note that these chunks are evicted without being written, because their slots are needed at once."""

    def recall(self, count: int) -> list[int]:
        """Give up to `count` departed slots back, those of the least worth. Slots that are being read are not given back."""

    def forget(self, keys: Keys, namespace: bytes | None) -> list[int]:
        """Drop the waiting writes of these cleared chunks, and of all departed chunks of `namespace` (None: of all).

        Returns the slots that had departed.
        """
