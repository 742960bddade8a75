"""The copy kernels alone: GB/s against thread blocks and run length, into HBM staging and into pinned host memory.

    gather     blocks -> rows, checksummed     scatter   rows -> blocks, checksummed     checksum   blocks read, nothing moved
    hbm        rows in device memory: what staging does          percent_hbm: of a plain device-to-device copy, same run
    host       rows in pinned host memory: zero-copy             percent_link: of a plain pinned copy, same direction and run
    stages     1: wide tiles; 3, 4: the ring of cp.async (docs/kernels.md)

A page is one run of `run_nbytes`, so blocks at random places never join. GB/s count the payload once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _gpu import Rig, Row, arguments, ceilings, gb_s, in_turns, open_rig, percent, print_row, write_json

from kvkern.kernels.layout import from_pages
from kvkern.kernels.paged_tensors import PagedTensors

RUNS = (256, 656, 2 << 10, 8 << 10, 18 << 10, 32 << 10, 64 << 10, 128 << 10, 512 << 10, 2 << 20)
CTAS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
CTA_RUNS = (2 << 10, 32 << 10)  # of the sweep over thread blocks
HBM_CTAS, HOST_CTAS = 32, 8  # of the sweep over run lengths: the planner's caps
STAGES = (1, 3, 4)
CHUNK_NBYTES = 2 << 20


@dataclass(frozen=True)
class Sizes:
    """How much is moved."""

    hbm_nbytes: int  # far beyond the L2 cache
    host_nbytes: int
    ceiling_nbytes: int
    runs: tuple[int, ...]
    ctas: tuple[int, ...]


FULL = Sizes(512 << 20, 128 << 20, 256 << 20, RUNS, CTAS)
QUICK = Sizes(128 << 20, 32 << 20, 128 << 20, (2 << 10, 32 << 10), (4, 32))
DRY = Sizes(4 << 20, 4 << 20, 1 << 20, (656, 32 << 10), (4,))


class Case:
    """Pages of one run length, and rows for all their chunks."""

    def __init__(self, rig: Rig, run_nbytes: int, where: str, nbytes: int) -> None:
        per_chunk = max(1, CHUNK_NBYTES // run_nbytes)
        chunks = max(1, nbytes // (per_chunk * run_nbytes))
        blocks = chunks * per_chunk + 1
        gap = 64 if run_nbytes % 64 == 0 else 48  # so that neighbours never join
        self._pages = rig.memory(blocks * (run_nbytes + gap)).view(blocks, -1)[:, :run_nbytes]
        self.paged = PagedTensors.bind(from_pages([self._pages], block_tokens=16), [self._pages])
        order = np.random.default_rng(0).permutation(blocks)[: chunks * per_chunk].astype(np.int32)
        self.ids = rig.upload(torch.from_numpy(order.reshape(chunks, per_chunk)))
        part = -(-self.paged.layout.part_nbytes(per_chunk) // 64) * 64
        self.rows = (rig.memory(chunks * part) if where == "hbm" else rig.pinned(chunks * part)).view(chunks, part)
        self.row_ids = rig.upload(torch.arange(chunks))
        self.sums = rig.upload(torch.zeros((chunks, 1), dtype=torch.uint64))
        self.nbytes = chunks * per_chunk * run_nbytes


def measure(
    rig: Rig,
    case: Case,
    where: str,
    run_nbytes: int,
    ctas: int,
    depths: Sequence[int],  # of STAGES
    ceiling: dict[str, float],
    runs: int,
) -> list[Row]:
    """Measure each operation at each depth, all in turns. Returns one row for each."""
    ops = ("gather", "scatter", "checksum") if where == "hbm" else ("gather", "scatter")
    cases = [(op, stages) for op in ops for stages in depths]
    args = (case.paged, case.ids, case.rows, case.row_ids, case.sums)
    works = {f"{op} {stages}": (lambda op=op, stages=stages: rig.copy(op, *args, ctas, stages)) for op, stages in cases}
    seconds = in_turns(rig, works, runs)
    rows: list[Row] = []
    for op, stages in cases:
        rate = gb_s(case.nbytes, seconds[f"{op} {stages}"])
        limit = ceiling["hbm"] if where == "hbm" else ceiling["d2h" if op == "gather" else "h2d"]
        rows.append({
            "op": op, "where": where, "run_nbytes": run_nbytes, "ctas": ctas, "stages": stages, "nbytes": case.nbytes,
            "gb_s": rate, "percent_hbm" if where == "hbm" else "percent_link": percent(rig, rate, limit),
        })  # fmt: skip
    return rows


def sweep(sizes: Sizes) -> list[tuple[str, int, int]]:
    """Return (where, run, thread blocks): every run at the planner's caps, then every grid at two runs. Each case once."""
    cases = []
    for where, cap in (("hbm", HBM_CTAS), ("host", HOST_CTAS)):
        cases += [(where, run, cap) for run in sizes.runs]
        cases += [(where, run, ctas) for run in CTA_RUNS if run in sizes.runs for ctas in sizes.ctas]
    return list(dict.fromkeys(cases))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=STAGES, help="only these depths")
    args = parser.parse_args()
    rig = open_rig(args.device)
    sizes, runs = (DRY, 1) if rig.dry else (QUICK, 3) if args.quick else (FULL, args.runs)
    ceiling = ceilings(rig, sizes.ceiling_nbytes, runs)
    rows: list[Row] = [{"op": "ceiling", "where": name, "gb_s": rate} for name, rate in ceiling.items()]
    for row in rows:
        print_row(rig, row)
    made: tuple[tuple[str, int], Case] | None = None
    for where, run_nbytes, ctas in sweep(sizes):
        if made is None or made[0] != (where, run_nbytes):
            made = None  # free the memory of the former case first
            made = (where, run_nbytes), Case(rig, run_nbytes, where, getattr(sizes, f"{where}_nbytes"))
        for row in measure(rig, made[1], where, run_nbytes, ctas, args.stages, ceiling, runs):
            rows.append(row)
            print_row(rig, row)
    write_json(rig, args.json, rows)


if __name__ == "__main__":
    main()
