"""A directory store for its tests, and looks at its files."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.remote.stores.conformance import Bench, MakeStore, key_of

VALUE = 4096 + 8192  # bytes of the small values here


def makes(path: Path, options: str = "") -> MakeStore:
    return lambda: make_store(RemoteUrl.parse(f"file://{path}?{options}" if options else f"file://{path}"))


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def bench(store_path: Path) -> Iterator[Bench]:
    bench = Bench(makes(store_path), payload_nbytes=8192)
    yield bench
    bench.close()


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of its own. Its size may be given by indirect parametrization."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '256k')}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a real full disk is not tested: no tmpfs can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], capture_output=True)


def knows_direct(path: Path) -> bool:
    try:
        os.close(os.open(path / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def values_in(path: Path) -> list[Path]:
    return [p for p in path.glob("kvkern1/??/*") if len(p.name) == 64]


def temporaries_in(path: Path) -> list[Path]:
    return list(path.glob("kvkern1/*/.kvkern-*.tmp"))


def nbytes_in(path: Path) -> int:
    total = 0
    for value in values_in(path):
        with suppress(FileNotFoundError):  # it may be evicted meanwhile
            total += value.stat().st_size
    return total


def file_of(path: Path, number: int) -> Path:
    name = key_of(number).hex()
    return path / "kvkern1" / name[:2] / name


def wait_for(what: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)
