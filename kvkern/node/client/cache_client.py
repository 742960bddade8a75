"""An engine's side of the node's cache: the methods of `Cache`, answered by a daemon, without ever waiting for it.

It keeps a replica of the daemon's index, so a lookup that misses costs no round trip, and a stock of granted slots, so a
store can begin at once; `acquire` alone asks the daemon, because only a pinned chunk is a promise. While the daemon is
away everything is a miss. Reading, writing and connecting again are the link's.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from blake3 import blake3

from ...arena.file import Arena
from ...arena.process_identity import process_start
from ...arena.slots import SlotGeometry, SlotState
from ...cache.base import NO_LEASE, Faults, RequestEnd
from ...errors import ConfigError
from ...metrics import CacheCounters
from ...policy.base import Use
from ...tiers.base import ChunkShape, Lease, Reservation, prefix_length
from ...tiers.slot_headers import begin_slots
from .. import protocol as p
from .reconnecting_link import ReconnectingLink

logger = logging.getLogger("kvkern")

FIRST_GOAL = 64  # granted slots kept in stock until more are seen to be needed
CLOSE_S = 1.0  # how long `close` waits for slots that it gives back
NO_LIMIT = 1 << 30  # until the daemon has said one
MAX_PUBLISH = p.MAX_KEYS // 2  # chunks of a reservation: with a chain of MAX_KEYS they still fit a frame


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NodeLease(Lease):
    """A lease by a daemon, under a connection."""

    number: int = 0
    era: int = 0


@dataclass(frozen=True, slots=True)
class NodeReservation(Reservation):
    """Granted slots that have been named."""

    namespace: bytes = b""
    era: int = 0
    use: Use | None = None


class NodeClient:
    """A `ChunkCache` over a socket. Thread-safe. `open` it, `close` it."""

    def __init__(
        self,
        path: Path,
        engine: str,
        geometry: SlotGeometry,
        index: bool = True,  # False: only the arena is wanted, by a process that copies
        patience_s: float = 0.0,  # how long `reserve` may wait for slots; 0 in an engine's step
    ) -> None:
        self.counters = CacheCounters()
        self.faults = Faults(self.counters)
        hello = p.Hello(p.VERSION, engine, p.Geometry.of(geometry), index)
        self._link = ReconnectingLink(path, hello, self._opened, self._lost, self._told)
        self._lock = self._link.lock
        self._index = index
        self._patience_s = patience_s
        self._owner = (os.getpid(), process_start(os.getpid()))
        self._era = 0  # of the connection; what was leased or granted under another is the daemon's to end
        self._held = 0  # leases and reservations of this era that have not ended
        self._held_before = 0  # of earlier eras: the daemon keeps their slots until `Settle`
        self._replica: set[bytes] = set()
        self._synced = False  # whether the replica has had the whole index since the connection
        self._writing: set[bytes] = set()
        self._begun: set[int] = set()  # slots under reservations of this connection
        self._stock: deque[tuple[int, int]] = deque()
        self._publishing = 0  # requests to publish that are not answered
        self._asked = 0  # slots asked for and not answered
        self._goal, self._limit = FIRST_GOAL, NO_LIMIT
        self._clears: dict[bytes, int] = {}  # namespaces to forget before anything else; the last request to do it
        self._num_clears = 0
        self._described: dict[bytes, dict[str, str]] = {}
        self._prefill_tokens_s = 0.0  # 0: nobody has said it
        self._late: deque[Lease] = deque()

    @classmethod
    def open(
        cls,
        path: Path,
        engine: str,
        geometry: SlotGeometry,
        index: bool = True,
        patience_s: float = 0.0,
        timeout_s: float = 60.0,
        prefault: bool = True,
    ) -> NodeClient:
        """Connect, waiting for daemon and arena at most `timeout_s`. Raises ConfigError if there is none or it refuses."""
        client = cls(p.checked_path(path), engine, geometry, index, patience_s)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                client._link.connect(prefault, max(0.1, deadline - time.monotonic()))
                break
            except OSError as error:
                if isinstance(error, PermissionError) or time.monotonic() > deadline:
                    client._link.close()
                    raise p.unreachable(path, error) from error
                time.sleep(0.1)
            except BaseException:
                client._link.close()
                raise
        client._link.start()
        return client

    @property
    def arena(self) -> Arena:
        """The shared memory. The same for the client's whole life."""
        assert self._link.arena is not None
        return self._link.arena

    @property
    def shared(self) -> bool:
        """The node's cache is every engine's."""
        return True

    @property
    def connected(self) -> bool:
        """Whether the daemon is there. Never in a forked child, where nobody reads its answers."""
        return self._link.connected and os.getpid() == self._owner[0]

    # -- what an engine asks -----------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Length of the longest prefix of `keys` in the replica: what an acquire would probably give."""
        with self._lock:
            return self._known(keys)

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """Pin the longest cached prefix, or every cached chunk. Done at once on a sure miss, else within ANSWER_S."""
        result: Future[Lease] = _promise()
        asked = list(keys[: p.MAX_KEYS])
        with self._lock:
            self._end_late()
            self.counters.lookup_chunks += len(keys)
            remote = self._link.remote and use is not None and bool(use.namespace)  # which may have what no index tells
            if self._synced and not (remote or self._publishing or self._link.behind()):
                asked = asked[: self._known(asked)] if prefix else [key for key in asked if key in self._replica]
            if not asked or not self.connected:
                result.set_result(NO_LEASE)
                return result
            era = self._era

            def answered(response: p.Response | None) -> None:
                lease: Lease = NO_LEASE
                if isinstance(response, p.Acquired) and response.slots and self._sound(response, len(asked)):
                    found = tuple(asked[row] for row in response.rows)
                    lease = NodeLease(found, tuple(response.slots), response.lease, era)
                    self.counters.hit_chunks += len(found)
                    self._held += 1
                result.set_result(lease)

            namespace, said = use.namespace if use is not None else b"", p.said_of(use)
            self._link.ask(lambda number: p.Acquire(number, p.join_keys(asked), prefix, namespace, *said), answered)
        return result

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """`acquire_soon`, waited for."""
        return self.acquire_soon(keys, prefix, use).result()

    def release(self, lease: Lease) -> int:
        """End a lease. Chunks its reader marked BAD are dropped by the daemon; returns how many."""
        if not isinstance(lease, NodeLease):
            return 0
        states = self.arena.headers["state"][np.array(lease.slots, dtype=np.int64)]
        bad = [key for key, state in zip(lease.keys, states.tolist(), strict=True) if state == SlotState.BAD]
        with self._lock:
            self.counters.bad_chunks += len(bad)
            self._replica.difference_update(bad)  # at once: the engine computes them now and will store them again
            if self._ended(lease.era):
                self._link.send(p.Release([lease.number]))
        return len(bad)

    def release_later(self, lease: Lease) -> None:
        """For finalizers, which may run while this thread holds the lock: the next call ends the lease."""
        self._late.append(lease)

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """Slots from the stock for those of `wanted` that nobody is known to have or to be writing."""
        with self._lock:
            self._end_late()
            missing = [key for key in dict.fromkeys(wanted) if key not in self._replica and key not in self._writing]
            if not self.connected or not missing:
                return Reservation((), (), (), len(missing))
            self._goal = max(self._goal, 2 * len(missing))
            self._refill(len(missing))
            if self._patience_s:
                self._lock.wait_for(lambda: self._enough(len(missing)), self._patience_s)
            granted = missing[: min(len(self._stock), MAX_PUBLISH)]
            taken = [self._stock.popleft() for _ in granted]
            slots, generations = tuple(slot for slot, _ in taken), tuple(generation for _, generation in taken)
            dropped = len(missing) - len(granted)
            self.counters.dropped_chunks += dropped
            if granted:
                at, under = np.array(slots, dtype=np.int64), np.array(generations, dtype=np.uint64)
                begin_slots(self.arena, at, under, granted, shape, chain, self._owner)
                self._writing.update(granted)
                self._begun.update(slots)
                self._held += 1
            return NodeReservation(
                tuple(granted), slots, generations, dropped, chain=tuple(chain),
                namespace=shape.namespace, era=self._era, use=use,
            )  # fmt: skip

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """Ask the daemon to publish what every rank has written. The result is how many chunks it did."""
        result: Future[int] = _promise()
        with self._lock:
            if not isinstance(reservation, NodeReservation) or not reservation.slots:
                result.set_result(0)
                return result
            self._writing.difference_update(reservation.keys)
            if reservation.era == self._era:
                self._begun.difference_update(reservation.slots)
            if not self._ended(reservation.era):
                self.counters.failed_chunks += len(reservation.slots)
                result.set_result(0)
                return result

            def answered(response: p.Response | None) -> None:
                self._publishing -= 1
                published = response.published if isinstance(response, p.Published) else []
                stored = sum(published)
                self.counters.stored_chunks += stored
                self.counters.failed_chunks += len(reservation.slots) - stored
                result.set_result(stored)

            keys, chain = p.join_keys(reservation.keys), p.join_keys(reservation.chain[: p.MAX_KEYS])
            slots, generations = list(reservation.slots), list(reservation.generations)
            namespace, said = reservation.namespace, p.said_of(reservation.use)
            self._publishing += 1
            self._link.ask(
                lambda number: p.Publish(number, namespace, slots, generations, keys, chain, *said), answered
            )
            self._refill(0)
        return result

    def commit(self, reservation: Reservation) -> int:
        """`commit_soon`, waited for: when it returns, every engine's acquire hits what was published."""
        return self.commit_soon(reservation).result()

    def finish(self, use: Use, ended: RequestEnd | None = None) -> None:
        """How the request `use.request` ended. Queued; lost if the daemon is away."""
        end = ended or RequestEnd()
        with self._lock:
            if use.request:
                keys, age_s = p.join_keys(end.prompt[: p.MAX_KEYS]), min(max(0.0, end.age_s), p.MAX_AGE_S)
                speed = min(max(0.0, end.prefill_tokens_s), p.MAX_SPEED)
                self._link.send(p.Finish(keys, end.prompt_tokens, age_s, speed, *p.said_of(use)))

    def note_prefill(self, tokens_s: float) -> None:
        """See ChunkCache. Every daemon that comes is told."""
        with self._lock:
            self._prefill_tokens_s = min(tokens_s, p.MAX_SPEED)
            self._tell_prefill()

    def has_room(self, wanted: Sequence[bytes]) -> bool:
        """Whether the stock has slots for those that are not cached, or can never have; else more are asked for."""
        with self._lock:
            count = sum(key not in self._replica for key in wanted)
            if self._enough(count):
                return True
            self._goal = max(self._goal, 2 * count)
            self._refill(count)
            return False

    def clear_soon(self, namespace: bytes) -> Future[int]:
        """Forget a namespace before anything that is asked later, also while the daemon is away: then it is told first."""
        result: Future[int] = _promise()
        with self._lock:
            self._described.pop(namespace, None)
            self._num_clears += 1
            self._clears[namespace] = self._num_clears
            self._send_clear(namespace, result)
        return result

    def clear(self, namespace: bytes | None = None) -> int:
        """`clear_soon`, waited for."""
        if namespace is None:
            raise ConfigError("an engine clears its own namespaces only; `kvkern clear` empties the whole cache")
        return self.clear_soon(namespace).result()

    def describe(self, root: bytes, fields: dict[str, str]) -> None:
        """Say what a namespace root stands for, for operators and for warnings about mistaken settings."""
        with self._lock:
            self._described[root] = {name: _short(value) for name, value in fields.items()}
            self._link.send(p.Describe(0, root, self._described[root]))

    def usage(self) -> dict[str, int]:
        """Slots of the arena, those granted and unused, chunks known, the most slots to hold, whether the daemon is there."""
        with self._lock:
            return {
                "slots": self.arena.spec.num_slots, "stock_slots": len(self._stock), "known_chunks": len(self._replica),
                "limit_slots": self._limit if self.connected else 0, "connected": int(self.connected),
            }  # fmt: skip

    def close(self) -> None:
        """End the connection and the thread. What is still held the daemon frees when this process is gone.

        Slots that were asked for are waited for, at most CLOSE_S, and given back: else the daemon would keep them as long.
        """
        with self._lock:
            self._limit = 0  # no more are asked for
            self._lock.wait_for(lambda: not (self._asked and self.connected), CLOSE_S)
            self._keep_within(0)
        self._link.close()

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _known(self, keys: Sequence[bytes]) -> int:
        return prefix_length(keys, self._replica)

    def _ended(self, era: int) -> bool:
        """A lease or reservation has ended. Returns whether the daemon knows it, else settles when it was the last."""
        if era == self._era:
            self._held -= 1
            return self.connected
        self._held_before -= 1
        self._settle()
        return False

    def _settle(self) -> None:
        if self._held_before == 0 and self.connected and self._index:
            self._link.send(p.Settle())

    def _sound(self, answer: p.Acquired, asked: int) -> bool:
        return max(answer.rows) < asked and max(answer.slots) < self.arena.spec.num_slots

    def _keep_within(self, limit: int) -> None:
        """Give back what is in stock above the limit."""
        self._limit = limit
        count = min(len(self._stock), len(self._stock) + len(self._begun) - limit)
        surplus = [self._stock.pop()[0] for _ in range(count)]
        for begin in range(0, len(surplus), p.MAX_SLOTS):
            self._link.send(p.GiveBack(surplus[begin : begin + p.MAX_SLOTS]))

    def _enough(self, needed: int) -> bool:
        return not (self.connected and self._index) or len(self._stock) >= min(needed, self._limit)

    def _refill(self, needed: int) -> None:
        goal = min(self._limit, max(self._goal, needed))
        coming = len(self._stock) + self._asked
        short = goal - coming
        if self._index and self.connected and short > 0 and (2 * short >= goal or needed > coming):
            count = min(short, p.MAX_SLOTS)
            self._asked += count

            def answered(response: p.Response | None) -> None:
                self._asked = max(0, self._asked - count)
                if isinstance(response, p.Granted):
                    granted = zip(response.slots, response.generations, strict=True)
                    self._stock.extend(pair for pair in granted if pair[0] < self.arena.spec.num_slots)
                    self._keep_within(response.limit)

            self._link.ask(lambda number: p.Grant(number, count), answered)

    def _tell_prefill(self) -> None:
        if self._prefill_tokens_s:
            self._link.send(p.Finish(b"", 0, 0.0, self._prefill_tokens_s, 0))

    def _send_clear(self, namespace: bytes, result: Future[int]) -> None:
        number = self._clears[namespace]

        def answered(response: p.Response | None) -> None:
            if not isinstance(response, p.Answer):
                result.set_result(0)  # it stays noted until a daemon has answered
                return
            if self._clears.get(namespace) == number:
                del self._clears[namespace]
            result.set_result(sum(int(row.get("chunks", 0)) for row in response.rows))

        begun = sorted(self._begun)
        self._link.ask(lambda id_: p.Clear(id_, namespace, begun), answered)

    def _opened(self) -> None:
        self._era += 1
        self._held_before += self._held
        self._begun.clear()
        self._held = 0
        for namespace in self._clears:
            self._send_clear(namespace, _promise())
        self._settle()
        for root, fields in self._described.items():
            self._link.send(p.Describe(0, root, fields))
        self._tell_prefill()
        self._refill(0)

    def _lost(self) -> None:
        self._stock.clear()
        self._replica.clear()
        self._synced = False
        self._asked, self._limit = 0, NO_LIMIT

    def _told(self, response: p.Response) -> None:
        if isinstance(response, p.Changed):
            if response.fresh:
                self._replica.clear()
                self._synced = True
            self._replica.update(p.cut_keys(response.added))
            self._replica.difference_update(p.cut_keys(response.removed))
        elif isinstance(response, p.Described) and response.warning:
            logger.warning("kvkern: %s", response.warning)
        elif isinstance(response, p.Granted):
            self._keep_within(response.limit)
        elif isinstance(response, p.Draining):
            self._keep_within(0)

    def _end_late(self) -> None:
        while self._late:
            self.release(self._late.popleft())


def _promise() -> Future[T]:
    """A future that its holder cannot cancel: the link's thread resolves it."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


def _short(value: str) -> str:
    return value if len(value) <= p.MAX_NAME else blake3(value.encode()).hexdigest()
