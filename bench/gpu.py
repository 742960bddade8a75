"""Runs every GPU bench, one after the other, and plots the results. `make gpu` runs this after the tests.

python bench/gpu.py                                results into bench/results/gpu_*.json, plots into docs/gpu_*.svg
python bench/gpu.py --device cpu --results DIR --plots DIR     a dry run: shows that everything runs, measures nothing
python bench/gpu.py --check                        if the benches cannot run here, says why in one line
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from _gpu import RESULTS, missing_requirement

HERE = Path(__file__).resolve().parent
BENCHES = ("gpu_copy", "gpu_paths", "gpu_interference", "gpu_keys")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run, no measurement")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON files (default bench/results)"
    )
    parser.add_argument("--plots", type=Path, default=HERE.parent / "docs", help="folder of the plots (default docs)")
    parser.add_argument("--quick", action="store_true", help="fewer cases and turns, to see that the benches run")
    parser.add_argument("--check", action="store_true", help="only check whether the benches can run here")
    args = parser.parse_args()
    if args.device == "cuda" and (why := missing_requirement()) is not None:
        raise SystemExit(why)
    if args.check:
        return
    if args.device == "cpu" and (args.results.resolve() == RESULTS or args.plots.resolve() == HERE.parent / "docs"):
        raise SystemExit("a dry run is no measurement: give it other folders with --results and --plots")
    failed = [name for name in BENCHES if not run(name, args)]
    from _gpu_plots import draw_all

    for path in draw_all(args.results, args.plots):
        print(f"plot: {path}")
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(BENCHES)} benches failed: {', '.join(failed)}. Their errors are above."
        )


def run(name: str, args: argparse.Namespace) -> bool:
    """Run one bench in its own process, so that its memory and its faults end with it. Returns False if it failed."""
    print(f"bench: bench/{name}.py", flush=True)
    options = ["--device", args.device, "--json", str(args.results / f"{name}.json"), *(["--quick"] * args.quick)]
    return subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], check=False).returncode == 0


if __name__ == "__main__":
    main()
