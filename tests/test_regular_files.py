"""Files that another user could have put in place: only regular ones are opened, and nothing waits."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkern.regular_files import NotRegularError, open_regular, read_regular, write_regular


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


PLANTS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a folder": os.mkdir,
    "a symbolic link": lambda path: path.symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize("kind", PLANTS)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT | os.O_TRUNC])
def test_what_is_no_regular_file(tmp_path: Path, kind: str, flags: int) -> None:
    path = tmp_path / "it"
    PLANTS[kind](path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotRegularError) as caught:
        open_regular(path, flags)
    assert caught.value.strerror == f"it is {kind}, not a regular file; remove it or give another path"
    assert caught.value.filename == str(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_device() -> None:
    with pytest.raises(NotRegularError, match="it is a device"):
        open_regular("/dev/null", follow_links=True)


def test_a_link_where_links_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 10, follow_links=True) == b"mine"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "other").symlink_to("fifo")
    with pytest.raises(NotRegularError, match="it is a FIFO"):
        read_regular(tmp_path / "other", 10, follow_links=True)


def test_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        open_regular(path)
    os.close(open_regular(path, os.O_WRONLY | os.O_CREAT))
    assert path.stat().st_mode & 0o777 == 0o600
    write_regular(path, b"12345", sync=True)
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes") as caught:
        read_regular(path, 4)
    assert caught.value.errno == errno.EFBIG
    os.close(open_regular(path, os.O_WRONLY | os.O_TRUNC))
    assert read_regular(path, 5) == b""
    folder = os.open(tmp_path, os.O_RDONLY)
    os.close(open_regular("file", dir_fd=folder))
    os.close(folder)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Neither through a link under the file's name, nor through one under the name of its new version."""
    (tmp_path / "others").write_bytes(b"theirs")
    for name in ("file", ".file.new"):
        (tmp_path / name).symlink_to("others")
    write_regular(tmp_path / "file", b"mine")
    assert (tmp_path / "others").read_bytes() == b"theirs"
    assert read_regular(tmp_path / "file", 10) == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"others", "file"}


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_regular(tmp_path / "file", b"old")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_regular(tmp_path / "file", b"new", sync=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
