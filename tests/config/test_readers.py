"""The two readers, for real: a daemon started by a file and variables, and `open_cache` told by variables alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

import kvkern
from kvkern import layout
from kvkern.errors import ConfigError
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from tests.node.conftest import eventually


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose sockets have short paths."""
    with tempfile.TemporaryDirectory(prefix="kvkern-", dir="/tmp") as name:
        yield Path(name)


def test_a_daemon_is_started_by_a_file_and_variables(folder: Path) -> None:
    """The command line gives the arena's folder, a variable the policy, the file the rest. One value is given in all three."""
    file = folder / "kvkern.toml"
    file.write_text(f'socket = "{folder}/s"\ncapacity = "1MiB"\npolicy = "lirs"\n[daemon]\nname = "of-the-file"\n')
    environ = os.environ | {"KVKERN_POLICY": "lru", "KVKERN_NAME": "of-the-variable"}
    command = [
        sys.executable,
        "-m",
        "kvkern",
        "serve",
        "--config",
        str(file),
        "--arena-dir",
        str(folder),
        "--name",
        "of-the-line",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        eventually(lambda: f"serving on {folder}/s" in (folder / "log").read_text(), "serving")
        with AdminClient(folder / "s") as admin:
            (row,) = admin.ask(p.Stat(1))
        assert row["policy"] == "lru"
        assert row["capacity_nbytes"] == 1 << 20
        assert row["arena"].endswith("-of-the-line")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_open_cache_reads_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument is preferred; the salt of a variable keeps caches apart like an argument's."""
    tensor = torch.zeros(2, 4, 16, 1, 8)
    tensors = [tensor]
    paged = layout.flash_attention(tensors)
    with pytest.raises(ConfigError, match="no capacity in open_cache"):
        kvkern.open_cache(paged, tensors, model="m", weights="w")
    monkeypatch.setenv("KVKERN_CAPACITY", "1MiB")
    monkeypatch.setenv("KVKERN_ARENA_DIR", str(folder))
    roots = []
    for variable, argument in ((None, None), ("a", None), ("b", None), ("b", "a")):
        if variable is not None:
            monkeypatch.setenv("KVKERN_SALT", variable)
        with closing(kvkern.open_cache(paged, tensors, model="m", weights="w", salt=argument)) as cache:
            roots.append(cache.namespace.root)
    assert len(set(roots)) == 3
    assert roots[1] == roots[3]
    monkeypatch.setenv("KVKERN_TREADS", "1")
    with pytest.raises(ConfigError, match="did you mean 'KVKERN_THREADS'"):
        kvkern.open_cache(paged, tensors, model="m", weights="w")
