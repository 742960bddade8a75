"""Writes the golden files anew: python -m tests.operator.write_golden. Read the difference before you commit it."""

from __future__ import annotations

from kvkern.operator.forms import read_kvcache
from kvkern.operator.objects import Cluster, render
from kvkern.operator.yaml_files import to_yaml
from tests.operator.manifests import FILES, GOLDEN, kvcache


def golden_text(name: str) -> str:
    """Return what a KVCache becomes: the findings as comments, then the objects."""
    cache = read_kvcache(kvcache(name))
    notes = "".join(f"# {each.level}: {each}\n" for each in cache.findings)
    return notes + to_yaml(render(cache, Cluster(monitors=name == "own_everything")))


if __name__ == "__main__":
    for file in FILES:
        (GOLDEN / f"{file}.yaml").write_text(golden_text(file))
