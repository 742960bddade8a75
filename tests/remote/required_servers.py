"""The requirements of tests with real stores, and servers that end with their test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest


def need(
    name: str,  # of the store, as in KVKERN_REQUIRE
    program: str = "",
    module: str = "",
) -> None:
    """Skip the test if the program is missing or the module cannot be loaded; fail if KVKERN_REQUIRE names the store.

    A module may be there and lack a system library. requirements/system_packages.sh installs what Debian has of both.
    """
    lacks = [f"the program {program} is missing"] if program and shutil.which(program) is None else []
    if module:
        try:
            import_module(module)
        except ImportError as error:
            lacks.append(f"the package {module} cannot be loaded ({error})")
    if not lacks:
        return
    why = f"{name} is not tested: {' and '.join(lacks)}"
    if name in os.environ.get("KVKERN_REQUIRE", "").split(","):
        pytest.fail(f"{why}, and KVKERN_REQUIRE names {name}")
    pytest.skip(why)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(
    command: list[str],
    log: Path,
    ready: Callable[[], bool],
    timeout_s: float = 30.0,
    **options: object,  # of Popen
) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a server process once it is `ready`. Kills it at the end of the block, whatever state it is in."""
    with log.open("ab") as out:
        process = subprocess.Popen(  # type: ignore[call-overload]
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, **options
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not ready():
            said = log.read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"{command[0]} has ended with {process.returncode}: {said}"
            assert time.monotonic() < deadline, f"{command[0]} is not ready after {timeout_s:.0f} s: {said}"
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    """Return True if somebody listens on a port of 127.0.0.1."""
    with socket.socket() as sock:
        sock.settimeout(1.0)
        return sock.connect_ex(("127.0.0.1", port)) == 0
