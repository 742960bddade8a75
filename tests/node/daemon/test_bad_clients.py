"""A real daemon, and clients that send nothing, never read, or vanish: what they cannot do."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon import admission, client_connection
from kvkern.node.daemon import server as server_module
from kvkern.node.daemon.node_config import NodeConfig
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

    def make(*args: Any, **options: Any) -> object:
        begun.set()
        assert go.wait(30)
        return real(*args, **options)

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
    """Its requests wait, so its answers do not fill the memory. After a time it is disconnected. Others are served."""
    monkeypatch.setattr(client_connection, "MAX_WAITING_NBYTES", 1 << 16)
    with served(config(folder, tmp_path)) as server, closing(NodeClient.open(folder / "s", "e", GEOMETRY)) as client:
        chain = chain_keys("a", 3)
        eventually(lambda: stock(client)[0])
        assert store(client, chain) == 3
        with Peer(folder / "s") as peer:
            peer.greet(geometry=None)
            (connection,) = (one for one in server.connections if not one.wants_index)
            peer.socket.settimeout(0.2)
            asked = framing.encode(p.Stat(1)) * 100
            with suppress(TimeoutError):  # until nothing is read from it any more
                while True:
                    peer.socket.sendall(asked)
            assert 1 << 16 < connection.unsent_nbytes < 1 << 17
            assert hits(client, chain) == 3
            monkeypatch.setattr(client_connection, "STALLED_S", 0.5)
            eventually(lambda: len(server.connections) == 1)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                peer.socket.sendall(asked)
        assert hits(client, chain) == 3


def test_a_client_that_reads_late_gets_every_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection, "MAX_WAITING_NBYTES", 1 << 16)
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as peer:
        peer.greet()
        peer.say(*(p.Stat(number) for number in range(2000)))
        (connection,) = server.connections
        eventually(lambda: connection.unsent_nbytes > 1 << 16)
        for number in range(2000):
            answer = peer.hear()
            assert isinstance(answer, p.Answer)
            assert answer.id == number
        assert (connection.unread_nbytes, connection.unsent_nbytes) == (0, 0)


def test_a_bad_client_that_does_not_read_is_let_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queued answers do not keep the connection, or what it holds, for ever."""
    monkeypatch.setattr(client_connection, "LINGER_S", 0.05)
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as peer:
        peer.greet()
        peer.say(*(p.Stat(number) for number in range(1000)))  # more than the socket buffers, less than the limit
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
    monkeypatch.setattr(admission, "MAX_CONNECTIONS", 2)
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


def half_a_frame(nbytes: int) -> bytes:
    """Return the beginning of a frame of the largest size."""
    return struct.pack("<I", framing.MAX_FRAME_NBYTES) + bytes(nbytes - 4)


def test_a_request_that_does_not_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "REQUEST_S", 0.5)
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as peer, Peer(folder / "s") as silent:
        silent.greet()  # as a worker, which says nothing after Hello
        peer.greet()
        peer.socket.sendall(half_a_frame(1000))
        assert peer.hung_up()
        eventually(lambda: len(server.connections) == 1)
        assert isinstance(silent.say(p.Stat(1)).hear(), p.Answer)


def test_half_requests_of_a_user_have_a_limit_in_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client that has waited longest has to go. The others may end what they say."""
    monkeypatch.setattr(admission, "MAX_UNREAD_NBYTES", 1 << 20)
    request = framing.encode(p.Finish(bytes(32 * 8000), 1, 0.0, 0.0, 1))  # 256,031 bytes
    with served(config(folder, tmp_path)) as server, ExitStack() as peers:
        many = [peers.enter_context(Peer(folder / "s")) for _ in range(5)]
        for peer in many:
            peer.greet()
            peer.socket.sendall(request[:-1])
        assert many[0].hung_up()
        eventually(lambda: len(server.connections) == 4)
        eventually(lambda: sum(one.unread_nbytes for one in server.connections) == 4 * (len(request) - 1))
        for peer in many[1:]:
            peer.socket.sendall(request[-1:])
            assert isinstance(peer.say(p.Stat(1)).hear(), p.Answer)
        assert sum(one.unread_nbytes for one in server.connections) == 0
        many[1].socket.sendall(request[:-1])  # what was said counts no more
        assert isinstance(many[2].say(p.Stat(1)).hear(), p.Answer)
    eventually(lambda: not server.admission._unread)


def test_unread_answers_of_a_user_have_a_limit_in_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(config(folder, tmp_path)) as server, ExitStack() as peers:
        many = [peers.enter_context(Peer(folder / "s")) for _ in range(4)]
        for number, peer in enumerate(many):
            peer.greet(index=number == 2)
            peer.say(*(p.Stat(1) for _ in range(1000 if number == 2 else 800)))
        eventually(lambda: all(one._requests == (1001 if one.wants_index else 801) for one in server.connections))
        unsent = sum(one.unsent_nbytes for one in server.connections)
        monkeypatch.setattr(admission, "MAX_UNSENT_NBYTES", unsent - 1)
        eventually(lambda: len(server.connections) == 3)
        assert many[2].hung_up()  # it left most unread
        for peer in (many[0], many[1], many[3]):
            for _ in range(800):
                assert isinstance(peer.hear(), p.Answer)


def test_before_hello_only_hello_fits(folder: Path, tmp_path: Path) -> None:
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as peer:
        peer.socket.sendall(half_a_frame(8))
        assert peer.hung_up()
        assert server.bad_frames == 1
        with Peer(folder / "s") as other:
            longest = p.Hello(p.VERSION, "\N{GRINNING FACE}" * p.MAX_NAME, SIZES, index=True)
            assert isinstance(other.say(longest).hear(), p.Welcome)


def test_requests_wait_while_the_arena_is_made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: they stay in the client's socket. All are answered."""
    begun, go = slow_arena(monkeypatch)
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as peer:
        peer.say(p.Hello(p.VERSION, "e", SIZES), *(p.Stat(number) for number in range(200)))
        assert begun.wait(30)
        peer.say(*(p.Stat(number) for number in range(200, 400)))
        (connection,) = server.connections
        assert 0 < connection.unread_nbytes < 1 << 18
        go.set()
        assert isinstance(peer.hear(), p.Welcome)
        for number in range(400):
            answer = peer.hear()
            assert isinstance(answer, p.Answer)
            assert answer.id == number


def test_a_flood_of_requests_lets_others_through(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other client is answered, and SIGTERM would be heard, while most of the flood waits."""
    carried_out = []
    with served(config(folder, tmp_path)) as server, Peer(folder / "s") as flood, Peer(folder / "s") as other:
        flood.greet()
        other.greet()
        real = server.handle

        def slow(connection: Any, session: Any, request: p.Request) -> None:
            if isinstance(request, p.Release):
                time.sleep(0.001)
                carried_out.append(1)
            real(connection, session, request)

        monkeypatch.setattr(server, "handle", slow)
        flood.say(*[p.Release([])] * 20_000)
        eventually(lambda: carried_out)
        for _ in range(3):
            assert isinstance(other.say(p.Stat(1)).hear(), p.Answer)
        assert len(carried_out) < 10_000


@pytest.mark.parametrize("fault", ["_watch_clients", "_say_working", "_sweep"])
def test_a_fault_in_what_is_done_regularly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """It is logged, and the daemon goes on."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(server_module, "SWEEP_S", 0.02)
    with served(config(folder, tmp_path)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server, fault, broken)
            eventually(lambda: "ZeroDivisionError" in caplog.text)
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
