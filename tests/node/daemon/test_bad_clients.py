"""A real daemon, and clients that send nothing, never read, or vanish: what they cannot do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon import client_connection
from kvkern.node.daemon import server as server_module
from kvkern.node.daemon.server import NodeConfig
from tests.node.conftest import (
    GEOMETRY,
    ROOT,
    SIZES,
    Daemon,
    Peer,
    eventually,
    hits,
    served,
    stock,
    store,
)
from tests.support import chain_keys


def config(folder: Path, tmp_path: Path) -> NodeConfig:
    return NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, drain_s=0)


def test_who_says_no_hello_is_cut_off(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "HELLO_S", 0.05)
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as peer:
        peer.socket.sendall(b"\x07\x00")  # an incomplete frame is no Hello
        assert peer.hung_up()
        eventually(lambda: not server.connections)


def slow_arena(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Delay the making of the arena until `go` is set. Returns (begun, go)."""
    begun, go, real = threading.Event(), threading.Event(), server_module.create_or_attach

    def make(*args: Any) -> object:
        begun.set()
        assert go.wait(30)
        return real(*args)

    monkeypatch.setattr(server_module, "create_or_attach", make)
    return begun, go


def test_who_has_said_hello_may_wait_for_a_large_arena(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection, "HELLO_S", 0.05)
    begun, go = slow_arena(monkeypatch)
    with served(config(folder, tmp_path)), Peer(folder / "s") as peer, Peer(folder / "s") as silent:
        peer.say(p.Hello(p.VERSION, "e", SIZES))
        assert begun.wait(30)
        assert silent.hung_up()  # its deadline came later
        go.set()
        assert isinstance(peer.hear(), p.Welcome)


def test_who_leaves_while_the_arena_is_made_holds_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = slow_arena(monkeypatch)
    with served(config(folder, tmp_path)) as server:
        with Peer(folder / "s") as peer:
            peer.say(p.Hello(p.VERSION, "e", SIZES))
            assert begun.wait(30)
        eventually(lambda: not server.connections)
        go.set()
        with Peer(folder / "s") as peer:
            assert isinstance(peer.greet(), p.Welcome)
            assert server.sessions is not None
            assert len(server.sessions.sessions) == 1


def test_a_client_that_never_reads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is disconnected before its answers fill the memory. Other clients are served all the time."""
    monkeypatch.setattr(client_connection, "MAX_UNSENT_NBYTES", 1 << 20)
    with served(config(folder, tmp_path)) as server, closing(NodeClient.open(folder / "s", "e", GEOMETRY)) as client:
        chain = chain_keys("a", 3)
        eventually(lambda: stock(client)[0])
        assert store(client, chain) == 3
        with Peer(folder / "s") as peer:
            peer.greet(geometry=None)
            asked = framing.encode(p.Stat(1)) * 100

            def ask() -> None:
                while True:
                    peer.socket.sendall(asked)
                    assert hits(client, chain) == 3

            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                ask()
        assert hits(client, chain) == 3
        eventually(lambda: len(server.connections) == 1)


def test_a_bad_client_that_does_not_read_is_let_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queued answers do not keep the connection, or what it holds, for ever."""
    monkeypatch.setattr(client_connection, "LINGER_S", 0.05)
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as peer:
        peer.greet()
        peer.say(*(p.Stat(number) for number in range(3000)))  # more than the socket buffers, less than the limit
        eventually(lambda: any(one._transport and one._transport.get_write_buffer_size() for one in server.connections))
        peer.socket.sendall(b"\xff" * 8)
        eventually(lambda: not server.connections)
        assert server.sessions is not None
        assert not server.sessions.sessions


def test_a_client_that_only_stops_sending_is_gone(daemon: Daemon) -> None:
    with Peer(daemon.socket) as peer:
        peer.greet()
        peer.socket.shutdown(socket.SHUT_WR)
        assert peer.hung_up()
    assert daemon.stat()["sessions"] == 1  # the admin client that asks


def test_too_many_connections(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "MAX_CONNECTIONS", 2)
    with served(config(folder, tmp_path)) as server:
        with Peer(folder / "s") as one, Peer(folder / "s") as two:
            one.greet()
            two.greet()
            with Peer(folder / "s") as three:
                assert three.hear() == p.Refused(
                    "2 connections are open already, the limit; close some, or run another daemon"
                )
                assert three.hung_up()
        eventually(lambda: not server.connections)
        with Peer(folder / "s") as peer:
            assert isinstance(peer.greet(), p.Welcome)


def test_a_client_that_is_gone_before_it_is_welcomed(daemon: Daemon) -> None:
    """The daemon was stopped meanwhile. When it goes on, it finds Hello in a connection whose client is gone."""
    with Peer(daemon.socket) as peer:
        peer.greet()
    daemon.signal(signal.SIGSTOP)
    for _ in range(5):
        with Peer(daemon.socket) as peer:
            peer.say(p.Hello(p.VERSION, "e", SIZES, True))
    daemon.signal(signal.SIGCONT)
    eventually(lambda: daemon.stat()["connections"] == 1)
    assert daemon.stat()["sessions"] == 1
    assert "Traceback" not in daemon.log


KILLED = """
import subprocess, sys
from pathlib import Path
from tests.node.conftest import Peer
peer = Peer(Path(sys.argv[1]))
peer.greet(index=True)
print(subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, pass_fds=[peer.socket.fileno()]).pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_client_whose_child_has_its_socket(daemon: Daemon) -> None:
    """Such a connection does not end by itself."""
    command = [sys.executable, "-c", KILLED, str(daemon.socket)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        child = int(client.stdout.readline())
        try:
            with Peer(daemon.socket) as other:
                other.greet()
                client.kill()
                client.wait()
                eventually(lambda: daemon.stat()["sessions"] == 2)  # the other client, and the admin client that asks
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("fault", ["open_session", "_send_welcome", "handle"])
def test_a_fault_of_the_daemon_ends_the_connection(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """The client does not wait for ever and holds nothing, and the fault is reported."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with served(config(folder, tmp_path)) as server:
        with Peer(folder / "s") as peer, monkeypatch.context() as patch:
            patch.setattr(server, fault, broken)
            peer.say(p.Hello(p.VERSION, "e", SIZES, index=True), p.Stat(1))
            assert peer.hung_up()
            eventually(lambda: not server.connections)
        eventually(lambda: "ZeroDivisionError" in caplog.text)
        with Peer(folder / "s") as peer:
            assert isinstance(peer.greet(), p.Welcome)
            assert server.sessions is not None
            assert len(server.sessions.sessions) == 1
