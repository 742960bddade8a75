"""The script that `make` and CI share: it installs what is missing where it may, and otherwise names it. It never fails.

It runs with a PATH of its own, in which apt-get, sudo, id and ldconfig are stubs that write down how they were called.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "requirements" / "system_packages.sh"
TOOLS = ("bash", "cat", "dirname", "env", "mktemp", "rm", "sed", "tail", "true")
SONAMES = ("libibverbs.so.1", "libnuma.so.1", "libcurl.so.4", "libglib-2.0.so.0")
LIBRARIES = "\n\t".join(f"{name} (libc6) => /x" for name in SONAMES)
ALL = "libibverbs1 libnuma1 libcurl4 libglib2.0-0"  # the packages that have them


class Machine:
    """A folder of programs, and what the script did with them."""

    def __init__(self, folder: Path) -> None:
        self.path, self.calls = folder / "bin", folder / "calls"
        self.path.mkdir()
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool) or tool)
        self.stub("python3", "")  # any question to it is answered well
        self.stub("ldconfig", f"echo '{LIBRARIES}'")
        self.stub("id", "echo 0")
        for name in ("g++", "redis-server"):
            self.stub(name, "")
        self.stub("apt-get", "")

    def stub(self, name: str, code: str) -> None:
        path = self.path / name
        path.write_text(f'#!/bin/bash\n[ $0 = {self.path}/python3 ] || echo "{name} $*" >> {self.calls}\n{code}\n')
        path.chmod(0o755)

    def run(self, *packages: str, **environment: str) -> list[str]:
        """Returns the lines that were printed. The status is 0 in any case."""
        done = subprocess.run(
            [str(self.path / "bash"), str(SCRIPT), *packages], env={"PATH": str(self.path), **environment},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def installed(self) -> list[str]:
        """The arguments of each `apt-get install`, from the first package on."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [
            line.partition("--no-install-recommends ")[2]
            for line in lines
            if line.startswith("apt-get") and "install" in line
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_package_whose_command_has_another_name(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.stub("etcd", "")
    machine.run("etcd-server:etcd", "etcd-client:etcdctl")
    assert machine.installed() == ["etcd-client"]


def test_nothing_is_missing(machine: Machine) -> None:
    assert machine.run() == []
    assert machine.installed() == []


def test_root_installs_and_says_so(machine: Machine) -> None:
    machine.stub("ldconfig", "")
    (machine.path / "redis-server").unlink()
    (machine.path / "g++").unlink()
    wanted = f"g++ libc6-dev redis-server {ALL}"
    assert machine.run() == [f"set-up: installing system packages: {wanted}"]
    assert machine.installed() == [wanted]


def test_sudo_without_a_password(machine: Machine) -> None:
    machine.stub("id", "echo 1000")
    machine.stub("sudo", 'shift; exec "$@"')
    machine.stub("ldconfig", f"echo '{LIBRARIES.replace(SONAMES[0], '')}'")
    assert machine.run("nonesuch") == ["set-up: installing system packages: nonesuch libibverbs1"]
    assert machine.installed() == ["nonesuch libibverbs1"]


def test_a_python_without_its_headers(machine: Machine) -> None:
    machine.stub("python3", 'case "$*" in *Python.h*) exit 1;; esac')
    machine.run()
    assert machine.installed() == ["python3-dev"]


@pytest.mark.parametrize("has_sudo", [False, True])
def test_a_user_who_may_not_install_is_told_in_one_line(machine: Machine, has_sudo: bool) -> None:
    machine.stub("id", "echo 1000")
    if has_sudo:
        machine.stub("sudo", "exit 1")
    machine.stub("ldconfig", "")
    (line,) = machine.run()
    assert ALL in line
    assert f"run sudo apt-get install {ALL}" in line
    assert machine.installed() == []


def test_not_asked_to_install(machine: Machine) -> None:
    machine.stub("ldconfig", "")
    (line,) = machine.run(INSTALL="no")
    assert f"missing system packages (Debian's names): {ALL}." in line
    assert machine.installed() == []


def test_no_debian(machine: Machine) -> None:
    machine.stub("ldconfig", "")
    (machine.path / "apt-get").unlink()
    (line,) = machine.run()
    assert f"{ALL}. There is no apt-get" in line


def test_one_package_that_the_archive_lacks(machine: Machine) -> None:
    machine.stub("ldconfig", "")
    machine.stub("apt-get", 'case "$*" in *libnuma1*) echo "E: no libnuma1"; exit 100;; esac')
    first, *reason, last = machine.run()
    assert first == f"set-up: installing system packages: {ALL}"
    assert "E: no libnuma1" in reason[-1]
    assert "(Debian's names): libnuma1. apt-get failed" in last
    assert machine.installed() == [ALL, *ALL.split()]


def test_make_and_ci_use_it() -> None:
    name = SCRIPT.relative_to(ROOT).as_posix()
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    assert makefile.count(name) == 3  # set-up, the targets that need more than that, and the tests
    assert makefile.count(f"{name} prometheus chromium") == 1  # the demo needs neither
    assert f"{name} make git prometheus chromium" in ci


def test_what_is_installed_starts_no_service(machine: Machine) -> None:
    machine.stub("apt-get", f'echo "level $RUNLEVEL" >> {machine.calls}')
    machine.run("prometheus", "chromium")
    assert machine.installed() == ["prometheus chromium"]
    assert "level 1" in machine.calls.read_text()
