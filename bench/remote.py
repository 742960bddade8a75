"""The remote tier beside the best plain loop of the same server's client: 2 MiB chunks, there and back.

    put   a sequence is stored in DRAM -> until the store has all of it          raw: the client writes the same bytes
    get   a prompt that only the store has -> until it is pinned in the arena     raw: the client reads the same bytes

Ours includes everything: asking what is there, the outbox, verification of every byte, publishing. Of each kind the
loops run in turn, medians; the raw loop's best variant counts. For files the raw loop verifies too: `file` reads what is not in
the page cache, ours with O_DIRECT; `file_cached` what is, both through it. Servers are started here, on 127.0.0.1; a missing
one is named. Targets: 0.9 of the raw loop, both ways.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from _common import print_row, write_json
from _remote import MissingError, Raw, place

from kvkern.arena import Arena, ArenaSpec, create_or_attach
from kvkern.assemble import back_with_remote, build_cache
from kvkern.cache import Cache
from kvkern.config import RemoteConfig
from kvkern.kernels.checksum import ROW_NBYTES, checksum
from kvkern.policy.base import Use
from kvkern.slots import SlotGeometry, seal
from kvkern.tiers.base import ChunkShape, Reservation

KINDS = ("file", "file_cached", "redis", "mooncake")
CHUNK_NBYTES = 2 << 20
CHUNKS = 64
ROOT = bytes(range(32))
SHAPE = ChunkShape(ROOT, group=0, chunk_tokens=16)
USE = Use(namespace=ROOT)
GIVE_UP_S = 120.0

Row = dict[str, object]


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
        tier = back_with_remote(self.cache, arena, RemoteConfig(url, "all", queue_nbytes=1 << 30), "lru")
        assert tier is not None
        self.tier, self.writer = tier, Writer(arena)
        self.slots = range(chunks, 2 * chunks)  # of the raw loops, as payload only
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
        self.tier.note_prefill(1.0)  # whatever it takes, it is worth the wait
        began = time.perf_counter()
        lease = self.cache.acquire(keys, use=USE)
        elapsed = time.perf_counter() - began
        if len(lease.slots) != self.chunks:
            raise RuntimeError(f"{len(lease.slots)} of {self.chunks} chunks came from {self.kind}")
        self.cache.release(lease)
        return elapsed

    def raw_put(self, variant: str) -> float:
        self.names = [f"raw-{self.rounds}-{variant}-{i}" for i in range(self.chunks)]
        began = time.perf_counter()
        self.raw.write(self.names, self.slots, variant)
        return time.perf_counter() - began

    def raw_get(self, variant: str) -> float:
        self.raw.settle(self.names)
        began = time.perf_counter()
        self.raw.read(self.names, self.slots, variant)
        elapsed = time.perf_counter() - began
        self.raw.forget(self.names)
        return elapsed

    def _until(self, condition: object) -> None:
        end = time.monotonic() + GIVE_UP_S
        while not condition():  # type: ignore[operator]
            if time.monotonic() > end:
                raise RuntimeError(f"{self.kind}: nothing moves any more")
            time.sleep(0.0002)


def measure(kind: str, runs: int, chunks: int, chunk_nbytes: int) -> list[Row]:
    """Rows of one kind of store."""
    geometry = SlotGeometry(chunk_nbytes // ROW_NBYTES * ROW_NBYTES, max_planes=1)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvkern-bench-remote-") as folder:
        arena = create_or_attach(ArenaSpec(geometry, 2 * chunks), Path(folder) / "arena")
        with place(kind, arena) as (url, raw):
            bench = Bench(kind, url, raw, arena, chunks)
            try:
                return _rows(bench, runs, chunks * geometry.slot_nbytes)
            finally:
                bench.cache.close()
                arena.close()


def _rows(bench: Bench, runs: int, nbytes: int) -> list[Row]:
    ours: dict[str, list[float]] = {"put": [], "get": []}
    cpu: dict[str, list[float]] = {"put": [], "get": []}
    raw: dict[str, dict[str, list[float]]] = {"put": {}, "get": {}}
    for run in range(runs + 1):  # the first warms up
        for op, call in (("put", bench.put), ("get", bench.get)):
            before = time.process_time()
            seconds = call()
            if run:
                ours[op].append(seconds)
                cpu[op].append(time.process_time() - before)
        for variant in bench.raw.variants():
            for op, plain in (("put", bench.raw_put), ("get", bench.raw_get)):
                seconds = plain(variant)
                if run:
                    raw[op].setdefault(variant, []).append(seconds)
    rows = []
    for op in ("get", "put"):
        best = min(raw[op], key=lambda variant: median(raw[op][variant]))
        seconds, plain_s = median(ours[op]), median(raw[op][best])
        rows.append({
            "remote": bench.kind, "op": op, "chunk_nbytes": nbytes // bench.chunks, "gb_s": nbytes / seconds / 1e9,
            "raw_gb_s": nbytes / plain_s / 1e9, "ratio_raw": plain_s / seconds, "raw_variant": best,
            "cpu_s_per_gb": median(cpu[op]) / (nbytes / 1e9), "runs": runs,
        })  # fmt: skip
    return rows


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
