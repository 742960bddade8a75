"""Measures an eviction policy at a full cache: time a chunk reference, time a request, and memory a chunk.

    fill:    sessions that grow by a few chunks a turn, until they fill the cache
    measure: further requests in runs; only access, insert and victims are timed; the median run counts
    bytes:   memory of the policy, over the chunks it knows; the 32-byte key itself is not counted

Targets for GRIT: 1 us a chunk and 30 us a request at 100,000 resident chunks; 64 bytes a chunk, resident chunk or ghost.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import _ablation
import _scan
from _common import option_parser, print_row, write_json
from blake3 import blake3

from kvkern.policy import POLICIES, make_policy
from kvkern.policy.base import Stop, Use
from kvkern.policy.grit import Grit

RUNS = 7

Request = tuple[list[bytes], Use]


def requests(resident: int, seed: int) -> Iterator[Request]:
    """Yield requests of sessions that share prompts. A session begins with 20 to 60 chunks.

    It comes back with 2 or 3 more chunks each time. A tenth of the requests begin a new session, which replaces the oldest.
    """
    rng = random.Random(seed)
    fresh = (blake3(b"%d" % number).digest() for number in range(1 << 62))
    prompts = [[next(fresh) for _ in range(4)] for _ in range(8)]
    sessions: list[list[bytes]] = []
    wanted = resident // 25  # sessions; their chunks are somewhat more than the cache holds
    number, now = 0, 0.0
    while True:
        number += 1
        now += rng.expovariate(20.0)
        if len(sessions) < wanted or rng.random() < 0.1:
            chain = rng.choice(prompts) + [next(fresh) for _ in range(rng.randint(16, 56))]
            sessions.append(chain)
            if len(sessions) > wanted:
                sessions.pop(0)
        else:
            at = rng.randrange(len(sessions))
            chain = sessions[at] = sessions[at] + [next(fresh) for _ in range(rng.randint(2, 3))]
            if len(chain) > 120:
                sessions[at] = rng.choice(prompts)[:]
        yield chain, Use(now, number, output_tokens=rng.randrange(1000), stop=Stop(rng.randrange(3)))


def measure(name: str, resident_chunks: int, requests_per_run: int) -> dict[str, object]:
    """Measure one policy and return its row."""
    source = requests(resident_chunks, seed=1)
    policy = make_policy(name, resident_chunks)
    resident: set[bytes] = set()

    def step() -> tuple[float, int]:
        chain, use = next(source)
        begin = time.perf_counter()
        policy.access(chain, use)
        timed = time.perf_counter() - begin
        missing = [key for key in chain if key not in resident]
        begin = time.perf_counter()
        policy.insert(missing, use)
        resident.update(missing)
        over = len(resident) - resident_chunks
        gone = policy.victims(over) if over > 0 else []
        timed += time.perf_counter() - begin
        resident.difference_update(gone)
        return timed, len(chain)

    while len(resident) < resident_chunks:
        step()
    for _ in range(requests_per_run):
        step()
    per_chunk, per_request = [], []
    for _ in range(RUNS):
        steps = [step() for _ in range(requests_per_run)]
        seconds, chunks = sum(s for s, _ in steps), sum(n for _, n in steps)
        per_chunk.append(seconds / chunks * 1e6)
        per_request.append(seconds / len(steps) * 1e6)
    return {
        "policy": name, "resident_chunks": len(resident),
        "us_per_chunk": median(per_chunk), "us_per_request": median(per_request),
        "bytes_per_chunk": memory(name, min(resident_chunks, 20_000)),
    }  # fmt: skip


def memory(name: str, resident_chunks: int) -> float:
    """Return the bytes a chunk, without its key, of a new policy after `resident_chunks // 5` requests."""
    source = requests(resident_chunks, seed=2)
    seen = [next(source) for _ in range(resident_chunks // 5)]
    gc.collect()
    tracemalloc.start()
    policy = make_policy(name, resident_chunks)
    before = tracemalloc.get_traced_memory()[0]
    resident: set[bytes] = set()
    for chain, use in seen:
        policy.access(chain, use)
        missing = [key for key in chain if key not in resident]
        policy.insert(missing, use)
        resident.update(missing)
        over = len(resident) - resident_chunks
        if over > 0:
            resident.difference_update(policy.victims(over))
    num_resident = len(resident)
    del resident
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    if isinstance(policy, Grit):
        return policy.nbytes / policy.num_chunks - 32
    return traced / num_resident


def main() -> None:
    parser = option_parser(__doc__, quick="small sizes, to check that it runs")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument(
        "--scan", action="store_true", help="print hit ratios with documents that are read once instead (_scan.py)"
    )
    parser.add_argument(
        "--ablation",
        type=Path,
        nargs="+",
        metavar="TRACE",
        help="print hit ratios of GRIT without one part at a time instead",
    )
    args = parser.parse_args()
    if args.scan:
        rows = _scan.hit_ratios(args.quick)
        for row in _scan.means(rows):
            print_row(row)
        write_json(args.json, rows)
        return
    if args.ablation:
        rows = list(_ablation.rows_of(args.ablation))
        print(*_ablation.table(rows), sep="\n")
        write_json(args.json, rows)
        return
    resident, count = (2_000, 50) if args.quick else (100_000, 1_000)
    rows = []
    for name in args.policies.split(","):
        rows.append(measure(name, resident, count))
        print_row(rows[-1])
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
