"""kvkern beside its rivals: one run, one machine, the same model, prompts and bytes.

engine level, time to first token of a prompt computed before (cases ttft_hit, ttft_native_hit, ttft_recompute):
    kvkern          this checkout's KvkernConnector
    vllm_example    vLLM's own ExampleConnector: a file per layer and prompt, in /dev/shm
    lmcache_mp      LMCache's server beside the engine, LMCacheMPConnector, shared memory between them
  Each system has an engine of its own, and one engine runs at a time. (vLLM forgets, hit, native hit) take turns. Replies
  are compared, see rows.py.
library level, GB/s of paged KV of Llama-3.1-8B, random blocks in host memory, no engine (cases store, retrieve):
    kvkern          kvkern.open_cache: keys, copy and checksums, on both kinds of pages
    lmcache_inproc  LMCache's in-process engine with its own CPU copy, on pages of layers (FlashAttention)
    aibrix          AIBrix's L1, on pages that are whole blocks, because its gather kernel needs a GPU
  A memcpy of the same process and threads is measured in the same loop. Every round trip is compared byte for byte.

ratio_kvkern > 1 means kvkern is better: kvkern's rate over theirs, or their time over kvkern's. In rows of ttft_native_hit
and ttft_recompute it compares vLLM with itself and should be near 1. Its distance from 1 shows how much the machine
disturbed the run. ratio_native_hit, a hit over the native hit beside it in the same engine, is hardly disturbed.
ratio_kvkern_paired is their ratio_native_hit over kvkern's. other_cpus is how many CPUs other processes used meanwhile:
above a fifth, repeat the run.

The first run installs the rivals, 130 MB in all, into environments that share torch and vLLM with the running one
(_peers/venvs.py). That needs the package index; later runs do not. A system that fails, or whose hits were not loads, gets a
warning instead of a row. The other systems still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from _common import option_parser, print_row, write_json
from _peers import engines, libraries
from _peers.busy import OtherProcesses
from _peers.children import PeerFailed
from _peers.rows import Row, Verdict, with_ratios

from kvkern.demo import engine_process, model, preconditions, run

LEVELS = ("engine", "library")
SYSTEMS = tuple(dict.fromkeys((*engines.SYSTEMS, *libraries.SYSTEMS)))
QUICK_ENGINES = engines.Plan(prompt_tokens=(1000, 2000), pairs=2, reply_tokens=4)
QUICK_LIBRARIES = libraries.Plan(sizes=(256, 1024), runs=2, capacity_gib=1)
QUIET_CPUS = 0.2  # up to this no remark; children that vLLM does not wait for count as others too, but stay below it
SHOWN = (
    "system", "case", "pages", "prompt_tokens", "tokens", "ttft_s", "gb_s", "memcpy_gb_s", "ratio_native_hit", "ratio_kvkern",
    "ratio_kvkern_paired", "loaded_tokens", "tokens_equal", "other_cpus",
)  # fmt: skip


class Bench:
    """Measures one system after the other. Collects rows and warnings."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.rows: list[Row] = []
        self.warnings: list[str] = []
        self._started_s = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started_s:5.0f} s] {text}", flush=True)

    def warn(self, system: str, text: str) -> None:
        self.warnings.append(f"{system}: {text}")
        print(f"warning: {system}: {text}", file=sys.stderr, flush=True)

    def measure(self, title: str, name: str, act: Callable[[], Verdict]) -> None:
        """Run one system and keep its rows. A failure becomes a warning."""
        self.say(f"{title}, {name}")
        others = OtherProcesses()
        try:
            verdict = act()
        except PeerFailed as failure:
            self.warn(name, str(failure))
            return
        other_cpus = others.busy_cpus()
        if other_cpus > QUIET_CPUS:
            self.say(
                f"  The machine was not quiet: other processes used {other_cpus:.2f} CPUs, above {QUIET_CPUS}. The figures are "
                f"doubtful; repeat the run."
            )
        self.rows += [row | {"other_cpus": other_cpus} for row in verdict.rows]
        for problem in verdict.problems:
            self.warn(name, problem)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = option_parser(__doc__, quick="short prompts, few runs: for smoke tests, not for figures")
    parser.add_argument(
        "--workdir", type=Path, default=default_workdir(), help="folder of environments and logs (default %(default)s)"
    )
    parser.add_argument(
        "--systems",
        type=parse_systems,
        default=SYSTEMS,
        help=f"comma-separated systems to run (default {','.join(SYSTEMS)})",
    )
    parser.add_argument("--level", choices=(*LEVELS, "all"), default="all", help="level to run (default all)")
    parser.add_argument("--model", type=Path, help="a model folder to use instead of the demo's")
    parser.add_argument(
        "--reserved-cpus",
        type=int,
        help="number of CPUs that every engine keeps free of compute threads (default: as in the demo)",
    )
    return parser.parse_args(arguments)


def parse_systems(text: str) -> tuple[str, ...]:
    """Return the named systems in the order they run. Raises ArgumentTypeError for an unknown name."""
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(SYSTEMS)):
        raise argparse.ArgumentTypeError(f"no system is called {unknown[0]!r}. Choose from {', '.join(SYSTEMS)}.")
    return tuple(name for name in SYSTEMS if name in names)


def default_workdir() -> Path:
    return run.default_workdir() / "peers"


def bench(args: argparse.Namespace) -> Bench:
    result = Bench(args.workdir)
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.level != "library":
        preconditions.require_packages()
        folder = args.model or model.ensure(model.ModelConfig(), run.default_workdir())
        plan = engines.with_reserved_cpus(QUICK_ENGINES if args.quick else engines.Plan(), args.reserved_cpus)
        for name in (name for name in args.systems if name in engines.SYSTEMS):
            act = partial(engines.measure, name, plan, folder, args.workdir, result.say)
            result.measure("engine level", name, act)
    if args.level != "engine":
        plan = libraries.limited_to_own_cpus(QUICK_LIBRARIES if args.quick else libraries.Plan())
        for name in (name for name in args.systems if name in libraries.SYSTEMS):
            result.measure("library level", name, partial(libraries.measure, name, plan, args.workdir, result.say))
    return result


def main() -> int:
    args = parse()
    engine_process.exit_on_signals(signal.SIGTERM)
    try:
        result = bench(args)
    except preconditions.NotReadyError as failure:
        print(f"peers: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("peers: interrupted. Every system has been stopped.", file=sys.stderr)
        return 130
    measured = with_ratios(result.rows)
    for row in measured:
        print_row({name: row[name] for name in SHOWN if name in row})
    if result.warnings:
        print(
            f"warnings: {len(result.warnings)}. Rows are missing or doubtful; see the warnings above.", file=sys.stderr
        )
    write_json(args.json, measured, warnings=result.warnings)
    return 1 if result.warnings else 0


if __name__ == "__main__":
    sys.exit(main())
