"""Who may ask what over HTTP: tokens, hosts, methods, and what a browser is told."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from kvkern.node.web.endpoint import Endpoint, read_token
from kvkern.node.web.http_server import listening_socket
from tests.node.web.conftest import TOKEN, Web, ask, connected, read_answer, web_daemon

PRIVATE = [
    ("metrics", "/"),
    ("metrics", "/events"),
    ("metrics", "/v1/overview"),
    ("rpc", "/v1/stat"),
    ("rpc", "/v1/chunks"),
]


def port_of(web: Web, name: str) -> int:
    return web.metrics if name == "metrics" else web.rpc


@pytest.mark.parametrize(("name", "path"), [*PRIVATE, ("metrics", "/metrics"), ("rpc", "/nothing")])
def test_with_a_token_everybody_needs_it(folder: Path, name: str, path: str) -> None:
    with web_daemon(folder, token=TOKEN) as web:
        port = port_of(web, name)
        expected = 404 if path == "/nothing" else 200
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}, {"authorization": TOKEN},
                      {"authorization": f"Bearer {TOKEN[:-1]}"}, {"authorization": f"Bearer {TOKEN}x"},
                      {"cookie": f"kvkern_{port}={TOKEN}"}, {"cookie": f"kvkern_{port}="}, {"cookie": "\x7f;=;;"}):  # fmt: skip
            answer = ask(port, path, **wrong)
            assert answer.status == 401, wrong
            assert TOKEN.encode() not in answer.body
        if path != "/events":
            assert ask(port, path, authorization=f"Bearer {TOKEN}").status == expected
            assert ask(port, path, authorization=f"bearer  {TOKEN} ").status == expected
        assert ask(port, "/healthz").status == 200
        assert path == "/" or ask(port, f"{path}?token={TOKEN}").status == 401  # an address is no place for a token


@pytest.mark.parametrize("name", ["a", "kvkern_1"])
def test_odd_cookies_take_no_time(folder: Path, name: str) -> None:
    """Python's own parser takes seconds for each of these, in the thread that serves engines."""
    cookie = f'{name}="' + "\\\\" * 7500 + '"'
    with web_daemon(folder, token=TOKEN) as web, ExitStack() as stack:
        socks = [stack.enter_context(connected(web.metrics)) for _ in range(40)]
        for sock in socks:
            sock.sendall(f"GET /metrics HTTP/1.1\r\nhost: localhost\r\ncookie: {cookie}\r\n\r\n".encode())
        assert [read_answer(sock).status for sock in socks] == [401] * 40


def test_a_browser_gets_in_by_an_address_that_it_does_not_keep(folder: Path) -> None:
    with web_daemon(folder, token=TOKEN) as web:
        assert ask(web.metrics, "/?token=wrong").status == 401
        assert b"<form>" in ask(web.metrics, "/").body
        answer = ask(web.metrics, f"/?token={TOKEN}")
        assert (answer.status, answer.headers["location"]) == (303, "/")
        cookie, *flags = answer.headers["set-cookie"].split("; ")
        assert {flag.lower() for flag in flags} >= {"httponly", "samesite=strict", "path=/"}
        assert TOKEN not in cookie
        for path in ("/", "/v1/overview", "/metrics"):
            assert ask(web.metrics, path, cookie=f"other=1; {cookie}").status == 200
        assert ask(web.metrics, "/v1/overview", cookie=cookie[:-1] + "x").status == 401
        assert ask(web.rpc, "/v1/stat", cookie=cookie).status == 401  # of another port


def test_a_query_of_many_fields_has_no_token(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with web_daemon(folder, token=TOKEN) as web:
        for path in ("/", "/v1/overview"):
            assert ask(web.metrics, f"{path}?{'a=1&' * 20}token={TOKEN}").status == 401
        assert ask(web.metrics, f"/?a=1&token={TOKEN}").status == 303
    assert "Exception" not in caplog.text


@pytest.mark.parametrize(("name", "path"), PRIVATE)
def test_without_a_token_only_this_machine(folder: Path, name: str, path: str) -> None:
    """A daemon on all interfaces: whoever connects over loopback and says so, and nobody under another name."""
    with web_daemon(folder, host="") as web:
        port = port_of(web, name)
        for host in ("10.1.2.3", f"10.1.2.3:{port}", "node.example", f"node.example:{port}", "localhost.evil.example"):
            answer = ask(port, path, host=host)
            assert answer.status == 403
            assert f"--{name}-token-file" in answer.body.decode()
            assert ask(port, "/healthz", host=host).status == 200
        assert ask(web.metrics, "/metrics", host="10.1.2.3").status == 200
        if path != "/events":
            assert ask(port, path, host=f"localhost:{port}").status == 200
            assert ask(port, path, host=f"[::1]:{port}").status == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/v1/overview"])
def test_a_loopback_port_knows_only_loopback_names(folder: Path, path: str) -> None:
    """DNS rebinding: a name of another site that leads to 127.0.0.1."""
    with web_daemon(folder, names=("kvkern.example",)) as web:
        for host in (
            "evil.example",
            f"evil.example:{web.metrics}",
            "10.0.0.1",
            "127.0.0.1.evil.example",
            "[::2]",
            "a:b:c",
        ):
            assert ask(web.metrics, path, host=host).status == 421, host
        for host in (
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1",
            "127.8.8.8:80",
            "[::1]:80",
            "kvkern.example",
            "KVkern.example:80",
        ):
            assert ask(web.metrics, path, host=host).status == 200, host


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW"])
@pytest.mark.parametrize("path", ["/healthz", "/", "/v1/chunks"])
def test_everything_can_only_be_read(web: Web, method: str, path: str) -> None:
    answer = ask(web.metrics, path, method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("header", ["content-length: 1", "content-length: 99999999999", "transfer-encoding: chunked"])
def test_a_body_is_refused_unread(web: Web, header: str) -> None:
    with connected(web.rpc) as sock:
        sock.sendall(f"GET /healthz HTTP/1.1\r\nhost: localhost\r\n{header}\r\nexpect: 100-continue\r\n\r\n".encode())
        answer = read_answer(sock)
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert sock.recv(1) == b""


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/nothing", "/v1/overview"])
def test_headers_for_browsers(web: Web, path: str) -> None:
    headers = ask(web.metrics, path, origin="https://evil.example").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "unsafe" not in headers["content-security-policy"]
    assert not [name for name in headers if name.startswith("access-control")]
    assert "server" not in headers


def test_an_address_of_another_machine_is_not_believed(folder: Path) -> None:
    """Forwarded headers change nothing: neither for the better nor for the worse."""
    with web_daemon(folder, host="") as web:
        assert (
            ask(web.rpc, "/v1/stat", host="10.0.0.1", x_forwarded_for="127.0.0.1", forwarded="for=127.0.0.1").status
            == 403
        )


@pytest.mark.parametrize(("text", "host", "port"), [
    ("127.0.0.1:8080", "127.0.0.1", 8080), (":8080", "", 8080), ("0.0.0.0:9600", "0.0.0.0", 9600), ("[::1]:80", "::1", 80),
    ("[::]:0", "::", 0), ("localhost:1", "127.0.0.1", 1),
])  # fmt: skip
def test_addresses(text: str, host: str, port: int) -> None:
    endpoint = Endpoint.parse(text, "--metrics")
    assert (endpoint.host, endpoint.port) == (host, port)
    assert endpoint.loopback == (host in ("127.0.0.1", "::1"))


@pytest.mark.parametrize("text", [
    "", "8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80", "[127.0.0.1]:80",
    "node.example:80", "[::1", "[fe80::1%eth0]:80", "1.2.3:80", "http://127.0.0.1:80", "127.0.0.1:80/", "127.0.0.1:٣",
])  # fmt: skip
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^rpc is .*; expected an IP address and a port"):
        Endpoint.parse(text, "--rpc")


def test_a_wrong_host_name() -> None:
    with pytest.raises(ConfigError, match=r"^http_host is 'a b'"):
        Endpoint.parse(":1", "--rpc", names=("a b",))


@pytest.mark.parametrize(("content", "token"), [
    (TOKEN + "\n", TOKEN), (TOKEN, TOKEN), (TOKEN + "\r\n", TOKEN), ("x" * 1024, "x" * 1024),
    ("x" * 15, ""), ("x" * 1025, ""), ("", ""), ("\n", ""), (TOKEN + "\nmore", ""),
    ("has spaces in it yes", ""), ("é" * 20, ""),
])  # fmt: skip
def test_token_files(tmp_path: Path, content: str, token: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    link = tmp_path / "link"  # as Kubernetes mounts secrets
    link.symlink_to(path)
    for name in (path, link):
        if token:
            assert read_token(name, "rpc_token_file") == token.encode()
        else:
            with pytest.raises(ConfigError, match="holds no token") as caught:
                read_token(name, "rpc_token_file")
            assert not content.strip() or content.strip() not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("mode", "good"),
    [(0o600, True), (0o400, True), (0o440, True), (0o644, False), (0o620, False), (0o602, False)],
)
def test_modes_of_token_files(tmp_path: Path, mode: int, good: bool) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(mode)
    if good:
        assert read_token(path, "rpc_token_file")
    else:
        with pytest.raises(ConfigError, match=f"mode {mode:04o}, so others could read or change"):
            read_token(path, "rpc_token_file")


def test_token_files_that_are_none(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, why in ((fifo, "a FIFO"), (tmp_path / "none", "No such file"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=f"rpc_token_file is .*, which cannot be read: .*{why}"):
            read_token(path, "rpc_token_file")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_token_file_of_another_user(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    os.chown(path, 12345, 0)
    with pytest.raises(ConfigError, match="belongs to uid 12345, who could change the token"):
        read_token(path, "rpc_token_file")


def test_the_token_is_shown_nowhere(folder: Path) -> None:
    with web_daemon(folder, token=TOKEN) as web:
        assert TOKEN not in repr(web.server.config)
        assert TOKEN.encode() not in ask(web.metrics, "/v1/overview", authorization=f"Bearer {TOKEN}").body


def test_small_answers_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off only for sockets that name their protocol."""
    for host in ("127.0.0.1", ""):
        with listening_socket(Endpoint.parse(f"{host}:0", "--rpc")) as sock:
            assert sock.proto == socket.IPPROTO_TCP
