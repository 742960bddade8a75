"""Policies by name: made when asked for, imported no earlier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from kvkern.policy import POLICIES, checked_policy, make_policy
from kvkern.policy.lru import LRU


def test_names() -> None:
    assert POLICIES == ("lru", "arc", "s3fifo", "lirs", "grit")
    assert isinstance(make_policy("lru", 8), LRU)
    for name in POLICIES:
        assert make_policy(name, 8).victims(1) == []


@pytest.mark.parametrize("name", ["", "LRU", "fifo"])
def test_an_unknown_name_is_told_the_known_ones(name: str) -> None:
    for call in (checked_policy, lambda name: make_policy(name, 8)):
        with pytest.raises(ConfigError, match=f"policy is '{name}'; expected one of lru, arc, s3fifo, lirs, grit"):
            call(name)


def test_nothing_else_is_loaded() -> None:
    code = (
        "import sys; from kvkern.policy import make_policy; make_policy('lru', 8); "
        "print(sorted(name for name in sys.modules if name.startswith('kvkern.policy') or name == 'numba'))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kvkern.policy', 'kvkern.policy.base', 'kvkern.policy.lru']"
