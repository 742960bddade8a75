"""What must hold of the pages: the site builds strictly, no cell of the comparison is without a source, the README is short."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPARISON = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None,
    reason="mkdocs-material is not installed: pip install 'kvkern[docs]'",
)


def build(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *settings], cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@needs_mkdocs
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    for page in (
        "index",
        "quickstart",
        "vllm",
        "node",
        "remote",
        "operations",
        "messages",
        "comparison",
        "contributing",
    ):
        assert (tmp_path / f"{page}.html").stat().st_size > 5000, page
    assert "unpkg.com" not in "".join(path.read_text() for path in tmp_path.rglob("*.js"))
    assert '<script src="assets/' in (tmp_path / "index.html").read_text()


@needs_mkdocs
@pytest.mark.parametrize(("line", "complaint"), [
    ("[x](NAME.md)", "NAME.md"),
    ("[x](node.md#nowhere)", "#nowhere"),
    ("[x](../README.md#nowhere)", "#nowhere"),
    ("<script src='https://example.org/x.js'></script>", "loads something from elsewhere"),
    ("<img alt='x' src='https://example.org/x.png'>", "loads something from elsewhere"),
])  # fmt: skip
def test_a_fault_on_a_page_fails_the_build(line: str, complaint: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for path in (ROOT / "docs").rglob("*"):
        if path.is_file() and path.suffix in (".md", ".svg", ".png"):
            copy = docs / path.relative_to(ROOT / "docs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes() + (f"\n{line}\n".encode() if path.name == "tuning.md" else b""))
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = settings.replace("docs_dir: docs", f"docs_dir: {docs}").replace(
        "docs/site_hooks.py", str(ROOT / "docs" / "site_hooks.py")
    )
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0
    assert complaint in done.stderr


@needs_mkdocs
def test_what_is_a_list_or_a_table_for_forges_is_one_on_the_site(tmp_path: Path) -> None:
    assert build(tmp_path).returncode == 0
    broken = {}
    for page in tmp_path.rglob("*.html"):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        if found := re.findall(r"<p>[^<]*(?:\n- |\n\| |\n\d+\. |\|---)[^<]*", text):
            broken[page.name] = found[0][:200]
    assert not broken


def test_every_cell_of_the_comparison_names_its_source() -> None:
    """A cell of a rival, or of kvkern if it claims more than "no", has a letter, and the letter is in the list of sources."""
    text, _, sources = COMPARISON.partition("## Sources")
    known = set(re.findall(r"^- (\[\w\]) ", sources, re.MULTILINE))
    rows = [
        line.strip("| \n").split(" | ")
        for line in text.partition("## Measured")[0].splitlines()
        if line.startswith("|")
    ]
    cells = [(row[0], cell) for row in rows for cell in row[1:] if len(row) == 5 and row[0] and "---" not in cell]
    assert len(cells) > 80
    assert not [(row, cell) for row, cell in cells if cell != "no" and not re.search(r"\[\w\]", cell)]
    assert {letter for _, cell in cells for letter in re.findall(r"\[\w\]", cell)} <= known


def test_the_comparison_is_dated() -> None:
    assert re.search(r"State of \w+ 20\d\d: LMCache \d\.\d\.\d", COMPARISON)


def test_the_readme_is_for_visitors() -> None:
    """One screen of text or two, and the pages say the rest."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 90
