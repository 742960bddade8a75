"""Redis and Valkey against real servers: plain, on a Unix socket, with TLS, as a cluster, and broken in every way."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.base import Got, RemoteError, RemoteStore, RemoteUrl, make_store, value_name
from tests.remote.conformance import Bench, Conformance, MakeStore, Memory, key_of
from tests.remote import redis_servers as servers
from tests.remote.need import need



@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    need("redis", program="redis-server", module="redis")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Any]:
    with servers.redis_server(folder, "--unixsocket", str(folder / "s")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    with servers.redis_cluster(folder) as cluster:
        yield cluster


def store_of(url: str) -> RemoteStore:
    return make_store(RemoteUrl.parse(url))


def fresh(url: str) -> MakeStore:
    """Stores at a URL that share a prefix which nobody has used."""
    full = f"{url}{'&' if '?' in url else '?'}prefix={secrets.token_hex(4)}/"
    return lambda: store_of(full)


class TestTcp(Conformance):
    @pytest.fixture
    def make(self, server: Any) -> MakeStore:
        return fresh(f"redis://127.0.0.1:{server.port}/3")


class TestUnixSocket(Conformance):
    @pytest.fixture
    def make(self, server: Any, folder: Path) -> MakeStore:
        return fresh(f"valkey:///0?socket={folder}/s&connections=1&ttl=600")


@pytest.fixture(scope="module")
def tls(folder: Path) -> Iterator[Any]:
    """With a user who may do what a store needs, and no more."""
    servers.make_certificates(folder)
    with servers.redis_server(
        folder, "--tls-cert-file", f"{folder}/server.crt", "--tls-key-file", f"{folder}/server.key",
        "--tls-ca-cert-file", f"{folder}/ca.crt", "--requirepass", "root", "--user", "me", "on", ">se@cret", "~*/kvkern*",
        "+get", "+set", "+exists", "+unlink", tls=True,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def tls_files(folder: Path) -> str:
    return f"ca_file={folder}/ca.crt&cert_file={folder}/server.crt&key_file={folder}/server.key"


class TestTls(Conformance):
    @pytest.fixture
    def make(self, tls: Any, tls_files: str) -> MakeStore:
        return fresh(f"rediss://me:se%40cret@127.0.0.1:{tls.port}?{tls_files}")


class TestCluster(Conformance):
    @pytest.fixture
    def make(self, cluster: Any) -> MakeStore:
        return fresh(f"redis+cluster://127.0.0.1:{cluster.servers[1].port}")
