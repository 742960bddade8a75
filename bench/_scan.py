"""Makes a trace to test scan resistance: a hot set of chats, and documents that are read once and never again.

    chats       a fixed number is live at any time; a new chat begins when one ends. All chats share one system prompt.
                A chat grows by a question and a reply each turn, with think time between turns
    documents   come in bursts, as from batch jobs, about a second apart. Each is new from its first chunk on. Together
                they are 60 % of the distinct chunks

Nothing marks a document: no session, no stop reason. The trace is seeded. Its parameters were chosen without running GRIT:
the number of turns and the duration give a hit ratio of about .70 for an endless cache, and .60 for LRU at 10 % of the
distinct chunks.
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

from kvkern.replay.grid import MIN, POLICIES, Cell, run_grid

SEEDS = range(1, 6)
CAPACITIES = ("1%", "3%", "10%", "30%")


@dataclass(frozen=True, slots=True)
class Scan:
    """Parameters of a trace. A chunk has 512 tokens; times are in seconds."""

    seed: int = 1
    duration_s: float = 3600.0
    live_chats: int = 160
    system_chunks: int = 2
    turns: float = 10.0  # mean of a geometric distribution
    first_chunks: float = 2.0  # size of a chat's first question: median of a log-normal distribution, sigma 1
    turn_chunks: float = 1.5  # size of a later question and the reply before it: median, log-normal, sigma .7
    think_s: float = 60.0  # time between turns: median, log-normal, sigma 1.2
    document_chunks: float = 16.0  # size of a document: median, log-normal, sigma .8
    burst_documents: float = 20.0  # mean of a geometric distribution
    document_share: float = 0.6  # of the distinct chunks


Request = tuple[float, list[int], int]  # time, chunks, tokens of the reply


def requests(scan: Scan) -> list[Request]:
    """Make the requests of a trace, in order of time."""
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
    """Write a gzipped trace in the Mooncake format, for `kvkern replay`. Replaces the file and returns its path."""
    with gzip.open(path, "wt", compresslevel=1) as file:
        for now, chunks, tokens in requests(scan):
            line = {"timestamp": round(now * 1000), "output_length": tokens, "hash_ids": chunks}
            file.write(json.dumps(line) + "\n")
    return path


def _chats(scan: Scan, rng: random.Random, fresh: Iterator[int], system: list[int]) -> Iterator[Request]:
    """Yield the requests of one chat after another. The first chat is under way when the trace begins."""
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
    """Return a row for each seed, capacity and policy, as `kvkern replay` writes them, without times."""
    scans = [replace(Scan(seed=seed), live_chats=12 if quick else 160) for seed in SEEDS[: 1 if quick else None]]
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder) / f"scan-{scan.seed}.jsonl.gz", scan) for scan in scans]
        cells = [
            Cell(path, policy, capacity, chunk_nbytes=1, hints=False)
            for path in paths for capacity in CAPACITIES for policy in (*POLICIES, MIN)
        ]  # fmt: skip
        results = run_grid(cells, workers, lambda done: None)
    return [{k: v for k, v in result.row().items() if k not in ("us_per_ref", "num_backwards")} for result in results]


def means(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return a row for each capacity: each policy's mean over the seeds, and GRIT's share of the way from LRU to MIN."""
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
