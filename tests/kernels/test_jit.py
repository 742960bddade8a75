"""Compiled functions with and without a folder to keep them in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from errno import ENOSPC, EROFS
from pathlib import Path
from typing import Any

import pytest
from numba.core import caching, config

from kvkern.kernels import jit
from kvkern.kernels.jit import cache_folders, compiled


def double(x):  # type: ignore[no-untyped-def]
    return 2 * x


def square(x):  # type: ignore[no-untyped-def]
    return x * x


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that NUMBA_CACHE_DIR names. No warning was given yet in this process."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_warned", False)
    return tmp_path / "cache"


def compile_both() -> tuple[Any, Any]:
    """One compiled at its first call, one at once."""
    lazy, eager = compiled(nogil=True)(double), compiled("int64(int64)", nogil=True)(square)
    assert (lazy(21), eager(5)) == (42, 25)
    return lazy, eager


def refuse(code: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def kept(folder: Path) -> set[str]:
    return {path.name.split("-")[0] for path in folder.rglob("*.nbi")}


def test_they_are_kept_on_disk(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_both()
    assert kept(folder) == {"test_jit.double", "test_jit.square"}
    for function in compile_both():
        assert sum(function.stats.cache_hits.values()) == 1
    assert caplog.records == []


def test_with_no_folder_they_are_compiled_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is one warning, which names the remedy."""
    monkeypatch.setattr(caching.tempfile, "TemporaryFile", refuse(EROFS))
    monkeypatch.setattr(jit.os, "listdir", refuse(EROFS))
    compile_both()
    compile_both()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "compiles in memory" in record.getMessage()
    assert "NUMBA_CACHE_DIR" in record.getMessage()


def test_a_folder_that_can_only_be_read_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An installation compiles as root, and a service reads it as another user. What is missing stays in memory."""
    compiled()(double)(21)
    monkeypatch.setattr(caching.tempfile, "TemporaryFile", refuse(EROFS))
    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", refuse(EROFS))
    again = compiled()(double)
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1
    assert caplog.records == []
    assert compiled("int64(int64)")(square)(5) == 25
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()


def test_a_folder_that_fills_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", refuse(ENOSPC))
    compile_both()
    assert [os.strerror(ENOSPC) in record.getMessage() for record in caplog.records] == [True]


def test_an_index_that_a_crash_cut_off(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_both()
    for path in folder.rglob("*.nbi"):
        path.write_bytes(b"")
    compile_both()
    for function in compile_both():
        assert sum(function.stats.cache_hits.values()) == 1
    assert caplog.records == []


def test_where_compiled_code_is_looked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor asks this. The order is numba's own."""
    writable, readable = cache_folders(tmp_path / "package" / "warm.py")
    assert writable[0].parent == folder
    assert writable[1] == tmp_path / "package" / "__pycache__"
    assert readable == writable[:2]
    monkeypatch.setattr(config, "CACHE_DIR", "")
    assert cache_folders(tmp_path / "package" / "warm.py")[1] == writable[1:2]
