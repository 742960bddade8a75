"""An engine's side of the node's cache: the methods of `ChunkCache`, answered by a daemon.

The client keeps a replica of the daemon's index, so a lookup that misses waits for nobody: the daemon is told of it, for
its counters and its policy, and the answer is not awaited. It keeps a stock of granted
slots, so a store can begin at once. Only an acquire asks the daemon, because only a pinned chunk is a promise. The methods
ending in `_soon` never wait for the daemon. While the daemon is away everything is a miss. The link
(reconnecting_link.py) reads, writes and connects again.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from blake3 import blake3

from ...arena.file import Arena
from ...arena.process_identity import process_start
from ...arena.slots import SlotGeometry, SlotState
from ...bounded_dict import BoundedDict
from ...cache.base import NO_LEASE, Faults, RequestEnd, promised
from ...errors import ConfigError
from ...metrics import CacheCounters
from ...policy.base import Use
from ...tiers.base import ChunkShape, Lease, Reservation, prefix_length, slot_array
from ...tiers.slot_headers import begin_slots
from .. import framing
from .. import protocol as p
from .first_connection import connect_first
from .leases import NodeLease, NodeReservation, lease_of
from .reconnecting_link import ReconnectingLink

logger = logging.getLogger("kvkern")

FIRST_STOCK_GOAL = 64  # granted slots to keep in stock until a larger store is seen
CLOSE_S = 1.0  # how long `close` waits for slots that were asked for, to give them back
NO_LIMIT = 1 << 30  # until the daemon has sent a limit
MAX_DESCRIBED = 4096  # namespaces that a restarted daemon is told of; those described longest ago are left out
MAX_PUBLISH = p.MAX_KEYS // 2  # chunks of one reservation: with a chain of MAX_KEYS they still fit into one frame


class NodeClient:
    """A `ChunkCache` whose cache is a daemon's. Thread-safe. Make it with `open`; end it with `close`."""

    def __init__(
        self,
        path: Path,
        engine: str,
        geometry: SlotGeometry,
        index: bool = True,  # False for a worker, which copies and needs only the arena
        patience_s: float = 0.0,  # how long `reserve` may wait for slots; 0 in an engine's step
        daemon_uid: int = -1,  # a user that may serve, beside root and this process's own; negative: none
    ) -> None:
        self.counters = CacheCounters()
        self.faults = Faults(self.counters)
        hello = p.Hello(p.VERSION, _shortened(engine), p.Geometry.from_slots(geometry), index)
        on_link = self._on_connected, self._on_disconnected, self._on_message
        self._link = ReconnectingLink(path, hello, *on_link, daemon_uid)
        self._lock = self._link.lock
        self._index = index
        self._patience_s = patience_s
        self._owner = (os.getpid(), process_start(os.getpid()))
        self._connection = 0  # number of the present connection; the daemon ends leases and grants of earlier ones
        self._held = 0  # leases and reservations of this connection that have not ended
        self._held_before = 0  # those of earlier connections: the daemon keeps their slots until `Settle`
        self._replica: set[bytes] = set()  # keys of the daemon's index
        self._synced = False  # the replica has received the whole index on this connection
        self._writing: set[bytes] = set()  # keys under reservations that have not ended
        self._begun: set[int] = set()  # slots under reservations of this connection
        self._stock: deque[tuple[int, int]] = deque()  # (slot, generation) of granted slots that are not used
        self._unanswered_publishes = 0
        self._slots_asked = 0  # slots of Grant requests that are not answered
        self._stock_goal, self._limit = FIRST_STOCK_GOAL, NO_LIMIT
        # namespace -> (number of its last clear, its description), until a daemon has confirmed it
        self._clears: dict[bytes, tuple[int, dict[str, str]]] = {}
        self._num_clears = 0
        # root -> fields, to describe again on a new connection; a daemon keeps no more
        self._described: BoundedDict[bytes, dict[str, str]] = BoundedDict(MAX_DESCRIBED)
        self._prefill_tokens_s = 0.0  # 0: unknown
        self._late_leases: deque[Lease] = deque()

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
        daemon_uid: int = -1,
        dump_arena: bool = False,
        required: bool = True,
    ) -> NodeClient:
        """Connect. Wait at most `timeout_s` for a sign of the daemon, and for the arena as long as the daemon answers.

        Raises ConfigError if no daemon answers, or the daemon refuses or is another user's. With `dump_arena` core dumps of
        this process hold the arena. If no daemon answers and none is `required`, the client connects when there is one.
        Until then everything is a miss, and it has no arena.
        """
        client = cls(framing.checked_socket_path(path), engine, geometry, index, patience_s, daemon_uid)
        client._link.dump_arena, client._link.prefault = dump_arena, prefault
        connect_first(client._link, prefault, timeout_s, required)
        client._link.start()
        return client

    @property
    def arena(self) -> Arena:
        """The shared memory. It stays the same for the client's whole life. Only a client that has connected has one."""
        assert self._link.arena is not None
        return self._link.arena

    def wait_for_arena(self, timeout_s: float) -> Arena | None:
        """Return the arena as soon as the client has connected for the first time, or None after `timeout_s` without one."""
        with self._lock:
            self._lock.wait_for(lambda: self._link.arena is not None, timeout_s)
            return self._link.arena

    @property
    def shared(self) -> bool:
        """True: all engines of the node use the daemon's cache."""
        return True

    @property
    def closed(self) -> bool:
        """Return True after `close`."""
        return self._link.closing

    @property
    def connected(self) -> bool:
        """Return True if the daemon is connected. False in a forked child, where no thread reads the answers."""
        return self._link.connected and os.getpid() == self._owner[0]

    # -- what an engine calls ----------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Return the length of the longest prefix of `keys` in the replica, which an acquire would probably give."""
        with self._lock:
            return prefix_length(keys, self._replica)

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """Pin the longest cached prefix, or with `prefix=False` every cached chunk.

        The future is done at once on a sure miss, else when the daemon answers or has been silent for ANSWER_S. The daemon
        is asked for all keys in either case, so that it counts misses and its policy learns of them.
        """
        result: Future[Lease] = promised()
        asked = list(keys[: p.MAX_KEYS])
        with self._lock:
            self._end_late_leases()
            counted = use is None or not use.counts_itself
            self.counters.lookup_chunks += len(keys) * counted
            # A remote store may hold chunks that no index names.
            remote = self._link.remote and use is not None and bool(use.namespace)
            if not asked or not self.connected:
                result.set_result(NO_LEASE)
                return result
            if self._synced and not (remote or self._unanswered_publishes or self._link.has_unread()):
                likely = asked[:1] if prefix else asked
                if self._replica.isdisjoint(likely):
                    result.set_result(NO_LEASE)

            def on_answer(response: p.Response | None) -> None:
                found = lease_of(response, asked, self.arena.spec.num_slots, self._connection)
                if found is not None and result.done():  # another engine has just stored it, and nobody waits any more
                    self._link.send(p.Release([found.number]))
                    return
                lease = NO_LEASE if found is None else found
                if found is not None:
                    self.counters.hit_chunks += len(lease.keys) * counted
                    self._held += 1
                if not result.done():
                    result.set_result(lease)

            namespace, about_request = use.namespace if use is not None else b"", p.request_fields(use)
            self._link.ask(
                lambda id_: p.Acquire(id_, framing.join_keys(asked), prefix, namespace, *about_request), on_answer
            )
        return result

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """Call `acquire_soon` and wait for the lease."""
        return self.acquire_soon(keys, prefix, use).result()

    def count_lookups(self, lookups: int, hits: int) -> None:
        """See ChunkCache."""
        with self._lock:
            self.counters.lookup_chunks += lookups
            self.counters.hit_chunks += hits

    def release(self, lease: Lease) -> int:
        """End a lease. The daemon drops the chunks that the reader marked BAD. Returns how many there are."""
        if not isinstance(lease, NodeLease):
            return 0
        states = self.arena.headers["state"][slot_array(lease.slots)]
        bad = [key for key, state in zip(lease.keys, states.tolist(), strict=True) if state == SlotState.BAD]
        with self._lock:
            self.counters.bad_chunks += len(bad)
            self._replica.difference_update(bad)  # at once, because the engine will compute them and store them again
            if self._end_held(lease.connection):
                self._link.send(p.Release([lease.number]))
        return len(bad)

    def release_later(self, lease: Lease) -> None:
        """End the lease in the next call. For finalizers, which may run while this thread holds the lock."""
        self._late_leases.append(lease)

    def reserve(
        self, chain: Sequence[bytes], wanted: Sequence[bytes], shape: ChunkShape, use: Use | None = None
    ) -> Reservation:
        """Take slots from the stock for those of `wanted` that are not in the replica and not being written by this client.

        Waits at most `patience_s` for more slots. Chunks without a slot are counted as dropped.
        """
        with self._lock:
            self._end_late_leases()
            missing = [key for key in dict.fromkeys(wanted) if key not in self._replica and key not in self._writing]
            if not self.connected or not missing:
                return Reservation((), (), (), len(missing))
            self._stock_goal = max(self._stock_goal, 2 * len(missing))
            self._refill_stock(len(missing))
            if self._patience_s:
                self._lock.wait_for(lambda: self._stock_suffices(len(missing)), self._patience_s)
            granted = missing[: min(len(self._stock), MAX_PUBLISH)]
            taken = [self._stock.popleft() for _ in granted]
            slots, generations = tuple(slot for slot, _ in taken), tuple(generation for _, generation in taken)
            dropped = len(missing) - len(granted)
            self.counters.dropped_chunks += dropped
            if granted:
                at, under = slot_array(slots), np.array(generations, dtype=np.uint64)
                begin_slots(self.arena, at, under, granted, shape, chain, self._owner)
                self._writing.update(granted)
                self._begun.update(slots)
                self._held += 1
            return NodeReservation(
                tuple(granted), slots, generations, dropped, chain=tuple(chain),
                namespace=shape.namespace, connection=self._connection, use=use,
            )  # fmt: skip

    @property
    def round_chunks(self) -> int:
        """See ChunkCache: half of the slots that the daemon grants. While one half is written, the other half comes."""
        with self._lock:
            limit = self._limit if self._limit < NO_LIMIT else FIRST_STOCK_GOAL
            return min(MAX_PUBLISH, max(1, limit // 2))

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """Ask the daemon to publish the chunks that every rank has written. The result is how many it published."""
        result: Future[int] = promised()
        with self._lock:
            if not isinstance(reservation, NodeReservation) or not reservation.slots:
                result.set_result(0)
                return result
            if not self._end_writing(reservation):
                self.counters.failed_chunks += len(reservation.slots)
                result.set_result(0)
                return result

            def on_answer(response: p.Response | None) -> None:
                self._unanswered_publishes -= 1
                published = response.published if isinstance(response, p.Published) else []
                stored = sum(published)
                known = sum(map(self._replica.__contains__, reservation.keys))
                self.counters.note_stored(len(reservation.slots), stored, known)
                result.set_result(stored)

            keys, chain = framing.join_keys(reservation.keys), framing.join_keys(reservation.chain[: p.MAX_KEYS])
            slots, generations = list(reservation.slots), list(reservation.generations)
            namespace, about_request = reservation.namespace, p.request_fields(reservation.use)
            self._unanswered_publishes += 1
            self._link.ask(
                lambda id_: p.Publish(id_, namespace, slots, generations, keys, chain, *about_request), on_answer
            )
            self._refill_stock(0)
        return result

    def commit(self, reservation: Reservation) -> int:
        """Call `commit_soon` and wait. When it returns, the next acquire of every engine hits the published chunks."""
        return self.commit_soon(reservation).result()

    def abort(self, reservation: Reservation) -> None:
        """See ChunkCache. The daemon is told at once, unless it is away."""
        with self._lock:
            if isinstance(reservation, NodeReservation) and reservation.slots and self._end_writing(reservation):
                self._link.send(p.GiveBack(list(reservation.slots)))

    def finish(self, use: Use, request_end: RequestEnd | None = None) -> None:
        """Tell the daemon how the request `use.request` ended. Queued; lost if the daemon is away."""
        end = request_end or RequestEnd()
        with self._lock:
            if use.request:
                keys, age_s = framing.join_keys(end.prompt[: p.MAX_KEYS]), min(max(0.0, end.age_s), p.MAX_AGE_S)
                speed = min(max(0.0, end.prefill_tokens_s), p.MAX_SPEED)
                self._link.send(p.Finish(keys, end.prompt_tokens, age_s, speed, *p.request_fields(use)))

    def note_prefill(self, tokens_s: float) -> None:
        """See ChunkCache. The client tells it to the present daemon and to every later one."""
        with self._lock:
            self._prefill_tokens_s = min(tokens_s, p.MAX_SPEED)
            self._send_prefill()

    def room(self, wanted: Sequence[bytes]) -> int:
        """Return how many of `wanted` the stock has slots for, if that is all of them or the stock can never be larger.

        Otherwise ask the daemon for more slots and return 0. Cached chunks need none. All, if no slots will come.
        """
        with self._lock:
            missing = [at for at, key in enumerate(wanted) if key not in self._replica and key not in self._writing]
            if not self._stock_suffices(len(missing)):
                self._stock_goal = max(self._stock_goal, 2 * len(missing))
                self._refill_stock(len(missing))
                return 0
            return missing[len(self._stock)] if 0 < len(self._stock) < len(missing) else len(wanted)

    def clear_soon(self, namespace: bytes) -> Future[int]:
        """Forget a namespace before any later request is carried out.

        While the daemon is away, the clear is kept and is the first request on the next connection.
        """
        result: Future[int] = promised()
        with self._lock:
            fields = self._described.pop(namespace, None) or self._clears.get(namespace, (0, {}))[1]
            self._num_clears += 1
            self._clears[namespace] = self._num_clears, fields
            self._send_clear(namespace, result)
        return result

    def clear(self, namespace: bytes | None = None) -> int:
        """Call `clear_soon` and wait. Raises ConfigError without a namespace."""
        if namespace is None:
            raise ConfigError(
                "an engine clears its own namespaces only, and none was given; `kvkern clear` empties the whole cache"
            )
        return self.clear_soon(namespace).result()

    def describe_namespace(self, root: bytes, fields: dict[str, str]) -> None:
        """Tell the daemon what a namespace root stands for. Quotas and warnings about mistaken settings use it."""
        with self._lock:
            described = {name: _shortened(value) for name, value in fields.items()}
            self._described.put(root, described)
            self._link.send(p.Describe(0, root, described))

    def usage(self) -> dict[str, int]:
        """Return the arena's slots, unused granted slots, chunks in the replica, the limit of granted slots, `connected`."""
        with self._lock:
            slots = 0 if self._link.arena is None else self.arena.spec.num_slots
            return {
                "slots": slots, "stock_slots": len(self._stock), "known_chunks": len(self._replica),
                "limit_slots": self._limit if self.connected else 0, "connected": int(self.connected),
            }  # fmt: skip

    def close(self) -> None:
        """End the connection and the thread. The daemon frees what is still held when this process is gone.

        Slots that were asked for would stay taken as long. So this waits for them, at most CLOSE_S, and gives them back.
        """
        with self._lock:
            self._limit = 0  # ask for no more
            self._lock.wait_for(lambda: not (self._slots_asked and self.connected), CLOSE_S)
            self._keep_within(0)
        self._link.close()

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _end_writing(self, reservation: NodeReservation) -> bool:
        """Note that nobody writes these slots any more. Return True if the daemon must be told."""
        self._writing.difference_update(reservation.keys)
        if reservation.connection == self._connection:
            self._begun.difference_update(reservation.slots)
        return self._end_held(reservation.connection)

    def _end_held(self, connection: int) -> bool:
        """Count a lease or reservation as ended. Return True if the daemon must be told.

        If it was the last one of earlier connections, settle.
        """
        if connection == self._connection:
            self._held -= 1
            return self.connected
        self._held_before -= 1
        self._settle()
        return False

    def _settle(self) -> None:
        if self._held_before == 0 and self.connected and self._index:
            self._link.send(p.Settle())

    def _keep_within(self, limit: int) -> None:
        """Set the limit and give back the stock above it."""
        self._limit = limit
        count = min(len(self._stock), len(self._stock) + len(self._begun) - limit)
        surplus = [self._stock.pop()[0] for _ in range(count)]
        for begin in range(0, len(surplus), p.MAX_SLOTS):
            self._link.send(p.GiveBack(surplus[begin : begin + p.MAX_SLOTS]))

    def _stock_suffices(self, needed: int) -> bool:
        return not (self.connected and self._index) or len(self._stock) >= min(needed, self._limit)

    def _refill_stock(self, needed: int) -> None:
        """Ask for slots if the stock is below half of its goal, or below `needed`."""
        goal = min(self._limit, max(self._stock_goal, needed))
        coming = len(self._stock) + self._slots_asked
        short = goal - coming
        if self._index and self.connected and short > 0 and (2 * short >= goal or needed > coming):
            count = min(short, p.MAX_SLOTS)
            self._slots_asked += count

            def on_answer(response: p.Response | None) -> None:
                self._slots_asked = max(0, self._slots_asked - count)
                if isinstance(response, p.Granted):
                    granted = zip(response.slots, response.generations, strict=True)
                    self._stock.extend(pair for pair in granted if pair[0] < self.arena.spec.num_slots)
                    self._keep_within(response.limit)

            self._link.ask(lambda id_: p.Grant(id_, count), on_answer)

    def _send_prefill(self) -> None:
        if self._prefill_tokens_s:
            self._link.send(p.Finish(b"", 0, 0.0, self._prefill_tokens_s, 0))

    def _send_clear(self, namespace: bytes, result: Future[int]) -> None:
        number, fields = self._clears[namespace]
        if fields:  # only who has described a namespace on this connection may clear it
            self._link.send(p.Describe(0, namespace, fields))

        def on_answer(response: p.Response | None) -> None:
            if not isinstance(response, p.Answer):
                result.set_result(0)  # it stays in _clears until a daemon answers
                return
            if self._clears.get(namespace, (0, {}))[0] == number:
                del self._clears[namespace]
            result.set_result(sum(int(row.get("chunks", 0)) for row in response.rows))

        begun = sorted(self._begun)
        self._link.ask(lambda id_: p.Clear(id_, namespace, begun), on_answer)

    def _on_connected(self) -> None:
        self._connection += 1
        self._held_before += self._held
        self._begun.clear()
        self._held = 0
        for namespace in self._clears:
            self._send_clear(namespace, promised())
        self._settle()
        for root, fields in self._described.items():
            self._link.send(p.Describe(0, root, fields))
        self._send_prefill()
        self._refill_stock(0)

    def _on_disconnected(self) -> None:
        self._stock.clear()
        self._replica.clear()
        self._synced = False
        self._slots_asked, self._limit = 0, NO_LIMIT

    def _on_message(self, response: p.Response) -> None:
        if isinstance(response, p.Changed):
            if response.fresh:
                self._replica.clear()
                self._synced = True
            self._replica.update(framing.split_keys(response.added))
            self._replica.difference_update(framing.split_keys(response.removed))
        elif isinstance(response, p.Described) and response.warning:
            logger.warning("kvkern: %(warning)s", {"event": "namespace_differs", "warning": response.warning})
        elif isinstance(response, p.Granted):
            self._keep_within(response.limit)
        elif isinstance(response, p.Draining):
            self._keep_within(0)

    def _end_late_leases(self) -> None:
        while self._late_leases:
            self.release(self._late_leases.popleft())


def _shortened(value: str) -> str:
    """Return the value, or its hash if it is longer than a field may be."""
    return value if len(value) <= p.MAX_NAME else blake3(value.encode()).hexdigest()
