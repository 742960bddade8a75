"""The script that runs under compute-sanitizer: a store and a load by every method, and every ring depth, at small sizes.

python -m tests.transfer.gpu.sanitizer_script FOLDER [cpu]
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import torch

from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.transfer.gpu.planner import Method
from tests.kernels.copy_checks import draw_ids
from tests.kernels.paged_cases import CASES
from tests.support import twin
from tests.transfer.gpu.late_engine import Engine, load_late, store_late


def transfers(folder: Path, kind: str) -> None:
    for method in Method:
        place = folder / method.value
        place.mkdir()
        with closing(Engine(place, kind, method)) as engine:
            want, reserved = store_late(engine, "a", seed=1)
            _, _, got, ok = load_late(engine, "a", reserved)
            assert ok.all()
            assert engine.equal(got, want)
        print(f"{method}: equal", flush=True)


def kernels() -> None:
    """Run the kernels at every depth over long runs, short runs, and odd runs without a ring. All must give the same sums."""
    from kvkern.kernels import paged_copy_triton

    for name in ("FA bf16", "MLA 656", "pages, odd rows"):
        host = CASES[name]()
        paged = PagedTensors.bind(host.layout, twin(host.tensors, "cuda"))
        ids = torch.from_numpy(draw_ids(2, 3)).cuda()
        rows = torch.zeros((2, host.layout.part_nbytes(3)), dtype=torch.uint8, device="cuda")
        row_ids = torch.arange(2, device="cuda")
        for stages in paged_copy_triton.STAGES:
            sums = torch.zeros((3, 2, len(host.layout.planes)), dtype=torch.uint64, device="cuda")
            paged_copy_triton.gather_chunks(paged, ids, rows, row_ids, sums[0], 4, stages)
            paged_copy_triton.checksum_chunks(paged, ids, sums[1], 4, stages)
            paged_copy_triton.scatter_chunks(paged, ids, rows, row_ids, sums[2], 4, stages)
            assert bool((sums.view(torch.int64) == sums[0].view(torch.int64)).all())


if __name__ == "__main__":
    transfers(Path(sys.argv[1]), "cpu" if sys.argv[2:] == ["cpu"] else "cuda")
    if sys.argv[2:] != ["cpu"]:
        kernels()
