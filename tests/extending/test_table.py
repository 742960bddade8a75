"""Drives the table "Where to change what" of CONTRIBUTING.md: what it names exists, and its steps are enough.

A copy of the tree gets the files of this folder by the table's own paths. Then the table's own suites run over them there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS = ("to add", "write", "register it", "suite", "page")


def table() -> dict[str, dict[str, str]]:
    """Cells by what is added, then by column."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.partition("## Where to change what")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert tuple(rows[0]) == COLUMNS, "the table has other columns: mend this test too"
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]}


def paths(cell: str) -> list[str]:
    """Paths of the tree that a cell names."""
    return [code for code in re.findall(r"`([^`]+)`", cell) if "/" in code or code.endswith((".toml", ".md"))]


TABLE = table()
FIFO = "fifo and not s3fifo"


def test_the_table_covers_what_people_add() -> None:
    wanted = {"policy", "store", "engine", "layout", "metric", "command", "message"}
    assert not {word for word in wanted if not any(word in row for row in TABLE)}


@pytest.mark.parametrize("row", TABLE)
def test_what_the_table_names_exists(row: str) -> None:
    for column in COLUMNS[1:]:
        for path in paths(TABLE[row][column]):
            place = ROOT / path
            assert (place if "NAME" not in path else place.parent).exists(), f"{column}: {path}"
        for name, path in re.findall(r"`(\w+)`[^`]* in `([^`]+)`", TABLE[row][column]):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{column}: {name} in {path}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the suites need."""
    for folder in ("kernels", "kvkern", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def add(tree: Path, row: str, name: str, source: str, line: str) -> str:
    """Write the file and register it, as the row says. Returns the path of the suite."""
    cells = TABLE[row]
    written = paths(cells["write"])[0].replace("NAME", name)
    shutil.copy(HERE / source, tree / written)
    ((registry, path),) = re.findall(r"`(\w+)` in `([^`]+)`", cells["register it"])
    text = (tree / path).read_text(encoding="utf-8")
    opening = re.search(rf"^{registry}\b.*= {{.*\n", text, re.MULTILINE)
    assert opening is not None, f"{registry} in {path} is no dict of a line for each"
    (tree / path).write_text(text[: opening.end()] + f"    {line}\n" + text[opening.end() :], encoding="utf-8")
    return paths(cells["suite"])[0].replace("NAME", name)


def passed(tree: Path, *arguments: str) -> int:
    """How many tests of the copy pass; fails with their output if one does not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return int(re.findall(r"(\d+) passed", done.stdout)[-1])


def test_a_policy_is_one_file_and_its_line(tree: Path) -> None:
    suite = add(tree, "an eviction policy", "fifo", "fifo.py", '"fifo": ("fifo", "Fifo"),')
    assert passed(tree, suite, "tests/policy/test_growth.py", "-k", FIFO) >= 11


def test_a_remote_store_is_one_file_and_its_line(tree: Path) -> None:
    suite = add(tree, "a remote store", "memory", "memory_store.py", '"memory": ("memory", ""),')
    example = tree / "tests" / "extending" / "memory_store_suite.py"
    (tree / suite).write_bytes(example.read_bytes())
    assert passed(tree, suite) >= 14


def test_an_unregistered_file_is_not_found(tree: Path) -> None:
    """The registry's line is what makes it known: without it the suite has no test of that name."""
    shutil.copy(HERE / "fifo.py", tree / "kvkern" / "policy" / "fifo.py")
    with pytest.raises(AssertionError, match="deselected"):
        passed(tree, "--collect-only", "tests/policy/test_conformance.py", "-k", FIFO)
