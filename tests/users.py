"""Runs a function as another user, in a forked child. Needs root; skips the test by name where there is none."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

VICTIM, ATTACKER = 7001, 7002


def needs_root() -> None:
    """Skip the test if this process cannot become another user."""
    if os.getuid() != 0:
        pytest.skip("needs root: to act as another user")


def as_user(uid: int, act: Callable[[], None]) -> None:
    """Run `act` in a child with this uid and gid and no other groups. Fails the test if it raises; prints the traceback."""
    needs_root()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            act()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert ended == 0, f"the child as uid {uid} failed; its traceback is above"


def shared_folder(folder: Path) -> Path:
    """Return a new folder like /dev/shm below `folder`: all users may make files in it, and remove only their own."""
    made = folder / "shm"
    made.mkdir()
    made.chmod(0o1777)
    return made
