"""Digests of files: the content counts, a file that stays is read once, and a side file of others is not believed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from blake3 import blake3

from kvkern import file_digests
from kvkern.errors import ConfigError
from kvkern.file_digests import FileDigests


class Counting(FileDigests):
    """Counts the files that are read."""

    reads = 0

    def _hash(self, *args: object) -> bytes:
        type(self).reads += 1
        return super()._hash(*args)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is settled."""
    monkeypatch.setattr(file_digests, "SETTLE_S", 0.05)
    monkeypatch.setattr(file_digests, "CLOCKS_APART_S", 0.05)
    monkeypatch.setattr(Counting, "reads", 0)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc")
    time.sleep(0.1)
    return path


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, (64 << 20) + 7])
def test_the_digest_is_blake3_of_the_content(tmp_path: Path, mapped: bool, nbytes: int) -> None:
    content = (b"0123456789abcde" * (nbytes // 15 + 1))[:nbytes]
    path = tmp_path / "file"
    path.write_bytes(content)
    read: list[int] = []
    assert FileDigests(mapped=mapped).digest(path, read.append) == blake3(content).digest()
    assert sum(read) == nbytes


def test_a_file_that_stays_is_read_once(file: Path, tmp_path: Path) -> None:
    side = tmp_path / "cache" / "digests.json"
    first, other = Counting(side), Counting()
    assert first.digest(file) == first.digest(file) == other.digest(file)
    assert Counting.reads == 2
    first.save()
    again = Counting(side)
    assert again.is_known(file)
    assert again.digest(file) == first.digest(file)
    assert Counting.reads == 2
    file.write_bytes(b"abd")
    assert not again.is_known(file)
    assert again.digest(file) == blake3(b"abd").digest()


@pytest.mark.parametrize("ahead_s", [-1200.0, 0.0, 1200.0])
def test_a_fresh_file_is_read_until_it_has_stayed(file: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    """Two writes within a tick of the file system's clock have the same times. The machine's own clock tells nothing of it."""
    real = time.time
    monkeypatch.setattr(file_digests.time, "time", lambda: real() + ahead_s)
    monkeypatch.setattr(file_digests, "CLOCKS_APART_S", 3600.0)
    monkeypatch.setattr(file_digests, "SETTLE_S", 3600.0)
    digests = Counting()
    file.write_bytes(b"new")
    digests.digest(file)
    digests.digest(file)
    assert Counting.reads == 2
    assert not digests.is_known(file)
    monkeypatch.setattr(file_digests, "SETTLE_S", 0.05)
    time.sleep(0.1)
    digests.digest(file)
    digests.digest(file)
    assert Counting.reads == 3
    assert digests.is_known(file)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_side_file_that_others_may_write_is_not_believed(file: Path, tmp_path: Path, mode: int) -> None:
    side = tmp_path / "digests.json"
    digests = FileDigests(side)
    digests.digest(file)
    digests.save()
    assert FileDigests(side).is_known(file)
    side.chmod(mode)
    assert not FileDigests(side).is_known(file)


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"version": 1}', '{"version": 2, "files": {}}', '{"version": 1, "files": {"a": 1}}',
    '{"version": 1, "files": {"a": []}}', '{"version": 1, "files": {"a": ["1", "zz"]}}', '{"version": 1, "files": []}',
])  # fmt: skip
def test_a_broken_side_file_is_none(file: Path, tmp_path: Path, content: str) -> None:
    side = tmp_path / "digests.json"
    side.write_text(content)
    digests = FileDigests(side)
    assert not digests.is_known(file)
    digests.digest(file)
    digests.save()
    assert FileDigests(side).is_known(file)


def test_what_another_user_put_in_the_place_of_a_file(file: Path, tmp_path: Path) -> None:
    """A FIFO blocks nobody, and a side file behind a link is not believed."""
    os.mkfifo(tmp_path / "fifo")
    digests = FileDigests(tmp_path / "link.json")
    with pytest.raises(OSError, match="it is a FIFO, not a regular file"):
        digests.digest(tmp_path / "fifo")
    assert not FileDigests(tmp_path / "fifo").is_known(file)
    others = FileDigests(tmp_path / "others.json")
    others.digest(file)
    others.save()
    (tmp_path / "link.json").symlink_to("others.json")
    assert not FileDigests(tmp_path / "link.json").is_known(file)
    (tmp_path / "weights").symlink_to(file)  # as hubs keep them
    assert digests.digest(tmp_path / "weights") == blake3(b"abc").digest()
    digests.save()
    assert FileDigests(tmp_path / "link.json").is_known(file)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("set_by_s", [-86_400.0, 86_400.0])
def test_a_wall_clock_that_is_set(file: Path, set_by_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a day: a file that changes is read again."""
    monkeypatch.setattr(file_digests, "CLOCKS_APART_S", 3600.0)
    digests = Counting()
    digests.digest(file)
    real = time.time
    monkeypatch.setattr(file_digests.time, "time", lambda: real() + set_by_s)
    assert digests.digest(file) == blake3(b"abc").digest()
    file.write_bytes(b"abd")
    assert digests.digest(file) == blake3(b"abd").digest()
    monkeypatch.setattr(file_digests.time, "time", real)
    file.write_bytes(b"abe")
    assert digests.digest(file) == blake3(b"abe").digest()


def test_files_that_are_gone_leave_the_side_file(file: Path, tmp_path: Path) -> None:
    side, gone = tmp_path / "digests.json", tmp_path / "gone.bin"
    gone.write_bytes(b"x")
    time.sleep(0.1)
    both = FileDigests(side)
    both.digest(file)
    both.digest(gone)
    both.save()
    gone.unlink()
    file.write_bytes(b"abd")
    time.sleep(0.1)
    later = FileDigests(side)
    later.digest(file)
    later.save()
    assert list(json.loads(side.read_text())["files"]) == [str(file)]


def test_a_file_that_never_rests_is_refused(file: Path) -> None:
    class Written(FileDigests):
        def _hash(self, *args: object) -> bytes:
            file.write_bytes(file.read_bytes() + b"x")
            return super()._hash(*args)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="changed 3 times while kvkern read it"):
        Written().digest(file)
