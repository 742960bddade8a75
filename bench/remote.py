"""The remote tier beside the best plain loop of the same server's client: 2 MiB chunks, there and back.

    put   a sequence is stored in DRAM -> until the store has all of it          raw: the client writes the same bytes
    get   a prompt that only the store has -> until it is pinned in the arena     raw: the client reads the same bytes

Ours includes everything: asking what is there, the outbox, verification of every byte, publishing. Of each kind the
loops run in turn, medians; the raw loop's best variant counts. ratio_raw_verified is against the same loop that then
sums what it has read, on one thread as ours: what is left of a difference is our path's. For files the raw loop sums it in
any case: `file` reads what is not in the page cache and writes to the disk, ours with O_DIRECT; `file_cached` reads what
is and leaves writing to the kernel, both through it. `s3` is moto's server, which is slow: it shows what our path adds,
not what a bucket gives. Servers are started here, on 127.0.0.1; a missing one is named. Targets: 0.9 of the raw loop,
both ways.
"""

from __future__ import annotations

import argparse
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
from _common import print_row, write_json
from _remote import MissingError, Raw, place, verify

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
cost_model.LEAST_WAIT_S = GIVE_UP_S  # a busy machine makes the figures worse, and does not end the run


def sequence(name: str, chunks: int) -> list[bytes]:
    """Keys of a sequence that shares no chunk with those of another name."""
    return [hashlib.blake2b(f"{name} {i}".encode(), digest_size=32).digest() for i in range(chunks)]


class Writer:
    """What an engine's workers leave in reserved slots: the same payload in each, its checksum sealed."""

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

    def __init__(self, kind: str, url: str, raw: Raw, arena: Arena, chunks: int) -> None:
        self.kind, self.raw, self.arena, self.chunks = kind, raw, arena, chunks
        self.cache: Cache = build_cache(arena, policy="lru")
        tier = attach_remote_tier(self.cache, arena, RemoteConfig(url, "all", queue_nbytes=1 << 30), "lru")
        assert tier is not None
        self.tier, self.writer = tier, Writer(arena)
        self.slots = range(chunks, 2 * chunks)  # of the raw loops, as payload only
        self._loop, self._other = asyncio.Runner(), make_store(RemoteUrl.parse(url))
        self._loop.run(self._other.open())
        self.rounds = 0
        self.names: list[str] = []

    def put(self) -> float:
        """Seconds until the store has a new sequence."""
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
        """Seconds until the sequence that was written last is pinned, all of it from the store."""
        keys = sequence(f"ours {self.rounds}", self.chunks)
        self._until(lambda: self.tier.idle)
        self.cache.clear()
        self.tier.note_prefill(1.0)  # whatever it takes, it is worth the wait; see LEAST_WAIT_S above
        began = time.perf_counter()
        lease = self.cache.acquire(keys, use=USE)
        elapsed = time.perf_counter() - began
        if len(lease.slots) != self.chunks:
            raise RuntimeError(f"{len(lease.slots)} of {self.chunks} chunks came from {self.kind}")
        self.cache.release(lease)
        self._loop.run(self._other.delete(keys, GIVE_UP_S))  # as the raw loop does: neither fills the store
        return elapsed

    def raw_put(self, variant: str) -> float:
        self.names = [f"raw-{self.rounds}-{variant}-{i}" for i in range(self.chunks)]
        began = time.perf_counter()
        self.raw.write(self.names, self.slots, variant)
        return time.perf_counter() - began

    def raw_get(self, variant: str) -> tuple[float, float]:
        """Seconds to read, and to read and then verify."""
        self.raw.settle(self.names)
        began = time.perf_counter()
        self.raw.read(self.names, self.slots, variant)
        elapsed = verified = time.perf_counter() - began
        if not self.raw.verifies:
            verify(self.arena, self.slots)
            verified = time.perf_counter() - began
        self.raw.forget(self.names)
        return elapsed, verified

    def close(self) -> None:
        self.cache.close()
        self._loop.run(self._other.close())
        self._loop.close()

    def _until(self, condition: object) -> None:
        end = time.monotonic() + GIVE_UP_S
        while not condition():  # type: ignore[operator]
            if time.monotonic() > end:
                raise RuntimeError(f"{self.kind}: nothing moves any more")
            time.sleep(0.0002)


Times = dict[str, dict[str, list[float]]]  # op or "verified" -> variant, "ours" or "cpu" -> seconds of each run


def measure(kind: str, runs: int, chunks: int, chunk_nbytes: int) -> list[Row]:
    """Rows of one kind of store. A third of the runs each in a new place, which a file system may like more or less."""
    geometry = SlotGeometry(chunk_nbytes // ROW_NBYTES * ROW_NBYTES, max_planes=1)
    times: Times = {"put": defaultdict(list), "get": defaultdict(list), "verified": defaultdict(list)}
    for _ in range(PLACES):
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix=f"kvkern-bench-remote-{kind}.") as folder:
            arena = create_or_attach(ArenaSpec(geometry, 2 * chunks), Path(folder) / "arena")
            with place(kind, arena) as (url, raw):
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
            bench.raw.rest()
            before = time.process_time()
            seconds = call()
            if run >= WARM_UPS:
                times[op]["cpu"].append(time.process_time() - before)
                times[op]["ours"].append(seconds)
        for variant in bench.raw.variants():
            bench.raw.rest()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--remote", default=",".join(KINDS), help=f"which ones, of {', '.join(KINDS)}")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few small chunks: for smoke tests, not for numbers")
    args = parser.parse_args(arguments)
    kinds = args.remote.split(",")
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"--remote: {kind!r} is none of {', '.join(KINDS)}")
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
    if args.json:
        write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
