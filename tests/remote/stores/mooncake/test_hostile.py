"""What answers on the port of a Mooncake master and means harm: the question ends in time and takes no memory."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable

import pytest

from kvkern.remote.stores.base import RemoteError
from tests.remote.required_servers import need
from tests.remote.stores.hostile_server import MIB, HostileServer

READY = struct.pack("<BBBBIII", 21, 0, 0, 0, 1, 0, 0)
HUGE = struct.pack("<BBBBIII", 21, 0, 0, 0, 1, 0xFFFFFFF0, 0)
HARMS: dict[str, Callable[[HostileServer, socket.socket], None]] = {
    "drips": lambda server, sock: server.drip(sock, READY[:-1]),
    "drips the rest": lambda server, sock: (
        sock.sendall(struct.pack("<BBBBIII", 21, 0, 0, 0, 1, 4000, 0)), server.drip(sock, b"x"),
    )[-1],
    "announces 4 GB": lambda server, sock: (sock.sendall(HUGE), server.pour(sock))[-1],
    "pours": lambda server, sock: server.pour(sock),
    "says nothing": lambda server, sock: (server.ended.wait(60), None)[-1],
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_master_that_means_harm(harm: str) -> None:
    need("mooncake", module="mooncake")
    from kvkern.remote.stores.mooncake.store import MooncakeMaster

    def talk(server: HostileServer, sock: socket.socket) -> None:
        sock.recv(100)
        HARMS[harm](server, sock)

    async def main(port: int) -> None:
        master = MooncakeMaster("127.0.0.1", port)
        async with asyncio.timeout(20.0):
            with pytest.raises(RemoteError, match=f"127.0.0.1:{port}"):
                await master.check_alive(asyncio.get_running_loop().time() + 0.4)
        master.close()

    with HostileServer(talk) as server:
        asyncio.run(main(server.port))
    assert server.most_nbytes < 100 * MIB
