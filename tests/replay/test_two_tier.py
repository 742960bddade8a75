"""Two tiers: hits and writes counted by hand, hits between one tier and the optimum, and the chunks each remote keeps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvkern.cli import app
from kvkern.errors import ConfigError
from kvkern.policy import make_policy
from kvkern.policy.persist_modes import Persist
from kvkern.replay import policy_driver
from kvkern.replay.oracle import infinite_hits, min_hits
from kvkern.replay.remote_models import FOREVER_S, NEVER, LRURemote, OracleRemote
from kvkern.replay.trace import Trace, read_trace
from kvkern.replay.two_tier import TwoTierCounts, checked_persist_mode, persist_modes_of, replay

MODES = [*Persist, None]


def load(tmp_path: Path, requests: list[tuple[float, list[int]]]) -> Trace:
    path = tmp_path / "t.jsonl"
    lines = [{"timestamp": time_s * 1000, "hash_ids": chain} for time_s, chain in requests]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_trace(path)


def chats(seed: int, count: int = 400) -> list[tuple[float, list[int]]]:
    """Make requests of twenty chats at a time, each ten turns long, with a shared first part."""
    rng = random.Random(seed)
    chains = [[0, 1] for _ in range(20)]
    found, fresh = [], 2
    for step in range(count):
        i = rng.randrange(len(chains))
        chains[i] = [0, 1] if len(chains[i]) > 30 else chains[i]
        chains[i] = [*chains[i], fresh, fresh + 1, fresh + 2]
        fresh += 3
        found.append((step * 2.0, chains[i]))
    return found


# DRAM of 2 chunks by LRU: a, b, then c, d push them out, then a, b again.
BY_HAND = [(0.0, [1, 2]), (1.0, [3, 4]), (2.0, [1, 2]), (3.0, [1, 2])]


@pytest.mark.parametrize(
    ("persist", "expected"),
    [
        (Persist.ALL, TwoTierCounts(dram_hits=2, remote_hits=2, written=4)),
        (Persist.HOT, TwoTierCounts(dram_hits=2, remote_hits=0, written=2)),  # at the last request
        (Persist.EVICTED, TwoTierCounts(dram_hits=2, remote_hits=2, written=4)),
        (None, TwoTierCounts(dram_hits=2, remote_hits=2, written=2)),  # 3 and 4 are never used again
    ],
)
def test_by_hand(tmp_path: Path, persist: Persist | None, expected: TwoTierCounts) -> None:
    assert replay(load(tmp_path, BY_HAND), "lru", 2, 10, persist, 0.0) == expected


@pytest.mark.parametrize("policy", ["lru", "grit"])
def test_two_tiers_lie_between_one_and_the_optimum(tmp_path: Path, policy: str) -> None:
    trace = load(tmp_path, chats(1))
    alone = policy_driver.replay(trace, make_policy(policy, 60), 60)
    for mode in persist_modes_of(policy):
        got = replay(trace, policy, 60, 200, checked_persist_mode(mode, policy), 0.3)
        assert alone <= got.dram_hits + got.remote_hits <= min_hits(trace, 260) <= infinite_hits(trace)
        assert got == replay(trace, policy, 60, 200, checked_persist_mode(mode, policy), 0.3)


def test_a_remote_for_everything_misses_nothing(tmp_path: Path) -> None:
    trace = load(tmp_path, chats(2))
    for persist in (Persist.ALL, Persist.EVICTED, None):
        got = replay(trace, "lru", 60, trace.num_unique, persist, 0.0)
        assert got.dram_hits + got.remote_hits == infinite_hits(trace)
        assert got.written <= trace.num_unique
    assert got.written < replay(trace, "lru", 60, trace.num_unique, Persist.EVICTED, 0.0).written


def test_a_higher_threshold_writes_less(tmp_path: Path) -> None:
    trace = load(tmp_path, chats(3))
    written = [replay(trace, "grit", 60, 200, Persist.PREDICTED, t).written for t in (0.0, 0.3, 0.9, 1.0)]
    assert written == sorted(written, reverse=True)
    assert written[0] == replay(trace, "grit", 60, 200, Persist.EVICTED, 0.0).written > written[2]
    assert written[3] == 0


def test_hostile_traces_cost_hits_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(1)
    trace = load(tmp_path, [(0.0, [rng.randrange(50) for _ in range(rng.randint(1, 40))]) for _ in range(200)])
    for persist in MODES:
        for capacity in (1, 10):
            got = replay(trace, "grit", capacity, 1, persist, 0.2)
            assert 0 <= got.dram_hits + got.remote_hits <= trace.num_refs


def test_residency_is_the_age_at_eviction() -> None:
    remote = LRURemote(4)
    remote.write([b"a"], 10.0)
    remote.write([b"b", b"c", b"d"], 40.0)
    assert remote.residency_s == FOREVER_S
    remote.write([b"e"], 40.0)
    assert remote.residency_s == 30.0
    assert b"a" not in remote
    remote.use([b"b"], 50.0)
    remote.write([b"f"], 60.0)
    assert b"b" in remote
    assert b"c" not in remote
    assert remote.residency_s == pytest.approx(30.0 + 0.05 * (20.0 - 30.0))


def test_the_oracle_keeps_what_is_used_soonest() -> None:
    upcoming = {b"a": 10, b"b": 20, b"c": 30, b"d": NEVER, b"e": 15}
    remote = OracleRemote(2, upcoming)
    remote.write([b"d", b"c", b"b", b"a"], 0.0)  # c gives way to a
    assert [key in remote for key in (b"a", b"b", b"c", b"d")] == [True, True, False, False]
    remote.write([b"c", b"e"], 0.0)  # c is refused, b gives way to e
    assert [key in remote for key in (b"a", b"b", b"e")] == [True, False, True]
    upcoming[b"a"] = NEVER
    remote.use([b"a"], 0.0)
    assert b"a" not in remote
    assert remote.written == 4


def test_modes() -> None:
    assert checked_persist_mode("oracle", "lru") is None
    assert checked_persist_mode("predicted", "grit") is Persist.PREDICTED
    assert persist_modes_of("arc") == ["all", "hot", "evicted", "oracle"]
    with pytest.raises(ConfigError, match="predicts nothing"):
        checked_persist_mode("predicted", "arc")
    with pytest.raises(ConfigError, match="expected one of all"):
        checked_persist_mode("sometimes", "grit")


def test_command(tmp_path: Path) -> None:
    load(tmp_path, chats(4))
    out = tmp_path / "out.json"
    args = ["--policy", "lru,grit,min", "--capacity", "60", "--remote-capacity", "200", "--json", str(out)]
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "t.jsonl"), *args, "--workers", "1"])
    assert done.exit_code == 0, done.output
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    modes = [(row["policy"], row.get("persist")) for row in rows]
    lru, grit = ([(name, mode) for mode in persist_modes_of(name)] for name in ("lru", "grit"))
    assert modes == [*lru, *grit, ("min", None)]
    for row in rows[:-1]:
        assert (row["capacity_chunks"], row["remote_capacity_chunks"]) == (60, 200)
        assert 0 < row["dram_hit_ratio"] <= row["hit_ratio"] < 1
        assert row["written_chunks"] >= 0 < row["unique_chunks"]
    assert "written_chunks" not in rows[-1]
