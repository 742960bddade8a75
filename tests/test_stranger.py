"""A user whom nobody knows, on a root file system that nobody can write: a container with `--user` and `--read-only`, a unit.

No process here has a home, an entry in passwd or a folder for numba's cache. They run under a random uid in a mount namespace
of their own, in which / is read-only. They may read what root may read, because this tree may lie in root's home.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.remote.required_servers import running

ROOT = Path(__file__).resolve().parent.parent
UID = 12345
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && cd "$0" && exec "$@"'
MEMBER = [
    f"--reuid={UID}", f"--regid={UID}", "--clear-groups",
    "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
]  # fmt: skip

ENGINE = """
import logging, sys
from contextlib import closing
import torch, kvkern
logging.basicConfig(level="WARNING", format="%(message)s")
kv = [torch.randn(2, 12, 16, 2, 16) for _ in range(2)]
before = [t[:, :4].clone() for t in kv]
for given in sys.argv[1:]:
    options = dict(pair.split("=", 1) for pair in given.split(","))
    layout = kvkern.layout.flash_attention(kv)
    with closing(kvkern.open_cache(layout, kv, model="m", weights="w", threads=1, **options)) as cache:
        assert cache.store(list(range(64)), [0, 1, 2, 3]) > 0
        with cache.match(list(range(65))) as hit:
            assert cache.load(hit, [4, 5, 6, 7]) == 64
    assert all(torch.equal(t[:, 4:8], b) for t, b in zip(kv, before, strict=True))
    for t in kv:
        t[:, 4:8] = 0
print("verified")
"""


def stranger(folder: Path, *command: str, **environment: str) -> list[str]:
    """Return a command that runs in `folder`, the only place on disk that it can write."""
    given = [f"{name}={value}" for name, value in {"PATH": os.environ["PATH"], **environment}.items()]
    return [
        "unshare", "--mount", "--propagation=private", "sh", "-c", READ_ONLY, str(folder), "setpriv", *MEMBER,
        "env", "-i", *given, *command,
    ]  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the stranger, with a short name: sockets lie in it. Skips the test if there can be no stranger here."""
    if os.getuid() != 0 or not (shutil.which("setpriv") and shutil.which("unshare")):
        pytest.skip("needs root, setpriv and unshare: to become another user on a read-only file system")
    path = Path(tempfile.mkdtemp(prefix="kvkern-", dir="/tmp"))
    os.chown(path, UID, UID)
    try:
        tried = subprocess.run(stranger(path, sys.executable, "-c", ""), capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"this root cannot make another user with a read-only file system: {tried.stderr.strip()}")
        yield path
    finally:
        shutil.rmtree(path)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(stranger(folder, *command, **environment), capture_output=True, text=True, timeout=400)


def kvkern(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvkern", *arguments]


@contextmanager
def daemon(folder: Path, arguments: list[str]) -> Iterator[Path]:
    """A daemon of the stranger. Yields its log."""
    log = folder / "log"
    ready = lambda: "serving on" in log.read_text()  # noqa: E731
    try:
        with running(stranger(folder, *kvkern(*arguments), PYTHONPATH=str(ROOT)), log, ready, timeout_s=120):
            yield log
    finally:
        shutil.rmtree(f"/dev/shm/kvkern-{UID}", ignore_errors=True)


def unit_of_the_docs() -> list[str]:
    """The arguments of the daemon in the systemd unit of docs/node.md, with paths and sizes that fit here."""
    unit = (ROOT / "docs/node.md").read_text().split("[Service]", 1)[1]
    (command,) = re.findall(r"^ExecStart=(.*)$", unit.split("```")[0], re.MULTILINE)
    _, *arguments = shlex.split(command)
    return [{"/run/kvkern/kvkern.sock": "s", "64GiB": "64MiB"}.get(word, word) for word in arguments]


@pytest.mark.slow
def test_a_node_an_engine_the_replay_and_the_doctor(folder: Path) -> None:
    """A cache in the engine and one in the daemon work. Nothing is written beside the socket."""
    (folder / "trace.jsonl").write_text(
        '{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n' * 2
    )
    here = {"PYTHONPATH": str(ROOT)}
    with daemon(folder, unit_of_the_docs()) as log:
        done = run(folder, sys.executable, "-c", ENGINE, "socket=s", "capacity=64MiB", **here)
        assert (done.returncode, done.stdout) == (0, "verified\n"), (done, log.read_text())
    done = run(folder, *kvkern("replay", "trace.jsonl", "--capacity", "1"), **here)
    assert done.returncode == 0, done
    done = run(folder, *kvkern("doctor", "--json"), **here)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["facts"]["numba_writable"] is False
    assert {path.name for path in folder.iterdir()} <= {"log", "s", ".s.lock", "trace.jsonl"}


@pytest.mark.slow
def test_an_installation_that_nobody_compiled(folder: Path, tmp_path: Path) -> None:
    """Everything is compiled in memory, with one warning. The doctor says that every start does so."""
    for name in ("kernels", "kvkern"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    cold = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    # The policy grit would be compiled for half a minute more.
    done = run(folder, sys.executable, "-c", ENGINE, "capacity=64MiB,policy=lru", NUMBA_OPT="1", **cold)
    assert (done.returncode, done.stdout) == (0, "verified\n"), done
    assert done.stderr.count("compiles in memory") == 1
    assert done.stderr.count("\n") == 1, done.stderr
    done = run(folder, *kvkern("doctor", "--json"), **cold)
    assert done.returncode == 0, done
    (finding,) = [f for f in json.loads(done.stdout)["findings"] if "numba" in f["what"]]
    assert finding["severity"] == "slow"
    assert "every start compiles" in finding["what"]
    assert "grit_trie" in finding["what"]
