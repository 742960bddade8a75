"""Wrong HTTP, slow clients and idle connections against a real daemon: it serves engines and probes, and does not grow."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.node.conftest import ROOT, Daemon, MakeDaemon, eventually, hits, store
from tests.node.test_fuzz import descriptors, resident_nbytes
from tests.node.web.conftest import TOKEN, ask, connected, ports_of, read_answer
from tests.support import chain_keys

REQUESTS = int(os.environ.get("KVKERN_SOAK_HTTP_REQUESTS", "3000"))  # of all processes together
PROCESSES = 3
IDLE = 1000
GROWTH_NBYTES = 24 << 20  # of allocator pools and of what 64 connections a port may have buffered
WITH_TOKEN = f" HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()


class Ports:
    """A daemon with both HTTP ports, of which one has a token, and an engine."""

    def __init__(self, make_daemon: MakeDaemon, folder: Path) -> None:
        token = folder / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        options = [
            "--rpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--metrics-token-file", str(token)
        ]  # fmt: skip
        self.daemon: Daemon = make_daemon(options=options).start()
        self.metrics, self.rpc = ports_of(self.daemon)
        self.client = self.daemon.client("engine")
        self.chain = chain_keys("a", 5)
        assert store(self.client, self.chain) == 5

    def serves(self) -> None:
        """The engine, a probe, Prometheus and a page get their answers."""
        assert hits(self.client, self.chain) == 5
        assert ask(self.rpc, "/healthz").json["pid"] == self.daemon.pid
        assert ask(self.rpc, "/v1/stat").json["chunks"] == 5
        assert b"kvkern_" in ask(self.metrics, "/metrics", authorization=f"Bearer {TOKEN}").body
        with connected(self.metrics) as sock:
            sock.sendall(b"GET /events" + WITH_TOKEN)
            assert read_answer(sock).status == 200

    def fuzz(self, seed: int, requests: int) -> None:
        """Run several fuzzers, and serve meanwhile."""
        command = [sys.executable, "-m", "tests.node.web.http_fuzzer"]
        each, ports = str(-(-requests // PROCESSES)), [str(self.rpc), str(self.metrics)]
        fuzzers = [
            subprocess.Popen([*command, str(seed + number), each, *ports], cwd=ROOT) for number in range(PROCESSES)
        ]
        try:
            while any(process.poll() is None for process in fuzzers):
                assert hits(self.client, self.chain) == 5
                assert ask(self.rpc, "/healthz").status == 200
        finally:
            for process in fuzzers:
                process.kill()
        assert [process.wait() for process in fuzzers] == [0] * PROCESSES


@pytest.fixture
def ports(make_daemon: MakeDaemon, folder: Path) -> Ports:
    return Ports(make_daemon, folder)


@pytest.mark.timeout(7200)
def test_a_daemon_under_wrong_http(ports: Ports) -> None:
    ports.fuzz(0, REQUESTS // 3)  # first fill the allocator's pools
    ports.serves()
    open_before, memory_before = descriptors(ports.daemon.pid), resident_nbytes(ports.daemon.pid)
    ports.fuzz(100, REQUESTS - REQUESTS // 3)
    ports.serves()
    eventually(lambda: descriptors(ports.daemon.pid) <= open_before + 8, "as few open files as before")
    assert resident_nbytes(ports.daemon.pid) < memory_before + GROWTH_NBYTES
    assert "Traceback" not in ports.daemon.log
    assert len(ports.daemon.log.splitlines()) < 200
    ports.client.close()
    assert ports.daemon.stop() == 0


def test_slow_clients(ports: Ports) -> None:
    """Heads that drip, events and metrics that nobody reads, and a thousand connections that say nothing, all at once."""
    before = resident_nbytes(ports.daemon.pid)
    with ExitStack() as stack:
        for number in range(IDLE):
            stack.enter_context(connected((ports.rpc, ports.metrics)[number % 2]))
        half = [stack.enter_context(connected(ports.rpc)) for _ in range(40)]
        for path in (b"/events", b"/metrics") * 10:
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", ports.metrics))
            sock.sendall(b"GET " + path + WITH_TOKEN)
        for _ in range(10):
            for sock in half:
                try:
                    sock.sendall(b"x")
                except OSError:
                    continue
            assert hits(ports.client, ports.chain) == 5
            assert ask(ports.rpc).status == ask(ports.metrics).status == 200
        assert descriptors(ports.daemon.pid) < 250
        assert resident_nbytes(ports.daemon.pid) < before + GROWTH_NBYTES
    ports.serves()
    assert "Traceback" not in ports.daemon.log
    ports.client.close()


def test_little_room_for_files(make_daemon: MakeDaemon, folder: Path) -> None:
    """With few open files allowed, HTTP takes none of those that engines need."""
    daemon = make_daemon(options=["--rpc", "127.0.0.1:0"])
    daemon.wrapper = ("bash", "-c", 'ulimit -n 220; exec "$@"', "bash")
    daemon.start()
    (port,) = ports_of(daemon)
    assert "at most 27 clients can connect" in daemon.log
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(port))
        clients = [daemon.client(f"engine-{number}") for number in range(3)]
        chain = chain_keys("a", 3)
        assert store(clients[0], chain) == 3
        assert [hits(client, chain) for client in clients] == [3, 3, 3]
        assert ask(port).status == 200
        for client in clients:
            client.close()
