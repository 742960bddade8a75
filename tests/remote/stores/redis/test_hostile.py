"""Servers that drip, announce gigabytes or never end: calls end in time, memory stays, and the engine has a miss."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores.base import Got, RemoteError, RemoteStore
from tests.remote.required_servers import need
from tests.remote.stores.conformance import Memory, key_of
from tests.remote.stores.hostile_server import MIB, HostileServer, Talk
from tests.remote.stores.redis.servers import store_of

ENDS_S = 20.0  # a call that takes this long hangs: its timeout is 0.4 s
LOGIN = {b"AUTH": b"+OK\r\n", b"CLIENT": b"+OK\r\n", b"SELECT": b"+OK\r\n"}


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    need("redis", module="redis")


def talks(at: bytes, harm: Callable[[HostileServer, socket.socket], None]) -> Talk:
    """Return a server that answers each command properly until `at` comes, and then does harm."""

    def talk(server: HostileServer, sock: socket.socket) -> None:
        asked = b""
        while data := sock.recv(1 << 16):
            asked += data
            while found := re.match(rb"\*\d+\r\n\$\d+\r\n([A-Z]+)\r\n(?:\$\d+\r\n[^\r]*\r\n)*", asked):
                whole, verb = found.group(0), found.group(1)
                # A command's words end where the next command begins.
                end = whole.find(b"\r\n*", 1)
                whole = whole if end < 0 else whole[: end + 2]
                asked = asked[len(whole) :]
                if verb == at or (at == b"SLOTS" and b"SLOTS" in whole):
                    harm(server, sock)
                sock.sendall(LOGIN.get(verb, b":0\r\n"))

    return talk


def outcome(store: RemoteStore, call: Callable[[RemoteStore], Awaitable[Any]]) -> object:
    """Return what a call returns or raises. It must end."""

    async def main() -> object:
        try:
            return await asyncio.wait_for(call(store), ENDS_S)
        except (RemoteError, ConfigError) as error:
            return error
        finally:
            store.interrupt()  # type: ignore[attr-defined]
            await store.close()

    return asyncio.run(main())


def asks(store: RemoteStore) -> Awaitable[Any]:
    return store.exists([key_of(1), key_of(2)], 0.4)


def reads(store: RemoteStore) -> Awaitable[Any]:
    memory = Memory(2, 70_000)
    return store.get([key_of(1), key_of(2)], [memory.parts(0), memory.parts(1)], 0.4)


CASES = [
    ("redis://me:pw@{}", b"AUTH", asks), ("redis://{}", b"CLIENT", asks), ("redis://{}/3", b"SELECT", asks),
    ("redis://{}", b"EXISTS", asks), ("redis://{}", b"GET", reads), ("redis+cluster://{}", b"SLOTS", asks),
]  # fmt: skip


@pytest.mark.parametrize("text", [b"+OK and more", b"$5\r\n", b"*1\r\n"])
@pytest.mark.parametrize(("url", "at", "call"), CASES, ids=[at.decode() for _, at, _ in CASES])
def test_a_server_that_drips(url: str, at: bytes, call: Callable[[RemoteStore], Awaitable[Any]], text: bytes) -> None:
    """A byte comes all the time, and the timeout counts for the whole exchange."""
    with HostileServer(talks(at, lambda server, sock: server.drip(sock, text))) as server:
        ended = outcome(store_of(url.format(f"127.0.0.1:{server.port}")), call)
    assert isinstance(ended, RemoteError), ended
    assert f"127.0.0.1:{server.port}" in str(ended) or "--remote-timeout" in str(ended)


def test_a_handshake_of_tls_that_drips() -> None:
    record = b"\x16\x03\x03\x40\x00" + bytes(16_384)  # a record that is announced, and comes byte by byte
    with HostileServer(lambda server, sock: server.drip(sock, record)) as server:
        ended = outcome(store_of(f"rediss://127.0.0.1:{server.port}"), asks)
    assert isinstance(ended, RemoteError)


@pytest.mark.parametrize("announced", [b"$4294967290\r\n", b"$400000000\r\n", b"*2\r\n$4294967290\r\n", b""])
@pytest.mark.parametrize(("url", "at", "call"), CASES, ids=[at.decode() for _, at, _ in CASES])
def test_a_reply_of_gigabytes(
    url: str, at: bytes, call: Callable[[RemoteStore], Awaitable[Any]], announced: bytes
) -> None:
    """It takes no memory, neither when it is announced nor when it just does not end."""

    def harm(server: HostileServer, sock: socket.socket) -> None:
        sock.sendall(announced)
        server.pour(sock)

    with HostileServer(talks(at, harm)) as server:
        ended = outcome(store_of(url.format(f"127.0.0.1:{server.port}")), call)
        if at == b"GET" and not isinstance(ended, RemoteError):  # a value of another size is read past
            assert ended == [Got.WRONG_SIZE, Got.UNKNOWN]
        else:
            assert isinstance(ended, RemoteError), ended
    assert server.most_nbytes < 100 * MIB


@pytest.mark.parametrize("reply", [
    b"*1000000000\r\n", b"*1\r\n" * 100, b"*99999999999999999999999\r\n", b"*x\r\n", b"*1\r\n$2000\r\n",
    b"*400000\r\n" + b"+" + b"x" * 4000 + b"\r\n",
], ids=["items", "depth", "number", "letters", "text", "lines"])  # fmt: skip
def test_a_map_that_no_cluster_has(reply: bytes) -> None:
    def harm(server: HostileServer, sock: socket.socket) -> None:
        sock.sendall(reply)
        line = b"+" + b"x" * 4000 + b"\r\n"
        while not server.ended.is_set():
            sock.sendall(line)

    with HostileServer(talks(b"SLOTS", harm)) as server:
        ended = outcome(
            store_of(f"redis+cluster://127.0.0.1:{server.port}"), lambda store: store.exists([key_of(1)], 10.0)
        )
        assert isinstance(ended, RemoteError)
        assert "in more than 8388608 bytes" in str(ended) or "no answer to the command" in str(ended)


def test_a_server_that_repeats_the_password() -> None:
    """It is in no message, and neither are letters that control a terminal."""
    said = b"-WRONGPASS \x1b[2J hush is wrong\r\n"
    with HostileServer(talks(b"AUTH", lambda _, sock: sock.sendall(said))) as server:
        ended = outcome(store_of(f"redis://me:hush@127.0.0.1:{server.port}"), lambda store: store.open())
    assert isinstance(ended, ConfigError)
    assert "WRONGPASS ?[2J *** is wrong" in str(ended)
    assert "hush" not in str(ended)


@pytest.mark.parametrize(
    "said", [b"-ERR max number of clients reached\r\n", b"-DENIED Redis is running in protected mode\r\n"]
)
@pytest.mark.parametrize("user", ["", "me:pw@"])
def test_a_server_that_takes_no_connection_now(said: bytes, user: str) -> None:
    """It is no fault of the password: the next call tries again."""

    def turn_away(_server: HostileServer, sock: socket.socket) -> None:
        sock.sendall(said)

    with HostileServer(turn_away) as server:
        ended = outcome(store_of(f"redis://{user}127.0.0.1:{server.port}"), asks)
    assert isinstance(ended, RemoteError)
