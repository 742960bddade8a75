"""The directory as a store: the conformance suite with and without O_DIRECT."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.base import RemoteUrl, make_store
from tests.remote.conformance import Conformance, MakeStore


def makes(path: Path, options: str = "") -> MakeStore:
    return lambda: make_store(RemoteUrl.parse(f"file://{path}?{options}" if options else f"file://{path}"))


class TestBuffered(Conformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> MakeStore:
        return makes(tmp_path / "store", "direct=no")


class TestDirect(Conformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> MakeStore:
        return makes(tmp_path / "store", "direct=yes&threads=2&sync=yes")
