"""The grid of a replay: every trace with every policy at every capacity, run in worker processes."""

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

MIN = "min"  # the oracle, in lists of policies
MAX_CHUNKS = 1 << 40


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the grid: what to replay."""

    path: Path
    policy: str
    capacity: str  # as the user wrote it; see `capacity_chunks`
    chunk_nbytes: int
    hints: bool
    remote_capacity: str = ""  # as `capacity`; not empty: replay two tiers
    persist: str = "all"  # a mode of policy/persist_modes.py, or two_tier.ORACLE
    threshold: float = 0.0  # probability above which Persist.PREDICTED writes


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one cell."""

    trace: str
    policy: str
    capacity_chunks: int
    capacity_fraction: float  # of the unique chunks
    hit_ratio: float
    requests: int
    chunk_refs: int
    unique_chunks: int
    us_per_ref: float  # time of the whole replay, without reading the trace
    num_backwards: int  # requests with an earlier time than the request above them
    remote_capacity_chunks: int | None = None
    persist: str | None = None
    dram_hit_ratio: float | None = None
    written_chunks: int | None = None

    def row(self) -> dict[str, object]:
        """Return the row for JSON output. A replay of one tier has no columns for two tiers."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def checked_policies(names: str) -> list[str]:
    """Return the policies of a comma-separated list, each once. Raises ConfigError if a name is unknown."""
    found = dict.fromkeys(name.strip() for name in names.split(","))
    return [name if name == MIN else checked_policy(name) for name in found]


def capacity_chunks(
    text: str,  # "3%" of the unique chunks, "5000" chunks, or "8GiB"
    num_unique: int,
    chunk_nbytes: int,
) -> int:
    """Return how many chunks fit, at least one. Raises ConfigError if `text` is no capacity."""
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


def run_grid(
    cells: Sequence[Cell],
    workers: int,
    progress: Callable[[int], object],  # called with the number of cells done since the last call
) -> list[Result]:
    """Run all cells and return their results in the order of the cells.

    Raises ConfigError if a trace cannot be read or a worker process dies.
    """
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
            future.result()  # the first error ends the run
            progress(1)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise ConfigError("a worker process died, perhaps because memory ran out; try --workers 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def run_cell(cell: Cell) -> Result:
    """Replay one cell. Raises ConfigError if its trace cannot be read."""
    trace = _read_trace_cached(cell.path)
    capacity = capacity_chunks(cell.capacity, trace.num_unique, cell.chunk_nbytes)
    begin = time.perf_counter()
    more: dict[str, Any] = {}
    if cell.policy == MIN:
        hits = oracle.min_hits(trace, capacity)
    elif cell.remote_capacity:
        remote = capacity_chunks(cell.remote_capacity, trace.num_unique, cell.chunk_nbytes)
        mode = two_tier.checked_persist_mode(cell.persist, cell.policy)
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


@lru_cache(maxsize=1)  # the cells of one trace are neighbours
def _read_trace_cached(path: Path) -> Trace:
    return read_trace(path)


__all__ = ["MIN", "POLICIES", "Cell", "Result", "capacity_chunks", "checked_policies", "run_cell", "run_grid"]
