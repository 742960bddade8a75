"""The guard of object stores: what it counts, what it leaves alone, and whom it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kvkern.remote.stores import received_bytes
from kvkern.remote.stores.received_bytes import SLACK_NBYTES, ReceiveGuard, _ReceivedBytes


class Line:
    """Connections to one port, and their other ends."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = int(self._listener.getsockname()[1])

    def connect(self) -> tuple[socket.socket, socket.socket]:
        ours = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
        theirs, _ = self._listener.accept()
        return ours, self._stack.enter_context(theirs)


@pytest.fixture
def line() -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(stack)


def read(sock: socket.socket, nbytes: int) -> None:
    while nbytes:
        nbytes -= len(sock.recv(nbytes))


def test_what_was_read_from_the_port_counts(line: Line) -> None:
    ours, theirs = line.connect()
    theirs.sendall(bytes(1000))
    read(ours, 1000)
    received = _ReceivedBytes(line.port)
    received.restart()
    assert received.nbytes() == 0
    theirs.sendall(bytes(5000))
    read(ours, 2000)
    assert received.nbytes() == 2000  # the rest waits in the kernel
    read(ours, 3000)
    other, far = line.connect()
    far.sendall(bytes(700))
    read(other, 700)
    assert received.nbytes() == 5700
    other.close()  # what it has received stays counted
    ours.sendall(bytes(9000))  # the other direction, and connections of others, do not count
    read(theirs, 9000)
    assert received.nbytes() == 5700


def test_a_moment_without_descriptors(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection received before is not counted anew."""
    ours, theirs = line.connect()
    received = _ReceivedBytes(line.port)
    received.restart()
    theirs.sendall(bytes(5000))
    read(ours, 5000)
    assert received.nbytes() == 5000

    def none_left(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for module, name, fault in ((received_bytes, "_open_files", lambda: None), (os, "dup", none_left)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            assert received.nbytes() == 5000
        assert received.nbytes() == 5000
    received.forget(4000)
    assert received.nbytes() == 1000


@pytest.mark.parametrize("fault", ["no /proc", "no count"])
def test_where_nothing_can_be_counted(line: Line, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = line.connect()
    received = _ReceivedBytes(line.port)
    if fault == "no /proc":
        monkeypatch.setattr(received_bytes, "_open_files", list)
    else:
        monkeypatch.setattr(received_bytes, "_RECEIVED", received_bytes.struct.Struct("=1000xQ"))
    received.restart()
    theirs.sendall(bytes(5000))
    read(ours, 5000)
    assert received.nbytes() == 0


def test_calls_that_have_ended_allow_nothing_more(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """While other calls overlap without a pause."""
    monkeypatch.setattr(received_bytes, "LOOK_S", 0.001)

    async def main() -> None:
        guard = ReceiveGuard(line.port)
        with guard.watched([], 1, 1000):
            for _ in range(5):
                with guard.watched([], 64, 1 << 30):
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert guard._allowed_nbytes + guard._ended_nbytes == 2 * 1000 + received_bytes.REQUEST_NBYTES

    asyncio.run(main())


@pytest.mark.parametrize("over", [False, True])
def test_calls_that_receive_too_much_are_ended(line: Line, over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_bytes, "LOOK_S", 0.001)
    allowed = SLACK_NBYTES + 2 * 1000 + received_bytes.REQUEST_NBYTES
    come = [0]
    monkeypatch.setattr(_ReceivedBytes, "nbytes", lambda _: come[0])
    monkeypatch.setattr(_ReceivedBytes, "restart", lambda _: None)

    async def main() -> None:
        guard = ReceiveGuard(line.port)
        for _ in range(2):  # the guard serves the next call too
            tasks = [asyncio.ensure_future(asyncio.sleep(0.1 if not over else 20.0)) for _ in range(3)]
            with guard.watched(tasks, 1, 1000):
                come[0] = allowed + over
                await asyncio.wait(tasks, timeout=10.0)
                assert guard.has_tripped(tasks) is over
            assert all(task.cancelled() is over for task in tasks)
            assert not guard.has_tripped(tasks)
            come[0] = 0

    asyncio.run(main())
