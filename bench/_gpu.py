"""Shared by the GPU benches: the device, the timing and the ceilings. It knows no case of any bench.

--device cuda   torch's events around work on the current stream; kernels by Triton; pinned host memory
--device cpu    a dry run: the same calls over host memory by the numba twins, at tiny sizes. It shows that a script runs
                from end to end. It is no measurement: its JSON says `"dry_run": true`, and every line says DRY RUN
"""

from __future__ import annotations

import argparse
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

try:
    import _common
    import torch

    from kvkern.kernels.paged_tensors import PagedTensors
    from kvkern.transfer.gpu.device import Device
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the GPU benches need a package that is not installed here: {error}. Install it as docs/gpu.md says."
    ) from error

Row = dict[str, object]
Work = Callable[[], object]
WARM_UP_TURNS = 2
HEAD_START_CYCLES = 1_000_000  # more than half a millisecond, in which the host enqueues the work to be timed
RESULTS = Path(__file__).resolve().parent / "results"


class Rig(ABC):
    """A device to measure on."""

    name: str
    dry: bool

    @abstractmethod
    def time(self, work: Work) -> float:
        """Return the seconds from the start of `work` on the device to its end."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all enqueued work."""

    @abstractmethod
    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return [nbytes] uint8 of host memory that kernels and copies can reach."""

    @abstractmethod
    def device(self) -> Device:
        """Return the device for a GpuCopier."""

    @abstractmethod
    def copy(
        self, op: str, paged: PagedTensors, ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, ctas: int, stages: int,
    ) -> None:  # fmt: skip
        """Enqueue a gather, a scatter or a checksum on the current stream: see paged_copy_triton."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """Return [nbytes] uint8 of random bytes on the device."""
        words = torch.randint(-(1 << 62), 1 << 62, (-(-nbytes // 8),), dtype=torch.int64, device=self.name)
        return words.view(torch.uint8)[:nbytes]

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device."""
        return host.to(self.name)


class CudaRig(Rig):
    """A GPU."""

    name, dry = "cuda", False

    def time(self, work: Work) -> float:
        """See Rig. The device waits first. Otherwise its clock would run while it is idle and Python launches a kernel."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def device(self) -> Device:
        from kvkern.transfer.gpu.cuda_device import CudaDevice

        return CudaDevice(torch.device("cuda"))

    def copy(
        self, op: str, paged: PagedTensors, ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, ctas: int, stages: int,
    ) -> None:  # fmt: skip
        from kvkern.kernels import paged_copy_triton as kernels

        if op == "checksum":
            kernels.checksum_chunks(paged, ids, sums, ctas, stages)
        else:
            run = kernels.gather_chunks if op == "gather" else kernels.scatter_chunks
            run(paged, ids, rows, row_ids, sums, ctas, stages)


class DryRig(Rig):
    """Host memory and the numba twins, in place of a GPU."""

    name, dry = "cpu", True

    def time(self, work: Work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        pass

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def device(self) -> Device:
        from kvkern.transfer.gpu.dry_run_device import DryRunDevice

        return DryRunDevice()

    def copy(
        self, op: str, paged: PagedTensors, ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, ctas: int, stages: int,
    ) -> None:  # fmt: skip
        from kvkern.kernels import paged_copy as kernels

        if op == "checksum":
            kernels.checksum_chunks(paged, ids.numpy(), sums.numpy())
        else:
            run = kernels.gather_chunks if op == "gather" else kernels.scatter_chunks
            run(paged, ids.numpy(), rows.numpy(), row_ids.numpy(), sums.numpy())


def missing_requirement() -> str | None:
    """Return one line that says why a GPU bench cannot run here, and what to do; None if it can run."""
    if torch.version.hip is not None:
        return (
            f"this torch ({torch.__version__}) is built for ROCm, but the GPU benches need an NVIDIA GPU. Use a torch built "
            f"for CUDA, or try the script itself with --device cpu."
        )
    if torch.version.cuda is None:
        return (
            f"the GPU benches need a torch built for CUDA, but this torch is {torch.__version__}. Install one in a separate "
            f"environment (docs/gpu.md), or try the script itself with --device cpu."
        )
    if not torch.cuda.is_available():
        return (
            f"no CUDA device: torch {torch.__version__} finds no NVIDIA GPU or driver here. See what nvidia-smi says."
        )
    return None


def open_rig(device: str) -> Rig:
    """Return the device of `--device`. If there is none, end the program with one line."""
    if device == "cpu":
        return DryRig()
    if (why := missing_requirement()) is not None:
        raise SystemExit(why)
    return CudaRig()


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every GPU bench has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run, no measurement")
    parser.add_argument("--runs", type=int, default=9, help="turns that count (default 9)")
    parser.add_argument("--quick", action="store_true", help="fewer cases and turns, to see that the bench runs")
    return parser


def in_turns(rig: Rig, works: Mapping[str, Work], runs: int) -> dict[str, float]:
    """Return the median seconds of each work. All take turns; the first turns compile and warm up, and do not count."""
    times_s: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(WARM_UP_TURNS + runs):
        for name, work in works.items():
            seconds = rig.time(work)
            if turn >= WARM_UP_TURNS:
                times_s[name].append(seconds)
    return {name: median(column) for name, column in times_s.items()}


def gb_s(nbytes: int, seconds: float) -> float:
    """Return 10^9 bytes of payload per second. Each byte counts once."""
    return nbytes / seconds / 1e9


def percent(rig: Rig, rate: float, ceiling: float) -> float | None:
    """Return the percentage of a ceiling that the same run measured. None in a dry run: it has neither a link nor HBM."""
    return None if rig.dry else 100 * rate / ceiling


def quantile(values: Sequence[float], q: float) -> float:
    """Return the least value that at least a share `q` of all values does not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def ceilings(rig: Rig, nbytes: int, runs: int) -> dict[str, float]:
    """Measure GB/s of large plain copies: "d2h" and "h2d" between pinned and device memory, "hbm" within device memory."""
    host, one, two = rig.pinned(nbytes), rig.memory(nbytes), rig.memory(nbytes)
    seconds = in_turns(
        rig,
        {
            "d2h": lambda: host.copy_(one, non_blocking=True),
            "h2d": lambda: one.copy_(host, non_blocking=True),
            "hbm": lambda: two.copy_(one),
        },
        runs,
    )
    return {name: gb_s(nbytes, found) for name, found in seconds.items()}


def print_row(rig: Rig, row: Mapping[str, object]) -> None:
    """Print one aligned line. In a dry run it says DRY RUN."""
    _common.print_row({"DRY": "DRY RUN", **row} if rig.dry else row)


def write_json(rig: Rig, path: Path | None, rows: Sequence[Row], **extra: object) -> None:
    """Write `{"meta", "rows", **extra}` as every bench does. `meta` also has the device and whether this was a dry run."""
    if path is None:
        return
    if rig.dry and path.resolve().parent == RESULTS:
        raise SystemExit(
            f"{path} is in the folder of measurements, and a dry run is no measurement; write a dry run elsewhere (--json)"
        )
    where: dict[str, Any] = {**_common.meta(), "dry_run": rig.dry, "device": device_facts(rig)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": where, "rows": list(rows), **extra}, indent=2) + "\n")


def device_facts(rig: Rig) -> dict[str, object] | None:
    """Return facts about the GPU and its link; None in a dry run."""
    if rig.dry:
        return None
    from kvkern.transfer.gpu.cuda_device import CudaDevice

    found, info = torch.cuda.get_device_properties(0), CudaDevice(torch.device("cuda")).info
    facts: dict[str, object] = {
        "name": found.name, "sms": found.multi_processor_count, "memory_nbytes": found.total_memory,
        "compute_capability": f"{found.major}.{found.minor}", "cuda": torch.version.cuda,
    }  # fmt: skip
    if info is not None:
        facts |= {
            "driver": info.driver, "pcie_generation": info.generation_here, "pcie_width": info.width, "c2c": info.c2c,
            "numa_node": info.numa_node,
        }  # fmt: skip
    return facts
