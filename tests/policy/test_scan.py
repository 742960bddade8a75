"""Scan resistance: chats and documents that are read once. `bench/policy.py --scan` makes the full measurement."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from kvkern.policy import make_policy
from kvkern.replay.oracle import min_hits
from kvkern.replay.policy_driver import replay
from kvkern.replay.trace import read_trace

BENCH = Path(__file__).resolve().parents[2] / "bench"
GOLDEN = {1: (0.5875, 0.6446, 0.6794), 2: (0.6027, 0.6649, 0.6972), 3: (0.6029, 0.6629, 0.6936)}  # LRU, GRIT, MIN


def test_documents_that_are_read_once_do_not_push_out_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from _scan import Scan, requests, write  # as `python bench/policy.py` finds it

    assert requests(Scan()) == requests(Scan())
    gaps = []
    for seed, golden in GOLDEN.items():
        trace = read_trace(write(tmp_path / f"{seed}.jsonl.gz", Scan(seed=seed)))
        capacity = trace.num_unique // 10
        lru, grit = (replay(trace, make_policy(name, capacity), capacity) for name in ("lru", "grit"))
        best = min_hits(trace, capacity)
        assert [hits / trace.num_refs for hits in (lru, grit, best)] == pytest.approx(golden, abs=0.001)
        gaps.append((grit - lru) / (best - lru))
    assert fmean(gaps) > 0.62
