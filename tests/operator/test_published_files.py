"""The published deployment's files against the examples: what a user has to change is the images, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.operator.manifests import EXAMPLES, ROOT

AS_PUBLISHED = EXAMPLES / "as_published"
PAIRS = [("kvcache", "published"), ("engine", "published_engine")]


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, their value, our value) of everything that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in theirs.keys() | ours.keys():
            yield from differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for number, pair in enumerate(zip(theirs, ours, strict=True)):
            yield from differences(*pair, f"{path}[{number}]")
    elif theirs != ours or type(theirs) is not type(ours):
        yield path, theirs, ours


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_one_image_differs(theirs: str, ours: str) -> None:
    published = list(yaml.safe_load_all((AS_PUBLISHED / f"{theirs}.yaml").read_text()))
    example = list(yaml.safe_load_all((EXAMPLES / f"{ours}.yaml").read_text()))
    ((path, old, new),) = differences(published, example)
    assert path.endswith(".image")
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert f"image: {old}\n" in page
    assert f"image: {new}\n" in page


def test_a_difference_is_found() -> None:
    assert list(differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": "2"}]})) == [("a[1].b", 2, "2")]
    assert list(differences({"a": [1]}, {"a": [1, 2], "c": None})) == [("a", [1], [1, 2])]
