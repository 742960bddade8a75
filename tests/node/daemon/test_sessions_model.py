"""Random walks of engines, their workers and daemons over one arena, against a model of who may use which slot."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvkern.arena.slots import SlotState
from kvkern.assemble import build_cache
from kvkern.node.daemon.sessions import RESTART_PIN_S, Process, Session, Sessions
from kvkern.tiers.base import ChunkShape, Reservation
from kvkern.tiers.slot_headers import begin_slots
from tests.node.conftest import payload, write_payload
from tests.support import key, make_arena

SLOTS, RANKS, PART_NBYTES = 10, 2, 128
ENGINES = ("red", "blue")
ROOTS = (key("one root"), key("another"))
picks = st.integers(0, 1 << 16)  # picks one of the present items
chains = st.tuples(st.sampled_from(range(3)), st.integers(1, 4)).map(
    lambda of: [key("chain", of[0], i) for i in range(of[1])]
)


@cache
def bytes_of(chunk: bytes, rank: int) -> bytes:
    return payload(chunk, rank, PART_NBYTES).tobytes()


def root_of(chunk: bytes) -> bytes:
    return ROOTS[chunk[0] % 2]


@dataclass(eq=False)
class Right:
    """The right of one engine to read or to write slots."""

    engine: str
    session: Session | None  # None: the connection, or the daemon that gave the right, is gone
    slots: tuple[int, ...]
    holders: set[Process]  # without a session: processes that may be using it
    keys: tuple[bytes, ...] = ()
    lease: int = 0  # number of the lease; 0: the right to write
    generations: tuple[int, ...] = ()
    complete: set[int] = field(default_factory=set)  # rows that are completely written
    stale: set[int] = field(default_factory=set)  # rows that were cleared meanwhile
    until: float = float("inf")


class Walk(RuleBasedStateMachine):
    """The state machine. `rights` and `ready` are the model."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.share = mock.patch("kvkern.node.daemon.shares.GRANTED_SHARE", 2)
        self.share.start()
        self.arena = make_arena(Path(self.folder.name), SLOTS, PART_NBYTES, planes=2, world_size=RANKS)
        self.now, self.next_pid = 0.0, 1
        self.living: set[Process] = set()
        self.process: dict[tuple[str, bool], Process] = {}  # of an engine's scheduler (True) and worker
        self.members: dict[str, set[Process]] = {name: set() for name in ENGINES}
        self.rights: list[Right] = []
        self.ready: dict[bytes, int] = {}
        self.start()

    def teardown(self) -> None:
        """When all clients are gone, nothing is held, no slot is lost, and the next daemon finds the same chunks."""
        self.living.clear()
        for session in list(self.sessions.sessions.values()):
            self.sessions.detach(session)
        self.sessions.sweep()
        self.rights.clear()
        for _ in range(2):
            self.every_slot_is_in_one_state()
            assert self.held() == {}
            assert self.sessions.cache.usage()["free_slots"] + len(self.ready) == SLOTS
            self.start()
        self.share.stop()
        self.arena.close()
        self.folder.cleanup()

    def start(self) -> None:
        self.sessions = Sessions(
            build_cache(self.arena), self.arena, lambda: self.now, self.alive, maps=lambda _arena, _pid: True
        )
        bad = {chunk for chunk, slot in self.ready.items() if self.arena.headers["state"][slot] == SlotState.BAD}
        for chunk in bad:
            del self.ready[chunk]
        assert self.sessions.adopt() == (len(self.ready), 0)

    def alive(self, pid: int, start: int) -> bool:
        return (pid, start) in self.living

    def held(self) -> dict[str, int | float | str]:
        usage = self.sessions.usage()
        names = ("leases", "granted_slots", "quarantined_leases", "quarantined_slots")
        return {name: usage[name] for name in names if usage[name]}

    # -- items to pick from ----------------------------------------------------------------------------------

    def connected(self, pick: int, writer: bool | None = None) -> Session | None:
        found = [s for s in self.sessions.sessions.values() if writer is None or s.writer == writer]
        return found[pick % len(found)] if found else None

    def right(self, pick: int, read: bool, of_session: bool = True) -> Right | None:
        found = [r for r in self.rights if bool(r.lease) == read and bool(r.session) >= of_session]
        return found[pick % len(found)] if found else None

    # -- processes -----------------------------------------------------------------------------------------------------

    @rule(engine=st.sampled_from(ENGINES), writer=st.booleans())
    def connect(self, engine: str, writer: bool) -> None:
        """Connect for the first time, again, or again before the daemon sees the end of the old connection."""
        process = self.process.get((engine, writer))
        if process not in self.living:
            process = self.process[engine, writer] = (self.next_pid, 7)
            self.next_pid += 1
            self.living.add(process)
        if sum(session.process == process for session in self.sessions.sessions.values()) < 2:
            self.sessions.attach(process, engine, writer)
            self.members[engine].add(process)

    @rule(pick=picks)
    def lose(self, pick: int) -> None:
        """End a connection. Its process goes on with its transfers."""
        if (session := self.connected(pick)) is not None:
            self.end(session)

    @rule(pick=picks)
    def kill(self, pick: int) -> None:
        if (session := self.connected(pick)) is not None:
            self.die(session.process)

    @rule(pick=picks)
    def kill_unconnected(self, pick: int) -> None:
        if idle := sorted(self.living - {s.process for s in self.sessions.sessions.values()}):
            self.die(idle[pick % len(idle)])

    def die(self, process: Process) -> None:
        self.living.discard(process)
        for session in list(self.sessions.sessions.values()):
            if session.process == process:
                self.end(session)
        self.sweep()

    def end(self, session: Session) -> None:
        for right in self.rights:
            if right.session is session:
                right.session = None
                right.holders = {session.process} | self.members[session.engine]
        self.sessions.detach(session)
        if not any(other.engine == session.engine for other in self.sessions.sessions.values()):
            self.members[session.engine].clear()
        self.forget_ended()

    def forget_ended(self) -> None:
        for right in list(self.rights):
            right.holders &= self.living
            if right.session is None and (not right.holders or self.now >= right.until):
                self.rights.remove(right)

    @rule(pick=picks)
    def settle(self, pick: int) -> None:
        """An engine says that its transfers of earlier connections have ended, which is true."""
        if (session := self.connected(pick, writer=True)) is None:
            return
        for right in list(self.rights):
            before = right.session is None and session.process in right.holders
            late = right.session is not None and right.session.process == session.process
            if right.engine == session.engine and (before or (late and right.session.number < session.number)):
                self.rights.remove(right)
        self.sessions.settle(session)

    @rule()
    def restart(self) -> None:
        """Kill the daemon; another one takes over."""
        for right in self.rights:
            if right.session is not None:
                right.session, right.holders = None, {right.session.process} | self.members[right.engine]
            if right.lease:
                right.until = self.now + RESTART_PIN_S
        for right in [right for right in self.rights if right.complete and not right.lease]:
            self.split(right)
        for processes in self.members.values():
            processes.clear()
        self.start()
        self.forget_ended()

    def split(self, right: Right) -> None:
        """Split off the rows that are completely written.

        Nobody writes them any more, so the next daemon keeps them only as long as rows that may be read.
        """
        rows = [row for row in range(len(right.slots)) if row not in right.complete]
        whole = tuple(slot for row, slot in enumerate(right.slots) if row in right.complete)
        self.rights.append(Right(right.engine, None, whole, set(right.holders), until=self.now + RESTART_PIN_S))
        right.stale = {at for at, row in enumerate(rows) if row in right.stale}
        right.keys = tuple(right.keys[row] for row in rows if row < len(right.keys))
        right.generations = tuple(right.generations[row] for row in rows)
        right.slots, right.complete = tuple(right.slots[row] for row in rows), set()

    @rule(seconds=st.sampled_from([1.0, 12.0]))
    def sweep(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.sessions.sweep()
        self.forget_ended()

    # -- reading ---------------------------------------------------------------------------------------------------------

    @rule(pick=picks, chain=chains, prefix=st.booleans())
    def acquire(self, pick: int, chain: list[bytes], prefix: bool) -> None:
        if (session := self.connected(pick)) is None:
            return
        found = [chunk for chunk in chain if chunk in self.ready]
        if prefix:
            found = next((chain[:i] for i, chunk in enumerate(chain) if chunk not in self.ready), chain)
        number, lease = self.sessions.acquire(session, chain, prefix)
        assert lease.keys == tuple(found)
        assert lease.slots == tuple(self.ready[chunk] for chunk in found)
        assert bool(number) == bool(found)
        if found:
            self.rights.append(Right(session.engine, session, lease.slots, set(), lease.keys, number))

    @rule(pick=picks, bad=st.booleans())
    def release(self, pick: int, bad: bool) -> None:
        if (right := self.right(pick, read=True)) is None or right.session is None:
            return
        if bad:
            self.arena.mark_bad(np.array(right.slots[:1], dtype=np.int64))
        self.rights.remove(right)
        states = self.arena.headers["state"][list(right.slots)]
        for chunk, slot, state in zip(right.keys, right.slots, states, strict=True):
            if state == SlotState.BAD and self.ready.get(chunk) == slot:
                del self.ready[chunk]
        self.sessions.release(right.session, [right.lease, right.lease + 1000])

    @rule(pick=picks)
    def mark_bad(self, pick: int) -> None:
        """A reader finds a chunk that does not verify, and goes on reading the rest."""
        if (right := self.right(pick, read=True, of_session=False)) is not None:
            self.arena.mark_bad(np.array(right.slots[-1:], dtype=np.int64))

    # -- writing ---------------------------------------------------------------------------------------------------------

    @rule(pick=picks, chain=chains)
    def grant(self, pick: int, chain: list[bytes]) -> None:
        if (session := self.connected(pick)) is None:
            return
        held, limit = len(session.granted), self.sessions.limit(session)
        got = self.sessions.grant(session, len(chain))
        assert len(got.slots) <= max(0, limit - held)
        assert self.in_use().isdisjoint(got.slots)
        for chunk in got.evicted:
            assert self.ready.pop(chunk) in got.slots
        if got.slots:
            right = Right(session.engine, session, got.slots, set(), generations=got.generations)
            self.rights.append(right)
            if session.number % 2:  # else the slots stay in stock for a while
                self.begin(right, chain)

    @rule(pick=picks, chain=chains)
    def begin_some(self, pick: int, chain: list[bytes]) -> None:
        right = self.right(pick, read=False, of_session=False)
        if right is not None and right.generations and not right.keys and len(chain) >= len(right.slots):
            self.begin(right, chain)

    def begin(self, right: Right, chain: Sequence[bytes]) -> None:
        right.keys = tuple(chain[: len(right.slots)])
        for row, chunk in enumerate(right.keys):
            one = slice(row, row + 1)
            slots, generations = np.array(right.slots[one], np.int64), np.array(right.generations[one], np.uint64)
            owner = right.session.process if right.session is not None else (1 << 20, 7)
            begin_slots(self.arena, slots, generations, [chunk], ChunkShape(root_of(chunk), 0, 16), chain, owner)

    @rule(pick=picks, rows=st.sets(st.integers(0, 3), min_size=1))
    def write(self, pick: int, rows: set[int]) -> None:
        """Write rows, also in a process that has lost the daemon or whose connection the daemon has lost."""
        if (right := self.right(pick, read=False, of_session=False)) is None:
            return
        for row in rows & set(range(len(right.keys))):
            one = slice(row, row + 1)
            write_payload(self.arena, Reservation(right.keys[one], right.slots[one], right.generations[one]))
            right.complete.add(row)

    @rule(pick=picks, turn=st.sampled_from(["good", "good", "foreign session", "stale generation", "foreign slot"]))
    def publish(self, pick: int, turn: str) -> None:
        right = self.right(pick, read=False)
        if right is None or right.session is None or not right.keys:
            return
        session, slots, generations = right.session, right.slots, right.generations
        others = [other for other in self.sessions.sessions.values() if other is not session]
        if turn == "foreign session" and others:
            session = others[0]
        elif turn == "stale generation":
            generations = tuple(generation - 1 for generation in generations)
        elif turn == "foreign slot":
            slots = tuple(slot + SLOTS for slot in slots)
        mine = (session, slots, generations) == (right.session, right.slots, right.generations)
        for root in ROOTS:  # one Publish message is for one namespace
            rows = [row for row, chunk in enumerate(right.keys) if root_of(chunk) == root]
            expected = []
            for row in rows:
                chunk = right.keys[row]
                fresh = mine and row in right.complete - right.stale and chunk not in self.ready
                expected.append(fresh)
                if fresh:
                    self.ready[chunk] = right.slots[row]
            published = self.sessions.publish(
                session, root, [slots[row] for row in rows], [generations[row] for row in rows],
                [right.keys[row] for row in rows], right.keys,
            )  # fmt: skip
            assert published == expected
        if mine:
            self.rights.remove(right)

    @rule(pick=picks)
    def give_back(self, pick: int) -> None:
        right = self.right(pick, read=False)
        if right is None or right.session is None:
            return
        other = self.connected(pick)
        if other is not None and other is not right.session:
            self.sessions.give_back(other, right.slots)  # changes nothing
            assert set(right.slots) <= set(right.session.granted)
        self.sessions.give_back(right.session, right.slots)
        self.rights.remove(right)

    # -- operators -------------------------------------------------------------------------------------------------------

    @rule(root=st.sampled_from([None, *ROOTS]))
    def clear(self, root: bytes | None) -> None:
        gone = [chunk for chunk in self.ready if root in (None, root_of(chunk))]
        assert self.sessions.cache.clear(root) == len(gone)
        for chunk in gone:
            del self.ready[chunk]
        for right in self.rights:
            if not right.lease:
                right.stale |= {row for row, chunk in enumerate(right.keys) if root in (None, root_of(chunk))}

    @rule(chain=chains)
    def drop(self, chain: list[bytes]) -> None:
        assert self.sessions.cache.drop(chain) == sum(self.ready.pop(chunk, None) is not None for chunk in chain)

    # -- invariants -------------------------------------------------------------------------------------------------

    def in_use(self) -> set[int]:
        return {slot for right in self.rights for slot in right.slots}

    @invariant()
    def every_slot_is_in_one_state(self) -> None:
        tier = self.sessions.cache._dram
        states = [*tier._free, *tier._index.values(), *tier._granted, *tier._doomed]
        assert sorted(states) == list(range(SLOTS))
        assert tier._index == self.ready

    @invariant()
    def ready_chunks_hold_their_bytes(self) -> None:
        for chunk, slot in self.ready.items():
            self.check_bytes(chunk, slot)

    @invariant()
    def nobody_touches_what_another_may_use(self) -> None:
        free = set(self.sessions.cache._dram._free)
        assert free.isdisjoint(self.in_use())
        written = [slot for right in self.rights if not right.lease for slot in right.slots]
        assert len(written) == len(set(written))
        assert set(self.ready.values()).isdisjoint(written)
        for right in self.rights:
            if right.lease:
                assert set(right.slots).isdisjoint(written)
                for chunk, slot in zip(right.keys, right.slots, strict=True):
                    self.check_bytes(chunk, slot)

    @precondition(lambda self: not self.living)
    @invariant()
    def the_dead_hold_nothing(self) -> None:
        self.sessions.sweep()
        assert self.held() == {}

    def check_bytes(self, chunk: bytes, slot: int) -> None:
        assert bytes(self.arena.headers["key"][slot]) == chunk
        for rank in range(RANKS):
            assert self.arena.parts(rank)[slot, :PART_NBYTES].tobytes() == bytes_of(chunk, rank)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
