"""No room for an arena, or no right to make one: each way is an ArenaError with the numbers and the remedy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import (
    EACCES,
    EFBIG,
    EIO,
    EISDIR,
    ELOOP,
    EMFILE,
    ENOENT,
    ENOLCK,
    ENOMEM,
    ENOSPC,
    ENOTDIR,
    EOPNOTSUPP,
    EROFS,
)
from pathlib import Path

import pytest

from kvkern.arena import file as arena_module
from kvkern.arena import room
from kvkern.arena.file import ArenaSpec, create_or_attach, read_spec
from kvkern.arena.folder import sweep_stale
from kvkern.arena.free_memory import FreeMemory
from kvkern.arena.slots import PAGE, SlotGeometry
from kvkern.errors import ArenaError

SPEC = ArenaSpec(SlotGeometry(part_nbytes=5000, max_planes=3, world_size=2), num_slots=5)


@contextmanager
def small_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"needs a mount of its own: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FAULTS = {
    "no folder": (ENOENT, r"No such file or directory \(it takes 104 KiB\); make the folder"),
    "the folder is a file": (ENOTDIR, "Not a directory .*; make the folder"),
    "a folder has its name": (EISDIR, ".* is a folder; remove it, or set arena_dir"),
    "a link has its name": (ELOOP, ".* is a symbolic link; remove it, or set arena_dir"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_path_that_cannot_be_used(tmp_path: Path, fault: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    code, message = FAULTS[fault]
    path = tmp_path / {ENOENT: "none/a", ENOTDIR: "file/a", EISDIR: "folder", ELOOP: "link"}[code]
    with pytest.raises(ArenaError, match=f"arena {path} cannot be made: {message}"):
        create_or_attach(SPEC, path)
    if code != ENOENT:
        with pytest.raises(ArenaError, match=f"arena {path} cannot be opened"):
            read_spec(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize(("call", "code", "remedy"), [
    ("open", EACCES, f"in which uid {os.getuid()} can make files"), ("open", EROFS, "use an arena_dir in which"),
    ("open", EMFILE, "ulimit -n"), ("open", ENOSPC, "make room"), ("ftruncate", EFBIG, "ulimit -f"),
    ("ftruncate", EIO, "look at the folder"),
])  # fmt: skip
def test_what_the_kernel_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, remedy: str
) -> None:
    """Each becomes an error with the path, the size, the kernel's reason and the remedy."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(arena_module.os, call, refuse)
        with pytest.raises(ArenaError, match=rf"cannot be made: {os.strerror(code)} \(it takes 104 KiB\); .*{remedy}"):
            create_or_attach(SPEC, tmp_path / "a")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error at once, not a creator that hangs. Sweeping leaves the file where it is."""

    def refuse(*_: object) -> None:
        raise OSError(ENOLCK, os.strerror(ENOLCK))

    (tmp_path / "kvkern-t-old").touch()
    for call in ("flock", "fcntl"):
        with monkeypatch.context() as patch:
            patch.setattr(arena_module.fcntl, call, refuse)
            with pytest.raises(ArenaError, match=r"No locks available .* file system has locks"):
                create_or_attach(SPEC, tmp_path / "a")
            if call == "flock":
                assert sweep_stale(tmp_path, "kvkern-t-") == []


def test_a_page_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(memory: object) -> None:
        raise OSError(ENOMEM, os.strerror(ENOMEM))

    monkeypatch.setattr(room, "populate", refuse)
    with pytest.raises(ArenaError, match=r"Cannot allocate memory .*; lower `capacity`"):
        create_or_attach(SPEC, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


BIG = replace(SPEC, num_slots=200)  # 4 MiB


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: to mount a small tmpfs")
def test_a_small_mount(tmp_path: Path) -> None:
    """With docker's 64 MiB /dev/shm, a large arena is an error that names the remedy, and a small one still works."""
    with small_tmpfs(tmp_path, "1m") as folder:
        with pytest.raises(ArenaError, match=r"needs 3\.\d+ MiB in .* only 1 MiB are free .*--shm-size"):
            create_or_attach(BIG, folder / "a")
        create_or_attach(SPEC, folder / "b").close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: to mount a small tmpfs")
@pytest.mark.parametrize("prefault", [True, False])
def test_a_mount_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefault: bool) -> None:
    """The pages are reserved at start, so a full file system is an error then and never a SIGBUS."""
    monkeypatch.setattr(arena_module, "check_room", lambda nbytes, path: None)
    with small_tmpfs(tmp_path, "1m") as folder:
        with pytest.raises(ArenaError, match="the kernel says: No space left"):
            create_or_attach(BIG, folder / "a", prefault=prefault)
        assert list(folder.iterdir()) == []
        create_or_attach(SPEC, folder / "a").close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: to mount a small tmpfs")
def test_a_mount_that_fills_up_later(tmp_path: Path) -> None:
    """Without prefault too, an arena that was made has its pages: a write into it works on a full mount."""
    with small_tmpfs(tmp_path, "1m") as folder:
        arena = create_or_attach(SPEC, folder / "a", prefault=False)
        with pytest.raises(OSError, match="No space left"):
            (folder / "other").write_bytes(bytes(1 << 20))
        arena.bytes[PAGE:] = 7  # on a page that is not there it would be a SIGBUS
        assert int(arena.bytes[-1]) == 7
        arena.close()
        del arena


@pytest.mark.parametrize("prefault", [True, False])
def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefault: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ArenaError, match=r"on a file system that cannot reserve memory .* use an arena_dir on a tmpfs"):
        create_or_attach(SPEC, tmp_path / "a", prefault=prefault)
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((*real[:3], 10, 10, *real[5:]))  # blocks, bfree, bavail follow bsize and frsize
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(ArenaError, match="are free there"):
        create_or_attach(SPEC, tmp_path / "a")


def test_no_memory_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: FreeMemory(1 << 10, "in this test"))
    with pytest.raises(
        ArenaError, match=r"needs 104 KiB of memory, but only 1 KiB are free in this test\. Lower `capacity`"
    ):
        create_or_attach(SPEC, tmp_path / "a")


def test_a_refused_arena_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: FreeMemory(1 << 10, ""))
    with pytest.raises(ArenaError):
        create_or_attach(SPEC, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
