"""Object stores that mean harm or cannot prove who they are: memory stays, nothing is sent in clear, and errors have a name."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores.base import RemoteError, RemoteStore
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.remote.required_servers import need
from tests.remote.stores.conformance import HIT, Bench, Memory, key_of
from tests.remote.stores.hostile_server import MIB, HostileServer
from tests.remote.stores.object_server import ObjectServer
from tests.remote.stores.redis.servers import make_certificates

CALL_S = 20.0  # a call that takes this long fills memory, or hangs


@pytest.fixture(autouse=True)
def _obstore_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    need("objects", module="obstore")
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "SSL_CERT")):
            monkeypatch.delenv(name)


def s3(endpoint: str) -> RemoteStore:
    return make_store(RemoteUrl.parse(f"s3://me:hush@bucket?endpoint={endpoint}"))


def outcome(store: RemoteStore, call: Callable[[RemoteStore], Awaitable[Any]]) -> object:
    async def main() -> object:
        try:
            return await call(store)
        except (RemoteError, ConfigError) as error:
            return error
        finally:
            await store.close()

    return asyncio.run(main())


MEMORY = Memory(1, 70_000)
CALLS: dict[str, Callable[[RemoteStore], Awaitable[Any]]] = {
    "open": lambda store: store.open(),
    "get": lambda store: store.get([key_of(1)], [MEMORY.parts(0)], CALL_S),
    "put": lambda store: store.put([key_of(1)], [MEMORY.parts(0)], CALL_S),
    "delete": lambda store: store.delete([key_of(1)], CALL_S),
}
METADATA = b'ETag: "1"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n'


def requests_of(sock: socket.socket) -> Iterator[bytes]:
    text = b""
    while data := sock.recv(1 << 16):
        text += data
        if b"\r\n\r\n" in text:
            yield text
            text = b""


@pytest.mark.parametrize("status", [b"400 Bad Request", b"404 Not Found", b"503 Busy"])
@pytest.mark.parametrize("call", CALLS)
def test_the_body_of_an_error_has_no_end(call: str, status: bytes) -> None:
    def talk(server: HostileServer, sock: socket.socket) -> None:
        for _ in requests_of(sock):
            sock.sendall(b"HTTP/1.1 %b\r\nContent-Length: 1610612736\r\n\r\n" % status)
            server.pour(sock)

    with HostileServer(talk) as server:
        ended = outcome(s3(f"http://127.0.0.1:{server.port}"), CALLS[call])
    assert isinstance(ended, RemoteError)
    assert "s3://bucket: the server sends far more than it was asked for" in str(ended)
    assert server.most_nbytes < 250 * MIB


def test_a_value_in_chunks_has_no_end() -> None:
    def talk(server: HostileServer, sock: socket.socket) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 74096\r\nTransfer-Encoding: chunked\r\n" + METADATA + b"\r\n"
        for _ in requests_of(sock):
            sock.sendall(head + b"60000000\r\n")
            server.pour(sock)

    with HostileServer(talk) as server:
        ended = outcome(s3(f"http://127.0.0.1:{server.port}"), CALLS["get"])
    assert isinstance(ended, RemoteError)
    assert server.most_nbytes < 250 * MIB


def test_large_objects_and_many_calls_are_no_harm() -> None:
    """Values of another size, which are not read, and more bytes than the slack of the guard."""
    with ObjectServer() as server:
        bench = Bench(lambda: s3(server.url), count=16, payload_nbytes=4 * MIB)
        keys = [key_of(i) for i in range(16)]
        assert bench.put(keys, bench.values()) == [True] * 16
        for _ in range(2):
            assert bench.get(keys, bench.into()) == [HIT] * 16
        assert all(bench.read(row) for row in range(16))
        small = Memory(16, 100)
        got = bench.run(bench.store.get(keys, [small.parts(row) for row in range(16)], CALL_S))
        assert [int(one) for one in got] == [2] * 16  # WRONG_SIZE
        bench.close()


# -- who is at the other end -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@contextmanager
def with_tls(folder: Path, certificate: str) -> Iterator[ObjectServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / certificate, folder / "server.key")
    with ObjectServer(context) as server:
        yield server


@pytest.mark.parametrize(("certificate", "why"), [
    ("server.crt", "no trusted authority has signed it"), ("own.crt", "it is signed by its own key"),
    ("expired.crt", "it has expired"),
])  # fmt: skip
@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_certificates_that_do_not_verify(certificates: Path, certificate: str, why: str, scheme: str) -> None:
    with with_tls(certificates, certificate) as server:
        user = {"s3": "me:hush", "az": "me:aHVzaA=="}[scheme]
        url = f"{scheme}://{user}@bucket?endpoint=https://127.0.0.1:{server.server_port}"
        ended = outcome(make_store(RemoteUrl.parse(url)), CALLS["open"])
        assert isinstance(ended, ConfigError)
        assert f"the server's certificate does not verify: {why}" in str(ended)
        assert "SSL_CERT_FILE" in str(ended)
        assert "hush" not in str(ended)
        later = outcome(make_store(RemoteUrl.parse(url)), CALLS["get"])  # one that expires while the engine runs
        assert isinstance(later, RemoteError)
        assert f"the server's certificate does not verify: {why}" in str(later)
        assert server.requests == []


def test_an_expired_certificate_of_a_trusted_authority(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.crt"))
    with with_tls(certificates, "expired.crt") as server:
        ended = outcome(s3(f"https://127.0.0.1:{server.server_port}"), CALLS["open"])
        assert "it has expired" in str(ended)
        assert server.requests == []
    with with_tls(certificates, "server.crt") as server:
        assert outcome(s3(f"https://127.0.0.1:{server.server_port}"), CALLS["open"]) is None


def test_https_is_never_replaced_by_http() -> None:
    with ObjectServer() as server:
        ended = outcome(s3(f"https://127.0.0.1:{server.server_port}"), CALLS["open"])
        assert isinstance(ended, RemoteError)
        assert "the server does not speak TLS" in str(ended)
        assert server.requests == []
