"""Values that users give for options: what passes can be handed to the system, and what does not is named with its limit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkern.config import host_and_port
from kvkern.errors import ConfigError
from kvkern.option_values import (
    checked_folder,
    checked_input_file,
    checked_number,
    checked_output_file,
    checked_path,
    split_address,
    without_brackets,
)

Check = Callable[[Path, str], Path]


@pytest.mark.parametrize(
    "good", ["a", "/", "/dev/null", "/nowhere/x", "ä" * 127, "/".join(["x" * 255] * 15), "a\nb", "\udcff"]
)
def test_paths_that_can_be_looked_up(good: str) -> None:
    assert checked_path(good, "out") == Path(good)
    assert not os.path.exists(good) or good in ("/", "/dev/null")


@pytest.mark.parametrize(("bad", "why"), [
    ("", "out is '', which is empty"), ("a\0b", r"out is 'a\\x00b', which is no path; give a path without NUL"),
    ("x" * 256, "a part of it has 256 bytes, at most 255"), ("/a/" + "ä" * 128, "a part of it has 256 bytes"),
    ("x/" * 2048, r"a path of 4096 bytes; at most 4095 are allowed"), ("y" * 9999, "y{100}...', a path of 9999 bytes"),
])  # fmt: skip
def test_paths_that_cannot(bad: str, why: str) -> None:
    for check in (checked_path, checked_input_file, checked_output_file, checked_folder):
        with pytest.raises(ConfigError, match=why):
            check(bad, "out")


def test_what_is_at_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "dangling").symlink_to("none")
    (tmp_path / "loop").symlink_to("loop")
    make: Check = lambda path, name: checked_folder(path, name, make=True)  # noqa: E731
    passes: dict[str, list[Check]] = {
        "file": [checked_input_file, checked_output_file], "to_file": [checked_input_file, checked_output_file],
        "none": [checked_output_file, make], "none/none": [checked_output_file, make], ".": [checked_folder, make],
    }  # fmt: skip
    names = {
        "pipe": "a FIFO",
        "to_pipe": "a FIFO",
        "dangling": "a broken link",
        "loop": "cannot be used: Too many levels",
    }
    for name in [*passes, *names, "file/x", "/dev/null"]:
        for check in (checked_input_file, checked_output_file, checked_folder, make):
            if check in passes.get(name, ()):
                assert check(tmp_path / name, "out") == tmp_path / name
            else:
                with pytest.raises(ConfigError, match=names.get(name, "out is ")):
                    check(tmp_path / name, "out")
    with pytest.raises(ConfigError, match="which is a device; give a file to write"):
        checked_output_file("/dev/null", "out")
    with pytest.raises(ConfigError, match="file' is a file, no folder"):
        checked_output_file(tmp_path / "file" / "x", "out")


def test_numbers() -> None:
    for good in (0, 1, 0.5):
        assert checked_number(good, "n", 0, 1) == good
    for bad in (-1, 1.1, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ConfigError, match=rf"n is {bad:g}; it must lie in 0\.\.1"):
            checked_number(bad, "n", 0, 1)
    with pytest.raises(ConfigError, match=r"n is 4294967296; it must lie in 0\.\.4294967295"):
        checked_number(1 << 32, "n", 0, (1 << 32) - 1)
    with pytest.raises(ConfigError, match=r"n is 9{100}; it must"):
        checked_number(10**400 - 1, "n", 0, 1)


@pytest.mark.parametrize(("text", "split"), [
    ("host:1", ("host", 1)), (":65535", ("", 65535)), ("[::1]:0", ("[::1]", 0)), ("::1:80", ("::1", 80)),
    ("", None), ("host", None), ("host:", None), ("host:65536", None), ("host:-1", None), ("host:+1", None), ("host: 1", None),
    ("host:1\n", None), ("host:\u0661", None), ("host:000080", None), ("host:" + "9" * 10_000, None),
])  # fmt: skip
def test_addresses(text: str, split: tuple[str, int] | None) -> None:
    assert split_address(text) == split


def test_brackets() -> None:
    assert [without_brackets(text) for text in ("[::1]", "[", "", "[a", "a]", "[]")] == ["::1", "[", "", "[a", "a]", ""]


def test_an_address_to_connect_to() -> None:
    assert host_and_port("kvcache-rpc:9600", "rpc_endpoint") == ("kvcache-rpc", 9600)
    assert host_and_port("[::1]:9600", "rpc_endpoint") == ("::1", 9600)
    for bad in (":9600", "[]:9600", "host:0", "host", "host:" + "9" * 10_000):
        with pytest.raises(ConfigError, match=r"^rpc_endpoint is .{1,103}; expected HOST:PORT"):
            host_and_port(bad, "rpc_endpoint")
    with pytest.raises(ConfigError, match=r"^rpc_endpoint has a user before its host") as refused:
        host_and_port("me:hush@host:9600", "rpc_endpoint")
    assert "hush" not in str(refused.value)
