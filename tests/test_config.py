"""The options that a user may write, and the message for each mistake."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.config import MAX_CAPACITY_NBYTES, Config, RemoteConfig, format_nbytes, parse_nbytes, reject_unknown
from kvkern.errors import ConfigError, KvkernError


@pytest.mark.parametrize(("text", "nbytes"), [
    (1, 1), (4096, 4096), ("1", 1), ("8GiB", 8 << 30), ("8 gib", 8 << 30), (" 500MB ", 500 * 10**6), ("0.5GiB", 1 << 29),
    ("1.5 KiB", 1536), ("7B", 7), ("64TiB", 1 << 46), ("1kB", 1000), ("2TB", 2 * 10**12), ("8G", 8 * 10**9), ("8Gi", 8 << 30),
    ("1.5Ti", 3 << 39), ("64 Mi", 64 << 20), ("7k", 7000), (MAX_CAPACITY_NBYTES, 1 << 46),
])  # fmt: skip
def test_sizes(text: int | str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("bad", [
    0, -1, "0", "0GiB", "0.0001B", "-5GiB", "", "GiB", "G", "Gi", "8I", "8GG", "8 GiBs", "eight", "1e9", "8,5GiB", "nan", "inf",
    8.5e9, None, True, [8], b"8GiB", MAX_CAPACITY_NBYTES + 1, "65TiB", "9" * 40, "8iB",
], ids=repr)  # fmt: skip
def test_texts_that_are_no_size(bad: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"capacity is {bad!r}")):
        parse_nbytes(bad)


@pytest.mark.parametrize("bad", ["9" * 5000, "9" * 400 + ".5GiB"], ids=["digits", "infinite"])
def test_absurd_digits(bad: str) -> None:
    with pytest.raises(ConfigError):
        parse_nbytes(bad)


@given(st.integers(1, 1 << 46))
def test_formatted_sizes_are_close_and_parse(nbytes: int) -> None:
    assert parse_nbytes(format_nbytes(nbytes)) == pytest.approx(nbytes, rel=1e-3)


def test_defaults() -> None:
    config = Config.parse({"capacity": "1GiB"})
    assert config == Config(1 << 30)
    assert config.arena_dir == Path("/dev/shm")
    assert config.store_replies  # vLLM's own default drops the tokens it generated
    assert 1 <= config.copy_threads <= 4
    assert Config.parse({"capacity": 1, "threads": 7}).copy_threads == 7


def test_every_option(tmp_path: Path) -> None:
    options = {
        "capacity": "1GiB", "arena_dir": str(tmp_path), "threads": 3, "prefault": False, "store_replies": False,
        "weights": "abc", "salt": "tenant", "policy": "arc", "remote": "file:///x", "persist": "all", "remote_queue": "1MiB",
        "remote_timeout": 2, "hbm": "2GiB",
    }  # fmt: skip
    expected = Config(
        1 << 30, tmp_path, 3, False, False, "abc", "tenant", policy="arc", remote="file:///x", persist="all",
        remote_queue_nbytes=1 << 20, remote_timeout=2.0, hbm_nbytes=2 << 30,
    )  # fmt: skip
    assert Config.parse(options) == expected
    assert expected.remote_config == RemoteConfig("file:///x", "all", 1 << 20, 2.0)
    assert Config.parse({"capacity": 1, "remote": "file:///x"}).remote_config == RemoteConfig("file:///x")


@pytest.mark.parametrize(("options", "message"), [
    ({}, "no capacity in the options; set how much memory"),
    ({"capactiy": "1GiB"}, "unknown key 'capactiy' in the options; did you mean 'capacity'?"),
    ({"capacity_nbytes": 5}, "did you mean 'capacity'?"),
    ({"capacity": 1, "thread": 1}, "did you mean 'threads'?"),
    ({"capacity": 1, "xyz": 1}, "unknown key 'xyz' in the options; known keys: arena_dir, capacity, "),
    ({"capacity": 1, "threads": "4"}, "threads in the options is '4' (str); expected int"),
    ({"capacity": 1, "threads": True}, "threads in the options is True (bool); expected int"),
    ({"capacity": 1, "threads": 1.5}, "1.5 (float); expected int"),
    ({"capacity": 1, "threads": -1}, "threads is -1; it must lie in 0..64"),
    ({"capacity": 1, "threads": 65}, "threads is 65"),
    ({"capacity": 1, "prefault": 1}, "prefault in the options is 1 (int); expected bool"),
    ({"capacity": 1, "salt": 5}, "salt in the options is of the type int; expected str"),
    ({"capacity": 1, "salt": None}, "salt in the options is of the type NoneType; expected str"),
    ({"capacity": 1, "remote": ["redis://user:hunter2@h"]}, "remote in the options is of the type list; expected str"),
    ({"capacity": 1, "arena_dir": 5}, "arena_dir in the options is 5"),
    ({"capacity": 1, "arena_dir": "/nowhere/at/all"}, "arena_dir is '/nowhere/at/all', which is no directory"),
    ({"capacity": 1, "policy": "fifo"}, "policy is 'fifo'; expected one of lru, arc, s3fifo, lirs, grit"),
    ({"capacity": 1, "policy": 1}, "policy in the options is 1 (int); expected str"),
    ({"socket": "/s", "policy": "lru"}, "policy and socket in the options exclude each other: the daemon has its own policy; "
     "leave it out here, and set it with `kvkern serve --policy`"),
    ({"socket": "/s", "remote_queue": 1}, "remote_queue and socket in the options exclude each other: the daemon has its own "
     "remote_queue; leave it out here, and set it with `kvkern serve --rem"),
    ({"socket": "/s", "remote_timeout": 1}, "leave it out here, and set it with `kvkern serve --remote-timeout`"),
    ({"capacity": 1, "remote_queue": "1MiB"}, "remote_queue is '1MiB', but there is no remote to write to"),
    ({"capacity": 1, "remote_timeout": 1.5}, "remote_timeout is 1.5, but there is no remote to write to"),
    ({"capacity": 1, "persist": "all"}, "persist is 'all', but there is no remote to write to"),
    ({"capacity": 1, "remote": "file:///x", "remote_queue": "many"}, "remote_queue is 'many'; expected a size"),
    ({"capacity": 1, "remote": "file:///x", "remote_timeout": "5"}, "is '5' (str); expected float"),
    ({"capacity": 1, "remote": "file:///x", "remote_timeout": True}, "True (bool); expected float"),
    ({"capacity": 1, "remote": "file:///x", "remote_timeout": 0}, "remote_timeout is 0.0; it must lie in 0.1..300 seconds"),
    ({"capacity": 1, "remote": "file:///x", "remote_timeout": float("nan")}, "remote_timeout is nan"),
    ({"capacity": 1, "remote": "file:///x", "persist": "some"}, "persist is 'some'; expected one of all"),
    ({"capacity": 0}, "capacity is 0"),
    ({1: 2}, "unknown key 1"),
], ids=repr)  # fmt: skip
def test_mistakes_name_the_value_and_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Config.parse(options, "the options")
    assert isinstance(caught.value, KvkernError)
    assert isinstance(caught.value, ValueError)


def test_no_secret_is_shown() -> None:
    assert "hunter2" not in repr(Config.parse({"capacity": 1, "salt": "hunter2", "remote": "redis://user:hunter2@h"}))


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config(1).threads = 5  # type: ignore[misc]


def test_known_keys_pass() -> None:
    reject_unknown({"a": 1}, {"a", "b"}, "here")
    reject_unknown({}, set(), "here")
