"""A store's folder in which others put things: nothing blocks, nothing is followed, and no value of a stranger is read."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from tests.remote.stores.conformance import HIT, MISS, Bench, key_of
from tests.remote.stores.file import files
from tests.remote.stores.file.files import VALUE, file_of, makes, nbytes_in, temporaries_in, wait_for
from tests.remote.stores.file.test_store import open_and_close

store_path, bench = files.store_path, files.bench

STRANGER = 54321  # a user without any part in the tests' folders


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path.name)
    os.chdir(here)


PLANTS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a folder": os.mkdir,
    "a symbolic link": lambda path: path.symlink_to("/dev/zero"),
}


def ended(call: Callable[[], object]) -> bool:
    """Return True if a call ends, which a blocked thread would not."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_in_the_place_of_a_value(store_path: Path, plant: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is a miss, said once, and the next write replaces it unless it is a folder. Values beside it are read."""
    bench = Bench(makes(store_path, "threads=1"), payload_nbytes=8192)
    wait_for(lambda: bench.store._capacity._complete)
    keys, values = [key_of(i) for i in range(8)], bench.values()
    assert bench.put(keys, values) == [True] * 8
    for number in (3, 4):
        file_of(store_path, number).unlink()
        PLANTS[plant](file_of(store_path, number))
    got: list[object] = []
    with caplog.at_level(logging.WARNING, logger="kvkern"):
        assert ended(lambda: got.append(bench.get(keys, bench.into())))
        assert got == [[HIT] * 3 + [MISS] * 5]
        assert bench.get([*keys[:3], *keys[5:]], bench.into()[:6]) == [HIT] * 6
        assert bench.exists(keys) == [True] * 3 + [False] * 2 + [True] * 3
        told = [text for text in caplog.messages if "in the place of a value" in text]
        assert [f": it is {plant}. It counts as absent." in text for text in told] == [True]
        assert str(file_of(store_path, 3)) in told[0] or str(file_of(store_path, 4)) in told[0]
    replaced = plant != "a folder"
    assert bench.put(keys, values) == [True] * 3 + [replaced] * 2 + [True] * 3
    assert bench.get(keys[3:5], bench.into()[:2]) == ([HIT] * 2 if replaced else [MISS] * 2)
    assert temporaries_in(store_path) == []
    wait_for(lambda: bench.store._capacity._reserved_nbytes == 0)
    assert bench.store._capacity.used_nbytes == nbytes_in(store_path) if replaced else True
    bench.close()


def test_a_folder_of_values_that_is_a_link(store_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is read or written behind it: no scan counts what lies there."""
    bench = Bench(makes(store_path, f"capacity={8 * VALUE}"), payload_nbytes=8192)
    wait_for(lambda: bench.store._capacity._complete)
    keys, values = [key_of(i) for i in range(4)], bench.values()[:4]
    assert bench.put(keys[1:], values[1:]) == [True] * 3
    other = tmp_path / "other"
    (store_path / "kvkern1" / "00").rename(other)  # kvkern has made it to try the folder
    (other / key_of(0).hex()).write_bytes(b"".join(values[0]))
    (store_path / "kvkern1" / "00").symlink_to(other)
    assert bench.get(keys[:1], bench.into()[:1]) == [MISS]
    assert bench.put(keys, values) == [False, True, True, True]
    bench.run(bench.store.delete(keys[:1], 30))
    assert [path.name for path in other.iterdir()] == [key_of(0).hex()]
    assert "a folder on its path is a link" in caplog.text
    bench.store._capacity.scan()
    assert bench.store._capacity.used_nbytes == 3 * VALUE
    bench.close()
    with pytest.raises(
        ConfigError, match=rf"{store_path}/kvkern1/00 is a link or no folder, .* the folder that it leads to"
    ):
        open_and_close(makes(store_path))


def test_a_link_to_another_drive_is_an_error_at_the_start(store_path: Path, tmp_path: Path) -> None:
    """Writes would follow it, and the capacity would not count them."""
    (tmp_path / "drive").mkdir()
    store_path.mkdir()
    (store_path / "kvkern1").symlink_to(tmp_path / "drive")
    with pytest.raises(
        ConfigError, match=rf"{store_path}/kvkern1 is a link or no folder, .* the folder that it leads to"
    ):
        open_and_close(makes(store_path))
    assert list((tmp_path / "drive").iterdir()) == []


def test_a_store_may_be_named_by_a_link(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir(mode=0o700)
    store_path.symlink_to(tmp_path / "drive")
    bench = Bench(makes(store_path, f"capacity={4 * VALUE}&threads=1"), payload_nbytes=8192)
    assert bench.put([key_of(i) for i in range(8)], bench.values()) == [True] * 8
    assert nbytes_in(tmp_path / "drive") == 4 * VALUE
    bench.close()


@pytest.mark.parametrize(("mode", "told"), [
    (0o700, ""), (0o750, ""), (0o755, ""), (0o2770, ""), (0o1777, ""),
    (0o777, "every user may write to {} (mode 777)"), (0o2777, "every user may write to {} (mode 2777)"),
])  # fmt: skip
def test_who_else_may_write_is_told(tmp_path: Path, mode: int, told: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "own").mkdir()
    store = tmp_path / "own" / "store"
    store.mkdir()
    store.chmod(mode)
    with caplog.at_level(logging.WARNING, logger="kvkern"):
        open_and_close(makes(store))
    said = [text for text in caplog.messages if "can replace values" in text]
    assert len(said) == bool(told)
    assert told.format(store) in "".join(said)
    assert not told or said[0].startswith(f"kvkern: file://{store}: every user")


def test_a_folder_of_another_user_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if os.geteuid() != 0:
        pytest.skip("a folder of another user is not tested: only root can make one")
    store = tmp_path / "store"
    store.mkdir(mode=0o755)
    os.chown(store, STRANGER, STRANGER)
    with caplog.at_level(logging.WARNING, logger="kvkern"):
        open_and_close(makes(store))
        assert f"{store} belongs to the user {STRANGER}, this process runs as 0" in caplog.text
        caplog.clear()
        store.chmod(0o2770)  # shared by a group
        open_and_close(makes(store))
        assert "belongs to the user" not in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o2770])
def test_a_value_of_a_stranger_is_none(store_path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    """In a folder that all may write to. A member of the group that shares a folder is no stranger."""
    if os.geteuid() != 0:
        pytest.skip("another user's values are not tested: only root can become another user")
    store_path.mkdir()
    os.chown(store_path, 0, 0)
    store_path.chmod(mode)
    shared = mode == 0o2770
    bench = Bench(makes(store_path, "threads=1"), payload_nbytes=8192)
    wait_for(lambda: bench.store._capacity._complete)  # counts are exact but for writes while a scan runs
    keys, values = [key_of(i) for i in range(3)], bench.values()[:3]
    assert bench.put(keys, values) == [True] * 3
    value = file_of(store_path, 1)
    os.chown(value, STRANGER, 0 if shared else STRANGER)  # as if he had put his own file in its place
    value.chmod(0o666)
    expected = [HIT, HIT, HIT] if shared else [HIT, MISS, MISS]
    assert bench.get(keys, bench.into()[:3]) == expected
    assert bench.exists(keys) == [True, shared, True]
    assert (f"it belongs to the user {STRANGER}, to whom the folder gives no rights" in caplog.text) != shared
    assert bench.put(keys, values) == [True] * 3  # it is replaced
    assert bench.get(keys, bench.into()[:3]) == [HIT] * 3
    assert bench.store._capacity.used_nbytes == nbytes_in(store_path) == 3 * VALUE
    bench.close()
