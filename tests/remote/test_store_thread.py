"""Stores that do not open, register or close: the message, and that no thread is left."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from kvkern.remote import tier as tier_module
from kvkern.remote.stores.base import RemoteError
from tests.remote.nodes import Node, node
from tests.remote.stores.memory import MemoryStore


def test_a_store_that_cannot_be_opened_is_closed(tmp_path: Path) -> None:
    class Refusing(MemoryStore):
        async def open(self) -> None:
            raise ConfigError("wrong password; give the right one")

    store = Refusing()
    with pytest.raises(ConfigError, match="wrong password"):
        Node(tmp_path, store)
    assert store.calls == [("close", 0)]


def test_a_tier_that_does_not_start_leaves_no_store_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("on purpose")

    monkeypatch.setattr(tier_module, "verify_slots", broken)
    store = MemoryStore()
    with pytest.raises(MemoryError):
        Node(tmp_path, store)
    assert store.calls == [("open", 0), ("close", 0)]
    assert "kvkern-remote" not in {thread.name for thread in threading.enumerate()}


def test_a_store_that_does_not_register_now(tmp_path: Path) -> None:
    class Refusing(MemoryStore):
        async def register(self, memory: memoryview) -> None:
            raise RemoteError("nobody there")

    with node(tmp_path, Refusing()) as one:
        assert one.tier.breaker.is_open


def test_a_store_that_does_not_close(tmp_path: Path) -> None:
    class Stuck(MemoryStore):
        async def close(self) -> None:
            raise RemoteError("it is gone")

    threads = threading.active_count()
    with node(tmp_path, Stuck()) as one:
        pass
    assert threading.active_count() == threads
    assert one.counters["faults"] == 1
