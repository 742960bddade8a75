"""Measures the cache manager: what a full hit costs before a byte moves, and whether overload drops stores.

    full_hit: keys of n tokens, then lookup, then acquire. Every chunk is cached. Release is measured apart: no request waits
              for it
    overload: distinct sequences, stored as fast as possible into an arena that they overflow within a second

Targets: 131,072 tokens in chunks of 16 within 5 ms, four times the tokens within five times that; no store dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from _common import option_parser, print_row, write_json

import kvkern
from kvkern.api import PagedCache
from kvkern.arena.slots import SlotGeometry
from kvkern.assemble import build_cache, open_arena
from kvkern.cache.manager import Cache
from kvkern.config import Config
from kvkern.kernels.chunk_keys import chunk_keys
from kvkern.keys import split_keys
from kvkern.tiers.base import ChunkShape

CHUNK_TOKENS = 16
PART_NBYTES = 4096  # payload of full_hit's slots; never read
ROOT = bytes(range(32))
SEQUENCE_CHUNKS = 16
WRITERS = 2
ROUND = 7  # runs of one size before the next size takes its turn

Row = dict[str, object]


@dataclass
class FullHit:
    """One sequence, completely cached in an arena of its own. Times are seconds per run."""

    cache: Cache
    tokens: npt.NDArray[np.uint32]
    times_s: list[tuple[float, float, float, float]] = field(default_factory=list)  # keys, lookup, acquire, release

    @classmethod
    def fill(cls, num_tokens: int) -> FullHit:
        chunks = num_tokens // CHUNK_TOKENS
        geometry = SlotGeometry(PART_NBYTES, max_planes=2)
        config = Config(4096 + chunks * geometry.slot_nbytes)
        arena = open_arena(config, geometry, f"bench-{num_tokens}-{time.time_ns()}", expected=1)
        cache = build_cache(arena)
        tokens = np.random.default_rng(0).integers(0, 1 << 17, num_tokens, dtype=np.uint32)
        keys = split_keys(chunk_keys(ROOT, tokens, CHUNK_TOKENS))
        reservation = cache.reserve(keys, keys, ChunkShape(ROOT, group=0, chunk_tokens=CHUNK_TOKENS))
        arena.headers["written"][list(reservation.slots), 0] = reservation.generations
        if cache.commit(reservation) != chunks:
            raise RuntimeError(
                f"Fewer than {chunks} chunks were published. The bench is wrong: check the arena's size."
            )
        return cls(cache, tokens)

    def run(self) -> None:
        start = time.perf_counter()
        keys = split_keys(chunk_keys(ROOT, self.tokens, CHUNK_TOKENS))
        keyed = time.perf_counter()
        hit = self.cache.lookup(keys)
        looked = time.perf_counter()
        lease = self.cache.acquire(keys)
        acquired = time.perf_counter()
        self.cache.release(lease)
        end = time.perf_counter()
        if not len(keys) == hit == len(lease.slots):
            raise RuntimeError(
                f"Lookup hit {hit} and acquire {len(lease.slots)} of {len(keys)} chunks, not all. The bench is wrong."
            )
        self.times_s.append((keyed - start, looked - keyed, acquired - looked, end - acquired))

    def row(self, base: Row | None) -> Row:
        keys, lookup, acquire, release = (1e3 * median(column) for column in zip(*self.times_s, strict=True))
        total = 1e3 * median(sum(times[:3]) for times in self.times_s)
        row: Row = {
            "case": "full_hit", "tokens": len(self.tokens), "chunk_tokens": CHUNK_TOKENS, "ms": total,
            "keys_ms": keys, "lookup_ms": lookup, "acquire_ms": acquire, "release_ms": release,
            "min_ms": 1e3 * min(sum(times[:3]) for times in self.times_s), "runs": len(self.times_s),
        }  # fmt: skip
        if base is not None:
            row["time_ratio"] = total / float(base["ms"])  # type: ignore[arg-type]  # over the first row's, which has fewer tokens
        return row


def full_hit(sizes: Sequence[int], runs: int) -> list[Row]:
    """Measure a full hit of each size. Sizes take turns in warm rounds of seven, so a busy machine slows all of them alike."""
    benches = [FullHit.fill(size) for size in sizes]
    for _ in range(-(-runs // ROUND)):
        for bench in benches:
            bench.run()  # does not count: the other sizes have emptied the CPU's caches
            bench.times_s.pop()
            for _ in range(ROUND):
                bench.run()
    first = benches[0].row(None)
    return [first, *(bench.row(first) for bench in benches[1:])]


def distinct_tokens(name: int) -> npt.NDArray[np.uint32]:
    """Return a sequence of tokens that shares no chunk with the sequence of another name."""
    tokens = np.arange(SEQUENCE_CHUNKS * CHUNK_TOKENS, dtype=np.uint32)
    tokens[0] = name
    return tokens


def verify_newest(cache: PagedCache, names: Sequence[int]) -> None:
    """Raise unless the newest sequences load and verify. This proves that chunks counted as stored were written."""
    for name in names:
        with cache.match(distinct_tokens(name)) as hit:
            loaded = cache.load(hit, range(SEQUENCE_CHUNKS))
        if loaded != SEQUENCE_CHUNKS * CHUNK_TOKENS:
            raise RuntimeError(
                f"{loaded} tokens of the newest sequence verify, not {SEQUENCE_CHUNKS * CHUNK_TOKENS}. Chunks counted as "
                f"stored were not written: this is a bug in kvkern."
            )


def overload(capacity_nbytes: int, seconds: float, layers: int, heads: int = 8, head_dim: int = 128) -> Row:
    """Store distinct sequences from WRITERS threads through the public API; payload is copied and checksummed."""
    num_blocks = WRITERS * SEQUENCE_CHUNKS
    shape = (2, num_blocks, CHUNK_TOKENS, heads, head_dim)
    tensors = [torch.randint(-99, 99, shape, dtype=torch.int16).view(torch.bfloat16) for _ in range(layers)]
    layout = kvkern.layout.flash_attention(tensors)
    chunk_nbytes = layout.part_nbytes(1)
    stored = [0] * WRITERS
    offered = [0] * WRITERS
    with closing(kvkern.open_cache(layout, tensors, model="bench", weights="none", capacity=capacity_nbytes)) as cache:
        deadline = time.perf_counter() + seconds

        def write(writer: int) -> None:
            table = range(writer * SEQUENCE_CHUNKS, (writer + 1) * SEQUENCE_CHUNKS)
            while time.perf_counter() < deadline:
                offered[writer] += SEQUENCE_CHUNKS
                stored[writer] += cache.store(distinct_tokens(writer << 24 | offered[writer] // SEQUENCE_CHUNKS), table)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(WRITERS)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - start
        verify_newest(cache, [writer << 24 | offered[writer] // SEQUENCE_CHUNKS for writer in range(WRITERS)])
        stats = cache.stats()
    return {
        "case": "overload", "offered_chunks": sum(offered), "dropped_chunks": sum(offered) - sum(stored),
        "rate": sum(stored) * chunk_nbytes / elapsed,  # bytes/s, payload written
        "gib_s": sum(stored) * chunk_nbytes / elapsed / (1 << 30),
        "evicted_chunks": stats["evicted_chunks"], "slots": stats["slots"], "chunk_nbytes": chunk_nbytes,
        "capacity_nbytes": capacity_nbytes, "seconds": elapsed, "writers": WRITERS,
    }  # fmt: skip


def main() -> None:
    args = option_parser(__doc__, quick="small sizes, in a second: for smoke tests, not for numbers").parse_args()
    rows = full_hit((2048, 8192), runs=3) if args.quick else full_hit((131_072, 524_288), runs=21)
    for row in rows:
        print_row(row)
    rows.append(overload(8 << 20, 0.3, layers=2) if args.quick else overload(512 << 20, 10, layers=32))
    print_row(rows[-1])
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
