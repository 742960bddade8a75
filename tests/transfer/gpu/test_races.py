"""On a real GPU the copier's streams wait where they must, even if the engine is late and reuses blocks at once.

test_orders.py proves every order of the streams on a fake device. Here real streams run, with poisoned buffers and with delays
that are longer than any job. The last tests make sure that these tests would notice a missing wait.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kvkern.transfer.gpu.planner import Method
from tests.transfer.gpu.late_engine import CHUNKS, Engine, load_late, store_late, until

ROOT = Path(__file__).resolve().parents[3]
SANITIZER_SCRIPT = "tests.transfer.gpu.sanitizer_script"
gpu = pytest.mark.gpu
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
each_method = pytest.mark.parametrize("method", list(Method))


@pytest.fixture
def engine(tmp_path: Path, device: str, method: Method) -> Iterator[Engine]:
    with closing(Engine(tmp_path, device, method)) as made:
        yield made


@devices
@each_method
def test_blocks_written_late_and_reused_at_once_are_stored_and_loaded(engine: Engine) -> None:
    want, reserved = store_late(engine, "a", seed=1)
    old, seen, got, ok = load_late(engine, "a", reserved)
    assert ok.all()
    assert engine.equal(seen, old)
    assert engine.equal(got, want)


@devices
@each_method
def test_stores_and_loads_at_once_with_one_buffer_each(engine: Engine) -> None:
    """In each of twenty rounds half of the chunks are stored while the other half are loaded into other blocks."""
    half = CHUNKS // 2
    want = engine.noise(1)
    engine.write(engine.index(engine.here), want)
    first, batch = engine.reserve("even", engine.here[:half])
    assert engine.copier.store([batch]).wait(60).ok.all()
    assert engine.cache.commit(first) == half
    second, other = engine.reserve("odd", engine.here[half:])
    got = engine.noise(0)
    for _ in range(20):
        index = engine.index(engine.there)
        engine.spoil(index)
        back = engine.batch("even", engine.there[:half], first.slots, first.generations)
        jobs = [engine.copier.load([back]), engine.copier.store([other])]
        until(jobs[1].released)
        for job in jobs:
            assert job.wait(60).error is None
            assert job.ok.all()
        again = engine.copier.load([engine.batch("odd", engine.there[half:], second.slots, second.generations)])
        assert again.wait(60).ok.all()
        engine.read(index, got)
        assert engine.equal(got, want)
    assert engine.cache.commit(second) == half


def careless_round_trip(folder: Path, method: Method) -> tuple[bool, bool]:
    """Store and load on a GPU without the edge to the engine's stream.

    Returns (the load gave what the engine wrote before the store, the engine's late reader saw its blocks before the load).
    """
    with closing(Engine(folder, "cuda", method, careless=True)) as engine:
        want, reserved = store_late(engine, "a", seed=1)
        torch.cuda.synchronize()
        old, seen, got, _ = load_late(engine, "a", reserved)
        return engine.equal(got, want), engine.equal(seen, old)


@gpu
@each_method
def test_a_store_that_does_not_wait_for_the_engine_is_seen(tmp_path: Path, method: Method) -> None:
    """The delay is long enough: without the edge the stored bytes are not the bytes that the engine wrote."""
    stored_what_was_written, _ = careless_round_trip(tmp_path, method)
    assert not stored_what_was_written


@gpu
@each_method
def test_a_load_that_does_not_wait_for_the_engine_is_seen(tmp_path: Path, method: Method) -> None:
    """The delay is long enough: without the edge the load overwrites blocks that the engine still reads."""
    _, reader_saw_its_blocks = careless_round_trip(tmp_path, method)
    assert not reader_saw_its_blocks


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    """It looks for accesses out of bounds, hazards in shared memory (the ring), and reads of memory that was never written."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", SANITIZER_SCRIPT, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_sanitizer_script_runs_on_the_host(tmp_path: Path) -> None:
    """The script itself works, over host memory."""
    done = subprocess.run(
        [sys.executable, "-m", SANITIZER_SCRIPT, str(tmp_path), "cpu"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{method}: equal" for method in Method]
