"""Spans do nothing unless KVKERN_NVTX asks for them; then they name the copiers' pieces."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kvkern.config import nvtx_requested
from kvkern.transfer import nvtx
from kvkern.transfer.gpu.planner import Method


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_asks(monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool) -> None:
    monkeypatch.delenv("KVKERN_NVTX", raising=False)
    if value is not None:
        monkeypatch.setenv("KVKERN_NVTX", value)
    assert nvtx_requested() is asked


def test_spans_that_are_off_are_one_shared_context() -> None:
    span = nvtx.make_span(False)
    assert span("a") is span("b")
    with span("a"), span("a"):
        pass


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has NVTX")
def test_spans_without_cuda_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvkern"), nvtx.make_span(True)("a"):
        pass
    assert "KVKERN_NVTX is set, but torch" in caplog.text


@pytest.mark.gpu
def test_spans_on_a_gpu_are_torchs() -> None:
    with nvtx.make_span(True)("a"):
        pass


def test_pieces_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for both copiers. A span also ends if its piece fails."""
    from kvkern.transfer import host
    from kvkern.transfer.gpu import stream_lanes
    from tests.transfer.gpu.late_engine import Engine, load_late, store_late

    seen: list[str] = []
    ended: list[str] = []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        seen.append(name)
        try:
            yield
        finally:
            ended.append(name)

    monkeypatch.setattr(host, "span", span)
    monkeypatch.setattr(stream_lanes, "span", span)
    engine = Engine(tmp_path, "cpu", Method.STAGED)
    _, reserved = store_late(engine, "a", 1)
    load_late(engine, "a", reserved)
    bad = engine.batch("a", np.full_like(engine.there, 9999), reserved.slots, reserved.generations)
    assert engine.copier.load([bad]).wait(60).error is not None
    copier = host.HostCopier(engine.copier._groups, engine.arena, 0, engine.copier.blocks_per_chunk, threads=1)
    batch = engine.batch("a", engine.here, reserved.slots, reserved.generations)
    assert copier.load([batch]).wait(60).error is None
    assert copier.store([batch]).wait(60).error is None
    copier.close()
    engine.close()
    kinds = {"kvkern store", "kvkern load"}
    kinds |= {
        f"kvkern gpu {name}: {part}" for name in ("store", "load") for part in ("enqueue", "wait, verify, publish")
    }
    assert set(seen) == kinds
    assert sorted(seen) == sorted(ended)
