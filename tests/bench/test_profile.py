"""The profiling scripts without a profiler: their commands, how they parse a profiler's output, and their verdicts."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "profile"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import ncu
    import nsys
    import workload

    return {"ncu": ncu, "nsys": nsys, "workload": workload}


def parsed(workload: ModuleType, *given: str, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    workload.add_options(parser)
    return argparse.Namespace(**vars(parser.parse_args(given)), **more)


def test_the_workload_runs(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """Runs the same command that the profilers get, with host memory in place of a GPU."""
    for method in ("staged", "zero_copy", "batch_dma"):
        args = parsed(scripts["workload"], "--method", method, "--chunks", "2", "--repeat", "1", "--device", "cpu")
        done = subprocess.run(
            scripts["workload"].workload_command(args), cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["nsys", "ncu"])
def test_a_missing_profiler_is_named(name: str, tmp_path: Path) -> None:
    if shutil.which(name):
        pytest.skip(f"{name} is installed here")
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent.parent)},
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name} is not installed")


@pytest.mark.parametrize("name", ["nsys", "ncu"])
def test_a_dry_run_needs_no_profiler(name: str, tmp_path: Path) -> None:
    """--device cpu runs the workload on host memory and says that nothing was profiled, whether or not a profiler is there."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--device", "cpu", "--chunks", "2", "--repeat", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PATH": "", "PYTHONPATH": str(FOLDER.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("DRY RUN: the workload ran on host memory")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_that_fails_fails(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scripts["workload"], "workload_command", lambda args: [sys.executable, "-c", "raise SystemExit(3)"]
    )
    with pytest.raises(SystemExit) as ended:
        scripts["workload"].dry_run(parsed(scripts["workload"], "--device", "cpu"))
    assert ended.value.code == 3


def test_commands_hand_the_workload_on(scripts: dict[str, ModuleType]) -> None:
    args = parsed(scripts["workload"], "--method", "zero_copy", output="out", no_metrics=False, launches=3)
    trace, counters = (
        scripts["nsys"].profiler_command("nsys", args),
        scripts["ncu"].profiler_command("ncu", ["a.sum", "b.sum"], args),
    )
    assert trace[:2] == ["nsys", "profile"]
    assert "--gpu-metrics-devices=0" in trace
    assert counters[counters.index("--metrics") + 1] == "a.sum,b.sum"
    for command in (trace, counters):
        assert command[-12:] == scripts["workload"].workload_command(args)[-12:]
        assert command[-12:][1] == "zero_copy"
    args.no_metrics = True
    assert not [part for part in scripts["nsys"].profiler_command("nsys", args) if "gpu-metrics" in part]


def test_only_counters_that_the_gpu_has_are_asked_for(scripts: dict[str, ModuleType]) -> None:
    ncu = scripts["ncu"]
    listing = (
        "Device NVIDIA (sm_90)\n\npcie__read_bytes   Counter  byte  # of bytes\ngpu__time_duration Counter ns time\n"
    )
    assert ncu.available_metrics(listing) == [ncu.TIME, ncu.LINK_READ]


RAW = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","pcie__read_bytes.sum","smsp__issue_active.avg.pct_of_peak_sustained_active"
"","","nsecond","byte","%"
"0","copy_chunks","1,000,000","50,000,000","12.5"
"1","copy_chunks","2,000,000","n/a","80"
"""


def test_the_raw_page_is_read(scripts: dict[str, ModuleType]) -> None:
    ncu = scripts["ncu"]
    first, second = ncu.parse_launches(RAW)
    assert first == {ncu.TIME: pytest.approx(1e-3), ncu.LINK_READ: 5e7, ncu.ISSUE: 12.5}
    assert ncu.LINK_READ not in second
    assert ncu.parse_launches("nothing") == []


def test_verdicts(scripts: dict[str, ModuleType]) -> None:
    ncu = scripts["ncu"]
    link = {ncu.TIME: 1e-3, ncu.LINK_READ: 5e7, ncu.HBM_PERCENT: 10.0, ncu.ISSUE: 20.0}
    assert ncu.verdict(link, 53.0).startswith("bound by the link (the link 94%")
    assert ncu.verdict({**link, ncu.LINK_READ: 5e6}, 53.0).startswith("bound by latency")
    assert ncu.verdict({**link, ncu.HBM_PERCENT: 85.0}, None).startswith("bound by HBM")
    assert ncu.verdict({**link, ncu.ISSUE: 90.0}, None).startswith("bound by the SMs' instructions")
    sectors = {ncu.TIME: 1e-3, ncu.HOST_WRITE: 5e7 / 32}
    assert ncu.verdict(sectors, 53.0).startswith("bound by the link")
    assert ncu.verdict({}, None).startswith("nothing to judge by")
