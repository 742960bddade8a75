"""What a cache is to engines, and how a fault in it ends. The manager, a daemon's client and HBM over DRAM each are one.

The one place where a fault becomes a miss: an unexpected error in a tier is counted, logged once per kind, and answered
as if nothing were cached. Calls are batched, in prefix order, and linear in the number of chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ..errors import KvkernError
from ..metrics import CacheCounters
from ..policy.base import Use
from ..tiers.base import ChunkShape, Lease, Reservation

logger = logging.getLogger("kvkern")

NO_LEASE = Lease((), ())
NO_RESERVATION = Reservation((), (), ())


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """What is known of a request at its end, beside its `Use`."""

    prompt: Sequence[bytes] = ()  # its chunks, from the first on
    prompt_tokens: int = 0
    age_s: float = 0.0  # since it came
    prefill_tokens_s: float = 0.0  # how fast the engine computes prompts at present; 0: unknown


class ChunkCache(Protocol):
    """What engines use: a `Cache` of their own, or a daemon's through node.client.NodeClient.

    `use` is what the caller knows of the request, for the eviction policy. Its time and namespace are filled in here.
    """

    counters: CacheCounters
    faults: Faults

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Length of the longest prefix that could be acquired now. Pins and counts nothing."""

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """`acquire_soon`, waited for."""

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """Pin the longest cached prefix, or all cached chunks. Never blocks; the lease is the caller's to release."""

    def release(self, lease: Lease) -> int:
        """End a lease. Returns how many of its chunks failed verification."""

    def release_later(self, lease: Lease) -> None:
        """For finalizers."""

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """Slots to write those of `wanted` into that nobody has."""

    def has_room(self, wanted: Sequence[bytes]) -> bool:
        """Whether `reserve` has slots for these now, if it ever will. False: ask again a little later."""

    def commit(self, reservation: Reservation) -> int:
        """`commit_soon`, waited for."""

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """Publish what every rank has written. Never blocks; the result is how many chunks were published."""

    def finish(self, use: Use, request_end: RequestEnd | None = None) -> None:
        """How the request `use.request` ended. Never blocks, and may be lost."""

    def note_prefill(self, tokens_s: float) -> None:
        """How fast the engine computes prompts, for who decides whether to load or to compute."""

    def clear(self, namespace: bytes | None = None) -> int:
        """`clear_soon`, waited for."""

    def clear_soon(self, namespace: bytes) -> Future[int]:
        """Forget a namespace before anything that is asked later. Never blocks; the result is how many chunks it had."""

    def describe_namespace(self, root: bytes, fields: dict[str, str]) -> None:
        """Say what a namespace root stands for."""

    def usage(self) -> dict[str, int]:
        """Slots and what they are used for."""

    @property
    def shared(self) -> bool:
        """Whether other engines read what this one stores, and it what they store."""

    def close(self) -> None:
        """Nothing more will be asked."""


class BackingTier(Protocol):
    """What stands behind DRAM: remote.tier.RemoteTier. Thread-safe; never blocks."""

    def extend(self, lease: Lease, keys: Sequence[bytes], prefix: bool, use: Use) -> Future[Lease]:
        """A lease of what this one has and the store adds to it."""

    def note_prefill(self, tokens_s: float) -> None:
        """An engine computes that fast."""

    def close(self, drain_s: float) -> None:
        """Nothing more will be asked. What waits to be written may take so long."""


class Faults:
    """The one place where a fault becomes a miss: counted, logged once per kind."""

    def __init__(self, counters: CacheCounters) -> None:
        self._counters = counters
        self._logged: set[str] = set()

    @contextmanager
    def are_misses(self) -> Iterator[None]:
        """Count and log what goes wrong inside; bad input is raised."""
        try:
            yield
        except KvkernError:
            raise  # bad input is the caller's to see
        except Exception as error:
            self._counters.faults += 1
            kind = type(error).__name__
            if kind not in self._logged:
                self._logged.add(kind)
                logger.exception(
                    "kvkern: a fault in the cache was answered as a miss; further %s are only counted", kind
                )
