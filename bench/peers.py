"""kvkern beside its rivals: one run, one machine, the same model, prompts and bytes.

engine level, time to first token of a prompt computed before (cases ttft_hit, ttft_native_hit, ttft_recompute):
    kvkern          this checkout, KvkernConnector
    vllm_example    vLLM's own ExampleConnector: a file per layer and prompt, in /dev/shm
    lmcache_mp      LMCache's server beside the engine, LMCacheMPConnector, shared memory between them
  Each in an engine of its own, one alive at a time; (vLLM forgets, hit, native hit) in turns; replies compared, see rows.py.
library level, GB/s of paged KV of Llama-3.1-8B, random blocks in host memory, no engine (cases store, retrieve):
    kvkern          kvkern.open_cache: keys, copy and checksums, on both kinds of pages
    lmcache_inproc  LMCache's in-process engine with its own CPU copy, on pages of layers (FlashAttention)
    aibrix          AIBrix's L1, on pages that are whole blocks, since its gather kernel needs a GPU
  A memcpy of the same process and threads is measured in the same loop; every round trip is compared byte for byte.

ratio_kvkern > 1 means kvkern is better: kvkern's rate over theirs, their time over kvkern's. In rows of ttft_native_hit and
ttft_recompute it compares vLLM with itself and should be near 1: how far off it is tells what the machine did meanwhile.
ratio_native_hit, a hit over the native hit beside it in the same engine, does not see that; ratio_kvkern_paired, theirs over
kvkern's, is made of it. other_cpus is how many CPUs other processes used meanwhile: above a fifth, repeat the run.

The rivals are installed on first use, 130 MB in all, into environments that share torch and vLLM with the running one
(_peers/venvs.py). Needs the package index for that, nothing later. A system that fails, or whose hits were no loads, gets
a warning instead of a row; the others still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from _common import print_row, write_json
from _peers import engines, libraries
from _peers.busy import Others
from _peers.children import PeerFailed
from _peers.rows import Row, Verdict, with_ratios

from kvkern.demo import model, preconditions, run

LEVELS = ("engine", "library")
SYSTEMS = tuple(dict.fromkeys((*engines.SYSTEMS, *libraries.SYSTEMS)))
QUICK_ENGINES = engines.Plan(prompt_tokens=(1000, 2000), pairs=2, reply_tokens=4)
QUICK_LIBRARIES = libraries.Plan(sizes=(256, 1024), runs=2, capacity_gib=1)
QUIET_CPUS = 0.2  # without a remark; processes that vLLM does not wait for count as others too, but stay below this
SHOWN = (
    "system", "case", "pages", "prompt_tokens", "tokens", "ttft_s", "gb_s", "memcpy_gb_s", "ratio_native_hit", "ratio_kvkern",
    "ratio_kvkern_paired", "loaded_tokens", "tokens_equal", "other_cpus",
)  # fmt: skip


class Bench:
    """Collects rows and warnings; one system after the other."""

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
        """Run one system and keep what comes of it; a failure is its warning."""
        self.say(f"{title}, {name}")
        others = Others()
        try:
            verdict = act()
        except PeerFailed as failure:
            self.warn(name, str(failure))
            return
        other_cpus = others.cpus()
        if other_cpus > QUIET_CPUS:
            self.say(f"  the machine was not quiet: others used {other_cpus:.2f} CPUs, these figures are doubtful")
        self.rows += [row | {"other_cpus": other_cpus} for row in verdict.rows]
        for problem in verdict.problems:
            self.warn(name, problem)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument(
        "--workdir", type=Path, default=default_workdir(), help="environments and logs (default %(default)s)"
    )
    parser.add_argument(
        "--systems", type=chosen, default=SYSTEMS, help=f"a comma-separated part of {','.join(SYSTEMS)}"
    )
    parser.add_argument("--level", choices=(*LEVELS, "all"), default="all")
    parser.add_argument("--model", type=Path, help="a model folder to use instead of the demo's")
    parser.add_argument(
        "--reserved-cpus", type=int, help="CPUs that every engine keeps free of compute threads (default: as the demo)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short prompts, few runs: for smoke tests, not for numbers"
    )
    return parser.parse_args(arguments)


def chosen(text: str) -> tuple[str, ...]:
    """Return the named systems in the order they run. Raises ArgumentTypeError for a name that is none."""
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(SYSTEMS)):
        raise argparse.ArgumentTypeError(f"no system is called {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    return tuple(name for name in SYSTEMS if name in names)


def default_workdir() -> Path:
    return run.default_workdir() / "peers"


def bench(args: argparse.Namespace) -> Bench:
    result = Bench(args.workdir)
    args.workdir.mkdir(parents=True, exist_ok=True)
    if args.level != "library":
        preconditions.require_packages()
        folder = args.model or model.ensure(model.ModelConfig(), run.default_workdir())
        plan = engines.reserving(QUICK_ENGINES if args.quick else engines.Plan(), args.reserved_cpus)
        for name in (name for name in args.systems if name in engines.SYSTEMS):
            act = partial(engines.measure, name, plan, folder, args.workdir, result.say)
            result.measure("engine level", name, act)
    if args.level != "engine":
        plan = libraries.within(QUICK_LIBRARIES if args.quick else libraries.Plan())
        for name in (name for name in args.systems if name in libraries.SYSTEMS):
            result.measure("library level", name, partial(libraries.measure, name, plan, args.workdir, result.say))
    return result


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, _leave)
    try:
        result = bench(args)
    except preconditions.NotReadyError as failure:
        print(f"peers: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("peers: interrupted; every system has been stopped", file=sys.stderr)
        return 130
    measured = with_ratios(result.rows)
    for row in measured:
        print_row({name: row[name] for name in SHOWN if name in row})
    if result.warnings:
        print(f"warnings: {len(result.warnings)}, see above; rows are missing or doubtful", file=sys.stderr)
    if args.json:
        write_json(args.json, measured, warnings=result.warnings)
    return 1 if result.warnings else 0


def _leave(number: int, _frame: FrameType | None) -> None:
    """Let SIGTERM unwind like Ctrl-C does, so that children, servers and files go too."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
