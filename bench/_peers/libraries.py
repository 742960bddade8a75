"""Library level: paged KV of Llama-3.1-8B's shape in host memory, stored and retrieved without an engine.

Knows which script measures which library in which environment; the loop is library_common.py's, the rows rows.py's.
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

SILENCE_LIMIT_S = 300.0  # the start with its fill of the cache, or one size
# Torch's threads spin while they wait, as they do by default: told to sleep, they cost LMCache a third on a quiet machine. On a
# busy one spinning costs it a factor of 20, hence other_cpus in every row.
LIBRARY_ENV = {"LMCACHE_LOG_LEVEL": "ERROR"}
SYSTEMS = {"kvkern": None, "lmcache_inproc": venvs.LMCACHE, "aibrix": venvs.AIBRIX}
PAGES = {"kvkern": ("layers", "blocks"), "lmcache_inproc": ("layers",), "aibrix": ("blocks",)}  # that each can address


@dataclass(frozen=True)
class Plan:
    """How much is asked of each library."""

    sizes: tuple[int, ...] = (256, 2048, 8192)  # tokens; multiples of LMCache's chunk of 256
    runs: int = 7
    threads: int = 2
    capacity_gib: int = 3


def within(plan: Plan) -> Plan:
    """Return the plan with no more threads than this process may use."""
    return replace(plan, threads=min(plan.threads, len(os.sched_getaffinity(0))))


def measure(name: str, plan: Plan, workdir: Path, say: Callable[[str], None]) -> Verdict:
    """Run one library from start to end. Raises PeerFailed, also when a byte came back wrong."""
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
