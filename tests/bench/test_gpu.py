"""The GPU benches without a GPU: dry runs from end to end, their arithmetic, their plots, and their message without a GPU."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.bench.test_bench import names_in_shared_memory

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
MARK = "pytest.mark." + "gpu"
SCRIPTS = ("gpu", "gpu_copy", "gpu_paths", "gpu_interference", "gpu_keys")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")


def run(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *options], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import _gpu

    return _gpu


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCH))
    import _gpu_plots

    return _gpu_plots


@no_gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_gpu_there_is_one_line_that_names_what_is_missing(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "torch built for CUDA" in line or "no CUDA device" in line
    assert done.stdout == ""


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path: Path) -> None:
    """Every script and plot works. Every line, file and plot says that nothing was measured. No arena is left."""
    pytest.importorskip("matplotlib")
    done = run("gpu", tmp_path, "--device", "cpu", "--results", "results", "--plots", "plots")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("bench: ", "plot: "))]
    assert lines
    assert all(line.startswith("DRY RUN") for line in lines)
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(results) == set(SCRIPTS[1:])
    for result in results.values():
        assert result["meta"]["dry_run"] is True
        assert result["meta"]["device"] is None
        assert result["rows"]
    check_rows({name: result["rows"] for name, result in results.items()})
    charts = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert charts == ["gpu_copy.svg", "gpu_interference.svg", "gpu_paths.svg"]
    assert all("NO MEASUREMENT" in (tmp_path / "plots" / name).read_text() for name in charts)
    assert not [n for n in names_in_shared_memory() if n.startswith(f"kvkern-{os.getuid()}-bench-gpu")]


def check_rows(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Check that the rows are those of docs/benchmarks.md."""
    copies = [row for row in rows["gpu_copy"] if row["op"] != "ceiling"]
    assert {(r["op"], r["where"], r["stages"]) for r in copies} == {
        (op, where, stages)
        for where, ops in (("hbm", ("gather", "scatter", "checksum")), ("host", ("gather", "scatter")))
        for op in ops
        for stages in (1, 3, 4)
    }
    assert all(min(r["run_nbytes"], r["ctas"], r["nbytes"], r["gb_s"]) > 0 for r in copies)
    assert all(r["percent_hbm" if r["where"] == "hbm" else "percent_link"] is None for r in copies)  # there is no link
    assert {r["where"] for r in rows["gpu_copy"] if r["op"] == "ceiling"} == {"d2h", "h2d", "hbm"}
    paths = [row for row in rows["gpu_paths"] if row["op"] != "ceiling"]
    assert {(r["op"], r["method"]) for r in paths} == {
        (op, method) for op in ("store", "load") for method in ("staged", "zero_copy", "batch_dma", "planned")
    }
    assert all(r["chosen"] in ("staged", "zero_copy", "batch_dma") for r in paths if r["method"] == "planned")
    assert all((r["released_ms"] is None) == (r["op"] == "load") for r in paths)
    assert [(r["case"], r["op"]) for r in rows["gpu_interference"]] == [
        (case, op) for case in ("staged", "zero_copy", "batch_dma", "uncapped") for op in ("store", "load")
    ]
    assert all(r["p50_us"] <= r["p99_us"] and r["background_gb_s"] > 0 for r in rows["gpu_interference"])
    assert {r["where"] for r in rows["gpu_keys"]} == {"device", "round", "cpu"}
    assert all(r["ratio_cpu"] == 1 for r in rows["gpu_keys"] if r["where"] == "cpu")


@pytest.mark.parametrize("options", [["--results", "r"], ["--plots", "p"], []])
def test_a_dry_run_does_not_go_where_measurements_are_kept(options: list[str], tmp_path: Path) -> None:
    done = run("gpu", tmp_path, "--device", "cpu", *options)
    assert done.returncode != 0
    assert "a dry run is no measurement" in done.stderr


def test_a_single_dry_run_does_not_overwrite_measurements(shared: ModuleType) -> None:
    with pytest.raises(SystemExit, match="write a dry run elsewhere"):
        shared.write_json(shared.DryRig(), BENCH / "results" / "gpu_copy.json", [])
    assert not (BENCH / "results" / "gpu_copy.json").exists()


def test_make_bench_leaves_them_out() -> None:
    """They fail without a GPU, so `make bench` does not run them."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile[makefile.index("\nbench:") :]
    assert "*/gpu*) continue" in recipe[: recipe.index("\ngpu:")]
    assert all(path.name.startswith(("gpu", "_gpu")) for path in BENCH.glob("*gpu*.py"))


def test_make_gpu_runs_every_test_that_needs_a_gpu() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (given,) = re.findall(r"-n 0 -m gpu (.*)", makefile)
    runs = ["tests/kernels", *given.split()]
    marked = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py") if MARK in path.read_text()]
    assert len(marked) > 3
    assert [name for name in marked if not any(name == run or name.startswith(f"{run}/") for run in runs)] == []


def test_arithmetic(shared: ModuleType) -> None:
    assert shared.gb_s(10**9, 0.5) == 2
    assert shared.percent(shared.CudaRig(), 26.5, 53.0) == 50
    assert shared.percent(shared.DryRig(), 26.5, 53.0) is None
    values = [float(i) for i in range(100, 0, -1)]
    assert [shared.quantile(values, q) for q in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert shared.quantile([7.0], 0.99) == 7


def test_contenders_take_turns_and_the_first_turns_do_not_count(shared: ModuleType) -> None:
    class Rig:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def time(self, work: Any) -> float:
            self.calls.append(work())
            return len(self.calls)

    rig = Rig()
    found = shared.in_turns(rig, {"a": lambda: "a", "b": lambda: "b"}, 3)
    assert rig.calls == ["a", "b"] * (shared.WARM_UP_TURNS + 3)
    assert found == {"a": 7, "b": 8}  # of turns 3 to 5: calls 5, 7, 9 and 6, 8, 10


def test_launches_are_not_timed(shared: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is enqueued while the device still waits, so its time is the device's time and not Python's."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, end: Any) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    assert shared.CudaRig().time(lambda: calls.append("work")) == 2e-3
    assert calls == ["sleep", "record", "work", "record", "synchronize"]


def test_the_sweep_covers_both_questions(shared: ModuleType) -> None:
    """It covers 1 to 64 thread blocks and runs of 256 B to 2 MiB, and each case once."""
    import gpu_copy

    cases = gpu_copy.sweep(gpu_copy.FULL)
    assert len(cases) == len(set(cases))
    for where in ("hbm", "host"):
        assert {1, 64} <= {ctas for w, run_nbytes, ctas in cases if (w, run_nbytes) == (where, 32 << 10)}
        assert {256, 2 << 20} <= {run_nbytes for w, run_nbytes, _ in cases if w == where}


def test_vllm_is_given_the_same_bytes_to_move(shared: ModuleType) -> None:
    """Copies of vLLM's tables leave the slots as our own store did, and our load verifies them."""
    import gpu_paths

    from kvkern.transfer.gpu.link_table import Direction, HostLink, seed_calibration
    from kvkern.transfer.gpu.planner import Method

    rig = shared.DryRig()
    with closing(gpu_paths.Copies(rig, rig.device(), 32 << 10, 2, seed_calibration(HostLink()))) as copies:
        copies.run(Direction.D2H, 2, Method.STAGED)
        slots = copies.arena.parts(0)
        stored = slots[:2].copy()
        slots[:2] = 0
        for src, dst, nbytes in zip(
            *(t.tolist() for t in gpu_paths.vllm_tables(copies, Direction.D2H, 2)), strict=True
        ):
            ctypes.memmove(dst, src, nbytes)
        assert (slots[:2] == stored).all()
        copies.run(Direction.H2D, 2, Method.STAGED)


def test_interference_ratios_are_bigger_where_steps_are_less_disturbed(shared: ModuleType) -> None:
    import gpu_interference

    row = gpu_interference.row("staged", "store", 32, [20.0, 20.0, 40.0], [10.0] * 6, 5.0)
    assert (row["p50_us"], row["p99_us"], row["ratio_p50"], row["ratio_p99"]) == (20, 40, 0.5, 0.25)


SYNTHETIC = {
    "gpu_copy": [
        *({"op": "ceiling", "where": where, "gb_s": 50.0} for where in ("d2h", "h2d", "hbm")),
        *(
            {"op": "gather", "where": where, "run_nbytes": run, "ctas": ctas, "stages": 1, "nbytes": 1, "gb_s": 1.0}
            for where in ("hbm", "host")
            for run, ctas in ((4096, 8), (8192, 8), (8192, 16), (16384, 8))
        ),
    ],
    "gpu_paths": [
        *({"op": "ceiling", "method": name, "gb_s": 50.0} for name in ("d2h", "h2d", "hbm")),
        *(
            {"op": op, "method": method, "run_nbytes": run, "chunks": chunks, "nbytes": 1, "gb_s": 1.0}
            for op in ("store", "load")
            for method in ("staged", "vllm")
            for run in (4096, 8192)
            for chunks in (1, 8)
        ),
    ],
    "gpu_interference": [
        {"case": "staged", "op": "store", "ratio_p50": 0.5, "ratio_p99": 0.25, "background_gb_s": 5.0}
    ],
}  # fmt: skip


def test_plots_of_synthetic_numbers(plots: ModuleType, tmp_path: Path) -> None:
    """A plot of a measurement names its GPU and has no warning. A missing result is not drawn. The numbers here are made up."""
    meta = {"dry_run": False, "device": {"name": "SYNTHETIC GPU"}, "commit": "abc"}
    for name, rows in SYNTHETIC.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    written = list(plots.draw_all(tmp_path, tmp_path / "out"))
    assert sorted(path.name for path in written) == sorted(f"{name}.svg" for name in SYNTHETIC)
    for path in written:
        text = path.read_text()
        assert "SYNTHETIC GPU, abc" in text
        assert "NO MEASUREMENT" not in text
    (tmp_path / "gpu_paths.json").unlink()
    assert len(list(plots.draw_all(tmp_path, tmp_path / "fewer"))) == 2
