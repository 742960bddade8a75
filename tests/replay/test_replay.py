"""`kvkern replay`: reading traces, counting hits, the optimum to compare with, and errors for bad input."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvkern.cli import app
from kvkern.errors import ConfigError
from kvkern.policy import POLICIES, make_policy
from kvkern.policy.base import Stop, Use
from kvkern.replay.grid import capacity_chunks
from kvkern.replay.oracle import infinite_hits, min_hits
from kvkern.replay.policy_driver import replay, trace_requests
from kvkern.replay.trace import Trace, read_trace

Lines = list[dict[str, Any]]


def write(path: Path, lines: Lines) -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def sessions(seed: int, count: int = 200, alphabet: int = 40) -> Lines:
    """Make requests with chains that grow and branch."""
    rng = random.Random(seed)
    fresh = itertools.count(1000)
    chains: list[list[int]] = [[]]
    lines = []
    for step in range(count):
        chain = rng.choice(chains[-alphabet:]) + [next(fresh) for _ in range(rng.randint(0, 4))]
        chains.append(chain if rng.random() < 0.8 else [])
        if chain:
            lines.append({"timestamp": step * 700, "output_length": rng.randrange(900), "hash_ids": chain})
    return lines


def load(tmp_path: Path, lines: Lines) -> Trace:
    return read_trace(write(tmp_path / "t.jsonl", lines))


def test_reads_what_the_format_has(tmp_path: Path) -> None:
    lines = [
        {
            "timestamp": 5000,
            "input_length": 99,
            "output_length": 7,
            "hash_ids": [9, 4],
            "session_id": "a",
            "stop": "tool_call",
        },
        {"timestamp": 6000, "hash_ids": []},
        {"timestamp": 6500, "hash_ids": [9, 4, 5], "session_id": "a", "stop": "refusal", "more": [1]},
    ]
    trace = read_trace(write(tmp_path / "some.jsonl.gz", lines))
    assert (trace.name, len(trace), trace.num_refs, trace.num_unique) == ("some", 2, 5, 3)
    (first, told), (second, later) = trace_requests(trace, True, lambda done: None)
    assert second[:2] == first
    assert len(set(second)) == 3
    assert told == Use(0.0, 1, b"", 7, Stop.TOOL_CALL, 1)
    assert later == Use(1.5, 2, b"", -1, Stop.UNKNOWN, 1)
    untold = [use for _, use in trace_requests(trace, False, lambda done: None)]
    assert untold == [Use(0.0, 1, b"", 7), Use(1.5, 2, b"", -1)]


def test_time_that_runs_backwards_stands_still_and_is_counted(tmp_path: Path) -> None:
    trace = load(tmp_path, [{"timestamp": t, "hash_ids": [1]} for t in (1000, 5000, 2000, 3000, 9000)])
    assert trace.times_s.tolist() == [0, 4, 4, 4, 8]
    assert trace.num_backwards == 2


@pytest.mark.parametrize(
    "text",
    [
        "{", '{"timestamp": 1}', '{"timestamp": -1, "hash_ids": [1]}', '{"timestamp": 1, "hash_ids": [-1]}',
        '{"timestamp": 1, "hash_ids": ["a"]}', '{"timestamp": 1, "hash_ids": [99999999999999999999]}', "[]", "\udcff",
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"timestamp": 1, "hash_ids": [1]}\n' + text.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:2: "):
        read_trace(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no request"):
        load(tmp_path, [])
    broken = tmp_path / "x.jsonl.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match=r"x\.jsonl\.gz"):
        read_trace(broken)


@pytest.mark.parametrize("name", POLICIES)
def test_hits_are_those_of_a_naive_replay(tmp_path: Path, name: str) -> None:
    trace = load(tmp_path, sessions(3))
    policy, resident, hits = make_policy(name, 60), set[bytes](), 0
    for chain, use in trace_requests(trace, True, lambda done: None):
        for key in chain:
            if key not in resident:
                break
            hits += 1
        policy.access(chain, use)
        missing = [key for key in chain if key not in resident]
        if missing:
            policy.insert(missing, use)
        resident.update(missing)
        for key in policy.victims(max(len(resident) - 60, 0)):
            resident.remove(key)
        assert len(resident) <= 60
    assert replay(trace, make_policy(name, 60), 60) == hits
    assert hits <= min_hits(trace, 60) <= infinite_hits(trace)


@pytest.mark.parametrize("name", POLICIES)
def test_hostile_traces_cost_hits_and_nothing_else(tmp_path: Path, name: str) -> None:
    """Ids that break the prefix rule, a chunk twice in a request, floods of single chunks, time that stands still."""
    rng = random.Random(1)
    lines: Lines = [
        {"timestamp": 0, "hash_ids": [rng.randrange(50) for _ in range(rng.randint(1, 40))]} for _ in range(300)
    ]
    lines += [{"timestamp": rng.randrange(9000), "hash_ids": [1000 + i]} for i in range(500)]
    trace = load(tmp_path, lines)
    for capacity in (1, 10, 1000):
        assert 0 <= replay(trace, make_policy(name, capacity), capacity) <= trace.num_refs


def tiny(seed: int) -> Lines:
    """Make nine requests for paths in a random tree of nine chunks."""
    rng = random.Random(seed)
    paths: list[list[int]] = [[]]
    for chunk in range(9):
        paths.append([*rng.choice(paths), chunk])
    return [{"timestamp": step, "hash_ids": rng.choice(paths[1:])} for step in range(9)]


@pytest.mark.parametrize("seed", range(20))
def test_the_oracle_is_the_best_of_all_choices(tmp_path: Path, seed: int) -> None:
    """Compares with brute force over every set, prefix-closed or not, that could be kept after each request."""
    trace = load(tmp_path, tiny(seed))
    chains = [chain for chain, _ in trace_requests(trace, True, lambda done: None)]
    for capacity in (1, 2, 3, 5):
        states: dict[frozenset[bytes], int] = {frozenset(): 0}
        for chain in chains:
            following: dict[frozenset[bytes], int] = {}
            for kept, hits in states.items():
                more = next((i for i, key in enumerate(chain) if key not in kept), len(chain))
                pool = kept.union(chain)
                for chosen in map(frozenset, itertools.combinations(pool, min(capacity, len(pool)))):
                    following[chosen] = max(following.get(chosen, 0), hits + more)
            states = following
        assert min_hits(trace, capacity) == max(states.values())


@pytest.mark.parametrize(
    ("text", "chunks"), [("3%", 60), ("0.01%", 1), ("5000", 5000), ("1GiB", 512), ("200%", 4000), ("1MiB", 1)]
)
def test_capacities(text: str, chunks: int) -> None:
    assert capacity_chunks(text, 2000, 2 << 20) == chunks


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "-1%", "-5", "x%", "nan%", "inf%", "3 %%", "12 apples", "9" * 30, "1" + "0" * 5000]
)
def test_capacities_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="capacity is"):
        capacity_chunks(text, 2000, 2 << 20)


def test_command(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.jsonl", sessions(5)), write(tmp_path / "two.jsonl.gz", sessions(6))
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    args = ["replay", str(one), str(two), "--policy", "grit,lru", "--capacity", "10%,40", "--json", str(out)]
    done = CliRunner().invoke(app, [*args, "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    assert {"cpu", "threads", "gpu", "commit", "versions"} <= set(result["meta"])
    rows = result["rows"]
    expected = itertools.product(["one", "two"], ["10%", "40"], ["grit", "lru", "min"])
    assert [(r["trace"], r["policy"]) for r in rows] == [(trace, policy) for trace, _, policy in expected]
    for row in rows:
        assert 0 < row["hit_ratio"] < 1
        assert row["capacity_fraction"] == row["capacity_chunks"] / row["unique_chunks"]
    again = CliRunner().invoke(app, [*args, "--workers", "1"])
    assert again.exit_code == 0, again.output
    same = [(r["trace"], r["policy"], r["capacity_chunks"], r["hit_ratio"]) for r in rows if r["policy"] != "min"]
    rows = json.loads(out.read_text())["rows"]
    assert [(r["trace"], r["policy"], r["capacity_chunks"], r["hit_ratio"]) for r in rows] == same


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "lru,best"], "policy is 'best'; expected one of lru"),
        (["--capacity", "0%"], "capacity is '0%'"),
        (["--chunk-size", "none"], "chunk-size is 'none'"),
        (["--remote-capacity", "0"], "capacity is '0'"),
        (["--remote-capacity", "9%", "--persist", "all,some"], "persist is 'some'; expected one of all"),
        (["--remote-capacity", "9%", "--persist", "predicted"], "policy 'lru' predicts nothing; use grit"),
        (["--remote-capacity", "9%", "--plot", "x.png"], "--plot draws one tier, but --remote-capacity asks for two"),
        (["--json", "/proc/none/x.json"], "cannot write /proc/none"),
        (["--json", "/"], "json is '/', which is a folder; give a file to write"),
    ],
)
def test_errors_of_the_command(tmp_path: Path, more: list[str], message: str) -> None:
    trace = write(tmp_path / "one.jsonl", sessions(5))
    done = CliRunner().invoke(app, ["replay", str(trace), "--workers", "1", *more])
    assert done.exit_code == 2
    assert message in done.output
    gone = CliRunner().invoke(app, ["replay", str(tmp_path / "none.jsonl")])
    assert gone.exit_code == 2
    assert "which is not there; give a file" in gone.output


def test_a_bad_trace_ends_the_command_among_workers(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", sessions(5)), tmp_path / "bad.jsonl"
    bad.write_text('{"timestamp": 1}\n')
    done = CliRunner().invoke(app, ["replay", str(bad), str(good), "--policy", "lru", "--workers", "2"])
    assert done.exit_code == 2
    assert "bad.jsonl:1: " in done.output.replace("\n", "")


def test_times_that_run_backwards_are_reported(tmp_path: Path) -> None:
    trace = write(tmp_path / "one.jsonl", [{"timestamp": t, "hash_ids": [1]} for t in (5, 3, 4, 9)])
    done = CliRunner().invoke(app, ["replay", str(trace), "--policy", "lru", "--capacity", "1", "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "one: 2 requests are older" in done.output


def test_two_traces_of_one_name(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / name, sessions(5))) for name in ("one.jsonl", "one.jsonl.gz")]
    done = CliRunner().invoke(app, ["replay", *paths])
    assert done.exit_code == 2
    assert "two traces are named 'one'" in done.output
