"""Fixtures of every test, and hypothesis without a stopwatch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvkern.cache import Cache
from kvkern.policy.lru import LRU
from kvkern.tiers.dram import DramTier
from tests.support import make_arena

# Two workers share two cores with whatever else runs there: time says nothing about the code.
settings.register_profile("kvkern", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvkern")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[tuple[Cache, object]]:
    """(a cache of eight small slots, its arena)."""
    arena = make_arena(tmp_path)
    yield Cache(DramTier(arena, LRU())), arena
    arena.close()
