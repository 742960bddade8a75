"""The remote tier beside the best plain loop of the same server's client: 2 MiB chunks, there and back.

    put   from storing a sequence in DRAM until the store has all of it           raw: the client writes the same bytes
    get   from asking for a prompt that only the store has until it is pinned     raw: the client reads the same bytes

kvkern's time includes everything: asking what is there, the outbox, verifying every byte, publishing. For each kind of store
the loops run in turn; the figures are medians, and the best variant of the raw loop counts. ratio_raw_verified compares with
a raw loop that also sums what it has read, on one thread like kvkern; the rest of the difference comes from kvkern's path.
For files the raw loop always sums. `file` reads values that are not in the page cache and writes to the disk; kvkern uses
O_DIRECT. `file_cached` reads values in the page cache and leaves the writing to the kernel; both sides use the page cache.
`s3` is moto's server, which is slow: it shows what kvkern's path adds, not what a bucket gives. The script starts the
servers on 127.0.0.1 and names a missing one. Targets: 0.9 of the raw loop, both ways.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from _common import option_parser, print_row, write_json
from _remote import MissingError, RawClient, start_store, verify

from kvkern.arena.file import Arena, ArenaSpec, create_or_attach
from kvkern.arena.slots import SlotGeometry, seal
from kvkern.assemble import attach_remote_tier, build_cache
from kvkern.cache.manager import Cache
from kvkern.config import RemoteConfig
from kvkern.kernels.checksum import ROW_NBYTES, checksum
from kvkern.policy.base import Use
from kvkern.remote import cost_model
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from kvkern.tiers.base import ChunkShape, Reservation

KINDS = ("file", "file_cached", "redis", "mooncake", "s3")
CHUNK_NBYTES = 2 << 20
CHUNKS = 64
ROOT = bytes(range(32))
SHAPE = ChunkShape(ROOT, group=0, chunk_tokens=16)
USE = Use(namespace=ROOT)
GIVE_UP_S = 120.0
PLACES, WARM_UPS = 3, 2

Row = dict[str, object]
cost_model.LEAST_WAIT_S = GIVE_UP_S  # a busy machine makes the figures worse, but does not end the run


def sequence(name: str, chunks: int) -> list[bytes]:
    """Return the keys of a sequence. Sequences of different names share no chunk."""
    return [hashlib.blake2b(f"{name} {i}".encode(), digest_size=32).digest() for i in range(chunks)]


class Writer:
    """Fills reserved slots as an engine's workers do: the same payload in each, with its checksum sealed."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        geometry = arena.spec.geometry
        noise = np.random.default_rng(0).integers(0, 256, geometry.part_nbytes, dtype=np.uint8)
        self._sum = np.uint64(checksum(noise))
        arena.parts(0)[:, : geometry.part_nbytes] = noise

    def write(self, reservation: Reservation) -> None:
        headers, at = self._arena.headers, np.array(reservation.slots, dtype=np.int64)
        generations = np.array(reservation.generations, dtype=np.uint64)
        sealed = seal(np.frombuffer(b"".join(reservation.keys), dtype="V32"), generations)
        headers["checksum"][at, 0, 0] = self._sum ^ sealed
        headers["plane_nbytes"][at, 0, 0] = self._arena.spec.geometry.part_nbytes
        headers["written"][at, 0] = generations


class Bench:
    """A cache with a store behind it, and the store's plain client on the same arena."""

    def __init__(self, kind: str, url: str, raw: RawClient, arena: Arena, chunks: int) -> None:
        self.kind, self.raw, self.arena, self.chunks = kind, raw, arena, chunks
        self.cache: Cache = build_cache(arena, policy="lru")
        tier = attach_remote_tier(self.cache, arena, RemoteConfig(url, "all", queue_nbytes=1 << 30), "lru")
        assert tier is not None
        self.tier, self.writer = tier, Writer(arena)
        self.slots = range(chunks, 2 * chunks)  # for the raw loops, as payload only
        self._loop, self._other = asyncio.Runner(), make_store(RemoteUrl.parse(url))
        self._loop.run(self._other.open())
        self.rounds = 0
        self.names: list[str] = []

    def put(self) -> float:
        """Return the seconds until the store has a new sequence."""
        self.rounds += 1
        keys = sequence(f"ours {self.rounds}", self.chunks)
        self.cache.clear()
        reservation = self.cache.reserve(keys, keys, SHAPE, USE)
        self.writer.write(reservation)
        before = self.cache.counters.remote_written_chunks
        began = time.perf_counter()
        self.cache.commit(reservation)
        self._until(lambda: self.cache.counters.remote_written_chunks == before + self.chunks)
        return time.perf_counter() - began

    def get(self) -> float:
        """Return the seconds until the sequence written last is pinned, all of it from the store."""
        keys = sequence(f"ours {self.rounds}", self.chunks)
        self._until(lambda: self.tier.idle)
        self.cache.clear()
        self.tier.note_prefill(1.0)  # computing is so slow that every wait is worth it; see LEAST_WAIT_S above
        began = time.perf_counter()
        lease = self.cache.acquire(keys, use=USE)
        elapsed = time.perf_counter() - began
        if len(lease.slots) != self.chunks:
            raise RuntimeError(f"only {len(lease.slots)} of {self.chunks} chunks came from {self.kind}")
        self.cache.release(lease)
        self._loop.run(self._other.delete(keys, GIVE_UP_S))  # the raw loop deletes too, so that neither fills the store
        return elapsed

    def raw_put(self, variant: str) -> float:
        self.names = [f"raw-{self.rounds}-{variant}-{i}" for i in range(self.chunks)]
        began = time.perf_counter()
        self.raw.write(self.names, self.slots, variant)
        return time.perf_counter() - began

    def raw_get(self, variant: str) -> tuple[float, float]:
        """Return the seconds to read, and the seconds to read and verify."""
        self.raw.prepare_read(self.names)
        began = time.perf_counter()
        self.raw.read(self.names, self.slots, variant)
        elapsed = verified = time.perf_counter() - began
        if not self.raw.verifies:
            verify(self.arena, self.slots)
            verified = time.perf_counter() - began
        self.raw.delete(self.names)
        return elapsed, verified

    def close(self) -> None:
        self.cache.close()
        self._loop.run(self._other.close())
        self._loop.close()

    def _until(self, condition: object) -> None:
        end = time.monotonic() + GIVE_UP_S
        while not condition():  # type: ignore[operator]
            if time.monotonic() > end:
                raise RuntimeError(f"{self.kind}: nothing has moved for {GIVE_UP_S:.0f} s")
            time.sleep(0.0002)


Times = dict[str, dict[str, list[float]]]  # op or "verified" -> variant, "ours" or "cpu" -> seconds of each run


def measure(kind: str, runs: int, chunks: int, chunk_nbytes: int) -> list[Row]:
    """Return the rows of one kind of store. Each third of the runs uses a new place: a file system may be faster in one."""
    geometry = SlotGeometry(chunk_nbytes // ROW_NBYTES * ROW_NBYTES, max_planes=1)
    times: Times = {"put": defaultdict(list), "get": defaultdict(list), "verified": defaultdict(list)}
    for _ in range(PLACES):
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix=f"kvkern-bench-remote-{kind}.") as folder:
            arena = create_or_attach(ArenaSpec(geometry, 2 * chunks), Path(folder) / "arena")
            with start_store(kind, arena) as (url, raw):
                bench = Bench(kind, url, raw, arena, chunks)
                try:
                    _take_turns(bench, -(-runs // PLACES), times)
                finally:
                    bench.close()
                    arena.close()
    return [_row(kind, op, times, chunks, geometry.slot_nbytes) for op in ("get", "put")]


def _take_turns(bench: Bench, runs: int, times: Times) -> None:
    for run in range(runs + WARM_UPS):
        for op, call in (("put", bench.put), ("get", bench.get)):
            bench.raw.finish_writes()
            before = time.process_time()
            seconds = call()
            if run >= WARM_UPS:
                times[op]["cpu"].append(time.process_time() - before)
                times[op]["ours"].append(seconds)
        for variant in bench.raw.variants():
            bench.raw.finish_writes()
            written, (read, verified) = bench.raw_put(variant), bench.raw_get(variant)
            if run >= WARM_UPS:
                times["put"][variant].append(written)
                times["get"][variant].append(read)
                times["verified"][variant].append(verified)


def _row(kind: str, op: str, all_times: Times, chunks: int, slot_nbytes: int) -> Row:
    times = all_times[op]
    best = min((name for name in times if name not in ("ours", "cpu")), key=lambda name: median(times[name]))
    seconds, plain_s, nbytes = median(times["ours"]), median(times[best]), chunks * slot_nbytes
    return {
        "remote": kind, "op": op, "chunk_nbytes": slot_nbytes, "gb_s": nbytes / seconds / 1e9,
        "raw_gb_s": nbytes / plain_s / 1e9, "ratio_raw": plain_s / seconds,
        "ratio_raw_verified": median(all_times["verified"][best]) / seconds if op == "get" else None, "raw_variant": best,
        "cpu_s_per_gb": median(times["cpu"]) / (nbytes / 1e9), "runs": len(times["ours"]),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser(__doc__, quick="few small chunks: for smoke tests, not for numbers")
    parser.add_argument("--remote", default=",".join(KINDS), help=f"kinds of stores, of {', '.join(KINDS)}")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args(arguments)
    kinds = args.remote.split(",")
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"--remote: {kind!r} is unknown; use {', '.join(KINDS)}")
    rows = []
    for kind in kinds:
        try:
            found = measure(kind, 2, 8, 64 << 10) if args.quick else measure(kind, args.runs, CHUNKS, CHUNK_NBYTES)
        except MissingError as error:
            print(f"bench/remote.py: {error}", file=sys.stderr)
            return 2
        for row in found:
            print_row(row)
        rows += found
    write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
