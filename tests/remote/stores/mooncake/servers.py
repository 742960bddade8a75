"""A Mooncake master and nodes for tests. As a program: a node that contributes a segment until its stdin ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.remote.required_servers import answers, free_port, running

# pip puts it beside the interpreter; PATH need not lead there.
MASTER = shutil.which(
    "mooncake_master", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)


@dataclass
class MooncakeMaster:
    """A running master."""

    port: int
    metrics_port: int
    metadata_port: int
    process: subprocess.Popen[bytes]

    def url(self, options: str = "segment=0") -> str:
        return f"mooncake://127.0.0.1:{self.port}?{options}"

    def stop(self) -> None:
        """Freeze it: it answers nothing any more, and its connections stay."""
        os.kill(self.process.pid, signal.SIGSTOP)
        threads = Path(f"/proc/{self.process.pid}/task")
        while any((one / "stat").read_text().rsplit(")", 1)[1].split()[0] != "T" for one in threads.iterdir()):
            time.sleep(0.001)  # its threads stop one by one

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


@contextmanager
def mooncake_master(folder: Path, *options: str, port: int = 0) -> Iterator[MooncakeMaster]:
    """Yield a master on 127.0.0.1. Only its metadata server listens on every address."""
    port, metrics, metadata = port or free_port(), free_port(), free_port()
    command = [
        MASTER or "mooncake_master", f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}",
        "--metrics_host=127.0.0.1", "--enable_http_metadata_server=true", f"--http_metadata_server_port={metadata}",
        "--http_metadata_server_host=127.0.0.1", "--enable_metric_reporting=false", *options,
    ]  # fmt: skip
    with running(command, folder / f"master-{port}.log", lambda: answers(port)) as process:
        yield MooncakeMaster(port, metrics, metadata, process)


class Node:
    """Another process that contributes a segment."""

    def __init__(self, master: MooncakeMaster, segment: str) -> None:
        command = [sys.executable, "-m", "tests.remote.stores.mooncake.servers", str(master.port), segment]
        root = Path(__file__).resolve().parents[4]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._expect(b"up")

    def forget_all(self) -> None:
        """Delete every value in the store, on every node."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"forget\n")
        self.process.stdin.flush()
        self._expect(b"forgotten")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _expect(self, word: bytes) -> None:
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.strip() == word, f"the node has said {said!r}"


@contextmanager
def node(master: MooncakeMaster, segment: str = "256MiB") -> Iterator[Node]:
    """Yield a node once its segment is there."""
    one = Node(master, segment)
    try:
        yield one
    finally:
        one.kill()


def library_client(port: int) -> Any:
    """Return a plain client of the library, to look behind the store's back."""
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    code = client.setup(f"127.0.0.1:{free_port()}", "P2PHANDSHAKE", 0, 0, "tcp", "", f"127.0.0.1:{port}")
    assert code == 0
    return client


def _main(port: str, segment: str) -> None:
    from kvkern.config import parse_nbytes
    from kvkern.remote.stores.mooncake.client import _mute_library_log

    _mute_library_log()
    client = library_client(int(port))
    assert client.allocate_and_mount_segment(parse_nbytes(segment), "tcp", "")["ret"] == 0
    print("up", flush=True)
    for line in sys.stdin:
        if line.strip() == "forget":
            client.remove_all(True)
            print("forgotten", flush=True)
    client.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
