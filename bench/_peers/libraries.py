"""Library level: paged KV of Llama-3.1-8B's shape in host memory, stored and retrieved without an engine.

Knows which script measures which library in which environment. library_common.py has the loop, rows.py makes the rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvkern import __version__
from kvkern.demo import engine_process

from . import venvs
from .children import Child
from .engines import HERE, QUIET
from .rows import Row, Verdict, library_rows

SILENCE_LIMIT_S = 300.0  # longest wait for a line: the start, which fills the cache, or one size
# Torch's threads spin while they wait, which is the default. Threads that sleep cost LMCache a third of its rate on a quiet
# machine. On a busy machine spinning costs it a factor of 20, so every row has other_cpus.
LIBRARY_ENV = {"LMCACHE_LOG_LEVEL": "ERROR"}
SYSTEMS = {"kvkern": None, "lmcache_inproc": venvs.LMCACHE, "aibrix": venvs.AIBRIX}
PAGES = {
    "kvkern": ("layers", "blocks"),
    "lmcache_inproc": ("layers",),
    "aibrix": ("blocks",),
}  # kinds of pages that each library can address


@dataclass(frozen=True)
class Plan:
    """How much is asked of each library."""

    sizes: tuple[int, ...] = (256, 2048, 8192)  # tokens; multiples of LMCache's chunk of 256
    runs: int = 7
    threads: int = 2
    capacity_gib: int = 3


def limited_to_own_cpus(plan: Plan) -> Plan:
    """Return the plan with at most as many threads as this process has CPUs."""
    return replace(plan, threads=min(plan.threads, len(os.sched_getaffinity(0))))


def measure(name: str, plan: Plan, workdir: Path, say: Callable[[str], None]) -> Verdict:
    """Run one library from start to end. Raises PeerFailed, also if a byte came back wrong."""
    rival = SYSTEMS[name]
    python = venvs.ensure(rival, workdir, say) if rival else Path(sys.executable)
    script = HERE / f"library_{name.removesuffix('_inproc')}_child.py"
    env = engine_process.environment(verbose=False) | QUIET | LIBRARY_ENV
    version = rival.version if rival else __version__
    rows: list[Row] = []
    for pages in PAGES[name]:
        measured = []
        with Child(f"the {name} library", [str(python), str(script)], env, workdir / f"library-{name}.log") as child:
            child.send(asdict(plan) | {"pages": pages})
            for one in child.rows(SILENCE_LIMIT_S):
                say(f"  {one['tokens']:,} tokens stored and retrieved {plan.runs} times, pages of {pages}")
                measured.append(one)
        rows += library_rows({"system": name, "version": version, "level": "library", "pages": pages}, measured)
    return Verdict(rows, problems=[])
