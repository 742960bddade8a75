"""Makes environments for the rivals on first use and keeps them, apart from the running one. Knows pip; knows no rival's API.

Each is a venv with only the packages that the rival adds, pinned and installed with --no-deps, and a .pth file that names the
running environment's site-packages. So torch and vLLM, which are gigabytes, are shared, and every system runs on the same
builds. --no-deps also leaves out packages that a CPU cannot use (cupy, cuda-python, cufile, RDMA and cloud clients).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .children import PeerFailed, log_tail

INSTALL_LIMIT_S = 900.0
STAMP = "complete"
SHARED = "zz_shared.pth"  # sorted last: the rival's own versions come first


@dataclass(frozen=True)
class Rival:
    """A rival and the packages that it needs beyond those of vLLM's environment."""

    name: str
    version: str
    needs: tuple[str, ...]

    @property
    def packages(self) -> tuple[str, ...]:
        return (f"{self.name}=={self.version}", *self.needs)


LMCACHE = Rival(
    "lmcache",
    "0.5.6",
    (
        "aiofile==3.12.3",
        "aiofiles==25.1.0",
        "caio==0.12.10",
        "nvtx==0.2.17",
        "opentelemetry-exporter-prometheus==0.66b2",
        "sortedcontainers==2.4.0",
    ),
)
AIBRIX = Rival(
    "aibrix-kvcache",
    "0.8.0",
    (
        "cityhash==0.4.10",
        "more-itertools==11.2.1",
        "netifaces==0.11.0",
        "nvtx==0.2.17",
        "redis==6.0.0",
        "sortedcontainers==2.4.0",
        "validators==0.36.0",
        "zstandard==0.25.0",
    ),
)


def ensure(rival: Rival, workdir: Path, say: Callable[[str], None]) -> Path:
    """Return the rival's interpreter. Installs the rival first if needed. Raises PeerFailed with pip's last lines."""
    folder = workdir / f"{rival.name}-{_digest(rival.packages)}"
    python = folder / "bin" / "python"
    if (folder / STAMP).is_file() and python.exists():
        return python
    say(f"installing {rival.name} {rival.version} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have left a part of it
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / f"{rival.name}-install.log"
    log.write_bytes(b"")
    _run([sys.executable, "-m", "venv", str(folder)], rival, log)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "--no-deps"]
    _run([*pip, *rival.packages], rival, log)
    _share(python)
    (folder / STAMP).touch()
    return python


def _digest(packages: Sequence[str]) -> str:
    """Hash everything an environment depends on: the pins, the Python, and the path of the running environment."""
    facts = json.dumps([sorted(packages), sys.version, _site_packages()])
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def _site_packages() -> list[str]:
    paths = sysconfig.get_paths()
    return list(dict.fromkeys((paths["purelib"], paths["platlib"])))


def _share(python: Path) -> None:
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    try:
        own = subprocess.run(ask, capture_output=True, text=True, timeout=60.0, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise PeerFailed(f"{python} does not run: {error}. Delete its environment and run again.") from error
    (Path(own) / SHARED).write_text("\n".join(_site_packages()) + "\n")


def _run(command: list[str], rival: Rival, log: Path) -> None:
    what = f"{rival.name} {rival.version} could not be installed"
    with log.open("ab") as out:
        try:
            done = subprocess.run(command, stdout=out, stderr=out, timeout=INSTALL_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerFailed(f"{what}: {error}. Check the connection to the package index.") from error
    if done.returncode:
        raise PeerFailed(
            f"{what}: exit status {done.returncode}. Check the connection to the package index. {log_tail(log)}"
        )
