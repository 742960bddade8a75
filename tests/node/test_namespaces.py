"""What the daemon remembers of namespaces: warnings, bounds, and that a quota holds for forgotten namespaces too."""

from __future__ import annotations

import pytest

from kvkern.arena.file import Arena
from kvkern.assemble import build_cache
from kvkern.node.daemon.quotas import Quotas
from kvkern.node.daemon.sessions import MAX_REMEMBERED_ENGINES, Session, Sessions
from tests.node.conftest import publish_one_by_one
from tests.support import chain_keys, key


class Node:
    """A daemon's state, and two engines on it."""

    def __init__(self, arena: Arena, quotas: Quotas | None = None) -> None:
        quotas = quotas or Quotas()
        self.arena = arena
        self.sessions = Sessions(
            build_cache(arena, shares=quotas.shares, policy="lru"), arena, alive=lambda pid, start: True, quotas=quotas
        )
        self.first, self.second = self.connect("first"), self.connect("second")

    def connect(self, name: str) -> Session:
        return self.sessions.attach((100, 1), name, writer=True)

    def describe(self, root: bytes, engine: Session | None = None, /, **fields: str) -> str:
        return self.sessions.describe(engine or self.first, root, fields)

    def store(self, namespace: bytes, count: int) -> int:
        """Store chunks of a sequence one after the other. Returns how many of them are cached then."""
        chain = chain_keys(namespace, count)
        publish_one_by_one(self.sessions, self.first, namespace, chain)
        return self.sessions.cache.lookup(chain)


@pytest.fixture
def node(arena: Arena) -> Node:
    return Node(arena)


# -- warnings ------------------------------------------------------------------------------------------------------------


def test_a_differing_hash_identity_is_reported(node: Node) -> None:
    assert node.describe(key(1), model="m", engine_hash="sha256 1") == ""
    assert node.describe(key(1), model="m", engine_hash="sha256 1") == ""
    assert node.describe(key(2), model="n", engine_hash="sha256 2") == ""
    warning = node.describe(key(3), model="m", engine_hash="sha256 2")
    assert "(sha256 1, here sha256 2)" in warning
    assert "PYTHONHASHSEED" in warning
    assert "(None, here" not in node.describe(key(4), model="m", salt="s", engine_hash="sha256 2")
    assert "here None" in node.describe(key(5), model="m")
    assert node.sessions.usage()["namespaces"] == 5


def test_an_engine_is_warned_once(node: Node) -> None:
    """An engine describes its namespaces again after a lost connection, and is not warned again. A new engine is warned."""
    one, other = {"model": "m", "engine_hash": "1"}, {"model": "m", "engine_hash": "2"}
    assert node.describe(key(1), node.first, **one) == ""
    assert node.describe(key(2), node.second, **other) != ""
    node.sessions.detach(node.second)
    assert node.describe(key(2), node.connect("second"), **other) == ""
    assert node.describe(key(1), node.first, **one) == ""
    assert node.describe(key(2), node.connect("third"), **other) != ""
    assert node.describe(key(2), node.first, **one) == ""  # it has corrected its setting


def test_who_was_told_is_bounded(node: Node) -> None:
    for number in range(3 * MAX_REMEMBERED_ENGINES):
        node.describe(key(1), node.connect(f"e{number}"), model="m")
    assert len(node.sessions.namespaces[key(1)].engines) <= MAX_REMEMBERED_ENGINES


class Counted(str):
    """A field that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def test_a_description_is_not_compared_with_all_others(node: Node) -> None:
    for number in range(500):
        node.describe(key(number), model=Counted(number), engine_hash="1")
    Counted.compared = 0
    for number in range(500):
        node.describe(key(number), model=Counted(number), engine_hash="1")
        node.describe(key(number, 2), model=Counted(number), engine_hash="2")
    assert Counted.compared < 20 * 500


# -- bounds --------------------------------------------------------------------------------------------------------------


def test_those_used_longest_ago_are_forgotten(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvkern.node.daemon.sessions.MAX_NAMESPACES", 3)
    for number in (0, 1, 2, 0):
        node.describe(key(number), model=str(number), engine_hash="1")
    assert node.store(key(1), 1) == 1
    node.describe(key(3), model="3", engine_hash="1")
    assert list(node.sessions.namespaces) == [key(0), key(1), key(3)]
    assert node.describe(key(4), model="2", engine_hash="2") == ""  # its description is forgotten
    assert len(node.sessions._hashes) == 3


def test_a_quota_holds_however_many_namespaces_there_are(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each namespace is described, used, forgotten, used again and described again."""
    monkeypatch.setattr("kvkern.node.daemon.sessions.MAX_NAMESPACES", 2)
    slot_nbytes = arena.spec.geometry.slot_nbytes
    node = Node(arena, Quotas(models={"large": 6 * slot_nbytes}, tenant=3 * slot_nbytes))
    assert node.store(key("nobody has described it"), 8) == 3
    for number in range(4):
        node.describe(key(number), model="m", salt=str(number))
        assert node.store(key(number), 8) == 3
    assert node.store(key(0), 8) == 3
    node.describe(key("large"), model="large")
    assert node.store(key("large"), 8) == 6
    for number in (1, 2):
        node.describe(key(number), model="m", salt=str(number))
    assert node.store(key("large"), 8) == 3  # forgotten: it gets the smallest quota


def test_without_quotas_nothing_is_limited(arena: Arena) -> None:
    node = Node(arena, Quotas(fair=True))
    assert node.store(key("nobody has described it"), 20) == 20
