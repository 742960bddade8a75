"""Makes a trace that scan resistance is tested on: a hot set of chats, and documents that are read once and never again.

    chats       so many are live at any time; one that ends makes room for a new one. Each begins with one system prompt that
                all share, and grows by a question and a reply a turn; between its turns somebody thinks
    documents   come in bursts, as batch jobs do, a second or so apart; each is new from its first chunk on. Together they
                are 60 % of the distinct chunks

Nothing marks a document: no session, no stop reason. Seeded, and made without a look at GRIT: the number of turns and
the duration were chosen so that an endless cache hits about .70, and LRU .60 at 10 % of the distinct chunks.
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from statistics import fmean

from kvkern.replay.grid import MIN, POLICIES, Cell, run

SEEDS = range(1, 6)
CAPACITIES = ("1%", "3%", "10%", "30%")


@dataclass(frozen=True, slots=True)
class Scan:
    """Chunks are of 512 tokens, times in seconds."""

    seed: int = 1
    duration_s: float = 3600.0
    live_chats: int = 160
    system_chunks: int = 2
    turns: float = 10.0  # mean of a geometric distribution
    first_chunks: float = 2.0  # of a chat's first question: median of a log-normal one, sigma 1
    turn_chunks: float = 1.5  # a later question with the reply before it: likewise, sigma .7
    think_s: float = 60.0  # between turns: likewise, sigma 1.2
    document_chunks: float = 16.0  # likewise, sigma .8
    burst_documents: float = 20.0  # mean of a geometric distribution
    document_share: float = 0.6  # of the distinct chunks


Request = tuple[float, list[int], int]  # time, chunks, tokens of the reply


def requests(scan: Scan) -> list[Request]:
    """In order of time."""
    rng = random.Random(scan.seed)
    fresh = count()
    system = [next(fresh) for _ in range(scan.system_chunks)]
    made = [request for _ in range(scan.live_chats) for request in _chats(scan, rng, fresh, system)]
    last = next(fresh)
    end = last / (1 - scan.document_share)
    while last < end:
        now = rng.uniform(0, scan.duration_s)
        for _ in range(_geometric(rng, scan.burst_documents)):
            chunks = [next(fresh) for _ in range(_size(rng, scan.document_chunks, 0.8))]
            made.append((now, chunks, _reply_tokens(rng)))
            now += rng.expovariate(1.0)
            last = chunks[-1]
    return sorted(made)


def write(path: Path, scan: Scan) -> Path:
    """As a gzipped trace in the Mooncake format, for `kvkern replay`. Replaces the file; returns its path."""
    with gzip.open(path, "wt", compresslevel=1) as file:
        for now, chunks, tokens in requests(scan):
            line = {"timestamp": round(now * 1000), "output_length": tokens, "hash_ids": chunks}
            file.write(json.dumps(line) + "\n")
    return path


def _chats(scan: Scan, rng: random.Random, fresh: Iterator[int], system: list[int]) -> Iterator[Request]:
    """One after the other. The first is under way when the trace begins."""
    now = -rng.uniform(0, scan.turns * scan.think_s)
    while now < scan.duration_s:
        chunks = system + [next(fresh) for _ in range(_size(rng, scan.first_chunks, 1.0))]
        for _ in range(_geometric(rng, scan.turns)):
            if 0 <= now < scan.duration_s:
                yield now, chunks, _reply_tokens(rng)
            chunks = chunks + [next(fresh) for _ in range(_size(rng, scan.turn_chunks, 0.7))]
            now += rng.lognormvariate(0, 1.2) * scan.think_s


def _geometric(rng: random.Random, mean: float) -> int:
    number = 1
    while rng.random() > 1 / mean:
        number += 1
    return number


def _size(rng: random.Random, median: float, sigma: float) -> int:
    return min(max(round(median * rng.lognormvariate(0, sigma)), 1), 256)


def _reply_tokens(rng: random.Random) -> int:
    return min(round(300 * rng.lognormvariate(0, 0.8)), 4096)


def hit_ratios(quick: bool, workers: int = 2) -> list[dict[str, object]]:
    """A row a seed, capacity and policy, as `kvkern replay` has them, less what is timed."""
    scans = [replace(Scan(seed=seed), live_chats=12 if quick else 160) for seed in SEEDS[: 1 if quick else None]]
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder) / f"scan-{scan.seed}.jsonl.gz", scan) for scan in scans]
        cells = [
            Cell(path, policy, capacity, chunk_nbytes=1, hints=False)
            for path in paths for capacity in CAPACITIES for policy in (*POLICIES, MIN)
        ]  # fmt: skip
        results = run(cells, workers, lambda done: None)
    return [{k: v for k, v in result.row().items() if k not in ("us_per_ref", "num_backwards")} for result in results]


def means(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """A row a capacity: each policy's mean over the seeds, and how much of the way from LRU to MIN GRIT comes."""
    table = []
    for capacity, mine in groupby(sorted(rows, key=_capacity), _capacity):
        ratios = defaultdict(list)
        for row in mine:
            ratios[str(row["policy"])].append(float(str(row["hit_ratio"])))
        mean = {policy: fmean(values) for policy, values in ratios.items()}
        gap = (mean["grit"] - mean["lru"]) / (mean[MIN] - mean["lru"])
        table.append({"capacity": f"{capacity:.0%}", **mean, "grit_gap": gap})
    return table


def _capacity(row: dict[str, object]) -> float:
    return round(float(str(row["capacity_fraction"])), 2)
