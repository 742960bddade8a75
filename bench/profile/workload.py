"""The workload of the profilers: repeated stores and loads by one method. Measures nothing itself.

python bench/profile/workload.py --method staged --run-nbytes 32768 --chunks 16 --repeat 5
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _gpu import open_rig
from gpu_paths import Copies

from kvkern.transfer.gpu.link_table import Direction, HostLink, seed_calibration
from kvkern.transfer.gpu.planner import Method
from kvkern.transfer.nvtx import span


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the workload's options to `parser`."""
    parser.add_argument("--method", choices=[method.value for method in Method], default="staged")
    parser.add_argument("--run-nbytes", type=int, default=32 << 10, help="contiguous bytes in a block (default 32 KiB)")
    parser.add_argument("--chunks", type=int, default=16, help="chunks of 2 MiB per transfer (default 16)")
    parser.add_argument("--repeat", type=int, default=5, help="number of stores, and then of loads (default 5)")
    parser.add_argument("--ctas", type=int, default=0, help="thread blocks of the kernel (default: the planner's cap)")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="where to run (default cuda); cpu runs the workload on host memory and profiles nothing",
    )


def workload_command(args: argparse.Namespace) -> list[str]:
    """Return the command that runs this script with these arguments."""
    names = ("method", "run_nbytes", "chunks", "repeat", "ctas", "device")
    given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return [sys.executable, str(Path(__file__).resolve()), *given]


def dry_run(args: argparse.Namespace) -> bool:
    """With --device cpu run the workload without a profiler, say so, and return True. Profilers here see GPUs alone."""
    if args.device != "cpu":
        return False
    done = subprocess.run(workload_command(args), check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    print("DRY RUN: the workload ran on host memory; a profile needs --device cuda and a GPU")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    rig = open_rig(args.device)
    with closing(Copies(rig, rig.device(), args.run_nbytes, args.chunks, seed_calibration(HostLink()))) as copies:
        copies.ctas = args.ctas
        for direction, name in ((Direction.D2H, "store"), (Direction.H2D, "load")):
            copies.run(direction, args.chunks, Method(args.method))  # compiles
            for _ in range(args.repeat):
                with span(f"workload {name}"):
                    copies.run(direction, args.chunks, Method(args.method))


if __name__ == "__main__":
    main()
