"""A process of another user, for tests that run as root: `python -m tests.node.other_user SOCKET UID GROUPS CODE`.

It imports what it needs as root, becomes the user, runs the code, and then waits until its standard input is closed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.node.conftest import Daemon

ROOT = Path(__file__).resolve().parent.parent.parent
UID = 7003
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")


def become(uid: int, groups: Iterable[int] = ()) -> None:
    """Give up root for good."""
    os.setgroups(list(groups))
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def open_to_all(daemon: Daemon) -> Daemon:
    """Let other users open the daemon's socket. What the daemon then thinks of them is what is tested."""
    daemon.folder.chmod(0o755)
    daemon.socket.chmod(0o666)
    return daemon


@contextmanager
def other_user(path: Path, code: str, uid: int = UID, groups: Iterable[int] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run code in a process of another user; `path` is the socket there. Its output is read until the line `ready`."""
    command = [
        sys.executable, "-m", "tests.node.other_user", str(path), str(uid), ",".join(map(str, groups)), code
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> list[str]:
    """Return the lines that the process has printed when it has run its code."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if line == "ready\n":
            return lines
        lines.append(line.rstrip("\n"))
    raise AssertionError(f"the other user's process has ended early, after {lines}")


def main() -> None:
    """Run the code."""
    from kvkern.arena.slots import SlotGeometry
    from kvkern.errors import KvkernError
    from kvkern.node import framing
    from kvkern.node import protocol as p
    from kvkern.node.client.admin_client import AdminClient
    from kvkern.node.client.cache_client import NodeClient
    from tests.node.peer import GEOMETRY, SIZES, Peer

    path, uid, groups, code = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    names = {
        "path": path, "framing": framing, "p": p, "AdminClient": AdminClient, "NodeClient": NodeClient, "Peer": Peer,
        "SIZES": SIZES, "GEOMETRY": GEOMETRY, "SlotGeometry": SlotGeometry, "KvkernError": KvkernError, "os": os,
    }  # fmt: skip
    if uid:
        become(uid, [int(group) for group in groups.split(",") if group])
    exec(code, names)  # noqa: S102 - it comes from a test
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
