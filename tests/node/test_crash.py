"""A daemon and its clients, real processes, killed with SIGKILL at random points: no wrong byte is read, nothing leaks.

The test starts one process without threads. It forks all others after its imports, kills them and forks new ones:

    daemon    `serve`, over an arena of a few MiB that outlives it
    engine    a NodeClient that stores, reads and clears; checks leased bytes when it gets the lease and before it ends it
    worker    an engine's second process, which does the copying, slowly, and does not stop when its engine is killed
    checker   runs after every start of a daemon: acquires every chunk that is served again and compares every byte

A chunk's bytes are a function of its key. By hand: `python tests/node/test_crash.py SEED KILLS`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kvkern.arena.file import Arena
from kvkern.arena.slots import SlotGeometry, seal
from kvkern.cache.base import FAULT_LINE
from kvkern.kernels.paged_copy_numba import checksum_planes
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.server import serve
from kvkern.tiers.base import ChunkShape, Lease

ROOT = Path(__file__).resolve().parent.parent.parent
KILLS = 240
PLANE_NBYTES, PLANES, RANKS = 512, 2, 2
GEOMETRY = SlotGeometry(PLANE_NBYTES * PLANES, PLANES, RANKS)
CAPACITY_NBYTES = 1536 << 10  # 127 slots: every second all of them are overwritten
ENGINES = 3
SEQUENCES, MAX_CHUNKS = 40, 12  # shared by all engines, and more than the arena holds
SHARED = bytes(range(32))  # their namespace
PATIENCE_S = 60.0  # limit for conditions that must come true
STORED, VERIFIED, RECHECKED, CLEARED, SERVED_AGAIN = range(5)  # columns of `tallies`


def key_of(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def payload(key: bytes, rank: int) -> bytes:
    return hashlib.shake_128(key + bytes([rank])).digest(GEOMETRY.part_nbytes)


def check_bytes(arena: Arena, keys: Sequence[bytes], slots: Sequence[int]) -> None:
    for key, slot in zip(keys, slots, strict=True):
        assert bytes(arena.headers["key"][slot]) == key, f"slot {slot} is not {key.hex()}'s"
        for rank in range(RANKS):
            found = arena.parts(rank)[slot, : GEOMETRY.part_nbytes].tobytes()
            assert found == payload(key, rank), f"slot {slot} does not hold the bytes of {key.hex()} on rank {rank}"


def store(
    arena: Arena, keys: Sequence[bytes], slots: Sequence[int], generations: Sequence[int], pause_s: float
) -> None:
    """Do what a copier's `store` does with a piece of a job, with pauses in which this process may be killed."""
    sizes = np.full((1, PLANES), PLANE_NBYTES, dtype=np.uint32)
    headers = arena.headers
    current = (headers["generation"][slots] == generations).tolist()
    for key, slot, generation in zip(keys, slots, generations, strict=True):
        if not current.pop(0):
            continue
        sealed = seal(np.frombuffer(key, dtype="V32"), np.array([generation], dtype=np.uint64))
        for rank in range(RANKS):
            data = np.frombuffer(payload(key, rank), dtype=np.uint8)
            part = arena.parts(rank)[slot]
            for plane in range(PLANES):
                piece = slice(plane * PLANE_NBYTES, (plane + 1) * PLANE_NBYTES)
                part[piece] = data[piece]
                time.sleep(pause_s)
            sums = checksum_planes(data[None], np.zeros(1, dtype=np.int64), sizes)
            headers["checksum"][slot, rank] = (sums ^ sealed)[0]
            headers["plane_nbytes"][slot, rank] = sizes[0]
            headers["written"][slot, rank] = generation


class Stop:
    """Becomes true when SIGTERM arrives."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked


class Engine:
    """The process of an engine. Its lifetime is random."""

    def __init__(self, socket: Path, name: str, number: int, seed: int, orders: Any, answers: Any, tally: Any) -> None:
        self.name, self.number = name, number
        self.random = random.Random(f"{seed} {number}")
        self.orders, self.answers, self.tally = orders, answers, tally
        self.own = hashlib.sha256(self.name.encode()).digest()  # a namespace of its own
        self.epoch = 0
        self.cleared: list[bytes] = []
        self.leases: list[Lease] = []
        answers.readline()  # the worker has the arena
        self.client = NodeClient.open(socket, self.name, GEOMETRY, timeout_s=PATIENCE_S, prefault=False)

    def run(self) -> None:
        stop = Stop()
        while not stop:
            what = self.random.random()
            if what < 0.45:
                self.read()
            elif what < 0.85:
                self.write()
            elif what < 0.97:
                self.let_go(self.random.randrange(len(self.leases) + 1))
            else:
                self.clear()
        self.let_go(0)
        self.client.close()

    def sequence(self) -> tuple[list[bytes], bytes]:
        """Return (keys from the first chunk on, namespace) of a random sequence. One in four is this engine's own."""
        if self.random.random() < 0.25:
            name, namespace = (self.number, self.epoch, self.random.randrange(3)), self.own
        else:
            name, namespace = ("shared", self.random.randrange(SEQUENCES)), SHARED
        return [key_of(*name, i) for i in range(self.random.randint(1, MAX_CHUNKS))], namespace

    def read(self) -> None:
        lease = self.client.acquire(self.sequence()[0], prefix=self.random.random() < 0.7)
        check_bytes(self.client.arena, lease.keys, lease.slots)
        self.tally[VERIFIED] += len(lease.keys)
        self.leases.append(lease)
        self.let_go(6)

    def let_go(self, keep: int) -> None:
        """Release all leases but `keep`. Their bytes are unchanged, whatever has happened to the daemon."""
        while len(self.leases) > keep:
            lease = self.leases.pop(self.random.randrange(len(self.leases)))
            check_bytes(self.client.arena, lease.keys, lease.slots)
            self.tally[RECHECKED] += len(lease.keys)
            assert self.client.release(lease) == 0

    def write(self) -> None:
        chain, namespace = self.sequence()
        got = self.client.reserve(chain, chain, ChunkShape(namespace, group=0, chunk_tokens=16))
        if not got.slots:
            time.sleep(0.002)
            return
        count = len(got.slots) if self.random.random() < 0.9 else self.random.randrange(len(got.slots))
        keys = [key.hex() for key in got.keys[:count]]
        order = {"keys": keys, "slots": got.slots[:count], "generations": got.generations[:count]}
        try:
            self.orders.write(json.dumps(order).encode() + b"\n")
            done = self.answers.readline()
        except BrokenPipeError:
            done = b""
        if not done:
            os._exit(0)  # the worker was killed, so the engine ends too
        stored = self.client.commit(got)
        assert stored <= count
        self.tally[STORED] += stored

    def clear(self) -> None:
        """Clear the engine's own namespace. Whatever happens to the daemon, none of its chunks comes back."""
        self.client.clear(self.own)
        for sequence in range(3):
            self.cleared += [key_of(self.number, self.epoch, sequence, i) for i in range(MAX_CHUNKS)]
        self.epoch += 1
        again = self.client.acquire(self.cleared, prefix=False)
        assert not again.keys, f"{len(again.keys)} chunks of a cleared namespace are served again"
        self.tally[CLEARED] += 1


def run_worker(socket: Path, name: str, number: int, seed: int, orders: Any, answers: Any) -> None:
    """Carry out every order to its end. End when the engine's end of the pipe is closed."""
    rng = random.Random(f"{seed} worker {number}")
    client = NodeClient.open(socket, name, GEOMETRY, index=False, timeout_s=PATIENCE_S, prefault=False)
    try:
        answers.write(b"ready\n")
        while line := orders.readline():
            order = json.loads(line)
            keys = [bytes.fromhex(key) for key in order["keys"]]
            store(client.arena, keys, order["slots"], order["generations"], rng.choice([0.0, 0.0, 0.0, 0.004]))
            answers.write(b"done\n")
    except BrokenPipeError:
        pass
    client.close()


def run_checker(socket: Path, number: int, tally: Any) -> None:
    client = NodeClient.open(socket, f"checker-{number}", GEOMETRY, timeout_s=PATIENCE_S, prefault=False)
    with AdminClient(socket) as admin:
        keys = [bytes.fromhex(row["key"]) for row in admin.ask(p.List(1, b"", p.MAX_ROWS))]
    lease = client.acquire(keys, prefix=False)
    check_bytes(client.arena, lease.keys, lease.slots)
    tally[SERVED_AGAIN] += len(lease.keys)
    client.release(lease)
    client.close()


class Chaos:
    """Forks, kills and watches processes. Has no threads: every child starts with the state of this process after imports."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.socket = folder / "s"
        self.config = NodeConfig(self.socket, CAPACITY_NBYTES, arena_dir=folder, prefault=False, drain_s=1.0)
        # Shared memory: one row of tallies for every child there ever was.
        self.tallies = np.frombuffer(mmap.mmap(-1, 8 << 20), dtype=np.int64).reshape(-1, 8)
        self.count = 0  # children forked so far
        self.role: dict[int, tuple[str, int]] = {}  # pid of a living child -> what it is, and of which engine
        self.kills = dict.fromkeys(("daemon", "engine", "worker"), 0)

    # -- children ------------------------------------------------------------------------------------------------------

    def fork(self, role: str, engine: int, main: Callable[[Any], None]) -> int:
        self.count += 1
        tally = self.tallies[self.count % len(self.tallies)]
        pid = os.fork()
        if pid:
            self.role[pid] = role, engine
            return pid
        code = 1
        try:
            main(tally)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)

    def start_daemon(self) -> None:
        ready, told = os.pipe()
        self.fork("daemon", -1, lambda tally: serve(self.config, lambda: os.close(told)))
        os.close(told)
        self.ready = ready

    def wait_for_daemon(self) -> None:
        """Return when the daemon serves, or is gone."""
        os.read(self.ready, 1)
        os.close(self.ready)

    def start_engine(self, engine: int) -> None:
        """Start a scheduler and a worker. Each holds only its own ends of the pipes, so each sees when the other ends."""
        take_orders, give_orders = os.pipe()
        take_answers, give_answers = os.pipe()
        name, number = f"engine-{engine}", self.count  # the name of the engine before, whose worker may still run

        def worker(tally: Any) -> None:
            os.close(give_orders)
            os.close(take_answers)
            with open(take_orders, "rb") as orders, open(give_answers, "wb", buffering=0) as answers:
                run_worker(self.socket, name, number, self.seed, orders, answers)

        def scheduler(tally: Any) -> None:
            os.close(take_orders)
            os.close(give_answers)
            with open(give_orders, "wb", buffering=0) as orders, open(take_answers, "rb") as answers:
                Engine(self.socket, name, number, self.seed, orders, answers, tally).run()

        self.fork("worker", engine, worker)
        self.fork("engine", engine, scheduler)
        for fd in (take_orders, give_orders, take_answers, give_answers):
            os.close(fd)

    def start_checker(self) -> None:
        number = self.count
        self.fork("checker", -1, lambda tally: run_checker(self.socket, number, tally))

    def alive(self, role: str) -> list[int]:
        return [pid for pid, (found, _) in self.role.items() if found == role]

    def ended(self, pid: int, status: int) -> None:
        role, _ = self.role.pop(pid)
        if os.WIFSIGNALED(status):
            self.kills[role] += 1
        else:
            assert os.waitstatus_to_exitcode(status) == 0, f"{role} {pid} has failed"

    def kill(self, pid: int) -> None:
        """Kill a process. Returns when it is gone."""
        os.kill(pid, signal.SIGKILL)
        self.ended(pid, os.waitpid(pid, 0)[1])

    def kill_one(self, role: str) -> None:
        if pids := self.alive(role):
            self.kill(self.random.choice(pids))

    def join(self, role: str) -> None:
        for pid in self.alive(role):
            self.ended(pid, os.waitpid(pid, 0)[1])

    def reap(self) -> None:
        """Collect children that have ended by themselves: workers and engines whose other half was killed, and checkers."""
        for pid in list(self.role):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.ended(pid, status)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self, kills: int) -> None:
        self.start_daemon()
        self.wait_for_daemon()
        while (done := sum(self.kills.values())) < kills:
            self.reap()
            running = {engine for role, engine in self.role.values() if role == "engine"}
            for engine in set(range(ENGINES)) - running:
                self.start_engine(engine)
            time.sleep(self.random.uniform(0.01, 0.12))
            if 7 * self.kills["daemon"] <= done and not self.alive("checker"):
                self.replace_daemon()
            else:
                self.kill_one(self.random.choice(["engine", "worker"]))
        self.finish()

    def replace_daemon(self) -> None:
        """Kill the daemon, alone or with an engine. Sometimes kill its successors too, while they take over."""
        if self.random.random() < 0.4:
            self.kill_one("engine")
        self.kill_one("daemon")
        if self.random.random() < 0.3:
            self.kill_one("engine")
        self.start_daemon()
        while self.random.random() < 0.3:
            time.sleep(self.random.uniform(0, 0.04))
            self.kill_one("daemon")
            self.wait_for_daemon()
            self.start_daemon()
        self.wait_for_daemon()
        self.start_checker()

    def finish(self) -> None:
        """End the engines, one of them gracefully. Then nothing is held, no slot is lost, a last daemon finds every chunk."""
        for pid in self.alive("engine")[:-1]:
            self.kill(pid)
        for pid in self.alive("engine"):
            os.kill(pid, signal.SIGTERM)
        for role in ("engine", "worker", "checker"):
            self.join(role)
        chunks = self.at_rest()
        (daemon,) = self.alive("daemon")
        os.kill(daemon, signal.SIGTERM)
        self.join("daemon")
        self.start_daemon()
        self.wait_for_daemon()
        assert self.at_rest() == chunks
        self.start_checker()
        self.join("checker")

    def at_rest(self) -> int:
        """Wait until nobody holds anything any more. Returns the number of chunks."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with AdminClient(self.socket) as admin:
                (row,) = admin.ask(p.Stat(1))
            held = {name: row[name] for name in ("leases", "granted_slots", "quarantined_leases", "quarantined_slots")}
            if not any(held.values()):
                break
            assert time.monotonic() < deadline, f"still held: {held}"
            time.sleep(0.05)
        assert row["free_slots"] + row["chunks"] == row["slots"], f"slots are lost: {row}"
        assert row["faults"] == 0
        assert row["bad_chunks"] == 0
        return int(row["chunks"])

    def close(self) -> None:
        for pid in list(self.role):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main(seed: int, kills: int) -> None:
    """Run, and print what was done. Ends with a traceback if anything was wrong."""
    logging.disable(logging.WARNING)  # every loss of a daemon logs a warning
    with tempfile.TemporaryDirectory(prefix="kvkern-") as folder, closing(Chaos(Path(folder), seed)) as chaos:
        chaos.run(kills)
        sums = chaos.tallies.sum(axis=0).tolist()
        names = ("stored", "verified", "rechecked", "clears", "served_again")
        print(json.dumps(chaos.kills | dict(zip(names, sums, strict=False)) | {"processes": chaos.count}))


@pytest.mark.slow
def test_kill_9_at_any_point() -> None:
    kills = int(os.environ.get("KVKERN_SOAK_KILLS", KILLS))
    seed = random.SystemRandom().randrange(1 << 32)
    command = [sys.executable, __file__, str(seed), str(kills)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=240 + kills)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"seed {seed}, {kills} kills:\n{errors[-8000:]}"
    assert FAULT_LINE.partition("%(kind)s")[2] not in errors, f"seed {seed}, {kills} kills:\n{errors[-8000:]}"
    done = json.loads(out)
    print(f"seed {seed}: {done}")
    assert done["daemon"] + done["engine"] + done["worker"] >= kills
    assert done["daemon"] >= kills // 12
    assert min(done[name] for name in ("stored", "verified", "rechecked", "clears", "served_again")) > 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
