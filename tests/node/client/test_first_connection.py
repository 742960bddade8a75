"""An engine that starts while its daemon makes a large arena waits as long as it answers; without a daemon it may go on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvkern.arena.file import Arena
from kvkern.arena.room import allocate
from kvkern.arena.slots import SlotGeometry
from kvkern.errors import ConfigError, KvkernError
from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client import first_connection
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.node_config import NodeConfig
from tests.node.conftest import GEOMETRY, eventually, hits, served, store
from tests.support import SHAPE, chain_keys


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Arenas have their pages, and are not finished before this is set."""
    go = threading.Event()

    def slow(*args: object) -> None:
        allocate(*args)  # type: ignore[arg-type]
        assert go.wait(60)

    monkeypatch.setattr("kvkern.arena.file.allocate", slow)
    yield go
    go.set()


def open_client(path: Path, engine: str) -> NodeClient:
    return NodeClient.open(path, engine, GEOMETRY, timeout_s=0.1, patience_s=30)


def test_engines_wait_for_an_arena_that_is_being_made(
    folder: Path, tmp_path: Path, go: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first engine's Hello makes the daemon make it. The second engine's patience is as short. Operators are answered."""
    monkeypatch.setattr(first_connection, "PROBE_S", 0.1)
    monkeypatch.setattr(first_connection, "ANSWERS_S", 30.0)
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path)
    with caplog.at_level(logging.INFO, "kvkern"), served(config), ThreadPoolExecutor(2) as threads:
        opened = [threads.submit(open_client, folder / "s", engine) for engine in ("one", "two")]
        eventually(lambda: caplog.text.count("is making its arena, 1020 KiB so far; waiting") >= 6, "six looks at it")
        assert not any(client.done() for client in opened)
        with AdminClient(folder / "s") as operator:
            (row,) = operator.ask(p.Stat(1))
        assert row["arena_nbytes"] == 1020 << 10
        go.set()
        with closing(opened[0].result(30)) as one, closing(opened[1].result(30)) as two:
            assert store(one, chain_keys("a", 3)) == 3
            assert hits(two, chain_keys("a", 3)) == 3


def test_a_daemon_that_answers_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections, and that is no sign."""
    monkeypatch.setattr(first_connection, "PROBE_S", 0.1)
    monkeypatch.setattr(first_connection, "ANSWERS_S", 0.1)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "s"))
        sock.listen()
        with pytest.raises(ConfigError, match=r"is there but does not answer \(timed out\)"):
            open_client(folder / "s", "e")


@pytest.mark.parametrize("dump", [False, True])
def test_a_core_dump_of_an_engine_leaves_the_arena_out(folder: Path, tmp_path: Path, dump: bool) -> None:
    with (
        served(NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, dump_arena=dump)) as server,
        closing(NodeClient.open(folder / "s", "e", GEOMETRY, dump_arena=dump)) as client,
    ):
        assert server._arena is not None
        for arena in (client.arena, server._arena):
            assert dumped(arena) == dump


def dumped(arena: Arena) -> bool:
    """Return True if core dumps of this process hold the mapping."""
    _, _, rest = Path("/proc/self/smaps").read_text().partition(f"\n{arena.bytes.ctypes.data:x}-")
    return "dd" not in rest.partition("\nVmFlags: ")[2].partition("\n")[0].split()


def test_a_client_that_needs_no_daemon_connects_when_one_comes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then everything is a miss at once, and nothing is stored. The log says what it waits for, and that it goes on."""
    monkeypatch.setattr(first_connection, "LINE_S", 0.1)
    keys = chain_keys("a", 3)
    client = NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=0.5, patience_s=30, prefault=False, required=False)
    with closing(client):
        assert caplog.text.count("no daemon answers on") >= 2
        assert "The engine goes on without a cache" in caplog.text
        assert client.wait_for_arena(0) is None
        assert client.acquire_soon(keys).result(0).keys == ()
        assert client.reserve(keys, keys, SHAPE).slots == ()
        assert (client.usage()["slots"], client.usage()["connected"]) == (0, 0)
        with served(NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False)):
            assert client.wait_for_arena(60) is not None
            eventually(lambda: client.connected, "connected")
            assert store(client, keys) == 3
            assert hits(client, keys) == 3
        assert "connected to the daemon on" in caplog.text
        assert f"connected to the daemon on {folder}/s again" not in caplog.text


def test_a_client_that_never_finds_a_daemon_can_be_closed(folder: Path) -> None:
    client = NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=0, required=False)
    assert not client.closed
    client.close()
    assert client.closed


def test_a_socket_that_is_no_socket_is_no_daemon_and_one_that_may_not_be_opened_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who must act is told at once, whether a daemon is required or not."""
    (folder / "s").touch()
    NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=0, required=False).close()

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvkern.node.client.reconnecting_link.ReconnectingLink.connect", refused)
    with pytest.raises(ConfigError, match="this user may not open"):
        NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=60, required=False)


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Serve: read a client's Hello, answer it and hang up, again and again."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with sock.accept()[0] as client:
                        client.recv(1 << 16)
                        client.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        sock.shutdown(socket.SHUT_RDWR)
        thread.join(60)
    path.unlink()


VERSION = "protocol version 9 is not the daemon's 8; upgrade the older side"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (framing.encode(p.Refused(VERSION)), VERSION),
        (framing.encode(p.Refused("cannot make an arena of 4 GiB")), "cannot make an arena of 4 GiB"),
        (framing.encode(p.Draining()), "answers Hello with Draining and no arena"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a frame has 1347703880 bytes"),
        (b"\3\0\0\0abc", "holds no message of protocol version"),
    ],
)
def test_an_engine_starts_whatever_the_daemon_says_and_uses_it_when_it_lets_it_in(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: bytes, said: str
) -> None:
    """The same refusal a second later would be a miss. Who asks for a daemon is told."""
    with answering(folder / "s", answer):
        with pytest.raises(KvkernError, match=re.escape(said)):
            open_client(folder / "s", "e")
        client = NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=60, patience_s=30, required=False)
    with closing(client):
        assert client.wait_for_arena(0) is None
        (line,) = (
            row.getMessage() for row in caplog.records if "The engine goes on without a cache" in row.getMessage()
        )
        assert said in line
        with served(NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False)):
            assert client.wait_for_arena(60) is not None
            eventually(lambda: client.connected, "connected")
            assert store(client, chain_keys("a", 3)) == 3


def test_an_arena_that_cannot_be_made_ends_no_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, served(NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path)):
        patch.setattr("kvkern.arena.file.allocate", full)
        client = NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=60, required=False)
        with closing(client):
            assert client.wait_for_arena(0) is None
            patch.undo()
            assert client.wait_for_arena(60) is not None


def test_where_somebody_must_act_no_engine_starts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model's daemon, a user that is not let in, one that may only operate, and processes that cannot be seen."""
    other = SlotGeometry(2 * GEOMETRY.part_nbytes, GEOMETRY.max_planes, GEOMETRY.world_size)
    with (
        served(NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path)) as server,
        closing(NodeClient.open(folder / "s", "one", GEOMETRY)),
    ):
        with pytest.raises(ConfigError, match="this cache holds chunks of"):
            NodeClient.open(folder / "s", "two", other, required=False)
        with monkeypatch.context() as patch:
            patch.setattr(server.admission, "is_engine", lambda peer: False)
            with pytest.raises(ConfigError, match="may operate this cache, but not read it"):
                NodeClient.open(folder / "s", "two", GEOMETRY, required=False)
        with monkeypatch.context() as patch:
            patch.setattr(server.admission, "is_operator", lambda peer: False)
            patch.setattr(server.admission, "_engines", SimpleNamespace(include=lambda peer: False))
            with pytest.raises(ConfigError, match="may not use this cache"):
                NodeClient.open(folder / "s", "two", GEOMETRY, required=False)
        with monkeypatch.context() as patch:
            patch.setattr(server.admission, "_unmapped", os.getuid())
            with pytest.raises(ConfigError, match="that the daemon's user namespace does not know"):
                NodeClient.open(folder / "s", "two", GEOMETRY, required=False)
        with monkeypatch.context() as patch:
            patch.setattr("kvkern.node.daemon.listener.process_start", lambda pid: 0)
            with pytest.raises(ConfigError, match="the daemon cannot see process"):
                NodeClient.open(folder / "s", "two", GEOMETRY, required=False)
