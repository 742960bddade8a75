"""Who holds what: leases and granted slots of every client, and those of clients that vanished. No sockets, no threads.

session lost -> what it held stays quarantined until every process of its engine is gone (pid and start time), or
                the engine is back and says that its transfers have ended (settle)
daemon lost  -> the next one adopts the arena: chunks are served at once, but nothing is evicted under processes
                that had the old daemon's file mapped, until they are back, gone, or RESTART_PIN_S have passed
                (their reads are verified, so this deadline costs misses only); slots they were writing stay
                theirs without any deadline
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from ...arena.file import MAX_PROCESSES, Arena
from ...arena.process_identity import process_alive
from ...cache.base import NO_LEASE
from ...cache.manager import Cache
from ...errors import ArenaError
from ...policy.base import Use
from ...tiers.base import Lease, Reservation

RESTART_PIN_S = 30.0
GRANTED_SHARE = 8  # at most one slot in so many is granted and not yet filled, over all clients
MAX_NAMESPACES = 4096  # described; of those used longest ago the descriptions are forgotten
MAX_TOLD = 128  # engines that a namespace remembers
MAX_LEASES = 4096  # of one session: an engine holds one or a few a waiting request

Process = tuple[int, int]  # pid and start time


@dataclass(eq=False)
class Session:
    """One connection."""

    number: int
    process: Process
    engine: str
    writer: bool  # may be granted slots
    settled: bool = False  # nothing that its engine began under an earlier connection of this process is under way
    leases: dict[int, Lease] = field(default_factory=dict)
    granted: dict[int, int] = field(default_factory=dict)  # slot -> generation


@dataclass(eq=False)
class Quarantine:
    """What processes may still be reading or writing."""

    engine: str | None  # None: from before this daemon, of any engine
    processes: set[Process]
    leases: list[Lease] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    until: float = float("inf")  # monotonic seconds


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """What engines said of a root."""

    fields: dict[str, str]
    limit: int | None  # slots that it may fill
    engines: set[str] = field(default_factory=set)  # that have said so, and were warned if there was a reason


@dataclass(frozen=True, slots=True)
class Quotas:
    """How many bytes of the arena a namespace may hold."""

    models: Mapping[str, int] = field(default_factory=dict)  # by model name; `*` and `?` stand for anything
    tenant: int | None = None  # of every namespace that has a salt
    fair: bool = False  # without quotas too, whoever holds most gives way first

    @property
    def shares(self) -> bool:
        """Whether namespaces are told apart."""
        return self.fair or bool(self.models) or self.tenant is not None

    def of(self, fields: Mapping[str, str]) -> int | None:
        """Bytes for a namespace with these fields; None: no limit."""
        limits = [nbytes for pattern, nbytes in self.models.items() if fnmatchcase(fields.get("model", ""), pattern)]
        if self.tenant is not None and "salt" in fields:
            limits.append(self.tenant)
        return min(limits, default=None)

    def least(self) -> int | None:
        """Bytes for a namespace of which nothing is known: no more than any quota allows."""
        return min([*self.models.values(), *([] if self.tenant is None else [self.tenant])], default=None)


class Sessions:
    """The daemon's state over one arena. One thread."""

    def __init__(
        self,
        cache: Cache,
        arena: Arena,
        clock: Callable[[], float] = time.monotonic,
        alive: Callable[[int, int], bool] = process_alive,
        quotas: Quotas | None = None,
    ) -> None:
        self.cache = cache
        self.arena = arena
        self.sessions: dict[int, Session] = {}
        self.quarantines: list[Quarantine] = []
        self.namespaces: OrderedDict[bytes, NamespaceInfo] = OrderedDict()  # the one used last is the last
        self._clock, self._alive = clock, alive
        self._quotas = quotas or Quotas()
        self._hashes: dict[frozenset[tuple[str, str]], Counter[str | None]] = {}  # of namespaces alike but for the hash
        self._next_session = self._next_lease = 0
        self._members: dict[str, set[Process]] = {}  # of engines with a name that have a session: all that ever had one
        self._settled: set[str] = set()  # engines of which nothing from before this daemon is under way
        self._limited = self._quotas.least() is not None
        if self._limited:
            cache.take_grown_namespaces()  # from now on it says so

    # -- start ---------------------------------------------------------------------------------------------------------

    def adopt(self) -> tuple[int, int]:
        """Take over what an earlier daemon left. Returns (chunks served again, chunks that did not verify)."""
        records = self.arena.processes.tolist()
        survivors = {process for process in records if process[0] and self._alive(*process)}
        # any survivor may be writing what a process that is gone was granted: a worker outlives its scheduler
        adopted = self.cache.adopt(lambda pid, start: bool(survivors) or self._alive(pid, start))
        read = Quarantine(None, set(survivors), [], list(adopted.unserved), self._clock() + RESTART_PIN_S)
        if survivors and adopted.ready:
            read.leases.append(self.cache.pin_all())
        self.quarantines.append(read)
        for owner in set(adopted.unfinished.values()):
            slots = [slot for slot, writer in adopted.unfinished.items() if writer == owner]
            self.quarantines.append(Quarantine(None, survivors | {owner}, [], slots))
        self.sweep()
        self._record()  # not before: if this daemon dies meanwhile, the next one must know of the same processes
        return adopted.ready, adopted.torn

    # -- a client's life -------------------------------------------------------------------------------------------

    def attach(self, process: Process, engine: str, writer: bool) -> Session:
        """A client is let in. Raises ArenaError if too many processes have the arena."""
        self.sweep()
        if len(self._processes() | {process}) > MAX_PROCESSES:
            raise ArenaError(f"{MAX_PROCESSES} processes use this cache already; end some, or run another daemon")
        self._next_session += 1
        session = Session(self._next_session, process, engine, writer)
        self.sessions[session.number] = session
        if engine:
            self._members.setdefault(engine, set()).add(process)
        if engine in self._settled:
            for held in self.quarantines:
                if held.engine is None:
                    held.processes.discard(process)
        self._record()
        return session

    def detach(self, session: Session) -> None:
        """A connection is gone; what it held is freed when nobody can be using it any more."""
        self.sessions.pop(session.number, None)
        same = [other for other in self.sessions.values() if other.engine == session.engine]
        if session.leases or session.granted:
            processes = {session.process} | self._members.get(session.engine, set())
            later = [other for other in same if other.process == session.process and other.number > session.number]
            if session.engine and any(other.settled for other in later):
                processes = set()  # the engine is back and has settled, before the end of this connection was seen
            held = Quarantine(session.engine, processes, list(session.leases.values()), list(session.granted))
            session.leases, session.granted = {}, {}
            self.quarantines.append(held)
        if session.writer or not same:
            self._settled.discard(session.engine)
        if not same:
            self._members.pop(session.engine, None)
        self.sweep()
        self._record()

    def settle(self, session: Session) -> None:
        """The engine's earlier transfers have ended: nothing that its process had a part in is in quarantine any more."""
        session.settled = True
        mates = {session.process} | self._members.get(session.engine, set())
        for held in self.quarantines:
            if session.process not in held.processes:
                continue  # a new process of an engine does not know what those before it still do
            if held.engine is None:
                held.processes -= mates
                self._settled.update({session.engine} - {""})
            elif held.engine == session.engine:
                held.processes.clear()
        self.sweep()

    def sweep(self) -> None:
        """Free what is in quarantine for processes that are gone, or past its deadline. Call it now and then."""
        now, kept = self._clock(), []
        watched = [*self._members.values(), *(held.processes for held in self.quarantines)]
        gone = {process for process in set().union(*watched) if not self._alive(*process)}
        for processes in watched:
            processes -= gone
        for held in self.quarantines:
            if held.processes and (held.leases or held.slots) and now < held.until:
                kept.append(held)
                continue
            for lease in held.leases:
                self.cache.release(lease)
            self.cache.give_back(held.slots)
        self.quarantines = kept
        for namespace in self.cache.take_grown_namespaces() if self._limited else ():
            if (limit := self._slots_of(namespace)) is not None:
                self.cache.trim(namespace, limit)

    # -- requests --------------------------------------------------------------------------------------------------------

    def acquire(
        self, session: Session, keys: Sequence[bytes], prefix: bool, use: Use | None = None
    ) -> tuple[int, Lease]:
        """`lend` of what is found, waited for."""
        return self.lend(session, self.acquire_soon(session, keys, prefix, use).result())

    def acquire_soon(
        self, session: Session, keys: Sequence[bytes], prefix: bool, use: Use | None = None
    ) -> Future[Lease]:
        """What is cached, to be lent when it is known; a remote store takes its time."""
        if len(session.leases) >= MAX_LEASES:
            nothing: Future[Lease] = Future()
            nothing.set_result(NO_LEASE)
            return nothing
        return self.cache.acquire_soon(keys, prefix, use)

    def lend(self, session: Session, lease: Lease) -> tuple[int, Lease]:
        """(number of the lease, lease). An empty lease has number 0 and needs no release. Nothing for who has gone."""
        if not lease.slots or session.number not in self.sessions:
            self.cache.release(lease)
            return 0, NO_LEASE
        self._next_lease += 1
        session.leases[self._next_lease] = lease
        return self._next_lease, lease

    def release(self, session: Session, numbers: Iterable[int]) -> None:
        """End leases of this session; numbers it does not hold are ignored."""
        for number in numbers:
            if (lease := session.leases.pop(number, None)) is not None:
                self.cache.release(lease)

    def limit(self, session: Session) -> int:
        """How many granted slots a client may hold: an even share of one slot in GRANTED_SHARE. A new writer makes it less."""
        if not session.writer:
            return 0
        writers = sum(other.writer for other in self.sessions.values())
        return max(1, self.arena.spec.num_slots // GRANTED_SHARE // max(1, writers))

    def grant(self, session: Session, count: int) -> Reservation:
        """Slots for the client to fill, as many as its limit leaves."""
        count = min(count, self.limit(session) - len(session.granted))
        if count <= 0:
            return Reservation((), (), ())
        granted = self.cache.grant(count)
        session.granted.update(zip(granted.slots, granted.generations, strict=True))
        return granted

    def publish(
        self,
        session: Session,
        namespace: bytes,
        slots: Sequence[int],
        generations: Sequence[int],
        keys: Sequence[bytes],
        chain: Sequence[bytes],
        use: Use | None = None,
    ) -> list[bool]:
        """Publish chunks in slots granted to this session; slots and generations it does not hold publish nothing."""
        result = [False] * len(slots)
        mine = []
        for row, (slot, generation) in enumerate(zip(slots, generations, strict=True)):
            if session.granted.get(slot) == generation:
                del session.granted[slot]
                mine.append(row)
        if mine:
            held = Reservation(
                tuple(keys[row] for row in mine), tuple(slots[row] for row in mine),
                tuple(generations[row] for row in mine), chain=tuple(chain),
            )  # fmt: skip
            for row, published in zip(mine, self.cache.publish(held, namespace, use), strict=True):
                result[row] = published
            if (limit := self._slots_of(namespace)) is not None:
                self.cache.trim(namespace, limit)
        return result

    def give_back(self, session: Session, slots: Iterable[int]) -> None:
        """Granted slots that the client has not used."""
        mine = [slot for slot in dict.fromkeys(slots) if slot in session.granted]
        for slot in mine:
            del session.granted[slot]
        self.cache.give_back(mine)

    def clear(self, session: Session, namespace: bytes | None, begun: Iterable[int]) -> int:
        """Forget a namespace, or everything. Returns how many chunks. `begun`: slots of this session that are in it."""
        return self.cache.clear(namespace, session.granted.keys() - set(begun))

    def describe(self, session: Session, root: bytes, fields: dict[str, str]) -> str:
        """Note what a root stands for. Returns a warning if it differs from another only in what is usually a mistake.

        An engine that says the same again, as after a lost connection, is not warned again. O(1).
        """
        known = self.namespaces.get(root)
        if known is None or known.fields != fields:
            known = self._note(root, fields)
        self.namespaces.move_to_end(root)
        if session.engine in known.engines:
            return ""
        if len(known.engines) >= MAX_TOLD:
            known.engines.clear()
        known.engines.add(session.engine)
        mine = fields.get("engine_hash")
        other = next((found for found in self._hashes[_but_hash(fields)] if found != mine), mine)
        if other == mine:
            return ""
        return (
            f"another engine caches the same model under another hash identity ({other}, here {mine}): they share "
            f"nothing; give all engines the same PYTHONHASHSEED and prefix_caching_hash_algo"
        )

    def _note(self, root: bytes, fields: dict[str, str]) -> NamespaceInfo:
        """A description takes the place of the root's earlier one, or of the one used longest ago."""
        if root in self.namespaces:
            self._forget(root)
        elif len(self.namespaces) >= MAX_NAMESPACES:
            self._forget(next(iter(self.namespaces)))
        self._hashes.setdefault(_but_hash(fields), Counter())[fields.get("engine_hash")] += 1
        info = self.namespaces[root] = NamespaceInfo(dict(fields), self._slots(self._quotas.of(fields)))
        return info

    def _forget(self, root: bytes) -> None:
        fields = self.namespaces.pop(root).fields
        alike, mine = self._hashes[_but_hash(fields)], fields.get("engine_hash")
        alike[mine] -= 1
        if not alike[mine]:
            del alike[mine]
        if not alike:
            del self._hashes[_but_hash(fields)]

    def _slots_of(self, namespace: bytes) -> int | None:
        """How many slots a namespace may fill. Without a description it escapes no quota: it gets the least there is."""
        if (info := self.namespaces.get(namespace)) is None:
            return self._slots(self._quotas.least())
        self.namespaces.move_to_end(namespace)
        return info.limit

    def _slots(self, nbytes: int | None) -> int | None:
        return None if nbytes is None else nbytes // self.arena.spec.geometry.slot_nbytes

    def usage(self) -> dict[str, int | float | str]:
        """Counters of the cache and what is held by whom."""
        return {
            **self.cache.counters.snapshot(),
            **self.cache.usage(),
            "slot_nbytes": self.arena.spec.geometry.slot_nbytes,
            "chunks": len(self.cache.all_keys()),
            "sessions": len(self.sessions),
            "leases": sum(len(session.leases) for session in self.sessions.values()),
            "granted_slots": sum(len(session.granted) for session in self.sessions.values()),
            "quarantined_leases": sum(len(held.leases) for held in self.quarantines),
            "quarantined_slots": sum(len(held.slots) for held in self.quarantines),
            "namespaces": len(self.namespaces),
        }

    def _processes(self) -> set[Process]:
        """Who may be touching the arena."""
        connected = {session.process for session in self.sessions.values()}
        return connected.union(*self._members.values(), *(held.processes for held in self.quarantines))

    def _record(self) -> None:
        """Write into the arena who may be touching it, for the daemon after this one.

        A process keeps its row, so that a kill between two rows hides no other process.
        """
        rows, new = self.arena.processes, self._processes()
        for row, process in enumerate(rows.tolist()):
            if process in new:
                new.discard(process)
            else:
                rows[row] = (0, 0)
        free = np.flatnonzero(rows["pid"] == 0).tolist()
        for row, process in zip(free, sorted(new), strict=False):
            rows[row] = process


def _but_hash(fields: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(item for item in fields.items() if item[0] != "engine_hash")
