"""A process's pid and start time, whatever its name is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from kvkern.arena import process_identity
from kvkern.arena.process_identity import process_alive, process_start

NAMED = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, bytes.fromhex(sys.argv[1]), 0, 0, 0)
print("named", flush=True)
sys.stdin.read()
"""


CUT = "1\u043c\u043e\u0434\u0435\u043b\u044c-\u0441\u0435\u0440\u0432\u0435\u0440".encode()[
    :15
]  # as the kernel cuts names


@pytest.mark.parametrize(
    "name", [CUT, b"\xff\xfe", b") R 1 2", b"a\nb (c", b"((((", b"))))", b" "],
    ids=["cut", "not_utf8", "bracket", "lines", "open", "closed", "space"],
)  # fmt: skip
def test_a_process_of_any_name(name: bytes) -> None:
    command = [sys.executable, "-c", NAMED, name.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        before = process_start(child.pid)
        assert child.stdout is not None
        assert child.stdout.readline() == b"named\n"
        assert process_start(child.pid) == before > 0
        assert process_alive(child.pid, before)
        child.kill()
        child.wait()
        assert not process_alive(child.pid, before)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM])
def test_who_cannot_be_looked_at_now_is_not_gone(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Else the slots that it is writing would be given to others while the daemon has too many open files."""
    mine = process_start(os.getpid())

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(process_identity.os, "open", fail)
        assert process_alive(os.getpid(), mine)
        assert not process_alive(os.getpid(), 0)
        with pytest.raises(OSError, match=os.strerror(code)):
            process_start(os.getpid())
    assert not process_alive(os.getpid(), mine + 1)
