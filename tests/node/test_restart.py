"""A daemon's start and end: what it takes over, what it does not touch, and what outlives it."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import closing
from pathlib import Path

import pytest

from kvkern.arena.file import ArenaSpec
from kvkern.arena.slots import PAGE
from kvkern.errors import ConfigError
from kvkern.node import protocol as p
from kvkern.node.daemon import socket_path
from kvkern.node.daemon.socket_path import exclusive_lock, listening_socket
from tests.node.conftest import (
    GEOMETRY,
    Daemon,
    MakeClient,
    MakeDaemon,
    Peer,
    eventually,
    hits,
    read_verified,
    stock,
    store,
    write_payload,
)
from tests.support import SHAPE, chain_keys


def test_sigterm_lets_transfers_end(make_daemon: MakeDaemon) -> None:
    """Transfers under way are published, no new client is let in, and then the daemon ends by itself."""
    daemon = make_daemon(options=["--drain", "60"]).start()
    with closing(daemon.client("one")) as client, Peer(daemon.socket) as waiting:
        chain = chain_keys("a", 3)
        reservation = client.reserve(chain, chain, SHAPE)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: stock(client) == (0, 0))  # it was told, and has given back its unused slots
        assert not daemon.socket.exists()
        answer = waiting.greet(geometry=None)
        assert isinstance(answer, p.Refused)
        assert "the daemon is ending" in answer.reason
        assert client.reserve(chain_keys("b", 2), chain_keys("b", 2), SHAPE).slots == ()
        write_payload(client.arena, reservation)
        assert daemon.alive
        assert client.commit(reservation) == 3
        assert daemon.wait() == 0
        eventually(lambda: not client.connected)
        assert client.acquire(chain).keys == ()
        daemon.start()
        eventually(lambda: client.lookup(chain) == 3)
        assert hits(client, chain) == 3
        assert store(client, chain_keys("b", 2)) == 2


def test_sigterm_waits_no_longer_than_it_was_told(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=["--drain", "0.1"]).start()
    with closing(daemon.client("one")) as client:
        chain = chain_keys("a", 3)
        assert store(client, chain) == 3
        lease = client.acquire(chain)
        assert daemon.stop() == 0
        assert read_verified(client.arena, lease)  # the mapping stays valid
        client.release(lease)


def test_idle_clients_do_not_keep_it(make_daemon: MakeDaemon) -> None:
    """A stock of granted slots that nobody writes is no transfer under way."""
    daemon = make_daemon(options=["--drain", "3600"]).start()
    with closing(daemon.client("one")) as client, Peer(daemon.socket):
        eventually(lambda: stock(client)[0])
        assert daemon.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_chunks_outlive_the_daemon(daemon: Daemon, make_client: MakeClient, how: signal.Signals) -> None:
    client = make_client()
    chains = [chain_keys(number, 3) for number in range(5)]
    for number, chain in enumerate(chains):
        assert store(client, chain, seed=number) == 3
    daemon.signal(how)
    assert daemon.wait() == 0
    daemon.start()
    assert "15 chunks" in daemon.log
    other = make_client("other")
    for number, chain in enumerate(chains):
        assert hits(other, chain, seed=number) == 3
        eventually(lambda chain=chain: client.lookup(chain) == 3)
        assert hits(client, chain, seed=number) == 3
    assert daemon.stat()["chunks"] == 15


def test_a_closed_terminal_ends_it_like_sigterm(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.wrapper = ("env", "--default-signal=HUP")
    daemon.start()
    daemon.signal(signal.SIGHUP)
    assert daemon.wait() == 0


def test_nohup_keeps_it(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.wrapper = ("env", "--ignore-signal=HUP")
    daemon.start()
    daemon.signal(signal.SIGHUP)
    assert daemon.stat()["pid"] == daemon.pid
    assert daemon.stop() == 0


def test_another_capacity_at_the_next_start(daemon: Daemon, make_client: MakeClient) -> None:
    """The arena keeps its size, and the log says so."""
    assert store(make_client(), chain_keys("a", 3)) == 3
    daemon.stop()
    daemon.start()
    assert "keeps this size" not in daemon.log
    daemon.stop()
    daemon.capacity = "2MiB"
    daemon.start()
    assert "keeps this size, though the capacity is 2 MiB now" in daemon.log
    assert daemon.stat()["slots"] == 127


def test_another_capacity_with_resize_arena(daemon: Daemon, make_client: MakeClient) -> None:
    """The next arena has the new size. An engine that was there has mapped the old one: it goes on without a cache."""
    client, chain = make_client(), chain_keys("a", 3)
    assert store(client, chain) == 3
    daemon.options = [*daemon.options, "--resize-arena"]
    daemon.stop()
    daemon.start()
    eventually(lambda: client.lookup(chain) == 3)
    assert hits(client, chain) == 3
    daemon.stop()
    daemon.capacity = "2MiB"
    daemon.start()
    assert "the capacity is 2 MiB now. It is removed with its chunks" in daemon.log
    assert client.lookup(chain) == 0
    with closing(daemon.client("next")) as successor:
        assert store(successor, chain) == 3
        assert hits(successor, chain) == 3
    assert daemon.stat()["slots"] > 127


def test_a_second_daemon_on_one_socket(daemon: Daemon, make_daemon: MakeDaemon, tmp_path: Path) -> None:
    second = make_daemon(options=["--name", "second"])
    second.socket = daemon.socket
    second.launch()
    assert second.wait() == 2
    assert second.log == f"kvkern: another daemon already has {daemon.socket}; stop it, or choose another --socket\n"
    assert daemon.stat()["pid"] == daemon.pid


def test_a_second_daemon_on_one_arena(daemon: Daemon, make_daemon: MakeDaemon) -> None:
    second = make_daemon()
    second.launch()
    assert second.wait() == 2
    assert "another daemon already has" in second.log
    assert "choose another --name or --arena-dir" in second.log
    assert second.log.count("\n") == 1
    assert not second.socket.exists()
    third = make_daemon(options=["--name", "third"]).start()
    assert third.stat()["pid"] == third.pid


def test_a_dead_daemons_socket_is_replaced(daemon: Daemon) -> None:
    daemon.kill()
    assert daemon.socket.is_socket()
    daemon.start()
    assert daemon.stat()["pid"] == daemon.pid


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_kept(make_daemon: MakeDaemon, kind: str) -> None:
    daemon = make_daemon()
    if kind == "file":
        daemon.socket.write_text("precious")
    elif kind == "folder":
        daemon.socket.mkdir()
    else:
        daemon.socket.symlink_to(daemon.folder / "elsewhere")
    daemon.launch()
    assert daemon.wait() == 2
    assert daemon.log == f"kvkern: {daemon.socket} exists and is no socket; remove it, or choose another --socket\n"
    assert os.path.lexists(daemon.socket)
    assert kind != "file" or daemon.socket.read_text() == "precious"


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_socket_in_no_folder(make_daemon: MakeDaemon, kind: str) -> None:
    daemon = make_daemon()
    if kind == "file":
        (daemon.folder / "x").write_text("")
    daemon.socket = daemon.folder / "x" / "s"
    daemon.launch()
    assert daemon.wait() == 2
    assert "create the folder, or choose another --socket" in daemon.log
    assert daemon.log.count("\n") == 1


def test_a_folder_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested on the functions, because root may do everything."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", denied)
    with pytest.raises(ConfigError, match=r"cannot listen on .*/s: Permission denied; create the folder"):
        listening_socket(folder / "s")
    monkeypatch.setattr(socket_path.os, "open", denied)
    lock = exclusive_lock(folder / "s", "--socket")
    with pytest.raises(ConfigError, match=r"cannot be opened: Permission denied; create the folder"):
        lock.__enter__()
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_arena_that_can_not_be_opened(make_daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"kvkern-node-{os.getuid()}-default"
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "elsewhere")
    daemon = make_daemon()
    daemon.launch()
    assert daemon.wait() == 2
    assert f"kvkern: arena {path} cannot be opened" in daemon.log
    assert daemon.log.count("\n") == 1


def test_an_arena_that_was_never_finished(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """A daemon was killed while it made the arena: the next daemon makes a new one."""
    path = tmp_path / f"kvkern-node-{os.getuid()}-default"
    path.touch()
    os.truncate(path, ArenaSpec.for_capacity(GEOMETRY, 1 << 20).nbytes)
    daemon = make_daemon().start()
    with closing(daemon.client()) as client:
        assert store(client, chain_keys("a", 3)) == 3


def test_an_arena_of_another_version(daemon: Daemon, make_client: MakeClient, tmp_path: Path) -> None:
    """The operator is told at the start, not every engine."""
    assert store(make_client(), chain_keys("a", 3)) == 3
    assert daemon.stop() == 0
    path = tmp_path / f"kvkern-node-{os.getuid()}-default"
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x09")
    daemon.launch()
    assert daemon.wait() == 2
    assert daemon.log.startswith(f"kvkern: arena {path} has version 9, this kvkern reads ")
    assert "remove the file when no engine uses it any more: it is only a cache" in daemon.log
    path.unlink()
    daemon.start()


def test_a_file_that_is_no_arena_is_kept(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    path = tmp_path / f"kvkern-node-{os.getuid()}-default"
    path.write_text("precious" * 100)
    daemon = make_daemon().start()
    with pytest.raises(ConfigError, match="is no finished kvkern arena; if no engine uses it, remove it"):
        daemon.client()
    assert path.read_text() == "precious" * 100
    path.unlink()
    with closing(daemon.client()) as client:
        assert store(client, chain_keys("a", 3)) == 3


def test_more_capacity_than_there_is(make_daemon: MakeDaemon) -> None:
    """The first engine decides the size of a slot, so it gets the error. The daemon goes on."""
    daemon = make_daemon(capacity="64TiB").start()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"the daemon refuses: the arena needs .* Lower `capacity`"):
            daemon.client()
    assert daemon.stat()["connections"] == 1


def test_less_capacity_than_a_slot(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(capacity=str(PAGE)).start()
    with pytest.raises(ConfigError, match=r"the daemon refuses: capacity 4 KiB holds no slot"):
        daemon.client()
    assert daemon.stat()["connections"] == 1


def test_an_arena_folder_that_is_gone(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(arena_dir=tmp_path / "arenas")
    daemon.arena_dir.mkdir()
    daemon.start()
    for file in daemon.arena_dir.iterdir():
        file.unlink()
    daemon.arena_dir.rmdir()
    with pytest.raises(ConfigError, match=r"cannot be made: No such file or directory"):
        daemon.client()
    daemon.arena_dir.mkdir()
    with closing(daemon.client()) as client:
        assert store(client, chain_keys("a", 3)) == 3
