"""A client trusts the daemon of its own user, of root, or of a user that its options name, and only that daemon's arena."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kvkern.config import Config
from kvkern.errors import ArenaError, ConfigError
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.client.daemon_identity import check_arena, check_daemon
from kvkern.node.client.trace_recorder import record
from tests.node.client.test_reconnecting_link import FakeDaemon, faked
from tests.node.conftest import GEOMETRY, Daemon, eventually
from tests.node.other_user import UID, needs_root, open_to_all, other_user, said

SERVE = """
import socket
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(path))
listener.listen()
print("ready", flush=True)
while True:
    sock, _ = listener.accept()
    got = sock.recv(100)
    print("got", got.hex(), flush=True)
    sock.close()
"""


@contextmanager
def impostor(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Another user's process that serves in a folder like /tmp. Yields (path of the socket, what clients told it)."""
    folder.chmod(0o1777)
    heard: list[str] = []
    with other_user(folder / "s", SERVE) as process:
        said(process)

        def listen() -> None:
            assert process.stdout is not None
            heard.extend(line.split()[1] if " " in line.strip() else "" for line in process.stdout)

        thread = threading.Thread(target=listen)
        thread.start()
        yield folder / "s", heard
    thread.join()


@needs_root
def test_nobody_talks_to_another_users_daemon(folder: Path, tmp_path: Path) -> None:
    """It hears no byte, and every kind of client names the uid and the remedy."""
    with impostor(folder) as (path, heard):
        for connect in (
            lambda: NodeClient.open(path, "e", GEOMETRY),
            lambda: AdminClient(path).__enter__(),
            lambda: record(path, tmp_path / "trace.jsonl"),
        ):
            with pytest.raises(ConfigError) as refused:
                connect()
            assert f"uid {UID} serves on {path}, but uid 0 or root is expected" in str(refused.value)
            assert f"daemon_uid {UID} among an engine's options, --daemon-uid {UID} for a command" in str(refused.value)
        with pytest.raises(ConfigError, match="no daemon answers"):  # trusted, but it hangs up
            AdminClient(path, daemon_uid=UID).__enter__()
        eventually(lambda: len(heard) == 4)
    assert heard[:3] == ["", "", ""]
    assert heard[3]


@needs_root
def test_another_user_serves_while_the_daemon_is_away(daemon: Daemon) -> None:
    """An engine that connects again goes on without a cache, and stores nothing there."""
    with closing(daemon.client()) as client:
        daemon.kill()
        eventually(lambda: not client.connected)
        daemon.socket.unlink()
        with impostor(daemon.folder) as (_, heard):
            eventually(lambda: len(heard) >= 2)
            assert not client.connected
        assert not any(heard)
        daemon.folder.chmod(0o700)
        daemon.socket.unlink()
        daemon.start()
        eventually(lambda: client.connected)


@needs_root
def test_roots_daemon_serves_other_users(daemon: Daemon) -> None:
    daemon.stop()
    daemon.options = ("--allow-uid", str(UID))
    code = "client = NodeClient.open(path, 'e', GEOMETRY)\nprint(client.connected)\nclient.close()"
    with other_user(open_to_all(daemon.start()).socket, code) as engine:
        assert said(engine) == ["True"]


def test_which_uids_are_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkern.node.client import daemon_identity
    from kvkern.node.peer_credentials import Peer

    with socket.socket(socket.AF_UNIX) as sock:
        for uid, trusted, may in [(0, -1, True), (os.getuid(), -1, True), (7001, -1, False), (7001, 7001, True),
                                  (7001, 7002, False), (0, 7002, True), (os.getuid(), 7002, True)]:  # fmt: skip
            monkeypatch.setattr(daemon_identity, "peer_of", lambda _, uid=uid: Peer(1, uid, 1))
            if may:
                assert check_daemon(sock, folder / "s", trusted) == uid
            else:
                with pytest.raises(ConfigError, match=f"uid {uid} serves on"):
                    check_daemon(sock, folder / "s", trusted)


# -- the arena -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604, 0o666, 0o620])
def test_the_arenas_mode(tmp_path: Path, mode: int) -> None:
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        os.fchmod(file.fileno(), mode)
        if mode in (0o600, 0o400):
            check_arena(file.fileno(), tmp_path / "a", os.getuid())
        else:
            with pytest.raises(
                ArenaError, match=rf"other users may open it \(mode {mode:04o}, expected 0600\); end the"
            ):
                check_arena(file.fileno(), tmp_path / "a", os.getuid())


def test_the_arenas_owner_and_kind(tmp_path: Path) -> None:
    wrong = f"it belongs to uid {os.getuid()}, but uid 7001 serves on the socket"
    with tempfile.TemporaryFile(dir=tmp_path) as file, pytest.raises(ArenaError, match=wrong):
        check_arena(file.fileno(), tmp_path / "a", 7001)
    read, write = os.pipe()
    try:
        assert stat.S_ISFIFO(os.fstat(read).st_mode)
        with pytest.raises(ArenaError, match="it is no regular file"):
            check_arena(read, tmp_path / "a", os.getuid())
    finally:
        os.close(read)
        os.close(write)


def test_an_arena_that_others_may_open_is_not_mapped(folder: Path, tmp_path: Path) -> None:
    """The descriptor is closed, and no store begins."""
    with faked(folder, tmp_path) as fake:
        assert isinstance(fake, FakeDaemon)
        fake.arena.path.chmod(0o644)
        open_before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ArenaError, match="other users may open it"):
            NodeClient.open(fake.path, "e", GEOMETRY)
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= open_before, "as few open files as before")
        fake.arena.path.chmod(0o600)
        with closing(NodeClient.open(fake.path, "e", GEOMETRY)) as client:
            assert client.connected


def test_the_option_of_engines() -> None:
    assert Config.parse({"socket": "/run/s", "daemon_uid": 990}).daemon_uid == 990
    assert Config.parse({"socket": "/run/s"}).daemon_uid == -1
    for options, why in [
        ({"capacity": "1GiB", "daemon_uid": 990}, "daemon_uid is 990, but there is no daemon; set `socket`"),
        ({"socket": "/run/s", "daemon_uid": -2}, "daemon_uid is -2; expected the number of a user"),
        ({"socket": "/run/s", "daemon_uid": 1 << 32}, "expected the number of a user"),
        ({"socket": "/run/s", "daemon_uid": "kvkern"}, "expected int"),
    ]:
        with pytest.raises(ConfigError, match=why):
            Config.parse(options)


def test_a_refusal_in_an_open_session_names_its_reason(daemon: Daemon) -> None:
    with AdminClient(daemon.socket) as admin:
        admin._bodies.append(_body(p.Refused("it is for operators")))
        with pytest.raises(ConfigError, match="the daemon refuses: it is for operators"):
            admin.ask(p.Stat(1))
        admin._bodies.append(_body(p.Refused("it is for operators")))
        with pytest.raises(ConfigError, match="the daemon refuses: it is for operators"):
            next(admin.recorded_requests())


def _body(message: p.Response) -> bytes:
    from kvkern.node import framing

    return framing.encode(message)[4:]
