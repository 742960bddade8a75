"""Shared by tests of HTTP: a daemon in a thread of this process with both ports, and bare requests."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.server import Server
from kvkern.node.web.endpoint import Endpoint
from tests.node.conftest import Daemon, served
from tests.node.peer import GEOMETRY, PATIENCE_S

TOKEN = "a-token-of-32-characters-or-more"


@dataclass(frozen=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE_S)


def read_answer(sock: socket.socket, head: bool = False) -> Answer:
    """Read one answer that has a length. Raises EOFError if there is none."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := sock.recv(1)):
            raise EOFError(data)
        data += more
    first, *lines = data.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body, length = b"", 0 if head else int(headers.get("content-length", "0"))
    while len(body) < length and (more := sock.recv(length - len(body))):
        body += more
    return Answer(int(first.split()[1]), headers, body)


def ask(port: int, path: str = "/healthz", method: str = "GET", **headers: str) -> Answer:
    """Send a request on a connection of its own. Headers: `_` in a name stands for `-`."""
    lines = {"host": f"127.0.0.1:{port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    with connected(port) as sock:
        sock.sendall(text.encode("latin-1"))
        return read_answer(sock, method == "HEAD")


@dataclass(frozen=True)
class Web:
    """A daemon that runs, and its ports."""

    server: Server
    metrics: int
    rpc: int

    def client(self, engine: str = "e") -> NodeClient:
        """Open an engine's client. The caller closes it."""
        return NodeClient.open(self.server.config.socket, engine, GEOMETRY, timeout_s=PATIENCE_S, patience_s=PATIENCE_S)


def ports_of(daemon: Daemon) -> tuple[int, ...]:
    """Return the ports that a daemon process has told in its log: of metrics, then of RPC, as far as it has them."""
    return tuple(int(port) for port in re.findall(r" on http://[0-9.]+:([0-9]+)/", daemon.log))


@contextmanager
def web_daemon(
    folder: Path, host: str = "127.0.0.1", token: str = "", names: tuple[str, ...] = (), **settings: Any
) -> Iterator[Web]:
    """Run a daemon with both ports."""
    metrics, rpc = (Endpoint(f"--{name}", host, 0, token.encode(), frozenset(names)) for name in ("metrics", "rpc"))
    settings = {"arena_dir": folder} | settings
    config = NodeConfig(folder / "s", 1 << 20, metrics=metrics, rpc=rpc, drain_s=0.1, **settings)
    with served(config) as server:
        yield Web(server, *(endpoint.port for endpoint in server.endpoints))


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    """A daemon with both ports on a loopback address, without tokens."""
    with web_daemon(folder) as running:
        yield running
