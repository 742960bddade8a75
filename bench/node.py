"""The node daemon: what sharing one cache costs engines, and that no chunk is lost. Real daemon, real client processes.

    together:         8 clients store at once, then each finds, loads and compares what all of them stored
    lookup:           longest cached prefix of 128 chunks, from the client's replica of the index
    echo:             8 clients, each: send as many bytes as an acquire, receive as many as its answer, sleep 20 ms.
                      A bare Unix socket and a process that does nothing else: the cost of a round trip on this machine
    acquire:          8 clients, each: acquire 128 chunks (timed), release, sleep 20 ms; nobody copies. daemon_cpu_us is the
                      daemon's CPU time for one acquire with its release
    acquire_copying:  the same, and each client loads the 32 MiB into its tensors before it releases
    flooded_unread:   acquire of one client, while 30 connections of another process flood the daemon with requests and never
                      read an answer; ratio_p99 compares it with rounds in between without the flood
    flooded_read:     the same, with a flood of acquires of 128 chunks that no cache holds, whose answers are read
    load, store:      2,048 tokens of Llama-3.1-8B (256 MiB): acquire, copy, release; reserve, copy, commit.
                      Through a daemon, and in the same turn with a cache embedded in the process
    memory:           the daemon's resident memory beyond the arena once all slots are filled, against a daemon of few slots;
                      and what the replica of the index costs a client

Every client is a process of its own, started once. A percentile is taken over all clients of one round; the median over
rounds is reported. other_cpus is how many CPUs other processes used meanwhile. If it is above a fifth, repeat the run.
Targets: lookup p50 100 us; acquire p50 400 us and p99 3 ms, and 3 times the p99 under a flood; load and store 0.9 of the
embedded cache's rate.
"""

from __future__ import annotations

import math
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import option_parser, print_row, write_json
from _flood import CONNECTIONS, KINDS, Flooder
from _node import (
    ANSWER,
    CHUNKS,
    GIVE_UP_S,
    REQUEST,
    SHAPE,
    SPAWN,
    Engine,
    Pages,
    daemon,
    echoes,
    resident_nbytes,
    sequence,
)  # fmt: skip
from _peers.busy import OtherProcesses

from kvkern.arena.slots import PAGE, SlotGeometry
from kvkern.assemble import build_cache, open_arena
from kvkern.config import Config
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.shares import GRANTED_SHARE

CLIENTS = 8
PAUSE_S = 0.02
FEW_SLOTS = 64

Row = dict[str, object]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


# -- many clients --------------------------------------------------------------------------------------------------------


class Client:
    """What one client process does on request. Its number names its own sequence."""

    def __init__(self, path: Path, number: int, layers: int) -> None:
        torch.set_num_threads(1)
        self._number = number
        self._keys = sequence(number)
        self._pages = Pages(layers)
        self._node = NodeClient.open(path, f"bench-{number}", self._pages.geometry, patience_s=1.0)
        self._engine = Engine(self._node, self._node.arena, self._pages, threads=1)
        self._random = random.Random(number)

    def close(self) -> None:
        self._engine.close()
        self._node.close()

    def store(self) -> int:
        self._pages.fill(self._number)
        return self._engine.store(self._keys)

    def verify(self, clients: int) -> int:
        """Load the chunks that every client has stored and compare them. Returns how many chunks are right."""
        right = 0
        for number in range(clients):
            self._engine.load(sequence(number))
            right += CHUNKS * self._pages.holds(number)
        return right

    def lookup(self, count: int) -> list[float]:
        times_s = []
        for _ in range(count):
            start = time.perf_counter()
            hit = self._node.lookup(self._keys)
            times_s.append(time.perf_counter() - start)
            if hit != CHUNKS:
                raise RuntimeError(f"{hit} of {CHUNKS} chunks hit")
            time.sleep(0.001)
        return times_s

    def take_precedence(self) -> None:
        """Let no other process of this machine delay this one. Needs root."""
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(2))

    def acquire(self, seconds: float) -> list[float]:
        return self._paced(self._acquire, seconds)

    def acquire_copying(self, seconds: float) -> list[float]:
        return self._paced(partial(self._engine.load, self._keys), seconds)

    def echo(self, seconds: float, path: Path) -> list[float]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            return self._paced(partial(_round_trip, sock), seconds)

    def _paced(self, act: Callable[[], float], seconds: float) -> list[float]:
        """Call `act` every PAUSE_S and return what it returns. The client's phase is drawn anew each time."""
        times_s = []
        time.sleep(self._random.uniform(0, PAUSE_S))
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            times_s.append(act())
            time.sleep(PAUSE_S)
        return times_s

    def _acquire(self) -> float:
        start = time.perf_counter()
        lease = self._node.acquire(self._keys)
        taken = time.perf_counter() - start
        self._node.release(lease)
        if len(lease.slots) != CHUNKS:
            raise RuntimeError(f"{len(lease.slots)} of {CHUNKS} chunks hit")
        return taken


def _round_trip(sock: socket.socket) -> float:
    start = time.perf_counter()
    sock.sendall(REQUEST)
    sock.recv(len(ANSWER), socket.MSG_WAITALL)
    return time.perf_counter() - start


def client_main(pipe: Connection, path: Path, number: int, layers: int) -> None:
    with closing(Client(path, number, layers)) as client:
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            name, arguments = order
            pipe.send(getattr(client, name)(*arguments))


class Clients:
    """Client processes of one daemon. `ask` makes all of them, or the first few, do the same at once."""

    def __init__(self, path: Path, count: int, layers: int) -> None:
        self.pipes: list[Connection] = []
        self._processes = []
        for number in range(count):
            mine, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=client_main, args=(theirs, path, number, layers), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self._processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def ask(self, name: str, *arguments: object, first: int | None = None) -> list[Any]:
        for pipe in self.pipes[:first]:
            pipe.send((name, arguments))
        return [pipe.recv() for pipe in self.pipes[:first]]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join()


def latency(case: str, rounds: Sequence[Sequence[Sequence[float]]]) -> Row:
    """Make the row of rounds, each with the times of every client. The first round is not counted."""
    pooled = [[1e6 * taken for client in clients for taken in client] for clients in rounds[1:]]
    return {
        "case": case, "clients": len(rounds[0]), "chunks": CHUNKS, "p50_us": median(percentile(r, 50) for r in pooled),
        "p99_us": median(percentile(r, 99) for r in pooled), "runs": len(pooled), "samples": sum(map(len, pooled)),
    }  # fmt: skip


def many_clients(layers: int, runs: int, round_s: float, lookups: int) -> Iterator[Row]:
    """Yield the rows of one daemon with CLIENTS clients. Each stores 128 chunks of 64 KiB times `layers`."""
    pages = Pages(layers)
    slots = 4 * CLIENTS * CHUNKS  # granted slots that are not written must not crowd out stored chunks
    with daemon(pages.geometry, slots) as node, closing(Clients(node.path, CLIENTS, layers)) as clients:
        start = time.perf_counter()
        stores = clients.ask("store")
        stored_s = time.perf_counter() - start
        right = clients.ask("verify", CLIENTS)
        stored = node.stat()["stored_chunks"]
        if stored != CLIENTS * CHUNKS or any(count != stored for count in right):
            raise RuntimeError(f"{stored} chunks stored, {right} of {CLIENTS * CHUNKS} are right")
        yield {
            "case": "together", "clients": CLIENTS, "stored_chunks": stored, "found_chunks": min(right),
            "reservations": sum(stores), "gb_s": CLIENTS * pages.nbytes / stored_s / 1e9, "runs": 1,
        }  # fmt: skip
        yield latency("lookup", [clients.ask("lookup", lookups, first=1) for _ in range(runs + 1)])
        busy_s = node.cpu_s()
        with echoes(node.path.with_name("echo")) as path:  # in turns with acquire, so that a busy machine slows both
            turns = [(clients.ask("echo", round_s, path), clients.ask("acquire", round_s)) for _ in range(runs + 1)]
        busy_s = node.cpu_s() - busy_s
        echoed, acquired = zip(*turns, strict=True)
        yield latency("echo", echoed)
        count = sum(len(times) for client_times in acquired for times in client_times)
        yield latency("acquire", acquired) | {"daemon_cpu_us": 1e6 * busy_s / count}  # for an acquire with its release
        rounds = [clients.ask("acquire_copying", round_s) for _ in range(runs + 1)]
        loaded = sum(len(times) for client_times in rounds[1:] for times in client_times)
        yield latency("acquire_copying", rounds) | {"gb_s": loaded * pages.nbytes / (runs * round_s) / 1e9}


def under_floods(
    runs: int,
    round_s: float,
    realtime: bool,  # daemon and client come before all other processes, so that only the daemon's own order counts
) -> Iterator[Row]:
    """Yield a row for each kind of flood. Rounds with and without the flood take turns."""
    pages = Pages(1)
    for kind in KINDS:
        with (
            daemon(pages.geometry, 4 * CHUNKS) as node,
            closing(Clients(node.path, 1, 1)) as clients,
            closing(Flooder(node.path, pages.geometry, kind)) as flooder,
        ):
            clients.ask("store")
            if realtime:
                os.sched_setscheduler(node.pid, os.SCHED_RR, os.sched_param(1))
                clients.ask("take_precedence")
            calm, flooded = [], []
            for _ in range(runs + 1):
                calm.append(clients.ask("acquire", round_s))
                with flooder:
                    flooded.append(clients.ask("acquire", round_s))
            before, row = latency("calm", calm), latency(f"flooded_{kind}", flooded)
            yield row | {
                "floods": CONNECTIONS, "realtime": realtime, "calm_p50_us": before["p50_us"], "calm_p99_us": before["p99_us"],
                "ratio_p99": median(p99(f) / p99(c) for f, c in zip(flooded[1:], calm[1:], strict=True)),
            }  # fmt: skip


def p99(clients: Sequence[Sequence[float]]) -> float:
    return percentile([taken for client in clients for taken in client], 99)


# -- bytes through the daemon, and embedded ------------------------------------------------------------------------------


def copies(layers: int, threads: int, runs: int) -> Iterator[Row]:
    """Load and store one sequence. Daemon and embedded cache take turns on the same tensors, in alternating order."""
    pages = Pages(layers)
    pages.fill(0)
    geometry, slots = pages.geometry, GRANTED_SHARE * (CHUNKS + CHUNKS // 4)
    config = Config(PAGE + slots * geometry.slot_nbytes)
    with daemon(geometry, slots) as node:
        client = NodeClient.open(node.path, "bench", geometry, patience_s=1.0)
        arena = open_arena(config, geometry, f"bench-node-{time.time_ns()}", expected=1)
        shared, embedded = (
            Engine(client, client.arena, pages, threads),
            Engine(build_cache(arena), arena, pages, threads),
        )
        with closing(arena), closing(client), closing(shared), closing(embedded):
            for engine in (shared, embedded):
                engine.store(sequence("hit"))
            for case in ("load", "store"):
                turns = [_turn(case, shared, embedded, turn) for turn in range(runs + 1)][1:]
                yield {
                    "case": case, "clients": 1, "nbytes": pages.nbytes, "threads": threads,
                    "gb_s": median(pages.nbytes / ours for ours, _ in turns) / 1e9,
                    "embedded_gb_s": median(pages.nbytes / theirs for _, theirs in turns) / 1e9,
                    "ratio_embedded": median(theirs / ours for ours, theirs in turns), "runs": runs,
                }  # fmt: skip


def _turn(case: str, shared: Engine, embedded: Engine, turn: int) -> tuple[float, float]:
    """Return the seconds of the second of two calls: (through the daemon, embedded)."""
    taken = {}
    for engine in (shared, embedded) if turn % 2 else (embedded, shared):
        for call in range(2):
            keys = sequence("hit") if case == "load" else sequence(f"store {turn} {call}")
            work = partial(engine.load if case == "load" else engine.store, keys)
            start = time.perf_counter()
            work()
            taken[engine] = time.perf_counter() - start
    return taken[shared], taken[embedded]


# -- memory --------------------------------------------------------------------------------------------------------------


def memory(sizes: Sequence[int]) -> Iterator[Row]:
    """Fill daemons of FEW_SLOTS and of these sizes with chunks that are only headers."""
    base, _, _ = filled(FEW_SLOTS)
    for slots in sizes:
        nbytes, chunks, replica = filled(slots)
        yield {
            "case": "memory", "slots": slots, "chunks": chunks, "base_nbytes": base, "nbytes": nbytes,
            "nbytes_per_slot": (nbytes - base) / slots, "client_nbytes_per_chunk": replica / chunks, "runs": 1,
        }  # fmt: skip


def filled(slots: int) -> tuple[int, int, int]:
    """Fill a daemon. Returns (its resident bytes, its chunks, resident bytes of a client's replica of them)."""
    geometry = SlotGeometry(PAGE, max_planes=1)
    with (
        daemon(geometry, slots, prefault=False) as node,
        ProcessPoolExecutor(1, SPAWN) as pool,
        closing(NodeClient.open(node.path, "bench", geometry, patience_s=1.0, prefault=False)) as client,
    ):
        written, chunks = client.arena.headers["written"], min(4096, slots // 16)
        for name in range(slots // chunks):
            keys = left = sequence(name, chunks)
            while left:
                if not client.connected:
                    raise RuntimeError(
                        "the daemon is gone while its slots are filled; look at its log, then repeat the run"
                    )
                reservation = client.reserve(keys, left, SHAPE)
                written[list(reservation.slots), 0] = reservation.generations
                client.commit(reservation)
                left = left[len(reservation.keys) :]
        cached = node.stat()["chunks"]
        nbytes = resident_nbytes(node.pid)
        return nbytes, cached, pool.submit(replica_nbytes, node.path, geometry, cached).result()


def replica_nbytes(path: Path, geometry: SlotGeometry, chunks: int) -> int:
    """Return how many resident bytes this process gains when it has a replica of so many chunks."""
    before = resident_nbytes(os.getpid())
    with closing(NodeClient.open(path, "replica", geometry, prefault=False)) as client:
        deadline = time.monotonic() + GIVE_UP_S
        while client.usage()["known_chunks"] < chunks * 7 // 8 and time.monotonic() < deadline:
            time.sleep(0.02)  # the daemon evicts a few chunks for this client's own stock of slots
        return resident_nbytes(os.getpid()) - before


def sections(quick: bool, threads: int, realtime: bool) -> Iterator[Iterator[Row]]:
    """Yield the sections. Each starts daemons of its own, which have ended when the section ends."""
    if quick:
        yield many_clients(layers=1, runs=1, round_s=0.3, lookups=50)
        yield under_floods(1, 0.3, realtime)
        yield copies(layers=1, threads=threads, runs=2)
        yield memory((2048, 4096))
    else:
        yield many_clients(layers=4, runs=5, round_s=4.0, lookups=500)
        yield under_floods(5, 10.0, realtime)
        yield copies(layers=32, threads=threads, runs=9)
        yield memory((65_536, 262_144))


def main() -> None:
    parser = option_parser(__doc__, quick="small and short: for smoke tests, not for numbers")
    parser.add_argument("--threads", type=int, default=2, help="threads that copy in load and store (default 2)")
    parser.add_argument(
        "--realtime", action="store_true", help="floods: real-time priority for daemon and client (root)"
    )
    args = parser.parse_args()
    rows: list[Row] = []
    for section in sections(args.quick, args.threads, args.realtime):
        others, begin = OtherProcesses(), len(rows)
        for row in section:
            rows.append(row)
            print_row(row)
        other_cpus = others.busy_cpus()
        for row in rows[begin:]:
            row["other_cpus"] = other_cpus
        print(f"  other processes used {other_cpus:.2f} CPUs", flush=True)
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
