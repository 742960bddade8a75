"""Salts come and go without end; every tenant keeps its root."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvkern.cache.manager import Cache
from kvkern.integrations.vllm.tenants import MAX_KNOWN_ROOTS, Tenants
from kvkern.keys import Namespace
from kvkern.policy.lru import LRU
from kvkern.tiers.dram import DramTier
from tests.support import chain_keys, make_arena, put

pytestmark = pytest.mark.vllm
SPACE = Namespace(model="m", dtype="bfloat16", layout="l", chunk_tokens=16, weights="w", group=None, engine_hash="h")


def make_tenants(folder: Path) -> tuple[Cache, Tenants]:
    arena = make_arena(folder, slots=8)
    cache = Cache(DramTier(arena, LRU()))
    put(cache, arena, chain_keys("a", 3))
    return cache, Tenants(cache, lambda: SPACE)


def test_idle_salts_are_forgotten_and_return_to_their_roots(tmp_path: Path) -> None:
    _, tenants = make_tenants(tmp_path)
    first = tenants.root_of("first")
    roots = {tenants.root_of(str(number)) for number in range(70_000)}
    assert len(roots) == 70_000
    assert len(tenants._roots) == MAX_KNOWN_ROOTS
    assert tenants.root_of("new") not in roots  # it is cached, as the first tenant was
    assert tenants.root_of("first") == first
    assert not any("first" in str(tenant) for tenant in tenants._roots)


def test_a_tenant_in_use_is_not_described_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tenants = make_tenants(tmp_path)
    described: list[bytes] = []
    monkeypatch.setattr(cache, "describe_namespace", lambda root, fields: described.append(root))
    for number in range(2 * MAX_KNOWN_ROOTS):
        tenants.root_of("busy")
        tenants.root_of(str(number))
    assert described.count(tenants.root_of("busy")) == 1


def test_a_reset_empties_an_own_cache_also_of_forgotten_tenants(tmp_path: Path) -> None:
    cache, tenants = make_tenants(tmp_path)
    before = tenants.root_of("first")
    tenants.reset()
    assert len(cache._dram) == 0
    assert tenants.private
    assert tenants.root_of("first") != before
