"""The benches run and write the JSON that the documents promise. Does not judge times."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvkern.arena.folder import arena_folder
from tests.remote.required_servers import need

ROOT = Path(__file__).resolve().parents[2]


def run_quick(name: str, folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    """Run `bench/<name>.py --quick` and return (its JSON, its stdout)."""
    out = folder / f"{name}.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--quick", "--json", str(out), *more],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def names_in_shared_memory() -> set[str]:
    """Return the names of all files in /dev/shm, and in the folder of this user's arenas there."""
    folder = arena_folder(Path("/dev/shm"))
    with suppress(FileNotFoundError):
        return {*os.listdir("/dev/shm"), *os.listdir(folder)}
    return set(os.listdir("/dev/shm"))


LEFT_BEFORE = frozenset(names_in_shared_memory())  # by runs that were killed


def files_left(own: str) -> set[str]:
    """Return the files that a bench left in /dev/shm. `own` matches its arenas' names, because other benches may be running."""
    names = names_in_shared_memory() - LEFT_BEFORE
    return {name for name in names if re.match(rf"kvkern-{os.getuid()}-bench-(?:{own})", name)}


@pytest.mark.slow
def test_cache(tmp_path: Path) -> None:
    result, printed = run_quick("cache", tmp_path)
    assert {"cpu", "threads", "gpu", "commit", "versions"} <= set(result["meta"])
    small, large, overload = result["rows"]
    for row, tokens in ((small, 2048), (large, 8192)):
        assert (row["case"], row["tokens"], row["chunk_tokens"]) == ("full_hit", tokens, 16)
        assert all(
            row[name] > 0 for name in ("ms", "min_ms", "keys_ms", "lookup_ms", "acquire_ms", "release_ms", "runs")
        )
        assert row["min_ms"] <= row["ms"]
    assert large["time_ratio"] == pytest.approx(large["ms"] / small["ms"])
    assert overload["case"] == "overload"
    assert overload["offered_chunks"] > overload["slots"]  # it was an overload
    assert overload["dropped_chunks"] == 0
    assert overload["evicted_chunks"] == overload["offered_chunks"] - overload["slots"]
    assert overload["rate"] > 0
    assert printed.count("full_hit") == 2
    assert printed.count("overload") == 1
    assert files_left(r"\d|overload") == set()


@pytest.mark.slow
def test_chunk_keys(tmp_path: Path) -> None:
    result, printed = run_quick("chunk_keys", tmp_path)
    rows = result["rows"]
    assert [(r["backend"], r["tokens"], r["input"]) for r in rows if "tokens" in r] == [
        ("numba", 8192, "uint32"),
        ("numba", 8192, "list"),
        ("ref", 8192, "uint32"),
        ("numba", 2048, "uint32"),
        ("numba", 2048, "list"),
    ]
    has_vllm = importlib.util.find_spec("vllm") is not None
    for row in rows:
        if "tokens" not in row:
            assert set(row) == {"backend", "adopted_keys", "ms"}
            assert row["ms"] > 0
            continue
        ratios = {"ratio_vllm_sha256", "ratio_vllm_sha256_cbor"}
        assert set(row) == {"backend", "tokens", "chunk_tokens", "input", "ns_per_token", *ratios}
        assert row["chunk_tokens"] == 16
        assert row["ns_per_token"] > 0
        assert all((row[name] > 0) if has_vllm else row[name] is None for name in ratios)
    assert [row["backend"] for row in rows if "adopted_keys" in row] == ["numba", "ref"]
    assert "Targets: " in printed


@pytest.mark.slow
def test_paged_copy(tmp_path: Path) -> None:
    result, printed = run_quick("paged_copy", tmp_path)
    rows = result["rows"]
    assert [(row["op"], row["run_nbytes"]) for row in rows] == [
        (op, run << 10) for run in (256, 32, 18, 2) for op in ("gather", "scatter")
    ]
    for row in rows:
        assert (row["backend"], row["threads"]) == ("numba", 2)
        assert all(row[name] > 0 for name in ("nbytes", "gb_s", "memcpy_gb_s", "ratio_memcpy", "ratio_index_select"))
    assert printed.count("gather") == printed.count("scatter") == 4
    assert files_left("copy|memcpy") == set()


FLOODED = ("flooded_unread", "flooded_read")


@pytest.mark.slow
def test_node(tmp_path: Path) -> None:
    result, printed = run_quick("node", tmp_path)
    rows = {row["case"]: row for row in result["rows"]}
    assert list(rows) == [
        "together",
        "lookup",
        "echo",
        "acquire",
        "acquire_copying",
        *FLOODED,
        "load",
        "store",
        "memory",
    ]
    assert rows["together"]["clients"] == 8
    assert rows["together"]["stored_chunks"] == rows["together"]["found_chunks"] == 8 * 128
    cases = {"lookup": 1, "echo": 8, "acquire": 8, "acquire_copying": 8} | dict.fromkeys(FLOODED, 1)
    for case, clients in cases.items():
        assert (rows[case]["clients"], rows[case]["chunks"]) == (clients, 128)
        assert 0 < rows[case]["p50_us"] <= rows[case]["p99_us"]
    assert rows["acquire_copying"]["gb_s"] > 0
    for case in ("load", "store"):
        assert all(rows[case][name] > 0 for name in ("nbytes", "gb_s", "embedded_gb_s", "ratio_embedded"))
    assert rows["memory"]["slots"] * 7 // 8 <= rows["memory"]["chunks"] < rows["memory"]["slots"]
    assert all(row["runs"] > 0 and row["other_cpus"] >= 0 for row in rows.values())
    assert printed.count("memory") == 2
    assert files_left("node") == set()


@pytest.mark.slow
def test_policy(tmp_path: Path) -> None:
    result, printed = run_quick("policy", tmp_path)
    assert [row["policy"] for row in result["rows"]] == ["lru", "arc", "s3fifo", "lirs", "grit"]
    for row in result["rows"]:
        assert row["resident_chunks"] == 2000
        assert min(row["us_per_chunk"], row["us_per_request"], row["bytes_per_chunk"]) > 0
        assert row["policy"] in printed


@pytest.mark.slow
def test_policy_scan(tmp_path: Path) -> None:
    result, printed = run_quick("policy", tmp_path, "--scan")
    rows = result["rows"]
    names = ["lru", "arc", "s3fifo", "lirs", "grit", "min"]
    assert [(row["trace"], row["policy"]) for row in rows] == [("scan-1", name) for name in 4 * names]
    for row in rows:
        assert 0 < row["hit_ratio"] <= next(r["hit_ratio"] for r in rows[5::6] if _same_size(r, row))
    assert len(printed.splitlines()) == 4
    assert printed.count("grit_gap") == 4


@pytest.mark.slow
def test_policy_ablation(tmp_path: Path) -> None:
    """Everything that the variants replace exists, and all variants compile. No other test runs them all."""
    lines = [{"timestamp": 900 * i, "hash_ids": list(range(i % 50 * 9, i % 50 * 9 + i % 7 + 1))} for i in range(300)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code = """
import _ablation
from pathlib import Path
for variant in _ablation.VARIANTS.values():
    variant()
results = map(_ablation.run_cell, _ablation._cells([Path("t.jsonl")], "grit"))
rows = [{"variant": _ablation.FULL, "gap": 0.5, **_ablation._row(result)} for result in results]
print(*_ablation.table([*rows, *({**row, "variant": "less", "hit_ratio": 0.0} for row in rows)]), sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}", "NUMBA_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, _, full, less = done.stdout.splitlines()
    assert head.count("| t ") == 3
    assert re.fullmatch(r"\| GRIT( \| \.\d{4}){3} \| \.50 \|", full)
    assert re.fullmatch(r"\| less( \| (-\d*\.\d|0)){3} \| \.50 \|", less)


def _same_size(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["capacity_chunks"] == other["capacity_chunks"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "program", "module"),
    [
        ("file", "", ""),
        ("file_cached", "", ""),
        ("redis", "redis-server", "hiredis"),
        ("mooncake", "", "mooncake.store"),
        ("s3", "", "flask_cors"),
    ],
)
def test_remote(tmp_path: Path, kind: str, program: str, module: str) -> None:
    need(kind, program, module)
    result, printed = run_quick("remote", tmp_path, "--remote", kind)
    assert [(row["remote"], row["op"]) for row in result["rows"]] == [(kind, "get"), (kind, "put")]
    for row in result["rows"]:
        assert row["ratio_raw"] == pytest.approx(row["gb_s"] / row["raw_gb_s"])
        if row["op"] == "get":  # the raw loop of files verifies too
            assert (row["ratio_raw_verified"] > row["ratio_raw"]) == ("file" not in kind)
        assert row["gb_s"] > 0
        assert row["cpu_s_per_gb"] > 0
        assert row["chunk_nbytes"] >= 64 << 10
    assert printed.count(f"{kind:<18}") == 2
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"kvkern-bench-remote-{kind}.")]


def test_remote_names_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "remote.py"), "--quick", "--remote", "redis"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "redis-server is not installed; install the Debian package redis-server" in done.stderr


@pytest.mark.slow
def test_what_metrics_cost_an_acquire(tmp_path: Path) -> None:
    result, printed = run_quick("observability", tmp_path, "--case", "metrics_acquire")
    (row,) = result["rows"]
    assert row["case"] == "metrics_acquire"
    assert row["ratio"] > 0
    assert row["counted"] > 0  # the rounds with metrics counted
    assert printed.count("metrics_acquire") == 1
    assert files_left("metrics") == set()


@pytest.mark.vllm
@pytest.mark.slow
def test_what_metrics_cost_a_step(tmp_path: Path) -> None:
    result, _ = run_quick("observability", tmp_path, "--case", "metrics_step")
    (row,) = result["rows"]
    assert row["case"] == "metrics_step"
    assert row["ratio"] > 0
    assert row["counted"] > 0  # the rounds with metrics counted, and were asked for
