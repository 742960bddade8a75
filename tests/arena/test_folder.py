"""A folder that all users share, such as /dev/shm: nobody else can take the names of a user's arenas, or stop a sweep."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkern.arena.file import create_or_attach
from kvkern.arena.folder import arena_folder, arena_prefix, is_private_folder, make_private_folder, sweep_stale
from kvkern.arena.slots import SlotGeometry
from kvkern.assemble import open_arena
from kvkern.config import Config
from kvkern.errors import ArenaError
from tests.arena.test_room import SPEC
from tests.users import ATTACKER, VICTIM, as_user, needs_root, shared_folder

GEOMETRY = SlotGeometry(part_nbytes=5000, max_planes=3, world_size=2)


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like /dev/shm that every user can reach, and a cache folder of the victim."""
    with tempfile.TemporaryDirectory(prefix="kvkern-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        home = folder / "home"
        home.mkdir()
        if os.getuid() == 0:
            os.chown(home, VICTIM, VICTIM)
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        yield shared_folder(folder)


def config(folder: Path) -> Config:
    return Config.parse({"capacity": "1MiB", "arena_dir": str(folder)})


def bind_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


PLANTS: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(0o700), "open folder": lambda path: (path.mkdir(), path.chmod(0o1777)),
    "file": lambda path: path.touch(0o600), "open file": lambda path: (path.touch(), path.chmod(0o666)),
    "FIFO": lambda path: (os.mkfifo(path), path.chmod(0o666)), "socket": bind_socket,
    "link to a folder": lambda path: path.symlink_to("/tmp"),
    "dangling symbolic link": lambda path: path.symlink_to("/nowhere/x"),
}  # fmt: skip


def make_arena_folder(directory: Path) -> Path:
    """Do what the creator of an arena does with the folder."""
    folder = arena_folder(directory)
    assert folder == directory or make_private_folder(folder)
    return folder


def test_a_folder_of_this_user_is_used_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert arena_folder(tmp_path) == make_arena_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775, 0o2770])
def test_elsewhere_a_folder_of_ones_own(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    folder = arena_folder(tmp_path)
    assert folder == tmp_path / f"kvkern-{os.getuid()}"
    assert is_private_folder(folder)
    assert not folder.exists()
    assert make_arena_folder(tmp_path) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert make_arena_folder(tmp_path) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_folder_comes_and_goes_with_its_files(shm: Path) -> None:
    """Of two arenas one is unlinked by its last process, the other by the next sweep. Then nothing is left."""
    folder = arena_folder(shm)
    with_name = create_or_attach(SPEC, folder / f"{arena_prefix(os.getuid())}a")
    without_name = open_arena(config(shm), GEOMETRY, "b", expected=1)
    assert os.listdir(folder) == [f"{arena_prefix(os.getuid())}a"]
    for arena in (with_name, without_name):
        arena.close()
    del with_name, without_name, arena
    assert [path.parent for path in sweep_stale(folder, arena_prefix(os.getuid()))] == [folder]
    assert os.listdir(shm) == []


def test_a_folder_that_is_removed_before_the_file_is_made(shm: Path) -> None:
    folder = make_arena_folder(shm)
    folder.rmdir()  # by the last process of another engine
    create_or_attach(SPEC, folder / "a", expected=1).close()
    assert os.listdir(shm) == []


@pytest.mark.parametrize("plant", list(PLANTS))
def test_another_user_has_taken_the_name(shm: Path, plant: str) -> None:
    """Every process of the victim finds the same other folder, and goes on finding it when the plant is gone."""
    planted = shm / f"kvkern-{VICTIM}"
    as_user(ATTACKER, lambda: void(PLANTS[plant](planted)))

    def find_it() -> None:
        folder = make_arena_folder(shm)
        assert folder != planted
        assert is_private_folder(folder)
        assert arena_folder(shm) == make_arena_folder(shm) == folder
        assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (VICTIM, 0o700)
        arena = open_arena(config(shm), GEOMETRY, "mine", expected=0)
        assert arena.path.parent == folder

    as_user(VICTIM, find_it)
    planted.rmdir() if planted.is_dir() and not planted.is_symlink() else planted.unlink()
    (noted,) = os.listdir(shm)

    def find_it_again() -> None:
        assert arena_folder(shm) == shm / noted
        assert sweep_stale(shm / noted, arena_prefix(VICTIM)) == [shm / noted / f"kvkern-{VICTIM}-mine"]

    as_user(VICTIM, find_it_again)
    assert os.listdir(shm) == []


@pytest.mark.parametrize("plant", ["folder", "FIFO"])
def test_without_a_place_for_a_note_the_owner_is_named(shm: Path, monkeypatch: pytest.MonkeyPatch, plant: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    as_user(ATTACKER, lambda: void(PLANTS[plant](shm / f"kvkern-{VICTIM}")))

    def fail() -> None:
        with pytest.raises(
            ArenaError,
            match=rf"/kvkern-{VICTIM} is a {plant} of uid {ATTACKER}, but this process is uid {VICTIM}: .*--arena-dir",
        ):
            open_arena(config(shm), GEOMETRY, "mine", expected=1)

    as_user(VICTIM, fail)


def test_a_note_of_another_user_counts_for_nothing(shm: Path) -> None:
    """Root would follow it otherwise. A note that others may write counts for nothing either."""
    needs_root()
    as_user(ATTACKER, lambda: (shm / "kvkern-0").mkdir())
    note = shm.parent / "home" / "kvkern" / "arena-folder"
    note.parent.mkdir()
    note.write_text("0123456789abcdef")
    for owner, mode in ((ATTACKER, 0o600), (0, 0o666)):
        os.chown(note, owner, owner)
        note.chmod(mode)
        with pytest.raises(ArenaError, match=rf"/kvkern-0 is a folder of uid {ATTACKER}"):
            arena_folder(shm)
    note.chmod(0o600)
    assert arena_folder(shm) == shm / "kvkern-0-0123456789abcdef"


@pytest.mark.parametrize("where", ["shared folder", "own folder"])
def test_a_sweep_passes_by_what_others_left(shm: Path, where: str) -> None:
    """Names that arenas of earlier versions had in the shared folder, as anything: no engine that starts may fail of them."""
    folder = shm if where == "shared folder" else shm / "own"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o1777)
    names = {plant: folder / f"{arena_prefix(VICTIM)}{plant.replace(' ', '-')}" for plant in PLANTS}

    def plant_all() -> None:
        for plant, path in names.items():
            PLANTS[plant](path)

    as_user(ATTACKER, plant_all)
    if where == "own folder":
        os.chown(folder, VICTIM, VICTIM)
        folder.chmod(0o755)

    def start() -> None:
        assert sweep_stale(folder, arena_prefix(VICTIM)) == []
        assert sweep_stale(Path("/nowhere"), arena_prefix(VICTIM)) == []
        (folder / f"{arena_prefix(VICTIM)}left").touch()
        open_arena(config(folder), GEOMETRY, "mine", expected=1).close()
        assert not (folder / f"{arena_prefix(VICTIM)}left").exists()

    as_user(VICTIM, start)
    assert sorted(os.listdir(folder)) == sorted(path.name for path in names.values())


def test_a_folder_that_cannot_be_listed(shm: Path) -> None:
    """A folder in which files can be made but not listed. The arena is made; nothing is swept."""
    shm.chmod(0o1733)
    as_user(VICTIM, lambda: open_arena(config(shm), GEOMETRY, "mine", expected=1).close())
    assert os.listdir(shm) == []


@pytest.mark.parametrize("plant", ["folder", "file", "open file", "FIFO", "dangling symbolic link"])
def test_an_arena_whose_name_is_taken(shm: Path, plant: str) -> None:
    """Only in a folder that is given by name and belongs to somebody else. The message names the owner; nothing is opened."""
    planted = shm / "arena"
    as_user(ATTACKER, lambda: void(PLANTS[plant](planted)))
    kind = plant.removeprefix("open ").removeprefix("dangling ")

    def fail() -> None:
        with pytest.raises(
            ArenaError, match=rf"{planted} is a {kind} of uid {ATTACKER}, but .* uid {VICTIM}: another user"
        ):
            create_or_attach(SPEC, planted)

    as_user(VICTIM, fail)


def void(_: object) -> None:
    """Turn a plant into a function that returns nothing."""
