"""KVCaches for tests: the published one, the later form, kvkern's own, each with everything that it can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "deploy" / "kubernetes" / "examples"
GOLDEN = Path(__file__).resolve().parent / "golden"
FILES = ("published", "runtime", "own", "published_everything", "runtime_everything", "own_everything")


def kvcache(name: str) -> dict[str, Any]:
    """Return the KVCache of an example or of a golden file's input."""
    path = EXAMPLES / f"{name}.yaml"
    if not path.exists():
        path = GOLDEN / f"{name}.in.yaml"
    found: dict[str, Any] = next(each for each in yaml.safe_load_all(path.read_text()) if each["kind"] == "KVCache")
    return found
