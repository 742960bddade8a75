"""What the GPU benches share: where they run, how they time, what the ceilings are. Knows no case of any bench.

--device cuda   torch's events around work on the current stream; kernels by Triton; pinned host memory
--device cpu    a dry run: the same calls over host memory by the numba twins, at tiny sizes. It proves that a script runs
                from end to end and is no measurement: its JSON says `"dry_run": true`, and so does every line
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
    raise SystemExit(f"the GPU benches need a package that is not installed here: {error}; see docs/gpu.md") from error

Row = dict[str, object]
Work = Callable[[], object]
WARM_UP_TURNS = 2
HEAD_START_CYCLES = 1_000_000  # more than half a millisecond, in which the host enqueues what is to be timed
RESULTS = Path(__file__).resolve().parent / "results"


class Rig(ABC):
    """A device to measure on."""

    name: str
    dry: bool

    @abstractmethod
    def time(self, work: Work) -> float:
        """Seconds from the device's start of `work` to its end."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything enqueued."""

    @abstractmethod
    def pinned(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 host memory that kernels and copies reach."""

    @abstractmethod
    def device(self) -> Device:
        """For a GpuTransfer."""

    @abstractmethod
    def copy(
        self, op: str, paged: PagedTensors, ids: torch.Tensor, rows: torch.Tensor, row_ids: torch.Tensor,
        sums: torch.Tensor, ctas: int, stages: int,
    ) -> None:  # fmt: skip
        """Enqueue a gather, a scatter or a checksum of the current stream: see paged_copy_triton."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 on the device, every byte written."""
        words = torch.randint(-(1 << 62), 1 << 62, (-(-nbytes // 8),), dtype=torch.int64, device=self.name)
        return words.view(torch.uint8)[:nbytes]

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        return host.to(self.name)


class CudaRig(Rig):
    """A GPU."""

    name, dry = "cuda", False

    def time(self, work: Work) -> float:
        """The device waits first: else it would be idle, and the clock run, while Python launches the next kernel."""
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
    """Host memory and the numba twins in a GPU's place."""

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


def missing() -> str | None:
    """What keeps a GPU bench from running here, in one line; None: nothing."""
    if torch.version.hip is not None:
        return "the GPU benches need an NVIDIA GPU; this torch is built for ROCm"
    if torch.version.cuda is None:
        return (
            f"no GPU bench without a torch built for CUDA; this one is {torch.__version__}: install one in an environment "
            f"of its own (docs/gpu.md), or try the script itself with --device cpu"
        )
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds no NVIDIA GPU or driver here; see what nvidia-smi says"
    return None


def open_rig(device: str) -> Rig:
    """The device of `--device`. Ends the program with one line where there is none."""
    if device == "cpu":
        return DryRig()
    if (why := missing()) is not None:
        raise SystemExit(why)
    return CudaRig()


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every GPU bench has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run, no measurement")
    parser.add_argument("--runs", type=int, default=9, help="turns that count (default 9)")
    parser.add_argument("--quick", action="store_true", help="fewer cases and turns: to see that it runs")
    return parser


def in_turns(rig: Rig, works: Mapping[str, Work], runs: int) -> dict[str, float]:
    """Median seconds of each; all take turns, after turns that compile, warm up and do not count."""
    times_s: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(WARM_UP_TURNS + runs):
        for name, work in works.items():
            seconds = rig.time(work)
            if turn >= WARM_UP_TURNS:
                times_s[name].append(seconds)
    return {name: median(column) for name, column in times_s.items()}


def gb_s(nbytes: int, seconds: float) -> float:
    """10^9 bytes of payload a second, each counted once."""
    return nbytes / seconds / 1e9


def percent(rate: float, ceiling: float | None) -> float | None:
    """Of a ceiling measured in the same run; None where there is none."""
    return 100 * rate / ceiling if ceiling else None


def quantile(values: Sequence[float], q: float) -> float:
    """The least observed value that a share `q` of all does not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def ceilings(rig: Rig, nbytes: int, runs: int) -> dict[str, float]:
    """GB/s of plain large copies: "d2h" and "h2d" between pinned and device memory, "hbm" within device memory."""
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
    """One aligned line; a dry run's says so."""
    _common.print_row({"DRY": "DRY RUN", **row} if rig.dry else row)


def write_json(rig: Rig, path: Path | None, rows: Sequence[Row], **extra: object) -> None:
    """`{"meta", "rows", **extra}` as every bench's; meta also names the device and whether this was a dry run."""
    if path is None:
        return
    if rig.dry and path.resolve().parent == RESULTS:
        raise SystemExit(f"{path} is where measurements are kept; write a dry run elsewhere")
    where: dict[str, Any] = {**_common.meta(), "dry_run": rig.dry, "device": device_facts(rig)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": where, "rows": list(rows), **extra}, indent=2) + "\n")


def device_facts(rig: Rig) -> dict[str, object] | None:
    """Of the GPU and its link; None in a dry run."""
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
