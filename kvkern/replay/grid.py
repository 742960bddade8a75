"""What a replay runs: every trace with every policy at every capacity, over worker processes. Results keep their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..config import parse_nbytes
from ..errors import ConfigError
from ..policy import POLICIES, checked_policy, make_policy
from . import oracle, two_tier
from .policy_driver import replay
from .trace import Trace, read_trace

MIN = "min"  # the oracle beside the policies
MAX_CHUNKS = 1 << 40


@dataclass(frozen=True, slots=True)
class Cell:
    """One number to find."""

    path: Path
    policy: str
    capacity: str  # as it was given
    chunk_nbytes: int
    hints: bool
    remote_capacity: str = ""  # with it, two tiers
    persist: str = "all"  # a mode of policy/persist.py, or two_tier.ORACLE
    threshold: float = 0.0  # of Persist.PREDICTED


@dataclass(frozen=True, slots=True)
class Result:
    """What a cell came to."""

    trace: str
    policy: str
    capacity_chunks: int
    capacity_fraction: float  # of the unique chunks
    hit_ratio: float
    requests: int
    chunk_refs: int
    unique_chunks: int
    us_per_ref: float  # all of it, reading apart
    num_backwards: int  # requests whose time was before that of the one above
    remote_capacity_chunks: int | None = None
    persist: str | None = None
    dram_hit_ratio: float | None = None
    written_chunks: int | None = None

    def row(self) -> dict[str, object]:
        """As JSON has it: one tier has no columns of two."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def checked_policies(names: str) -> list[str]:
    """The policies of a comma-separated list. Raises ConfigError."""
    found = dict.fromkeys(name.strip() for name in names.split(","))
    return [name if name == MIN else checked_policy(name) for name in found]


def capacity_chunks(
    text: str,  # "3%" of the unique chunks, "5000" chunks, or "8GiB"
    num_unique: int,
    chunk_nbytes: int,
) -> int:
    """Chunks that fit; at least one. Raises ConfigError."""
    expected = 'expected a percentage of the unique chunks ("3%"), chunks ("5000") or bytes ("8GiB")'
    try:
        if text.endswith("%"):
            chunks = int(num_unique * float(text[:-1]) / 100)
        elif text.isdecimal():
            chunks = int(text)
        else:
            chunks = parse_nbytes(text, "capacity") // chunk_nbytes
    except (ValueError, OverflowError, ConfigError) as error:
        raise ConfigError(f"capacity is {text!r}; {expected}") from error
    if text.startswith("-") or chunks < 0 or text.strip("0.%") == "":
        raise ConfigError(f"capacity is {text!r}, which holds no chunk; {expected}")
    if chunks > MAX_CHUNKS:
        raise ConfigError(f"capacity is {text!r}, more than {MAX_CHUNKS} chunks; {expected}")
    return max(chunks, 1)


def run(
    cells: Sequence[Cell],
    workers: int,
    progress: Callable[[int], object],  # called with the cells done since the last call
) -> list[Result]:
    """All results, in the order of the cells."""
    if workers <= 1 or len(cells) == 1:
        results = []
        for cell in cells:
            results.append(run_cell(cell))
            progress(1)
        return results
    pool = ProcessPoolExecutor(min(workers, len(cells)), mp_context=get_context("spawn"))
    try:
        futures: list[Future[Result]] = [pool.submit(run_cell, cell) for cell in cells]
        for future in as_completed(futures):
            future.result()  # the first error ends it
            progress(1)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise ConfigError("a worker process died, perhaps for want of memory; try --workers 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def run_cell(cell: Cell) -> Result:
    """Replay one."""
    trace = _trace(cell.path)
    capacity = capacity_chunks(cell.capacity, trace.num_unique, cell.chunk_nbytes)
    begin = time.perf_counter()
    more: dict[str, Any] = {}
    if cell.policy == MIN:
        hits = oracle.min_hits(trace, capacity)
    elif cell.remote_capacity:
        remote = capacity_chunks(cell.remote_capacity, trace.num_unique, cell.chunk_nbytes)
        mode = two_tier.checked_mode(cell.persist, cell.policy)
        tiers = two_tier.replay(trace, cell.policy, capacity, remote, mode, cell.threshold, cell.hints)
        hits = tiers.dram_hits + tiers.remote_hits
        more = {
            "remote_capacity_chunks": remote, "persist": cell.persist,
            "dram_hit_ratio": tiers.dram_hits / trace.num_refs, "written_chunks": tiers.written,
        }  # fmt: skip
    else:
        hits = replay(trace, make_policy(cell.policy, capacity), capacity, cell.hints)
    seconds = time.perf_counter() - begin
    return Result(
        trace=trace.name, policy=cell.policy, capacity_chunks=capacity,
        capacity_fraction=capacity / trace.num_unique, hit_ratio=hits / trace.num_refs,
        requests=len(trace), chunk_refs=trace.num_refs, unique_chunks=trace.num_unique,
        us_per_ref=seconds / trace.num_refs * 1e6, num_backwards=trace.num_backwards, **more,
    )  # fmt: skip


@lru_cache(maxsize=1)  # cells of one trace follow each other
def _trace(path: Path) -> Trace:
    return read_trace(path)


__all__ = ["MIN", "POLICIES", "Cell", "Result", "capacity_chunks", "checked_policies", "run", "run_cell"]
