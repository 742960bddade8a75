"""One kernel under Nsight Compute: is it bound by the link, HBM, the SMs' instructions, or too few bytes in flight?

    python bench/profile/ncu.py --link-gb-s 53 [--method zero_copy ...]     one line and one verdict per launch

`--link-gb-s` is the speed of a plain pinned copy on this machine: the `ceiling` rows of bench/gpu_copy.py. The script asks for
counters by name. It leaves out the ones that this GPU does not have (`ncu --query-metrics`), and lists them. The names are
NVIDIA's metrics of Nsight Compute; not every chip has every one. Needs permission for performance counters, see nsys.py.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import workload

TIME = "gpu__time_duration.sum"
LINK_READ, LINK_WRITE = "pcie__read_bytes.sum", "pcie__write_bytes.sum"
HOST_READ, HOST_WRITE = "lts__t_sectors_aperture_sysmem_op_read.sum", "lts__t_sectors_aperture_sysmem_op_write.sum"
HBM_READ, HBM_WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
HBM_PERCENT = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_active"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
LOADS, STORES = "smsp__sass_inst_executed_op_global_ld.sum", "smsp__sass_inst_executed_op_global_st.sum"
ASYNC = "smsp__sass_inst_executed_op_ldgsts.sum"
WAIT_MEMORY = "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
WAIT_BARRIER = "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
METRICS: dict[str, str] = {
    TIME: "duration of the launch",
    LINK_READ: "bytes the GPU read over PCIe: loads by a kernel, and the overhead of requests",
    LINK_WRITE: "bytes the GPU wrote over PCIe: stores by a kernel",
    HOST_READ: "sectors of 32 bytes that L2 read from host memory",
    HOST_WRITE: "sectors of 32 bytes that L2 wrote to host memory",
    HBM_READ: "bytes read from HBM",
    HBM_WRITE: "bytes written to HBM",
    HBM_PERCENT: "percent of HBM's peak",
    ISSUE: "percent of the instruction slots of SMs that had work; a capped grid leaves the other SMs idle",
    WARPS: "percent of the warps that an SM can hold, of SMs that had work",
    LOADS: "global loads, one per warp",
    STORES: "global stores, one per warp",
    ASYNC: "cp.async, one per warp: the ring",
    WAIT_MEMORY: "warps that waited for memory, per issued instruction",
    WAIT_BARRIER: "warps that waited at a barrier (the ring has one per tile), per issued instruction",
}
BOUND = 0.8  # share of a ceiling from which a launch counts as bound by it
SECTOR_NBYTES = 32
SCALES = {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
          "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # fmt: skip


def available_metrics(listing: str) -> list[str]:
    """Return the METRICS that the output of `ncu --query-metrics` lists. It lists base names: the part before the first dot."""
    names = {line.split()[0] for line in listing.splitlines() if line.strip()}
    return [metric for metric in METRICS if metric.split(".")[0] in names]


def profiler_command(program: str, metrics: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Return the command of the profiler with the workload. It skips two launches, because they compile."""
    return [
        program, "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(metrics),
        "--kernel-name", "regex:copy_chunks", "--launch-skip", "2", "--launch-count", str(args.launches),
        *workload.workload_command(args),
    ]  # fmt: skip


def parse_launches(text: str) -> list[dict[str, float]]:
    """Read ncu's raw page as CSV: a row of names, a row of units, then one row per launch. Returns seconds and bytes."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, units, *rows = csv.reader(lines[start:])
    found = []
    for row in rows:
        cells = zip(names, units, row, strict=True)
        found.append({name: float(cell.replace(",", "")) * SCALES.get(unit, 1.0) for name, unit, cell in cells
                      if name in METRICS and re.fullmatch(r"[\d.,eE+-]+", cell)})  # fmt: skip
    return found


def verdict(values: Mapping[str, float], link_gb_s: float | None) -> str:
    """Say what limits a launch. Shares are of ceilings: the link's was measured, Nsight states the others."""
    seconds = values.get(TIME, 0.0)
    shares: dict[str, float] = {}
    reads = values.get(LINK_READ, SECTOR_NBYTES * values.get(HOST_READ, 0.0))
    writes = values.get(LINK_WRITE, SECTOR_NBYTES * values.get(HOST_WRITE, 0.0))
    if link_gb_s and seconds:
        shares["the link"] = max(reads, writes) / seconds / 1e9 / link_gb_s
    if HBM_PERCENT in values:
        shares["HBM"] = values[HBM_PERCENT] / 100
    if ISSUE in values:
        shares["the SMs' instructions"] = values[ISSUE] / 100
    if not shares:
        return "nothing to judge by: none of the counters is there. Run ncu --query-metrics to see what this GPU has"
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    name, most = max(shares.items(), key=lambda item: item[1])
    if most >= BOUND:
        return f"bound by {name} ({listed})"
    return f"bound by latency: too few bytes in flight. Try more thread blocks or a ring ({listed})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_options(parser)
    parser.add_argument("--launches", type=int, default=4, help="number of launches to profile (default 4)")
    parser.add_argument(
        "--link-gb-s", type=float, help="GB/s of a plain pinned copy on this machine, from bench/gpu_copy.py"
    )
    args = parser.parse_args()
    if workload.dry_run(args):
        return
    program = shutil.which("ncu")
    if program is None:
        raise SystemExit("ncu is not installed: install Nsight Compute, alone or with the CUDA toolkit")
    listing = subprocess.run([program, "--query-metrics"], capture_output=True, text=True, check=True).stdout
    metrics = available_metrics(listing)
    for absent in sorted(set(METRICS) - set(metrics)):
        print(f"not on this GPU: {absent} ({METRICS[absent]})")
    done = subprocess.run(profiler_command(program, metrics, args), capture_output=True, text=True, check=False)
    found = parse_launches(done.stdout)
    if done.returncode or not found:
        raise SystemExit(
            f"ncu reported no launches (exit status {done.returncode}). Its last output: {(done.stdout + done.stderr)[-2000:]}"
        )
    for values in found:
        print("  ".join(f"{name} {value:.6g}" for name, value in values.items()))
        print(verdict(values, args.link_gb_s))


if __name__ == "__main__":
    main()
