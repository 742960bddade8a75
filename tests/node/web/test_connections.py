"""What one HTTP client can take from others: connections, memory, time. And that nothing of it ends the daemon."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from kvkern.node.web import connections, events, http_connection, pacer
from kvkern.node.web.connections import share_of
from kvkern.node.web.endpoint import MAX_CONNECTIONS
from tests.node.conftest import eventually, store
from tests.node.web.conftest import Web, ask, connected, read_answer, web_daemon
from tests.support import chain_keys

GET = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"


def serves(web: Web) -> None:
    """An engine and a probe get their answers."""
    with closing(web.client("probe")) as client:
        chain = chain_keys(time.monotonic_ns(), 2)
        assert store(client, chain) == 2
        lease = client.acquire(chain)
        assert len(lease.keys) == 2
        client.release(lease)
    assert ask(web.rpc).status == ask(web.metrics).status == 200


def ends(sock: socket.socket) -> bytes:
    """Read until the daemon hangs up."""
    data = b""
    try:
        while more := sock.recv(1 << 16):
            data += more
    except ConnectionResetError:
        pass
    return data


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Web]:
    """A daemon with short deadlines."""
    for name, value in {"HEAD_S": 0.3, "IDLE_S": 0.6, "ANSWER_S": 5.0, "STALLED_S": 0.3, "LINGER_S": 0.3}.items():
        monkeypatch.setattr(http_connection, name, value)
    monkeypatch.setattr(connections, "WATCH_S", 0.05)
    with web_daemon(folder) as web:
        yield web


def test_one_connection_many_requests(web: Web) -> None:
    with connected(web.rpc) as sock:
        for _ in range(5):
            sock.sendall(GET)
            assert read_answer(sock).status == 200


def test_requests_sent_ahead_are_answered_in_order(web: Web) -> None:
    paths = ["/healthz", "/nothing", "/v1/chunks", "/readyz"] * 10
    with connected(web.rpc) as sock:
        sock.sendall(b"".join(GET.replace(b"/healthz", path.encode()) for path in paths))
        assert [read_answer(sock).status for _ in paths] == [200, 404, 200, 200] * 10


def test_requests_in_pieces(web: Web) -> None:
    with connected(web.rpc) as sock:
        for byte in GET + GET:
            sock.sendall(bytes([byte]))
        assert [read_answer(sock).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(("said", "status"), [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"400"),  # the first bytes of TLS
    (b"\x00" * 100, b"400"),
    (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no host
    (b"NONSENSE\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * (16 << 10) + b"\r\n\r\n", b"431"),
    (b"GET /" + b"y" * (17 << 10), b"431"),  # and no end
    (b"GET /" + b"%41" * 1400 + b" HTTP/1.1\r\nhost: a\r\n\r\n", b"414"),
    (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 64 + b"\r\n", b"431"),
])  # fmt: skip
def test_wrong_requests_are_refused(web: Web, said: bytes, status: bytes) -> None:
    with connected(web.metrics) as sock:
        sock.sendall(said)
        assert ends(sock).startswith(b"HTTP/1.1 " + status)
    serves(web)


@pytest.mark.parametrize("said", [b"", b"G", GET[:-2], GET[:-2] + b"x: y\r\n"])
def test_a_head_that_does_not_come(short: Web, said: bytes) -> None:
    with connected(short.rpc) as sock:
        sock.sendall(said)
        assert ends(sock) == b""
    serves(short)


def test_a_head_that_drips(short: Web) -> None:
    """Each byte comes in time, the head does not."""

    def drip() -> None:
        for _ in range(1500):
            sock.sendall(b"x")
            time.sleep(0.02)

    with connected(short.rpc) as sock, pytest.raises((ConnectionResetError, BrokenPipeError)):
        drip()


def test_a_connection_that_idles(short: Web) -> None:
    with connected(short.rpc) as sock:
        sock.sendall(GET)
        assert read_answer(sock).status == 200
        assert ends(sock) == b""


def test_a_page_that_is_not_read(short: Web) -> None:
    """Events fill the socket's buffers and the daemon's, and then the daemon hangs up."""
    short.server.overview.render = lambda: b'"' + b"x" * 200_000 + b'"'  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch, socket.socket() as sock:
        patch.setattr(events, "TICK_S", 0.01)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", short.metrics))
        sock.sendall(GET.replace(b"/healthz", b"/events"))
        time.sleep(1.0)
        serves(short)
        assert ends(sock).startswith(b"HTTP/1.1 200")


def test_answers_that_are_not_read(short: Web) -> None:
    """A client that sends requests ahead without end and reads nothing."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", short.metrics))
        sock.settimeout(0.5)

        def ask_on() -> None:
            while True:
                sock.sendall(GET.replace(b"/healthz", b"/metrics") * 50)

        with pytest.raises((TimeoutError, ConnectionError)):
            ask_on()
        serves(short)


def test_silent_connections_keep_nobody_out(web: Web) -> None:
    """A thousand connections that send nothing: those who ask are let in, and no more than the limit stay."""
    with ExitStack() as stack:
        for _ in range(1000):
            sock = stack.enter_context(connected(web.rpc))
        assert ask(web.rpc).status == 200
        serves(web)
        assert len(os.listdir("/proc/self/fd")) < 1000 + MAX_CONNECTIONS + 200  # both ends are of this process
        sock.sendall(GET)
        assert read_answer(sock).status == 200


def test_half_requests_keep_nobody_out(web: Web) -> None:
    with ExitStack() as stack:
        for _ in range(3 * MAX_CONNECTIONS):
            stack.enter_context(connected(web.rpc)).sendall(GET[:-2])
        for _ in range(5):
            serves(web)


def test_pages_beyond_the_limit_are_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_STREAMS", 3)
    with ExitStack() as stack:
        socks = [stack.enter_context(connected(web.metrics)) for _ in range(5)]
        for sock in socks:
            sock.sendall(GET.replace(b"/healthz", b"/events"))
        assert sorted(sock.recv(12) for sock in socks) == [b"HTTP/1.1 200"] * 3 + [b"HTTP/1.1 503"] * 2
        serves(web)
    eventually(lambda: ask(web.metrics, "/events", "HEAD").status == 200, "room for another page")


def test_a_flood_takes_turns(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests begin one at a time, with a pause between them."""
    began: list[float] = []
    monkeypatch.setattr(pacer, "GAP_S", 0.02)
    begin = http_connection.HttpConnection.begin

    def noted(self: Any) -> None:
        began.append(time.monotonic())
        begin(self)

    monkeypatch.setattr(http_connection.HttpConnection, "begin", noted)
    with ExitStack() as stack:
        socks = [stack.enter_context(connected(web.rpc)) for _ in range(4)]
        for sock in socks:
            sock.sendall(GET * 5)
        for sock in socks:
            assert [read_answer(sock).status for _ in range(5)] == [200] * 5
    assert len(began) == 20
    assert min(after - before for before, after in pairwise(began)) > 0.015


def test_a_fault_of_a_handler_is_an_answer(
    web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(web.server, "stat", broken)
    for _ in range(3):
        assert ask(web.rpc, "/v1/stat").status == 500
    monkeypatch.undo()
    assert "ZeroDivisionError" in caplog.text
    serves(web)


def test_a_daemon_with_open_pages_ends_soon(folder: Path) -> None:
    with ExitStack() as stack:
        with web_daemon(folder) as web:
            socks = [stack.enter_context(connected(web.metrics)) for _ in range(10)]
            for sock in socks[:5]:
                sock.sendall(GET.replace(b"/healthz", b"/events"))
                assert sock.recv(12) == b"HTTP/1.1 200"
        for sock in socks:
            ends(sock)
        with pytest.raises(ConnectionRefusedError):
            connected(web.metrics)


@pytest.mark.parametrize(("address", "share"), [
    ("127.0.0.1", "127.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"), ("odd", "odd"),
])  # fmt: skip
def test_shares_of_addresses(address: str, share: str) -> None:
    assert share_of(address) == share


def test_shares_of_one_address(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all connections of an address are busy, another of it is refused, and other addresses are let in."""
    monkeypatch.setattr(connections, "MAX_OF_ADDRESS", 3)
    with ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(connected(web.metrics))
            sock.sendall(GET.replace(b"/healthz", b"/events"))
            assert sock.recv(12) == b"HTTP/1.1 200"
        with connected(web.metrics) as sock:
            assert ends(sock).startswith(b"HTTP/1.1 503")
        with socket.socket() as other:
            other.bind(("127.0.0.2", 0))
            other.connect(("127.0.0.1", web.metrics))
            other.sendall(GET)
            assert read_answer(other).status == 200


def test_starlette_is_asked_as_it_expects() -> None:
    """The handlers are plain functions of a request; this fails if Starlette changes what it hands them."""
    assert Request({"type": "http", "headers": [], "query_string": b"limit=3"}).query_params.get("limit") == "3"
