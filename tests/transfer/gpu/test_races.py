"""What only a GPU shows: that the copier's streams wait where they must, when the engine is late and reuses blocks at once.

Every order of the streams is proven on a fake device (test_orders.py). Here the real ones run, with poisoned buffers and
delays that are longer than any transfer; the last tests make sure that a missing wait would be seen.
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
from tests.transfer.gpu.engine import CHUNKS, Engine, load_late, store_late, until

ROOT = Path(__file__).resolve().parents[3]
gpu = pytest.mark.gpu
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
each_method = pytest.mark.parametrize("method", list(Method))


@pytest.fixture
def engine(tmp_path: Path, device: str, method: Method) -> Iterator[Engine]:
    with closing(Engine(tmp_path, device, method)) as made:
        yield made


@devices
@each_method
def test_what_is_written_late_and_overwritten_at_once_is_stored_and_loaded(engine: Engine) -> None:
    want, reserved = store_late(engine, "a", seed=1)
    old, seen, got, ok = load_late(engine, "a", reserved)
    assert ok.all()
    assert engine.equal(seen, old)
    assert engine.equal(got, want)


@devices
@each_method
def test_stores_and_loads_at_once_with_one_buffer_each(engine: Engine) -> None:
    """Twenty rounds: half of the chunks go out while the other half come back into other blocks, then they change roles."""
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


@gpu
@each_method
def test_a_store_that_does_not_wait_for_the_engine_is_seen(tmp_path: Path, method: Method) -> None:
    """The delay is long enough: without the edge to the engine's stream, what was stored is not what was written."""
    with closing(Engine(tmp_path, "cuda", method, careless=True)) as engine:
        want, reserved = store_late(engine, "a", seed=1)
        torch.cuda.synchronize()
        _, _, got, _ = load_late(engine, "a", reserved)
        assert not engine.equal(got, want)


@gpu
@each_method
def test_a_load_that_does_not_wait_for_the_engine_is_seen(tmp_path: Path, method: Method) -> None:
    with closing(Engine(tmp_path, "cuda", method, careless=True)) as engine:
        _, reserved = store_late(engine, "a", seed=1)
        torch.cuda.synchronize()
        old, seen, _, _ = load_late(engine, "a", reserved)
        assert not engine.equal(seen, old)


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    """Accesses out of bounds, hazards in shared memory (the ring), reads of what nobody has written."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.transfer.gpu.sanitized", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_what_the_sanitizer_runs(tmp_path: Path) -> None:
    """The script itself, over host memory."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.transfer.gpu.sanitized", str(tmp_path), "cpu"], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{method}: equal" for method in Method]
