"""A daemon's sessions without its process: an arena, clients that come and are killed, a clock that stands still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvkern.arena.file import Arena
from kvkern.assemble import build_cache
from kvkern.node.daemon.sessions import Session, Sessions
from kvkern.node.daemon.shares import EMPTY_SHARE, GRANTED_SHARE, Process
from kvkern.tiers.base import Reservation
from kvkern.tiers.slot_headers import begin_slots
from tests.node.conftest import write_payload
from tests.support import NAMESPACE, SHAPE, chain_keys

SLOTS = 32
MOST = SLOTS // GRANTED_SHARE  # slots one writer may hold in a full arena
EMPTY_MOST = SLOTS // EMPTY_SHARE  # in an empty one
ENGINE, WORKER, OTHER = (100, 1), (101, 1), (200, 1)  # processes


class World:
    """An arena, the state of the present daemon, and the processes that are alive."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.now = 0.0
        self.dead: set[Process] = {(0, 0)}
        self.maps: dict[int, bool | None] = {}  # by pid, if not True
        self.restart()

    def alive(self, pid: int, start: int) -> bool:
        return (pid, start) not in self.dead

    def restart(self) -> tuple[int, int]:
        """Kill the daemon; another one adopts the arena."""
        self.sessions = Sessions(
            build_cache(self.arena),
            self.arena,
            lambda: self.now,
            self.alive,
            maps=lambda _, pid: self.maps.get(pid, True),
        )
        return self.sessions.adopt()

    def kill(self, *processes: Process) -> None:
        """Kill processes; the daemon sees their connections end."""
        self.dead.update(processes)
        for session in list(self.sessions.sessions.values()):
            if session.process in processes:
                self.sessions.detach(session)

    def engine(self, process: Process = ENGINE, name: str = "e", uid: int = 0) -> Session:
        return self.sessions.attach(process, name, writer=True, uid=uid)

    def worker(self, process: Process = WORKER, name: str = "e", uid: int = 0) -> Session:
        return self.sessions.attach(process, name, writer=False, uid=uid)

    def begin(self, session: Session, chain: Sequence[bytes]) -> Reservation:
        """Grant slots and write the headers of the chunks that are about to be written."""
        granted = self.sessions.grant(session, len(chain))
        assert len(granted.slots) == len(chain)
        named = Reservation(tuple(chain), granted.slots, granted.generations, chain=tuple(chain))
        slots, generations = np.array(named.slots, np.int64), np.array(named.generations, np.uint64)
        begin_slots(self.arena, slots, generations, chain, SHAPE, chain, session.process)
        return named

    def publish(self, session: Session, held: Reservation) -> list[bool]:
        return self.sessions.publish(session, NAMESPACE, held.slots, held.generations, held.keys, held.chain)

    def fill(self, session: Session, chunks: int = SLOTS) -> None:
        """Put so many single chunks."""
        for number in range(chunks):
            self.put(session, ("fill", number), 1)

    def put(self, session: Session, name: object, chunks: int = MOST) -> Reservation:
        held = self.begin(session, chain_keys(name, chunks))
        write_payload(self.arena, held)
        assert self.publish(session, held) == [True] * chunks
        return held

    def held(self) -> dict[str, int | float | str]:
        usage = self.sessions.usage()
        names = ("leases", "granted_slots", "quarantined_leases", "quarantined_slots")
        return {name: usage[name] for name in names if usage[name]}

    def free(self) -> int:
        return self.sessions.cache.usage()["free_slots"]

    def recorded(self) -> set[Process]:
        return {process for process in self.arena.processes.tolist() if process[0]}
