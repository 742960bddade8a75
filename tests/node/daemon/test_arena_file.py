"""The daemon's arena as a file: whoever else can make files beside it, whatever a client has done to it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from kvkern.arena import file as arena_module
from kvkern.arena.file import ArenaSpec, create_or_attach, read_spec
from kvkern.arena.slots import PAGE
from kvkern.errors import ArenaError, ConfigError
from kvkern.node.daemon import arena_file
from kvkern.node.daemon.arena_file import SizeWatch, _move_earlier, claimed_arena_path, taking_over
from tests.arena.test_room import small_tmpfs
from tests.node.conftest import GEOMETRY, Daemon, MakeClient, MakeDaemon, eventually, hits, read_verified, store
from tests.support import chain_keys
from tests.users import ATTACKER, VICTIM, as_user, needs_root, shared_folder

SPEC = ArenaSpec.for_capacity(GEOMETRY, 1 << 20)
NAME = f"kvkern-node-{VICTIM}-default"


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like /dev/shm that every user can reach. Nobody can note anything outside it."""
    with tempfile.TemporaryDirectory(prefix="kvkern-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
        yield shared_folder(Path(name))


@pytest.mark.parametrize(
    "plant", ["folder", "file", "pipe", "link", "lock file", "lock folder", "lock pipe", "lock link"]
)
def test_names_that_another_user_took_beside_the_folder(shm: Path, plant: str) -> None:
    """Where earlier versions had their arena and its lock. The daemon has its names in a folder of its own."""
    path = shm / (f".{NAME}.lock" if plant.startswith("lock") else NAME)
    make = {
        "folder": path.mkdir, "file": path.touch, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/tmp"),
    }[plant.split()[-1]]  # fmt: skip
    as_user(ATTACKER, make)

    def claim() -> None:
        with claimed_arena_path(shm, NAME) as path:
            assert path == shm / f"kvkern-{VICTIM}" / NAME
            create_or_attach(SPEC, path).close()
        assert path.exists()
        path.unlink()
        with claimed_arena_path(shm, NAME):
            pass

    as_user(VICTIM, claim)
    assert os.listdir(shm) == [path.name]


def test_a_lock_that_another_user_took(shm: Path) -> None:
    """In a folder of somebody else, which is possible for `--socket`: the message names the owner, and no other daemon."""
    lock = shm / ".s.lock"
    as_user(ATTACKER, lambda: lock.touch(0o666))
    lock.chmod(0o666)

    def fail() -> None:
        with (
            pytest.raises(
                ConfigError, match=rf"{lock} cannot be used: it belongs to uid {ATTACKER}, and this process is uid"
            ),
            arena_file.exclusive_lock(shm / "s", "--socket"),
        ):
            pass

    as_user(VICTIM, fail)


def test_an_arena_of_an_earlier_version_is_found(shm: Path) -> None:
    """It lies in the shared folder. Engines that map it keep it."""

    def upgrade() -> None:
        arena = create_or_attach(SPEC, shm / NAME)
        (shm / f".{NAME}.lock").touch(0o600)
        with claimed_arena_path(shm, NAME) as path:
            assert (path.stat().st_dev, path.stat().st_ino) == arena.file_id()
            assert sorted(os.listdir(path.parent)) == [f".{NAME}.lock", NAME]
        assert os.listdir(shm) == [f"kvkern-{VICTIM}"]

    as_user(VICTIM, upgrade)


def test_an_earlier_daemon_that_still_runs(shm: Path) -> None:
    def start_second() -> None:
        create_or_attach(SPEC, shm / NAME).close()
        with (
            arena_file.exclusive_lock(shm / NAME, "--name"),
            pytest.raises(ConfigError, match=f"another daemon already has {shm / NAME}"),
            claimed_arena_path(shm, NAME),
        ):
            pass

    as_user(VICTIM, start_second)


def test_a_lock_is_not_left_behind(tmp_path: Path) -> None:
    with claimed_arena_path(tmp_path, NAME):
        assert os.listdir(tmp_path) == [f".{NAME}.lock"]
        with pytest.raises(ConfigError, match="another daemon already has"), claimed_arena_path(tmp_path, NAME):
            pass
        assert os.listdir(tmp_path) == [f".{NAME}.lock"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("left", [PAGE, PAGE + 2 * GEOMETRY.slot_nbytes, SPEC.nbytes - 1, 2 * SPEC.nbytes])
def test_an_arena_of_another_size_is_repaired(
    daemon: Daemon, make_client: MakeClient, tmp_path: Path, left: int
) -> None:
    """A client has changed its size while no daemon ran. Engines that have it mapped go on with it."""
    client = make_client()
    keys = chain_keys("a", 3)
    assert store(client, keys) == 3
    path = tmp_path / f"kvkern-node-{os.getuid()}-default"
    daemon.kill()
    eventually(lambda: not client.connected)
    os.truncate(path, left)
    daemon.start()
    assert path.stat().st_size == SPEC.nbytes
    assert path.stat().st_blocks * 512 >= SPEC.nbytes
    assert "a process that has it open has changed its size" in daemon.log
    eventually(lambda: client.connected)
    hits(client, keys)  # what is served verifies
    store(client, keys)
    assert hits(client, keys) == 3


@pytest.mark.parametrize("left", [0, 5, 40])
def test_an_arena_that_is_cut_within_its_header_is_made_anew(
    daemon: Daemon, make_client: MakeClient, tmp_path: Path, left: int
) -> None:
    assert store(make_client(), chain_keys("a", 3)) == 3
    assert daemon.stop() == 0
    os.truncate(tmp_path / f"kvkern-node-{os.getuid()}-default", left)
    daemon.start()
    assert "is no whole arena" in daemon.log
    with closing(daemon.client("new")) as client:
        assert store(client, chain_keys("a", 3)) == 3


def test_senseless_sizes_in_the_header(daemon: Daemon, make_client: MakeClient, tmp_path: Path) -> None:
    """A client wrote them. A daemon that believed them would serve no slot, or need more memory than there is."""
    assert store(make_client(), chain_keys("a", 3)) == 3
    path = tmp_path / f"kvkern-node-{os.getuid()}-default"
    for slots in (0, 1 << 60):
        assert daemon.stop() == 0
        with path.open("r+b") as file:
            file.seek(16)
            file.write(slots.to_bytes(8, "little"))
        daemon.start()
        assert "is no whole arena" in daemon.log
        with closing(daemon.client("new")) as client:
            assert store(client, chain_keys("a", 3)) == 3


def test_an_arena_that_is_cut_under_a_daemon(daemon: Daemon, make_client: MakeClient, tmp_path: Path) -> None:
    """It gets its size back before anybody touches what is missing. The chunks that were there do not verify."""
    client = make_client()
    keys = chain_keys("a", 3)
    assert store(client, keys) == 3
    pid, path = daemon.pid, tmp_path / f"kvkern-node-{os.getuid()}-default"
    os.truncate(path, PAGE)
    eventually(lambda: path.stat().st_size == SPEC.nbytes, "the size")
    eventually(lambda: "has changed its size" in daemon.log, "the log")
    lease = client.acquire(keys)
    assert len(lease.slots) == 3
    assert not read_verified(client.arena, lease)
    client.arena.mark_bad(np.array(lease.slots))
    assert client.release(lease) == 3
    assert store(client, keys) == 3
    assert hits(client, keys) == 3
    assert daemon.stat()["pid"] == pid


def descriptor_of_earlier(path: Path) -> int:
    """Make an arena that nobody maps any more. Return a descriptor of it."""
    with closing(create_or_attach(SPEC, path)) as arena:
        return arena.descriptor()


@pytest.mark.parametrize("kind", ["flock", "record lock"])
def test_an_arena_that_an_earlier_client_has_locked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A daemon has the name for itself, so it need not wait. It makes a new arena."""
    monkeypatch.setattr(arena_module, "LOCKED_S", 0.05)
    path = tmp_path / NAME
    fd = descriptor_of_earlier(path)
    try:
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, PAGE, 0))
        with closing(create_or_attach(SPEC, path, repair=True)) as arena:
            assert not os.path.samestat(os.fstat(fd), path.stat())
            assert arena.file_id() == (path.stat().st_dev, path.stat().st_ino)
    finally:
        os.close(fd)
    assert "is locked by a process that an earlier daemon had let in" in caplog.text


@pytest.mark.parametrize("at", [0, 8, 30, 60])
def test_a_header_of_the_file_that_a_client_has_changed(daemon: Daemon, make_client: MakeClient, at: int) -> None:
    """Magic, version, sizes, identity. New engines get the arena, and the next daemon finds it."""
    client = make_client()
    assert store(client, chain_keys("a", 3)) == 3
    client.arena.bytes[at] ^= 0x40
    with closing(daemon.client("other")) as other:
        assert hits(other, chain_keys("a", 3)) == 3

    def is_right() -> bool:
        with suppress(ArenaError):  # another version
            return read_spec(client.arena.path) == SPEC
        return False

    eventually(is_right, "the header is right again")
    daemon.kill()
    daemon.start()
    eventually(lambda: client.connected)
    assert hits(client, chain_keys("a", 3)) == 3


@pytest.mark.parametrize("size", [PAGE, SPEC.nbytes])
def test_an_arena_that_cannot_be_repaired_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """Its pages were given to somebody else. A daemon that cannot start would be worse than one with an empty cache."""
    needs_root()
    with small_tmpfs(tmp_path, "2m") as folder:
        path = folder / NAME
        create_or_attach(SPEC, path).close()
        os.truncate(path, PAGE)
        os.truncate(path, size)  # of the right size it has holes, as kvkern's arenas without prefault once had
        (folder / "other").write_bytes(bytes(3 << 19))
        with caplog.at_level(logging.WARNING, "kvkern"), taking_over(path, SPEC, 1 << 20):
            create_or_attach(SPEC, path, repair=True)
        assert "not whole and cannot be repaired (the arena needs" in caplog.text
        assert not path.exists()


def test_a_repair_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is no room for the pages now. Why is said once."""
    needs_root()
    with small_tmpfs(tmp_path, "2m") as folder, closing(create_or_attach(SPEC, folder / NAME)) as arena:
        watch, other = SizeWatch(), folder / "other"
        os.truncate(folder / NAME, PAGE)
        other.write_bytes(bytes(3 << 19))

        async def look() -> None:
            watch.look(arena)
            await watch.end()

        for _ in range(3):
            asyncio.run(look())
            assert not arena.has_its_size()
        assert [line.levelname for line in caplog.records].count("ERROR") == 1
        other.unlink()
        asyncio.run(look())
        assert arena.has_its_size()


def test_what_an_earlier_version_left_and_cannot_be_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, path = tmp_path / "earlier", tmp_path / "path"
    earlier.write_bytes(b"")

    def fails(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        _move_earlier(earlier, path)
    path.write_bytes(b"")
    _move_earlier(earlier, path)
    assert caplog.text.count(f"{earlier}") == caplog.text.count("is not used; remove it") == 2
    assert earlier.exists()


def test_an_arena_that_others_could_open(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    path = tmp_path / f"kvkern-node-{os.getuid()}-default"
    create_or_attach(SPEC, path).close()
    path.chmod(0o666)
    daemon = make_daemon().start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "had the mode 0666, so other users could open it; it is 0600 now" in daemon.log
