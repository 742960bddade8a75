"""Whatever stands in a KVCache, reading it raises nothing but a ConfigError, and what has no error becomes objects.

An API server checks KVCaches by their schema, but `render` reads files, and another definition may let anything through.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.errors import ConfigError
from kvkern.operator.forms import read_kvcache
from kvkern.operator.objects import render
from kvkern.operator.yaml_files import to_yaml
from tests.operator.manifests import FILES, kvcache

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["4Gi", "-1", "1e999", "0", "9" * 40, "redis://[::1", "a/b", "Always"]
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += places(each, (*path, key))
    return found


def with_value(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    inside: Any = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return changed


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_any_value_anywhere(name: str, data: st.DataObject) -> None:
    manifest = kvcache(name)
    for _ in range(data.draw(st.integers(1, 3))):
        paths = places(manifest)
        path = paths[random.Random(data.draw(st.integers(0, 1 << 20))).randrange(len(paths))]
        manifest = with_value(manifest, path, data.draw(ANYTHING))
    try:
        cache = read_kvcache(manifest)
    except ConfigError:
        return
    if not cache.errors:
        assert to_yaml(render(cache))
