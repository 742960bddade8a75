"""Holds the import levels of tests/import_graph.py, and the rules that a syntax tree can show.

- An import goes to the same or a lower level. Imports form no cycle, neither of modules nor of components.
- An import inside a function, for types alone, or by a registry's name counts like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.import_graph import (
    KERNELS,
    LEVELS,
    MODULES,
    NAMES,
    ROOT,
    Module,
    component_imports,
    cycles,
    known,
    level,
    module_imports,
    source_files,
    under,
)

# Beyond transfer a chunk is bytes: the manager and its daemon run where torch is not installed.
TORCH_FREE = (
    *(m for m, n in LEVELS.items() if n in (1, 3)),
    "kvkern.errors",
    "kvkern.bounded_dict",
    "kvkern.metrics",
    "kvkern.measurement_json",
    "kvkern.regular_files",
    "kvkern.option_values",
    "kvkern.file_digests",
    "kvkern.version",
    "kvkern.tiers",
    "kvkern.remote",
    "kvkern.node",
    "kvkern.cli",
    "kvkern.demo_remote",
)
CYCLES_ALLOWED: frozenset[frozenset[str]] = (
    frozenset()
)  # modules that import each other, lazily or not; each with its reason
BROAD_EXCEPT_ALLOWED = {"kvkern/cache/base.py"}  # the one place where a fault becomes a miss
ENVIRON_ALLOWED = ("kvkern/config/environment.py", "kernels/target.py", "kvkern/demo/", "kvkern/integrations/")
UNPICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
MAX_LINES = 500


each_module = pytest.mark.parametrize("module", MODULES, ids=lambda m: m.rel)


def test_both_trees_are_read() -> None:
    assert {"kvkern", KERNELS} <= NAMES, f"found only {sorted(NAMES)}"


@each_module
def test_imports_go_down_or_stay_level(module: Module) -> None:
    own = level(module.name)
    wrong = [
        f"{module.rel}:{line} (level {own}) imports {target} (level {level(target)})"
        for line, dotted in module.imports()
        if (target := known(dotted)) and level(target) > own
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [m for m in MODULES if under(m.name, KERNELS)], ids=lambda m: m.rel)
def test_kernels_import_nothing_of_kvkern(module: Module) -> None:
    wrong = [
        f"{module.rel}:{line} imports {dotted}"
        for line, dotted in module.imports()
        if under(dotted, "kvkern") and not under(dotted, KERNELS)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("read", [module_imports, component_imports])
def test_no_cycles(read: Callable[[], dict[str, set[str]]]) -> None:
    found = [" <-> ".join(sorted(cycle)) for cycle in cycles(read()) if cycle not in CYCLES_ALLOWED]
    assert not found, "these import each other:\n" + "\n".join(found)


def test_reader_of_cycles() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert cycles(edges) == [frozenset("bc")]
    assert cycles({**edges, "d": {"e"}}) == [frozenset("abcde")]


@pytest.mark.parametrize(
    "module", [m for m in MODULES if any(under(m.name, p) for p in TORCH_FREE)], ids=lambda m: m.rel
)
def test_no_torch_beyond_transfer(module: Module) -> None:
    wrong = [f"{module.rel}:{line} imports {d}" for line, d in module.imports() if under(d, "torch")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("names", [
    ["kvkern"],
    ["kvkern", "kvkern.cache.manager", "kvkern.arena.file", "kvkern.keys", "kvkern.policy.lru", "kvkern.tiers.dram"],
    sorted(m.name for m in MODULES if any(under(m.name, p) for p in TORCH_FREE if p != "kvkern.remote")),
], ids=["package", "manager", "all"])  # fmt: skip
def test_torch_is_not_loaded(names: list[str]) -> None:
    """Sees what the tree does not show: torch loaded through somebody else's module."""
    code = f"import sys, {', '.join(names)}; sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def is_broad(node: ast.expr | None) -> bool:
    if node is None:
        return True
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(ast.unparse(p).rpartition(".")[2] in {"Exception", "BaseException"} for p in parts)


def swallows_everything(node: ast.AST) -> bool:
    """A broad handler that ends in a bare `raise` only cleans up: it hides nothing."""
    if isinstance(node, ast.ExceptHandler):
        last = node.body[-1]
        return is_broad(node.type) and not (isinstance(last, ast.Raise) and last.exc is None)
    is_suppress = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "suppress"
    return is_suppress and any(is_broad(arg) for arg in node.args)


@each_module
def test_no_broad_except(module: Module) -> None:
    if module.rel in BROAD_EXCEPT_ALLOWED:
        return
    wrong = [
        f"{module.rel}:{node.lineno} catches everything: name the exceptions, or leave it to kvkern/cache/base.py"
        for node in ast.walk(module.tree)
        if swallows_everything(node)
    ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_environment_is_read_at_the_edge(module: Module) -> None:
    if module.rel.startswith(ENVIRON_ALLOWED):
        return
    names = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    wrong = [f"{module.rel}:{line} imports {d}" for line, d in module.imports() if d in names] + [
        f"{module.rel}:{node.lineno} uses {ast.unparse(node)}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in names
    ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_nothing_unpickles(module: Module) -> None:
    wrong = [f"{module.rel}:{line} imports {d}" for line, d in module.imports() if d.partition(".")[0] in UNPICKLERS]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path", source_files("kernels", "kvkern", "tests", "bench"), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_no_file_is_two_ideas(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines, the limit is {MAX_LINES}: split it"


@pytest.mark.parametrize(("source", "expected"), [
    ("import torch.nn", ["torch.nn"]),
    ("from .base import Tier", ["kvkern.tiers.base.Tier"]),
    ("from . import base", ["kvkern.tiers.base"]),
    ("from ..errors import KvkernError as E", ["kvkern.errors.KvkernError"]),
    ("def f():\n    import torch", ["torch"]),
    ("from importlib import import_module\nimport_module(X['base'])", ["importlib.import_module", "kvkern.tiers.base"]),
    ("import importlib\nimportlib.import_module('.hbm', P)", ["importlib", "kvkern.tiers.hbm"]),
    ("import importlib\nimportlib.import_module('kvkern.api')", ["importlib", "kvkern.api"]),
    ("x = 'kvkern.api'", []),  # a word, where nothing is imported by name
])  # fmt: skip
def test_reader_of_imports(source: str, expected: list[str]) -> None:
    module = Module(ROOT / "kvkern" / "tiers" / "dram.py")
    module.__dict__["tree"] = ast.parse(source)
    assert [dotted for _, dotted in module.imports()] == expected


def test_an_unplaced_module_fails() -> None:
    with pytest.raises(AssertionError, match="is in no level"):
        level("kvkern.misc")
    assert level("kvkern.policy.lru") == 1


@pytest.mark.parametrize(("handler", "expected"), [
    ("except:\n    pass", True),
    ("except (OSError, Exception) as e:\n    log(e)", True),
    ("except BaseException:\n    close()\n    raise", False),
    ("except BaseException:\n    if x:\n        raise", True),
    ("except OSError:\n    pass", False),
])  # fmt: skip
def test_reader_of_handlers(handler: str, expected: bool) -> None:
    nodes = list(ast.walk(ast.parse(f"try:\n    f()\n{handler}")))
    assert any(map(swallows_everything, nodes)) is expected
    assert swallows_everything(ast.parse("suppress(Exception)").body[0].value)  # type: ignore[attr-defined]
