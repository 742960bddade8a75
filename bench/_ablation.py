"""Replays traces with GRIT without one part at a time. Knows names of functions and constants in kvkern/policy/grit*.py.

    a variant   replaces some of these before they are compiled, in its own process and with its own numba cache
    hit ratios  from the driver of `kvkern replay`, with hints
    mean gap    share of the way from LRU to MIN, over all cells

The policy itself has no switches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numba
import numpy as np

from kvkern.policy import grit, grit_model, grit_store, grit_trie
from kvkern.replay.grid import MIN, Cell, Result, run_cell

CAPACITIES = {  # trace -> capacities at which MIN is at least a point above LRU
    "agents-miniswe": ("3%", "5%"), "chat-mooncake": ("1%", "3%", "10%", "30%"),
    "agents-claudecode-3h": ("1%", "3%", "10%"), "agents-claudecode-24h": ("0.3%", "1%", "3%"),
}  # fmt: skip
OTHER_CAPACITIES = ("1%", "3%", "10%")
FULL = "GRIT"


def replace_in_grit(name: str, value: object) -> None:
    """Replace the function or constant of that name in all modules of GRIT that have it."""
    places = [module for module in (grit, grit_model, grit_store, grit_trie) if hasattr(module, name)]
    assert places, name
    for module in places:
        setattr(module, name, value)


def rank_by(value: Callable[[float, float, float], float]) -> None:
    """Make the index a function of (hazard, P(return), density). The last two look ahead to the end of time."""
    index_class, edges, num_bins, least_s = (
        grit_model.index_class, grit_model.EDGES, grit_model.NUM_BINS, grit_model.LEAST_S,
    )  # fmt: skip
    ranked = numba.njit(value)

    @numba.njit
    def variant(e: Any, x: Any, base: Any, rho: Any, cls: int, hazard: Any, index: Any) -> None:
        index_class(e, x, base, rho, cls, hazard, index)
        for b in range(num_bins):
            alive, returns, seconds = 1.0, 0.0, 0.0
            for h in range(b, num_bins):
                rate = hazard[cls, h]
                miss = np.exp(-rate * (edges[h + 1] - edges[h]))
                returns += alive * (1.0 - miss)
                seconds += alive * (1.0 - miss) / rate
                alive *= miss
            index[cls, b] = ranked(hazard[cls, b], returns, returns / (seconds + least_s))

    replace_in_grit("index_class", variant)


def map_features(mapping: Callable[..., tuple[Any, ...]]) -> None:
    """Pass the features through `mapping` before they make a class."""
    main_class, mapped = grit_model.main_class, numba.njit(mapping)

    @numba.njit
    def variant(turn: int, new: int, gap: float, rhythm: float, length: int, output: int, stop: int) -> int:
        return main_class(*mapped(turn, new, gap, rhythm, length, output, stop))  # type: ignore[no-any-return]

    replace_in_grit("main_class", variant)


def weigh_chunks_equally() -> None:
    """Count every chunk of a request as one observation."""
    add_row = grit_store.add_row

    @numba.njit
    def variant(rows: Any, state: Any, time: float, serial: int, weight: float, cls: int) -> int:
        return add_row(rows, state, time, serial, 1.0 if weight > 0.0 else 0.0, cls)  # type: ignore[no-any-return]

    replace_in_grit("add_row", variant)


VARIANTS: dict[str, Callable[[], None]] = {
    FULL: lambda: None,
    "index: the hazard now": lambda: rank_by(lambda hazard, probability, density: hazard),
    "index: total density, H = infinity": lambda: rank_by(lambda hazard, probability, density: density),
    "index: P(return)": lambda: rank_by(lambda hazard, probability, density: probability),
    "no least second": lambda: replace_in_grit("LEAST_S", 0.0),
    "one class for all requests": lambda: map_features(lambda t, n, g, r, m, o, s: (1, 0, -1.0, -1.0, 0, -1, 0)),
    "features: turn and new chunks only": lambda: map_features(
        lambda t, n, g, r, m, o, s: (t, n, -1.0, -1.0, 0, -1, 0)
    ),
    "without the reply's tokens": lambda: map_features(lambda t, n, g, r, m, o, s: (t, n, g, r, m, -1, s)),
    "without stop reasons": lambda: map_features(lambda t, n, g, r, m, o, s: (t, n, g, r, m, o, 0)),
    "without rhythm": lambda: map_features(lambda t, n, g, r, m, o, s: (t, n, g, -1.0, m, o, s)),
    "no chunk counts as shared": lambda: replace_in_grit("_MIN_SHARED_USES", 1 << 20),
    "one age band": lambda: replace_in_grit("BAND", np.zeros_like(grit_model.BAND)),
    "every chunk weighs 1": weigh_chunks_equally,
}


def rows_of(paths: Sequence[Path], workers: int = 2) -> Iterator[dict[str, object]]:
    """Yield a row for each variant and cell. Cells in which MIN is no better than LRU say nothing and are left out."""
    bounds = {policy: [run_cell(cell) for cell in _cells(paths, policy)] for policy in ("lru", MIN)}
    with ThreadPoolExecutor(workers) as pool:
        for variant, results in zip(VARIANTS, pool.map(lambda name: _replay(name, paths), VARIANTS), strict=True):
            for result, low, high in zip(results, bounds["lru"], bounds[MIN], strict=True):
                if high.hit_ratio > low.hit_ratio:
                    gap = (result["hit_ratio"] - low.hit_ratio) / (high.hit_ratio - low.hit_ratio)
                    yield {"variant": variant, **result, "gap": gap}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table in docs/policy.md.

    The full policy's row has hit ratios. The other rows have points above or below them. The last column is the mean gap.
    """
    full = {_cell_of(row): row["hit_ratio"] for row in rows if row["variant"] == FULL}
    yield "| | " + " | ".join(f"{trace} {fraction:.1%}" for trace, fraction in full) + " | mean gap |"
    yield "|---" * (len(full) + 2) + "|"
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        points = [f"{100 * (row['hit_ratio'] - full[_cell_of(row)]):+.1f}" for row in mine]
        shown = [_ratio(row["hit_ratio"]) for row in mine] if variant == FULL else map(_points, points)
        yield f"| {variant} | {' | '.join(shown)} | {_ratio(fmean(row['gap'] for row in mine), 2)} |"


def _cell_of(row: dict[str, Any]) -> tuple[str, float]:
    return row["trace"], row["capacity_fraction"]


def _points(text: str) -> str:
    return "0" if float(text) == 0 else text.replace("0.", ".", 1) if text[1:3] == "0." else text


def _ratio(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def _cells(paths: Sequence[Path], policy: str) -> Iterator[Cell]:
    for path in paths:
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        for capacity in CAPACITIES.get(name, OTHER_CAPACITIES):
            yield Cell(path, policy, capacity, chunk_nbytes=1, hints=True)


def _replay(variant: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Replay one variant in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, variant, *map(str, paths)],
            env={**os.environ, "NUMBA_CACHE_DIR": cache}, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _row(result: Result) -> dict[str, object]:
    names = ("trace", "capacity_chunks", "capacity_fraction", "hit_ratio")
    return {name: getattr(result, name) for name in names}


if __name__ == "__main__":
    VARIANTS[sys.argv[1]]()
    print(json.dumps([_row(run_cell(cell)) for cell in _cells([Path(path) for path in sys.argv[2:]], "grit")]))
