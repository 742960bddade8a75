"""A timeline by Nsight Systems: which streams, copies and kernels overlap, and the load of the link and of HBM.

    python bench/profile/nsys.py [--method zero_copy ...]     -> kvkern.nsys-rep, and tables of ranges, kernels and copies

Named ranges of kvkern's threads are on (KVKERN_NVTX=1). GPU metrics need permission for performance counters: be root, or set
the driver's option NVreg_RestrictProfilingToAdminUsers=0. --no-metrics runs without them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess

import workload

TABLES = ("nvtx_pushpop_sum", "cuda_gpu_kern_sum", "cuda_gpu_mem_time_sum", "cuda_gpu_mem_size_sum")


def profiler_command(program: str, args: argparse.Namespace) -> list[str]:
    """Return the command of the profiler with the workload."""
    metrics = [] if args.no_metrics else ["--gpu-metrics-devices=0", "--gpu-metrics-frequency=20000"]
    return [
        program, "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", *metrics, "--force-overwrite=true",
        f"--output={args.output}", *workload.workload_command(args),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_options(parser)
    parser.add_argument("--output", default="kvkern", help="name of the report (default kvkern)")
    parser.add_argument("--no-metrics", action="store_true", help="do not sample the GPU's counters")
    args = parser.parse_args()
    if workload.dry_run(args):
        return
    program = shutil.which("nsys")
    if program is None:
        raise SystemExit("nsys is not installed: install Nsight Systems, alone or with the CUDA toolkit")
    subprocess.run(profiler_command(program, args), check=True, env={**os.environ, "KVKERN_NVTX": "1"})
    for table in TABLES:
        subprocess.run([program, "stats", "--report", table, f"{args.output}.nsys-rep"], check=False)


if __name__ == "__main__":
    main()
