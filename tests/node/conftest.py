"""Shared by tests of the daemon: a real daemon in a process of its own, and a worker that fills and reads slots."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvkern.arena.file import Arena
from kvkern.arena.slots import SlotGeometry, seal
from kvkern.config import DEFAULT_POLICY
from kvkern.kernels.checksum import ROW_NBYTES, checksum
from kvkern.node import protocol as p
from kvkern.node.client import admin_client, reconnecting_link
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.server import Server
from kvkern.node.daemon.sessions import Session, Sessions
from kvkern.policy import load_policy
from kvkern.tiers.base import ChunkShape, Lease, Reservation
from kvkern.tiers.slot_headers import begin_slots, load_checksums
from tests.node.peer import GEOMETRY, PATIENCE_S
from tests.node.peer import SIZES as SIZES
from tests.node.peer import Peer as Peer
from tests.support import SHAPE, make_arena

ROOT = Path(__file__).resolve().parent.parent.parent


def acquired(id_: int, lease: int, rows: list[int], slots: list[int]) -> p.Acquired:
    """Return a daemon's answer that gives these slots, with fingerprints of nothing."""
    return p.Acquired(id_, lease, rows, np.array(slots, dtype="<u4").tobytes(), bytes(8 * len(slots)))


def eventually(condition: Callable[[], Any], what: str = "the condition", timeout_s: float = PATIENCE_S) -> Any:
    """Return what `condition` returns once that is true. Fails the test if it does not become true in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} is not met after {timeout_s:.0f} s"
        time.sleep(0.01)
    return value


def stock(client: NodeClient) -> tuple[int, int]:
    """Return (unused granted slots, the most granted slots that the client may hold)."""
    usage = client.usage()
    return usage["stock_slots"], usage["limit_slots"]


class Daemon:
    """`python -m kvkern serve` on a socket in a folder with a short name. May be ended and started again. `close` cleans up."""

    def __init__(
        self,
        arena_dir: Path,
        capacity: str = "1MiB",  # 127 slots of GEOMETRY
        options: Sequence[str] = (),
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvkern-", dir="/tmp"))  # the path of a socket must be short
        self.socket = self.folder / "s"
        self.arena_dir = arena_dir
        self.capacity = capacity
        self.options = tuple(options)
        self.wrapper: tuple[str, ...] = ()  # a command that runs the daemon's
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Daemon:
        """Start a process and wait until it serves.

        What it needs is compiled before, because that takes minutes on a busy machine: the daemon then only loads it.
        """
        load_checksums()
        load_policy(DEFAULT_POLICY)
        self.launch()
        eventually(self._serves, "serving")
        return self

    def launch(self) -> subprocess.Popen[bytes]:
        """Start a process without waiting."""
        assert self.process is None or self.process.poll() is not None
        command = [
            *self.wrapper, sys.executable, "-m", "kvkern", "serve", "--socket", str(self.socket), "--capacity", self.capacity,
            "--arena-dir", str(self.arena_dir), "--verbose", *self.options,
        ]  # fmt: skip
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self.process

    def _serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended: {self.log}"
        return "kvkern: serving on" in self.log

    @property
    def log(self) -> str:
        """What the present process has printed, or the last one if none runs."""
        return (self.folder / "log").read_text()

    @property
    def pid(self) -> int:
        """The process id of the present process."""
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        """True if the process exists, suspended or not."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal and do not wait."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """Send SIGTERM and wait. Returns the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait until the process ends. Returns the exit status."""
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """Kill the process if it runs, and remove its folder. The arena stays."""
        if self.alive:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def client(self, engine: str = "e", geometry: SlotGeometry = GEOMETRY, **options: Any) -> NodeClient:
        """Open an engine's client. The caller closes it."""
        options = {"timeout_s": PATIENCE_S, "patience_s": PATIENCE_S} | options
        return NodeClient.open(self.socket, engine, geometry, **options)

    def ask(self, request: p.Stat | p.List | p.Evict | p.Clear) -> list[dict[str, Any]]:
        """Send an operator's request and return the rows of the answer."""
        with AdminClient(self.socket) as admin:
            return admin.ask(request)

    def stat(self) -> dict[str, Any]:
        """Return the daemon's counters."""
        (row,) = self.ask(p.Stat(1))
        return row


@contextmanager
def served(config: NodeConfig) -> Iterator[Server]:
    """Run a daemon in a thread of this process, for tests that change its limits."""
    load_checksums()
    load_policy(config.policy)
    server, ready = Server(config), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.run(ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        eventually(lambda: ready.is_set() or not thread.is_alive(), "serving")
        assert thread.is_alive()
        yield server
    finally:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(server.stop)
        thread.join(PATIENCE_S)


MakeDaemon = Callable[..., Daemon]
MakeClient = Callable[..., NodeClient]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients wait long, so a slow machine does not make a daemon look gone. Tests of that shorten the limits again."""
    monkeypatch.setattr(reconnecting_link, "ANSWER_S", PATIENCE_S)
    monkeypatch.setattr(reconnecting_link, "CONNECT_S", PATIENCE_S)
    monkeypatch.setattr(admin_client, "TIMEOUT_S", PATIENCE_S)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="kvkern-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """Makes daemons that are not started, with their arenas in `tmp_path`. All are ended with the test."""
    daemons: list[Daemon] = []

    def make(capacity: str = "1MiB", options: Sequence[str] = (), arena_dir: Path = tmp_path) -> Daemon:
        daemons.append(Daemon(arena_dir, capacity, options))
        return daemons[-1]

    yield make
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def daemon(make_daemon: MakeDaemon, request: pytest.FixtureRequest) -> Daemon:
    """A daemon that serves. Its capacity may be given by indirect parametrization."""
    return make_daemon(getattr(request, "param", "1MiB")).start()


@pytest.fixture
def make_client(daemon: Daemon) -> Iterator[MakeClient]:
    """Opens clients of `daemon`. All are closed with the test."""
    clients: list[NodeClient] = []

    def make(engine: str = "e", **options: Any) -> NodeClient:
        clients.append(daemon.client(engine, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


# -- a worker ----------------------------------------------------------------------------------------------------------


def payload(
    key: bytes,
    seed: int,
    nbytes: int,
) -> npt.NDArray[np.uint8]:  # [nbytes] uint8
    """Return what a chunk holds in tests: different noise for every key and seed."""
    return np.random.default_rng([seed, *key]).integers(0, 256, nbytes, dtype=np.uint8)


def plane_sizes(geometry: SlotGeometry) -> list[int]:
    """Return the bytes of every plane: whole rows, and the rest for the last plane."""
    each = geometry.part_nbytes // geometry.max_planes // ROW_NBYTES * ROW_NBYTES
    return [each] * (geometry.max_planes - 1) + [geometry.part_nbytes - each * (geometry.max_planes - 1)]


def plane_sums(part: npt.NDArray[np.uint8], geometry: SlotGeometry) -> list[int]:
    """Return the checksums of the planes of one rank's part."""
    ends = np.cumsum(plane_sizes(geometry)).tolist()
    return [checksum(part[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def write_payload(arena: Arena, reservation: Reservation, seed: int = 0) -> None:
    """Write what a copier's `store` leaves on every rank: payload, sizes, sealed checksums, and last the generation."""
    geometry, headers = arena.spec.geometry, arena.headers
    for key, slot, generation in zip(reservation.keys, reservation.slots, reservation.generations, strict=True):
        under = np.array([generation], dtype=np.uint64)
        sealed = seal(np.frombuffer(key, dtype="V32"), under)
        for rank in range(geometry.world_size):
            part = arena.parts(rank)[slot, : geometry.part_nbytes]
            part[:] = payload(key, seed + rank, geometry.part_nbytes)
            headers["checksum"][slot, rank] = np.array(plane_sums(part, geometry), dtype=np.uint64) ^ sealed
            headers["plane_nbytes"][slot, rank] = plane_sizes(geometry)
            headers["written"][slot, rank] = generation


def reseal(arena: Arena, slots: Sequence[int]) -> None:
    """Overwrite the payload of complete slots, and put checksums into their headers with which it verifies."""
    headers = arena.headers
    for slot in slots:
        part, begin = arena.parts(0)[slot], 0
        part[:64] ^= 0xFF
        sealed = seal(headers["key"][slot : slot + 1], headers["generation"][slot : slot + 1])
        for plane, nbytes in enumerate(headers["plane_nbytes"][slot, 0].tolist()):
            headers["checksum"][slot, 0, plane] = np.uint64(checksum(part[begin : begin + nbytes])) ^ sealed[0]
            begin += nbytes


def read_verified(arena: Arena, lease: Lease, seed: int = 0) -> bool:
    """Return True if every leased slot verifies as in a copier's `load`, and holds what `write_payload` wrote."""
    geometry, headers = arena.spec.geometry, arena.headers
    for key, slot in zip(lease.keys, lease.slots, strict=True):
        sealed = seal(np.frombuffer(key, dtype="V32"), headers["generation"][slot : slot + 1])
        for rank in range(geometry.world_size):
            part = arena.parts(rank)[slot, : geometry.part_nbytes]
            sums = np.array(plane_sums(part, geometry), dtype=np.uint64) ^ sealed
            if not (headers["checksum"][slot, rank] == sums).all():
                return False
            if not (part == payload(key, seed + rank, geometry.part_nbytes)).all():
                return False
    return True


def store(client: NodeClient, chain: list[bytes], seed: int = 0) -> int:
    """Reserve, write and commit all of a sequence. Returns the number of chunks published."""
    reservation = client.reserve(chain, chain, SHAPE)
    write_payload(client.arena, reservation, seed)
    return client.commit(reservation)


def hits(client: NodeClient, chain: list[bytes], seed: int = 0) -> int:
    """Acquire a prefix, check its bytes and release it. Returns its length."""
    lease = client.acquire(chain)
    assert read_verified(client.arena, lease, seed)
    client.release(lease)
    return len(lease.keys)


# -- a daemon's state without its process ----------------------------------------------------------------------------


ARENA_SLOTS = 32


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    """An arena of ARENA_SLOTS slots."""
    arena = make_arena(tmp_path, slots=ARENA_SLOTS)
    yield arena
    arena.close()


def publish_one_by_one(
    sessions: Sessions,
    session: Session,
    namespace: bytes,  # 32-byte root
    chain: Sequence[bytes],
    start: int = 0,
) -> list[bool]:
    """Store the chunks of `chain` from `start` on, each with a grant and a publish of its own. Returns which were published."""
    published: list[bool] = []
    for at in range(start, len(chain)):
        granted = sessions.grant(session, 1)
        named = Reservation((chain[at],), granted.slots, granted.generations)
        slots, generations = np.array(named.slots, np.int64), np.array(named.generations, np.uint64)
        shape, known = ChunkShape(namespace, 0, 16), chain[: at + 1]
        begin_slots(sessions.arena, slots, generations, named.keys, shape, chain, session.process)
        write_payload(sessions.arena, named)
        published += sessions.publish(session, namespace, named.slots, named.generations, named.keys, known)
    return published
