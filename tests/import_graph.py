"""Which module of kvkern imports which, read from the sources, and the level of each. The standard library alone.

tests/test_imports.py holds the levels; docs/draw_map.py draws them.

    level of a module      that of the longest prefix of its name in LEVELS
    component of a module  that prefix
    import                 at module level, inside a function, for types alone, or by name in a registry for import_module
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "kvkern.kernels"
LEVELS = {
    KERNELS: 0,  # and it imports nothing of kvkern but itself
    "kvkern.errors": 0,
    "kvkern.bounded_dict": 0,
    "kvkern.metrics": 0,
    "kvkern.measurement_json": 0,
    "kvkern.regular_files": 0,
    "kvkern.option_values": 0,
    "kvkern.file_digests": 0,
    "kvkern.version": 0,
    "kvkern.observability": 0,
    "kvkern.keys": 1,
    "kvkern.policy": 1,
    "kvkern.config": 1,
    "kvkern.arena": 1,
    "kvkern.api_arguments": 2,
    "kvkern.transfer": 2,
    "kvkern.tiers": 2,
    "kvkern.remote": 2,
    "kvkern.cache": 3,
    "kvkern.observability.tracing": 4,
    "kvkern.assemble": 4,
    "kvkern.node": 4,
    "kvkern.api": 4,
    "kvkern.integrations": 5,
    "kvkern.demo": 5,
    "kvkern.doctor": 5,
    "kvkern.replay": 5,
    "kvkern.operator": 5,
    "kvkern.cli": 6,
    "kvkern.demo_remote": 6,
}
TOP = {"kvkern", "kvkern.__main__"}  # re-export and start: import anything; only the highest level imports them


@dataclass(frozen=True)
class Module:
    """One source file."""

    path: Path

    @cached_property
    def rel(self) -> str:
        """Path below the repository's root."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def name(self) -> str:
        """Dotted name; files of kernels/ are kvkern.kernels."""
        parts = list(self.path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] == "kernels":
            parts.insert(0, "kvkern")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=self.rel)

    @cached_property
    def package(self) -> str:
        """What its relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yields (line, absolute dotted name); `from a import b` gives a.b, which `known` cuts back where b is no module."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    up = self.package.split(".")
                    base = ".".join([*up[: len(up) - node.level + 1], *([base] if base else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        if "import_module" in {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(self.tree)}:
            for node in ast.walk(self.tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for dotted in (node.value, f"{self.package}.{node.value.lstrip('.')}"):
                        if "." in dotted and dotted in NAMES and dotted != self.name:
                            yield node.lineno, dotted


def source_files(*folders: str) -> list[Path]:
    """Python files under the folders; the link kvkern/kernels is left out, kernels/ being walked itself."""
    link = ROOT / "kvkern" / "kernels"
    files = (p for folder in folders for p in sorted((ROOT / folder).rglob("*.py")))
    return [p for p in files if link not in p.parents]


MODULES = [Module(p) for p in source_files("kernels", "kvkern")]
NAMES = {m.name for m in MODULES}


def known(dotted: str) -> str | None:
    """The longest prefix that is a module of kvkern, or None for anybody else's."""
    while dotted and dotted not in NAMES:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def under(name: str, prefix: str) -> bool:
    """Whether a module is `prefix` or lies below it."""
    return name == prefix or name.startswith(prefix + ".")


def component(name: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    prefixes = [p for p in LEVELS if under(name, p)]
    assert prefixes, f"{name} is in no level: place it in LEVELS of tests/import_graph.py"
    return max(prefixes, key=len)


def level(name: str) -> int:
    """The level of a module."""
    return max(LEVELS.values()) if name in TOP else LEVELS[component(name)]


def module_imports() -> dict[str, set[str]]:
    """For each module of kvkern the others that it imports."""
    return {m.name: {t for _, d in m.imports() if (t := known(d)) and t != m.name} for m in MODULES}


def component_imports() -> dict[str, set[str]]:
    """For each component the others that it imports; what lies at the top is left out."""
    components: dict[str, set[str]] = {name: set() for name in LEVELS}
    for name, targets in module_imports().items():
        if name not in TOP:
            components[component(name)] |= {component(t) for t in targets if t not in TOP} - {component(name)}
    return components


def reached(edges: dict[str, set[str]], name: str) -> set[str]:
    """What `name` imports, directly or through others."""
    found, new = set[str](), [name]
    while new:
        targets = edges[new.pop()] - found
        found |= targets
        new += targets
    return found


def cycles(edges: dict[str, set[str]]) -> list[frozenset[str]]:
    """Sets of modules of which each imports, perhaps through others, every other one."""
    from_each = {name: reached(edges, name) for name in edges}
    found = {frozenset(b for b in from_each[a] if a in from_each[b]) for a in edges}
    return sorted(found - {frozenset()}, key=sorted)
