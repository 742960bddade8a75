"""The file system's clock, while this machine's is wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvkern.remote.stores.file.clock import FileSystemClock


@pytest.mark.parametrize("ahead_s", [-1200.0, 0.0, 1200.0])
def test_it_is_the_clock_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead_s)
    clock = FileSystemClock(str(tmp_path))
    clock.measure()
    path = tmp_path / "file"
    path.touch()
    now_ns = clock.now_ns()
    assert now_ns is not None
    assert abs(now_ns - path.stat().st_mtime_ns) < 5e9


def test_it_is_unknown_until_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FileSystemClock(str(tmp_path / "none"))
    clock.measure()
    assert clock.now_ns() is None
    (tmp_path / "none").mkdir()
    clock.measure()
    (tmp_path / "none").rmdir()
    clock.measure()  # what was measured stays
    assert clock.now_ns() is not None


def test_a_server_whose_clock_is_far_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.utime
    monkeypatch.setattr(os, "utime", lambda path: real(path, (1e6, 1e6)))
    clock = FileSystemClock(str(tmp_path))
    clock.measure()
    first = clock.now_ns()
    assert first is not None
    assert 0 <= first - 10**15 < 60 * 10**9
    assert first <= (clock.now_ns() or 0)
