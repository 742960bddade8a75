"""Redis servers for tests, single and as a cluster, their certificates, and a proxy that breaks replies."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores.base import RemoteError, RemoteStore
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.remote.required_servers import answers, free_port, running
from tests.remote.stores.conformance import Bench, MakeStore
from tests.remote.stores.threaded_server import ThreadedServer

NUM_SLOTS = 16384
LATE_S = 1.0  # how much later than its timeout a call may end on a busy machine


@dataclass
class RedisServer:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]

    def client(self, **options: Any) -> Any:
        """Return a plain client, to look behind the store's back. Its connections end with it."""
        import redis  # imported only where it is installed

        return redis.Redis(port=self.port, socket_timeout=10, **options)

    def stop(self) -> None:
        """Freeze it: it answers nothing any more, and its connections stay."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server(folder: Path, *options: str, port: int = 0, tls: bool = False) -> Iterator[RedisServer]:
    """Yield a server on 127.0.0.1 that keeps nothing on disk."""
    port = port or free_port()
    listen = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
    command = [
        "redis-server", *listen, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder), *options,
    ]  # fmt: skip
    with running(command, folder / f"redis-{port}.log", lambda: answers(port)) as process:
        yield RedisServer(port, process)


@dataclass
class RedisCluster:
    """Three masters that share the slots evenly."""

    servers: list[RedisServer]
    ids: list[str] = field(default_factory=list)

    def start_slots(self) -> list[int]:
        return [NUM_SLOTS * i // len(self.servers) for i in range(len(self.servers) + 1)]

    def owner(self, slot: int) -> int:
        """Return the index of the server that has a slot at the start."""
        return next(i for i, first in enumerate(self.start_slots()[1:]) if slot < first)

    def wait(self, timeout_s: float = 20.0) -> None:
        """Wait until all servers see the whole cluster."""
        deadline = time.monotonic() + timeout_s
        while not all(self._sees_all(server) for server in self.servers):
            assert time.monotonic() < deadline, "the cluster does not come together"
            time.sleep(0.05)

    def _sees_all(self, server: RedisServer) -> bool:
        with server.client() as client:
            said = client.execute_command("CLUSTER INFO")
            nodes = client.execute_command("CLUSTER NODES")
        return (
            said["cluster_state"] == "ok"
            and int(said["cluster_slots_ok"]) == NUM_SLOTS
            and len(nodes) == len(self.servers)
        )


@contextmanager
def redis_cluster(folder: Path, count: int = 3) -> Iterator[RedisCluster]:
    """Yield a cluster of masters only. Each answers for its slots also when another one is gone."""
    with ExitStack() as stack:
        servers, bus = [], []
        for index in range(count):
            (folder / f"node{index}").mkdir()
            bus.append(free_port())
            options = (
                "--cluster-enabled", "yes", "--cluster-port", str(bus[-1]), "--cluster-node-timeout", "15000",
                "--cluster-require-full-coverage", "no",
            )  # fmt: skip
            servers.append(stack.enter_context(redis_server(folder / f"node{index}", *options)))
        cluster = RedisCluster(servers)
        slots = cluster.start_slots()
        for index, server in enumerate(servers):
            with server.client() as client:
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
                client.execute_command("CLUSTER ADDSLOTSRANGE", slots[index], slots[index + 1] - 1)
                cluster.ids.append(client.execute_command("CLUSTER MYID").decode())
                if index:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port, bus[0])
        cluster.wait()
        yield cluster


def make_certificates(folder: Path, host: str = "127.0.0.1") -> None:
    """Make `ca.crt`, `server.crt` and `server.key` that it signed for an address, and `other.crt`, which signed nothing.

    `expired.crt` is like `server.crt` and has expired; `own.crt` is signed by its own key.
    """
    openssl(folder, "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test-ca -keyout ca.key -out ca.crt")
    openssl(folder, "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=other -keyout other.key -out other.crt")
    openssl(folder, "req -newkey rsa:2048 -nodes -subj /CN=server -keyout server.key -out server.csr")
    openssl(folder, f"req -x509 -key server.key -days 2 -subj /CN=server -addext subjectAltName=IP:{host} -out own.crt")
    (folder / "names").write_text(f"subjectAltName=IP:{host}\n")
    for days, name in ((2, "server"), (-1, "expired")):
        sign = f"x509 -req -days {days} -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile names"
        openssl(folder, f"{sign} -out {name}.crt")


def openssl(folder: Path, arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments.split()], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Proxy(ThreadedServer):
    """A proxy between a client and a server: replies pass until it is told to break the next ones."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.connections = 0
        self._to = port
        self._left: int | None = None  # bytes of replies that still pass; None: all
        self._then = b""  # sent behind them
        self._cut = False  # the connection ends then; False: it stays, silent
        self._once = False  # later replies pass again
        self.start()

    def break_after(self, nbytes: int, then: bytes = b"", cut: bool = False, once: bool = False) -> None:
        """Let replies pass for `nbytes` more, counted over all connections."""
        self._then, self._cut, self._once, self._left = then, cut, once, nbytes

    def heal(self) -> None:
        """Let everything pass again, on new connections."""
        self._left = None

    def _welcome(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._to))
        self.connections += 1
        self._sockets.append(server)
        self._run(self._requests, client, server)
        self._run(self._replies, server, client)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _replies(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                left = self._left
                if left is None or left > len(data):
                    self._left = None if left is None else left - len(data)
                    client.sendall(data)
                else:
                    self._left = None if self._once else 0
                    client.sendall(data[:left] + self._then)
                    if self._cut:
                        break
                    return  # drop the rest of its replies
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def spread(names: Sequence[bytes], cluster: RedisCluster) -> list[int]:
    """Return which server of the cluster has each of the values."""
    with cluster.servers[0].client() as client:
        return [cluster.owner(client.execute_command("CLUSTER KEYSLOT", name)) for name in names]


# -- stores ------------------------------------------------------------------------------------------------------------


def store_of(url: str) -> RemoteStore:
    return make_store(RemoteUrl.parse(url))


def fresh(url: str) -> MakeStore:
    """Return a maker of stores at a URL, with a prefix that nobody has used."""
    full = f"{url}{'&' if '?' in url else '?'}prefix={secrets.token_hex(4)}/"
    return lambda: store_of(full)


@contextmanager
def bench_of(make: MakeStore | str, count: int = 8, payload_nbytes: int = 70_000) -> Iterator[Bench]:
    bench = Bench(fresh(make) if isinstance(make, str) else make, count, payload_nbytes)
    try:
        yield bench
    finally:
        bench.close()


def fails(bench: Bench, call: Any, timeout_s: float) -> str:
    """Return the message of a call's RemoteError, which comes soon after the timeout."""
    began = time.monotonic()
    with pytest.raises(RemoteError) as error:
        bench.run(call)
    assert time.monotonic() - began < timeout_s + LATE_S
    return str(error.value)


def refused(url: str) -> str:
    """Return the message of the ConfigError of making and opening a store. It shows no password."""

    async def attempt() -> None:
        store = store_of(url)
        try:
            await store.open()
        finally:
            await store.close()

    with pytest.raises(ConfigError) as error:
        asyncio.run(attempt())
    assert "hush" not in str(error.value)
    return str(error.value)
