"""The cache's interface to engines, and the one place where a fault becomes a miss.

Three classes have this interface: the manager, the client of a daemon, and HBM over DRAM. An unexpected error in a tier is
counted, logged once per kind, and answered as if nothing were cached. Calls are batched, in prefix order, and their cost
is linear in the number of chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..errors import KvkernError
from ..metrics import CacheCounters
from ..policy.base import Use
from ..tiers.base import ChunkShape, Lease, Reservation

logger = logging.getLogger("kvkern")

FAULT_LINE = (  # of the log, for a kind of exception
    "kvkern: %(kind)s in the cache; this call was answered as a miss. Further errors of this kind are only counted (`faults`). "
    "Please report this as a bug, with the traceback"
)

T = TypeVar("T")

NO_LEASE = Lease((), ())
NO_RESERVATION = Reservation((), (), ())
ONE_ROUND = 1 << 62  # `round_chunks` of a cache that gives all its slots to one reservation


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """What the engine knows of a request at its end, in addition to its `Use`."""

    prompt: Sequence[bytes] = ()  # keys of its chunks, from the first on
    prompt_tokens: int = 0
    age_s: float = 0.0  # seconds since it arrived
    prefill_tokens_s: float = 0.0  # tokens/s that the engine prefills at present; 0: unknown


class ChunkCache(Protocol):
    """The cache as engines use it: their own `Cache`, or a daemon's through node.client.cache_client.NodeClient.

    `use` describes the request for the eviction policy. The cache fills in its time and namespace.
    """

    counters: CacheCounters
    faults: Faults

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Return the length of the longest prefix that can be acquired now. Pins and counts nothing."""

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """Call `acquire_soon` and wait for its result."""

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """Pin the longest cached prefix, or all cached chunks. Never blocks. The caller must release the lease."""

    def count_lookups(self, lookups: int, hits: int) -> None:
        """Count chunks that were looked up and served by calls whose `use.counts_itself` is set."""

    def release(self, lease: Lease) -> int:
        """End a lease. Returns how many of its chunks failed verification."""

    def release_later(self, lease: Lease) -> None:
        """End a lease soon. Safe to call in a finalizer."""

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """Reserve slots for the chunks of `wanted` that are neither cached nor being written."""

    @property
    def round_chunks(self) -> int:
        """The most chunks that one `reserve` should ask for. A larger store goes in rounds: reserve, copy, commit."""

    def room(self, wanted: Sequence[bytes]) -> int:
        """Return how many of `wanted`, from the first one on, `reserve` should ask for now. The others: a little later."""

    def commit(self, reservation: Reservation) -> int:
        """Call `commit_soon` and wait for its result."""

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """Publish the chunks that every rank has written. Never blocks. The result is the number of published chunks."""

    def abort(self, reservation: Reservation) -> None:
        """Publish none of these chunks. Never blocks. Call it when no writer can write them any more."""

    def finish(self, use: Use, request_end: RequestEnd | None = None) -> None:
        """Tell the cache how the request `use.request` ended. Never blocks. The information may be lost."""

    def note_prefill(self, tokens_s: float) -> None:
        """Tell the cache how many tokens/s the engine prefills. The remote tier then decides to load or to compute."""

    def clear(self, namespace: bytes | None = None) -> int:
        """Call `clear_soon` and wait for its result."""

    def clear_soon(self, namespace: bytes) -> Future[int]:
        """Forget a namespace. Later calls do not see its chunks. Never blocks. The result is the number of its chunks."""

    def describe_namespace(self, root: bytes, fields: dict[str, str]) -> None:
        """Tell the cache which fields a namespace root stands for."""

    def usage(self) -> dict[str, int]:
        """Return the number of slots, and of slots per use."""

    @property
    def shared(self) -> bool:
        """True if this engine and others read each other's chunks."""

    def close(self) -> None:
        """End the cache. No call may follow."""


class BackingTier(Protocol):
    """The tier behind DRAM: remote.tier.RemoteTier. Thread-safe. Never blocks."""

    def extend(self, lease: Lease, keys: Sequence[bytes], prefix: bool, use: Use) -> Future[Lease]:
        """Replace `lease` by a lease that also has the chunks that the store adds."""

    def note_prefill(self, tokens_s: float, client: int = 0) -> None:
        """Tell the tier how many tokens/s an engine prefills; 0: unknown. `client` is its number; 0: the only one."""

    def forget_client(self, client: int) -> None:
        """Tell the tier that a client is gone."""

    def close(self, drain_s: float) -> None:
        """End the tier. No call may follow. Waiting writes get at most `drain_s` seconds."""


class Faults:
    """The one place where a fault becomes a miss. Each fault is counted, and logged once per kind."""

    def __init__(self, counters: CacheCounters) -> None:
        self._counters = counters
        self._logged: set[str] = set()

    @contextmanager
    def are_misses(self) -> Iterator[None]:
        """Count and log an unexpected error in the block, and end it. Bad input (KvkernError) is raised."""
        try:
            yield
        except KvkernError:
            raise  # the caller must see bad input
        except Exception as error:
            self._counters.faults += 1
            kind = type(error).__name__
            if kind not in self._logged:
                self._logged.add(kind)
                logger.exception(FAULT_LINE, {"event": "fault", "kind": kind})


def completed(value: T) -> Future[T]:
    """Return a future that has its result already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def promised() -> Future[T]:
    """Return a future that its holder cannot cancel, because another thread sets its result."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future
