"""The daemon's listening socket when the system has no room for another connection, and when accepting goes wrong."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.daemon import listener as listener_module
from kvkern.node.daemon.admission import Admission, Users
from kvkern.node.daemon.listener import Listener
from kvkern.node.daemon.socket_path import listening_socket
from kvkern.node.peer_credentials import Peer


class Accepted(asyncio.Protocol):
    """Notes who was let in."""

    def __init__(self, peer: Peer, start: int) -> None:
        self.peer, self.start = peer, start
        self.made = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.made.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


class Failing:
    """A listening socket whose first calls of `accept` fail."""

    def __init__(self, sock: socket.socket, codes: list[int]) -> None:
        self._sock, self._codes = sock, codes
        self.fileno, self.close = sock.fileno, sock.close

    def accept(self) -> Any:
        if self._codes:
            raise OSError(code := self._codes.pop(0), os.strerror(code))
        return self._sock.accept()


@pytest.mark.parametrize(
    "codes", [[], [errno.EMFILE], [errno.ENFILE, errno.ENOBUFS], [errno.ECONNABORTED, errno.EINTR]]
)
def test_accepting_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, codes: list[int]
) -> None:
    """A client that connects while there is no room is let in when there is, and the log names the remedy."""
    monkeypatch.setattr(listener_module, "PAUSE_S", 0.02)
    log_expected = bool(set(codes) & {errno.EMFILE, errno.ENFILE})

    async def main() -> None:
        clients: list[Accepted] = []

        def make(peer: Peer, start: int) -> Accepted:
            clients.append(Accepted(peer, start))
            return clients[-1]

        sock: Any = Failing(listening_socket(folder / "s"), codes)
        listener = Listener(sock, Admission(Users(), Users()), make)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "s"))
            while not clients:
                await asyncio.sleep(0.005)
            await clients[0].made.wait()
            assert (clients[0].peer.pid, clients[0].start > 0) == (os.getpid(), True)
        await clients[0].lost.wait()
        listener.close()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert ("no client can connect" in caplog.text) is log_expected


def test_a_peer_that_cannot_be_looked_at_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(listener_module, "process_start", fail)

    async def main() -> None:
        listener = Listener(listening_socket(folder / "s"), Admission(Users(), Users()), Accepted)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "s"))
            client.setblocking(False)
            said = await asyncio.get_running_loop().sock_recv(client, 4096)
        (body,) = framing.FrameSplitter().feed(said)
        assert framing.decode_response(body) == p.Refused(
            "the daemon cannot find out who this client is (Too many open files); try again"
        )
        listener.close()

    asyncio.run(asyncio.wait_for(main(), 30))
