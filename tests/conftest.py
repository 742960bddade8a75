"""Fixtures of all tests. Turns off the time limits of hypothesis."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from kvkern.cache.manager import Cache
from kvkern.kernels.target import interpreted
from kvkern.policy.lru import LRU
from kvkern.tiers.dram import DramTier
from tests.support import make_arena

# Two workers share two cores with other programs, so the time of a test says nothing about the code.
settings.register_profile("kvkern", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvkern")


@pytest.hookimpl(trylast=True)  # after pytest-xdist, which puts the groups into the names
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse to run if groups of tests are not kept together. Skip tests of Triton kernels that cannot run here.

    The environment chooses Triton's interpreter before the import.
    """
    no_interpreter = pytest.mark.skip(reason="TRITON_INTERPRET=1 is not set; `make test` has a phase with it")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    grouped = config.getoption("loadgroup", False)  # in a worker of `--dist loadgroup`
    for item in items:
        if grouped and item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
            raise pytest.UsageError(f"pytest-xdist ignores the group of {item.nodeid}; install the pytest of cpu.lock")
        if item.get_closest_marker("interpret") and not interpreted():
            item.add_marker(no_interpreter)
        if item.get_closest_marker("gpu") and (interpreted() or not torch.cuda.is_available()):
            item.add_marker(no_gpu)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[tuple[Cache, object]]:
    """A cache of eight small slots, and its arena."""
    arena = make_arena(tmp_path)
    yield Cache(DramTier(arena, LRU())), arena
    arena.close()
