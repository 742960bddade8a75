"""Who holds what: leases and granted slots of every client, and of clients that are gone. No sockets, no threads.

session lost -> what it held stays in quarantine until every process of its engine is gone (pid and start time), or
                until the engine is back and says that its transfers have ended (settle)
daemon lost  -> the next daemon adopts the arena and serves its chunks at once. It evicts nothing under processes that
                had the old daemon's file mapped until they are back, gone, or RESTART_PIN_S have passed. Their reads are
                verified, so this deadline costs misses only. Slots that they were writing stay theirs without a deadline,
                as far as they are no more than clients may be granted, and as far as the kernel says that a process has
                the arena mapped. The list of processes lies in shared memory, so it only says whom to ask about
"""

from __future__ import annotations

import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ...arena.file import MAX_PROCESSES, Arena
from ...arena.process_identity import process_alive
from ...cache.base import NO_LEASE
from ...cache.manager import Cache
from ...errors import ArenaError
from ...policy.base import Use
from ...tiers.base import Lease, Reservation, slot_array
from ..protocol import MAX_KEYS
from . import shares
from .admission import USER_SHARE
from .arena_holders import maps_arena
from .quotas import Quotas
from .shares import Process, Shares

RESTART_PIN_S = 30.0
MAX_NAMESPACES = 4096  # descriptions that are kept; those used longest ago are forgotten
MAX_REMEMBERED_ENGINES = 128  # engines per namespace that are known to have described it
MAX_LEASES = 4096  # per session; an engine holds one or a few for each waiting request
LEASED_SHARE = 16  # a user may have each slot on lease so often, on average

Team = tuple[int, str]  # the processes of an engine: its user and its name


@dataclass(eq=False)
class Session:
    """What one connection holds."""

    number: int
    process: Process
    engine: str
    writer: bool  # may be granted slots
    uid: int = 0
    settled: bool = False  # no transfer is under way that its engine began on an earlier connection of this process
    leases: dict[int, Lease] = field(default_factory=dict)  # by number
    granted: dict[int, int] = field(default_factory=dict)  # slot -> generation
    extra: int = 0  # of `granted`: see shares.py
    told_limit: int = 0  # the limit of granted slots that the client knows

    @property
    def team(self) -> Team | None:
        """The engine that this is a process of. None: it has no name, so it is on its own."""
        return (self.uid, self.engine) if self.engine else None


@dataclass(eq=False)
class Quarantine:
    """Leases and slots that these processes may still be reading or writing."""

    team: Team | None  # None: an engine without a name, or with `holder` None from before this daemon: any engine
    holder: Process | None  # whose connection has ended; None: from before this daemon
    processes: set[Process]
    leases: list[Lease] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    extra: int = 0  # of `slots`: see shares.py
    until: float = float("inf")  # deadline, monotonic seconds
    uid: int | None = None  # of the holder
    unseen: set[Process] = field(
        default_factory=set
    )  # of `processes`: the kernel does not say whether they hold the arena
    unseen_until: float = float("inf")  # deadline of those


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """What engines said about a namespace root."""

    fields: dict[str, str]
    limit: int | None  # slots that it may fill; None: no limit
    engines: set[Team] = field(default_factory=set)  # engines that described it, and were warned if there was a reason


class Sessions:
    """The daemon's state over one arena. Use it from one thread."""

    def __init__(
        self,
        cache: Cache,
        arena: Arena,
        clock: Callable[[], float] = time.monotonic,
        alive: Callable[[int, int], bool] = process_alive,
        quotas: Quotas | None = None,
        maps: Callable[[Arena, int], bool | None] = maps_arena,
    ) -> None:
        self.cache = cache
        self.arena = arena
        self.sessions: dict[int, Session] = {}
        self.quarantines: list[Quarantine] = []
        self.namespaces: OrderedDict[bytes, NamespaceInfo] = OrderedDict()  # in order of use, the last used at the end
        self._clock, self._alive, self._maps = clock, alive, maps
        self._quotas = quotas or Quotas()
        # fields without the hash -> hashes of the namespaces with these fields
        self._hashes: dict[frozenset[tuple[str, str]], Counter[str | None]] = {}
        self._next_session = self._next_lease = 0
        # every process that a named engine with a session ever had
        self._engine_processes: dict[Team, set[Process]] = {}
        self._leased: Counter[int | None] = (
            Counter()
        )  # slots on lease, in quarantine too, each as often as it is, by uid
        self._recorded: set[Process] = set()  # those that the arena lists
        self._settled: set[Team] = set()  # engines that have no transfer from before this daemon under way
        self._limited = self._quotas.smallest_nbytes() is not None
        if self._limited:
            cache.take_grown_namespaces()  # the first call makes the cache note them

    # -- start ---------------------------------------------------------------------------------------------------------

    def adopt(self) -> tuple[int, int]:
        """Take over an earlier daemon's chunks and slots. Returns (chunks served again, chunks that did not verify)."""
        seen: dict[Process, bool | None] = {}

        def may_hold(process: Process) -> bool:
            if process not in seen:
                seen[process] = bool(process[0]) and self._alive(*process) and self._maps(self.arena, process[0])
            return seen[process] is not False

        survivors = {process for process in self.arena.processes.tolist() if may_hold(process)}
        # Any survivor may be writing into slots that a dead process was granted, because a worker outlives its scheduler.
        adopted = self.cache.adopt(lambda pid, start: bool(survivors) or may_hold((pid, start)))
        deadline = self._clock() + RESTART_PIN_S
        maybe_read = Quarantine(None, None, set(survivors), [], list(adopted.unserved), until=deadline)
        if survivors and adopted.ready:
            maybe_read.leases.append(self.cache.pin_all())
        self.quarantines.append(maybe_read)
        most = max(1, self.arena.spec.num_slots // shares.GRANTED_SHARE)
        surplus = sorted(adopted.unfinished)[most:]  # no client could hold so many in a full arena
        left_by: dict[Process | None, set[int]] = {}  # None: owners that hold nothing any more, whoever they were
        for slot, owner in adopted.unfinished.items():
            left_by.setdefault(owner if may_hold(owner) else None, set()).add(slot)
        for holder, slots in left_by.items():
            holders = survivors | ({holder} if holder is not None else set())
            unseen = {process for process in holders if seen[process] is None}
            for held, until in ((slots.difference(surplus), float("inf")), (slots.intersection(surplus), deadline)):
                self.quarantines.append(
                    Quarantine(
                        None, None, set(holders), [], sorted(held), until=until, unseen=unseen, unseen_until=deadline
                    )
                )
        self.sweep()
        self._record_processes()  # last: if this daemon dies before, the next one must find the same processes
        return adopted.ready, adopted.torn

    # -- connections -------------------------------------------------------------------------------------------

    def attach(self, process: Process, engine: str, writer: bool, uid: int = 0) -> Session:
        """Open a session for a client. Raises ArenaError if too many processes use the arena."""
        if self._no_place(process, uid):
            self.sweep()
        if reason := self._no_place(process, uid):
            raise ArenaError(f"{reason}; end some, or run another daemon")
        self._next_session += 1
        session = Session(self._next_session, process, engine, writer, uid)
        self.sessions[session.number] = session
        if session.team is not None:
            self._engine_processes.setdefault(session.team, set()).add(process)
        if session.team in self._settled:
            for held in self.quarantines:
                if held.holder is None:
                    held.processes.discard(process)
        if process not in self._recorded:
            self._record_processes()
        return session

    def _no_place(self, process: Process, uid: int) -> str:
        """Return why another process may not use the arena; empty if it may. The daemon's user and root keep some places."""
        if process in self._recorded:
            return ""
        if len(self._processes() | {process}) > MAX_PROCESSES:
            return f"{MAX_PROCESSES} processes use this cache already, the limit"
        if uid in (0, os.getuid()) or len(self._processes(uid) | {process}) <= MAX_PROCESSES // USER_SHARE:
            return ""
        return f"{MAX_PROCESSES // USER_SHARE} processes of uid {uid} use this cache already, the limit of a user"

    def detach(self, session: Session) -> None:
        """End a session. What it held is freed when no process can be using it any more."""
        self.sessions.pop(session.number, None)
        self.cache.forget_client(session.number)
        team = session.team
        same = [other for other in self.sessions.values() if other.team == team]
        held_any = bool(session.leases or session.granted)
        if held_any:
            later = [other for other in same if other.process == session.process and other.number > session.number]
            processes = self._mates(session)
            if session.engine and any(other.settled for other in later):
                processes = set()  # the engine came back and settled before the daemon saw the end of this connection
            held = Quarantine(
                team, session.process, processes, list(session.leases.values()), list(session.granted), session.extra,
                uid=session.uid,
            )  # fmt: skip
            session.leases, session.granted, session.extra = {}, {}, 0
            self.quarantines.append(held)
        if team is not None and (session.writer or not same):
            self._settled.discard(team)
        if team is not None and not same:
            self._engine_processes.pop(team, None)
        if held_any or any(session.process in held.processes for held in self.quarantines):
            self.sweep()  # else the next regular sweep is soon enough: to connect and hang up must cost others little

    def settle(self, session: Session) -> None:
        """The transfers that the engine began on earlier connections have ended. End the quarantines of its process."""
        session.settled = True
        mates = self._mates(session)
        for held in self.quarantines:
            if session.process not in held.processes:
                continue  # a new process of an engine does not know what earlier processes still do
            if held.holder is None:
                held.processes -= mates
                if session.team is not None:
                    self._settled.add(session.team)
            elif held.team == session.team:
                held.processes.clear()
        self.sweep()

    def _mates(self, session: Session) -> set[Process]:
        """Return the processes of the session's engine."""
        known = set() if session.team is None else self._engine_processes.get(session.team, set())
        return {session.process} | known

    def sweep(self) -> None:
        """End quarantines past their deadline or whose processes are gone. Then apply quotas. Call it regularly.

        A process that has left stays in the arena's list until then. The next daemon sees by itself that it is gone.
        """
        now, kept = self._clock(), []
        watched = [*self._engine_processes.values(), *(held.processes for held in self.quarantines)]
        gone = {process for process in set().union(*watched) if not self._alive(*process)}
        for processes in watched:
            processes -= gone
        for held in self.quarantines:
            if now >= held.unseen_until:
                held.processes -= held.unseen
            if held.processes and (held.leases or held.slots) and now < held.until:
                kept.append(held)
                continue
            for lease in held.leases:
                self._leased[held.uid] -= len(lease.slots)
                self.cache.release(lease)
            self.cache.give_back(held.slots)
        self.quarantines = kept
        if self._recorded != self._processes():
            self._record_processes()
        for namespace in self.cache.take_grown_namespaces() if self._limited else ():
            if (limit := self._slot_limit(namespace)) is not None:
                self.cache.trim(namespace, limit)

    # -- requests --------------------------------------------------------------------------------------------------------

    def acquire(
        self, session: Session, keys: Sequence[bytes], prefix: bool, use: Use | None = None
    ) -> tuple[int, Lease]:
        """Wait for `acquire_soon`, then `lend` the lease."""
        return self.lend(session, self.acquire_soon(session, keys, prefix, use).result())

    def acquire_soon(
        self, session: Session, keys: Sequence[bytes], prefix: bool, use: Use | None = None
    ) -> Future[Lease]:
        """Pin what is cached. Pass the result to `lend`. It is not done at once if the remote store is asked.

        A session with MAX_LEASES leases gets an empty lease.
        """
        if len(session.leases) >= MAX_LEASES:
            nothing: Future[Lease] = Future()
            nothing.set_result(NO_LEASE)
            return nothing
        return self.cache.acquire_soon(keys, prefix, use)

    def lend(self, session: Session, lease: Lease) -> tuple[int, Lease]:
        """Give a lease to a session. Returns (number of the lease, lease).

        An empty lease has number 0 and needs no release. If the session has ended, the lease is released. So it is if its
        user would have more than LEASED_SHARE times all slots and MAX_KEYS on lease, or if it names a chunk repeatedly.
        """
        slots, most = len(lease.slots), self.arena.spec.num_slots
        too_many = slots > most or self._leased[session.uid] + slots > LEASED_SHARE * most + MAX_KEYS
        if not slots or too_many or session.number not in self.sessions:
            self.cache.release(lease)
            return 0, NO_LEASE
        self._next_lease += 1
        session.leases[self._next_lease] = lease
        self._leased[session.uid] += slots
        return self._next_lease, lease

    def places(self, lease: Lease, asked: Sequence[bytes]) -> tuple[list[int], bytes, bytes]:
        """Return what Acquired says of a lease: rows of `asked`, slots, and fingerprints of their headers.

        Without `asked` there are no rows: the lease holds the first keys that were asked for, in their order.
        """
        row_of = {key: row for row, key in enumerate(asked)}
        slots = slot_array(lease.slots)
        rows = [row_of[key] for key in lease.keys] if asked else []
        return rows, slots.astype("<u4").tobytes(), self.cache.records.fingerprints[slots].tobytes()

    def release(self, session: Session, numbers: Iterable[int]) -> None:
        """End leases of this session. Numbers that it does not hold are ignored."""
        for number in numbers:
            if (lease := session.leases.pop(number, None)) is not None:
                self._leased[session.uid] -= len(lease.slots)
                self.cache.release(lease)

    def limit(self, session: Session) -> int:
        """Return how many granted slots a client may hold: see shares.py. For a writer at least one."""
        return self.shares().limit(session)

    def shares(self) -> Shares:
        """Return the shares of this moment. O(sessions + quarantines)."""
        slots = self.arena.spec.num_slots
        return Shares(self.sessions.values(), self.quarantines, slots, self.cache.num_unused)

    def above_limit(self) -> list[Session]:
        """Return the sessions that hold more than their limit, and believe in a limit that is an eighth above it or more."""
        now = self.shares()
        limits = [(session, now.limit(session)) for session in self.sessions.values() if session.granted]
        return [s for s, limit in limits if len(s.granted) > limit and limit <= s.told_limit * 7 // 8]

    def grant(self, session: Session, count: int) -> Reservation:
        """Grant the client slots to write, at most as many as shares.py leaves it. Free slots are granted first."""
        room, free = self.shares().room(session)
        count = min(count, room)
        if count <= 0:
            return Reservation((), (), ())
        granted = self.cache.grant(count)
        session.granted.update(zip(granted.slots, granted.generations, strict=True))
        session.extra += max(0, len(granted.slots) - free)
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
        """Publish chunks in slots granted to this session. Returns for each row whether its chunk is READY now.

        Rows whose slot and generation the session does not hold publish nothing.
        """
        result = [False] * len(slots)
        mine = []
        for row, (slot, generation) in enumerate(zip(slots, generations, strict=True)):
            if session.granted.get(slot) == generation:
                del session.granted[slot]
                mine.append(row)
        session.extra = min(session.extra, len(session.granted))
        if mine:
            held = Reservation(
                tuple(keys[row] for row in mine), tuple(slots[row] for row in mine),
                tuple(generations[row] for row in mine), chain=tuple(chain),
            )  # fmt: skip
            done = self.cache.publish(held, namespace, use, session.process[0])
            for row, published in zip(mine, done, strict=True):
                result[row] = published
            if (limit := self._slot_limit(namespace)) is not None:
                self.cache.trim(namespace, limit)
        return result

    def give_back(self, session: Session, slots: Iterable[int]) -> None:
        """Free granted slots that the client has not used. Slots that it does not hold are ignored."""
        mine = [slot for slot in dict.fromkeys(slots) if slot in session.granted]
        for slot in mine:
            del session.granted[slot]
        session.extra = min(session.extra, len(session.granted))
        self.cache.give_back(mine)

    def clear(self, session: Session, namespace: bytes | None, begun: Iterable[int]) -> int:
        """Forget a namespace, or everything. Returns how many chunks.

        `begun` are the granted slots that this session was already writing; only those of its slots are cleared too.
        """
        return self.cache.clear(namespace, session.granted.keys() - set(begun))

    def describe(self, session: Session, root: bytes, fields: dict[str, str]) -> str:
        """Note what a root stands for. Returns a warning if it differs from another root in the hash alone, else "".

        That is usually a mistake. An engine that describes the same again, after a lost connection, is not warned again. O(1).
        """
        known = self.namespaces.get(root)
        if known is None or known.fields != fields:
            known = self._remember(root, fields)
        self.namespaces.move_to_end(root)
        engine = (session.uid, session.engine)
        if engine in known.engines:
            return ""
        if len(known.engines) >= MAX_REMEMBERED_ENGINES:
            known.engines.clear()
        known.engines.add(engine)
        mine = fields.get("engine_hash")
        other = next((found for found in self._hashes[_without_hash(fields)] if found != mine), mine)
        if other == mine:
            return ""
        return (
            f"another engine caches the same model under another hash identity ({other}, here {mine}), so the two share "
            f"nothing; give all engines the same PYTHONHASHSEED and prefix_caching_hash_algo"
        )

    def _remember(self, root: bytes, fields: dict[str, str]) -> NamespaceInfo:
        """Store a description in place of the root's earlier one. If there are too many, forget the one used longest ago."""
        if root in self.namespaces:
            self._forget(root)
        elif len(self.namespaces) >= MAX_NAMESPACES:
            self._forget(next(iter(self.namespaces)))
        self._hashes.setdefault(_without_hash(fields), Counter())[fields.get("engine_hash")] += 1
        info = self.namespaces[root] = NamespaceInfo(dict(fields), self._to_slots(self._quotas.limit_nbytes(fields)))
        return info

    def _forget(self, root: bytes) -> None:
        fields = self.namespaces.pop(root).fields
        alike, mine = self._hashes[_without_hash(fields)], fields.get("engine_hash")
        alike[mine] -= 1
        if not alike[mine]:
            del alike[mine]
        if not alike:
            del self._hashes[_without_hash(fields)]

    def _slot_limit(self, namespace: bytes) -> int | None:
        """Return how many slots a namespace may fill; None: no limit. Without a description it gets the smallest quota."""
        if (info := self.namespaces.get(namespace)) is None:
            return self._to_slots(self._quotas.smallest_nbytes())
        self.namespaces.move_to_end(namespace)
        return info.limit

    def _to_slots(self, nbytes: int | None) -> int | None:
        return None if nbytes is None else nbytes // self.arena.spec.geometry.slot_nbytes

    def usage(self) -> dict[str, int | float | str]:
        """Return counters of the cache, and how much sessions and quarantines hold."""
        return {
            **self.cache.counters.snapshot(),
            **self.cache.usage(),
            "slot_nbytes": self.arena.spec.geometry.slot_nbytes,
            "chunks": self.cache.num_ready(),
            "sessions": len(self.sessions),
            "leases": sum(len(session.leases) for session in self.sessions.values()),
            "granted_slots": sum(len(session.granted) for session in self.sessions.values()),
            "quarantined_leases": sum(len(held.leases) for held in self.quarantines),
            "quarantined_slots": sum(len(held.slots) for held in self.quarantines),
            "namespaces": len(self.namespaces),
        }

    def _processes(self, uid: int | None = None) -> set[Process]:
        """Return the processes that may be using the arena: of all users, or of one."""
        return set().union(
            (session.process for session in self.sessions.values() if uid in (None, session.uid)),
            *(processes for team, processes in self._engine_processes.items() if uid in (None, team[0])),
            *(held.processes for held in self.quarantines if uid in (None, held.uid)),
        )

    def _record_processes(self) -> None:
        """Write the processes that may be using the arena into it, for the next daemon.

        A process keeps its row, so a kill of this daemon between two writes hides no other process.
        """
        rows, new = self.arena.processes, self._processes()
        self._recorded = set(new)
        for row, process in enumerate(rows.tolist()):
            if process in new:
                new.discard(process)
            else:
                rows[row] = (0, 0)
        free = np.flatnonzero(rows["pid"] == 0).tolist()
        for row, process in zip(free, sorted(new), strict=False):
            rows[row] = process


def _without_hash(fields: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(item for item in fields.items() if item[0] != "engine_hash")
