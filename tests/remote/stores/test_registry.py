"""URLs, the registry, and the conformance suite on a store that is only a dict."""

from __future__ import annotations

import asyncio
import os
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores import registry
from kvkern.remote.stores.base import RemoteError, checked_answers, checked_get_answers
from kvkern.remote.stores.blocking_calls import BlockingCalls
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl, hide_password
from tests.remote.stores.conformance import HIT, MISS, UNKNOWN, Conformance, MakeStore
from tests.remote.stores.memory import MemoryStore


class TestMemory(Conformance):
    @pytest.fixture
    def make(self) -> MakeStore:
        values: dict[bytes, bytes] = {}
        return lambda: MemoryStore(values)


def test_a_url() -> None:
    url = RemoteUrl.parse("RedisS://me:se%40cret@Host:7000/a%20b?x=1&y=8GiB&z=no")
    assert (url.scheme, url.host, url.port, url.user, url.password) == ("rediss", "Host", 7000, "me", "se@cret")
    assert (url.path, dict(url.options)) == ("/a b", {"x": "1", "y": "8GiB", "z": "no"})
    assert (url.integer("x", 5, 0, 9), url.integer("none", 5, 0, 9)) == (1, 5)
    assert (url.nbytes("y", 1), url.nbytes("none", 1)) == (8 << 30, 1)
    assert (url.flag("z", True), url.flag("none", True), url.text("x")) == (False, True, "1")
    assert "se@cret" not in repr(url)
    assert str(url) == "rediss://Host:7000/a b"
    assert str(RemoteUrl.parse("redis://[::1]:1/")) == "redis://[::1]:1/"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("mooncake://Node-A:50051", "Node-A", 50051), ("az://me:a%2Fb@MyContainer/x", "MyContainer", None),
        ("redis://[FE80::1]:1", "FE80::1", 1), ("redis://u@[::1]", "::1", None), ("file:///Path", "", None),
        ("redis:///0", "", None), ("redis://:7", "", 7),
    ],
)  # fmt: skip
def test_a_host_is_what_was_written(text: str, host: str, port: int | None) -> None:
    url = RemoteUrl.parse(text)
    assert (url.host, url.port) == (host, port)


def test_a_password_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("hush\n")
    url = RemoteUrl.parse(f"redis://h?password_file={tmp_path}/p")
    assert (url.password, dict(url.options)) == ("hush", {})
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=r"password_file .* cannot be read: .*it is a FIFO, not a regular file"):
        RemoteUrl.parse(f"redis://h?password_file={tmp_path}/fifo")
    with pytest.raises(ConfigError, match=r"password_file .* cannot be read: .*No such file"):
        RemoteUrl.parse(f"redis://h?password_file={tmp_path}/q")


def test_a_password_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "hush")
    url = RemoteUrl.parse("redis://me@h?password_env=STORE_PASSWORD")
    assert (url.user, url.password, dict(url.options)) == ("me", "hush", {})
    with pytest.raises(
        ConfigError, match=r"password_env .* is NONE, but this process has no environment variable NONE\. Set"
    ):
        RemoteUrl.parse("redis://h?password_env=NONE")
    with pytest.raises(ConfigError, match="gives the password more than once"):
        RemoteUrl.parse("redis://me:hush@h?password_env=STORE_PASSWORD")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://me:s3cret@h:1/0", "redis://me:***@h:1/0"), ("redis://:s3cret@h", "redis://:***@h"),
        ("s3://id:s3/cr@et@bucket", "s3://id:***@bucket"), ("redis://me:s3:cret@[::1]:7", "redis://me:***@[::1]:7"),
        ("redis://h:6379/0", "redis://h:6379/0"), ("redis://me@h?password_file=/p", "redis://me@h?password_file=/p"),
        ("file:///path", "file:///path"), ("nonsense", "nonsense"),
        ("redis://h?password=s3cret&prefix=a", "redis://h?password=***&prefix=a"),
        ("s3://b?region=r&secret_access_key=s3&cr=et", "s3://b?region=r&secret_access_key=***&cr=et"),
        ("redis://h?password_env=NAME&prefix=a", "redis://h?password_env=NAME&prefix=a"),
    ],
)  # fmt: skip
def test_hidden_passwords(text: str, shown: str) -> None:
    assert hide_password(text) == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no scheme\. Expected redis://"), ("host:6379", "has no scheme|malformed"), ("file:/x", "has no scheme"),
        ("redis://h:port", "malformed"), ("redis://h:99999", "malformed"), ("redis://h?a", "malformed"),
        ("redis://user:123/4secret@h", r"has an @ behind its host\. Write / in a password as %2F"),
        ("s3://AKIA:wsecret/x@bucket", "malformed"), ("default:secret@cache:6379", "has no scheme|malformed"),
        ("redis://h?a=1&a=2", "gives an option twice"), ("redis://[::1", "malformed"),
    ],
)  # fmt: skip
def test_urls_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RemoteUrl.parse(text)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_options_that_are_none() -> None:
    url = RemoteUrl.parse("redis://me:hush@h?connections=two&size=x&tls=maybe&conections=3")
    with pytest.raises(ConfigError, match=r"connections of redis://h is 'two'\. Give an integer in 1..9"):
        url.integer("connections", 1, 1, 9)
    with pytest.raises(ConfigError, match="size of redis://h is 'x'; expected a size"):
        url.nbytes("size", 1)
    with pytest.raises(ConfigError, match=r"tls of redis://h is 'maybe'\. Give yes or no"):
        url.flag("tls", True)
    with pytest.raises(ConfigError, match="unknown key 'conections' in the options of redis://h; did you mean"):
        url.check_options("connections", "size", "tls")


def test_an_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match=r"No remote store has the scheme 'ftp'\. Use one of: .*file, .*redis"):
        make_store(RemoteUrl.parse("ftp://h"))


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'redis'")

    monkeypatch.setattr(registry, "import_module", missing)
    with pytest.raises(ConfigError, match=r"redis:// needs a package .*\. Install it: pip install 'kvkern\[redis\]'"):
        make_store(RemoteUrl.parse("redis://h"))


def test_a_package_that_lacks_a_system_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libibverbs.so.1: cannot open shared object file")

    monkeypatch.setattr(registry, "import_module", broken)
    with pytest.raises(
        ConfigError, match=r"cannot load its package \(libibverbs\.so\.1: .*\)\. Install the library that is"
    ):
        make_store(RemoteUrl.parse("mooncake://h"))


def test_a_third_party_s_store(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("mine", "tests.remote.stores.test_registry:_make_mine", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "kvkern.remotes" else [])
    store = make_store(RemoteUrl.parse("mine://h"))
    assert isinstance(store, MemoryStore)


def test_a_third_party_s_store_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        metadata.EntryPoint(name, f"{at}:make", registry.ENTRY_POINTS) for name, at in (("a", "no_such"), ("b", "json"))
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    for scheme in ("a", "b"):
        with pytest.raises(
            ConfigError, match=rf"{scheme}:// is registered, but its package cannot be loaded \(.*\)\. Repair or remove"
        ):
            make_store(RemoteUrl.parse(f"{scheme}://h"))


def _make_mine(url: RemoteUrl) -> MemoryStore:
    assert url.host == "h"
    return MemoryStore()


def test_threads_wait_for_what_was_cancelled() -> None:
    threads, go, ended = BlockingCalls(1, "test"), threading.Event(), threading.Event()

    def call() -> int:
        go.wait(30)
        ended.set()
        raise OSError("late")

    async def main() -> None:
        task = asyncio.ensure_future(threads.run(call))
        await asyncio.sleep(0.01)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        with pytest.raises(OSError, match="late"):
            await threads.run(call)
        assert await threads.run(lambda: 5) == 5

    asyncio.run(main())
    threads.close()


def test_what_was_not_answered() -> None:
    failure = [RemoteError("one of many")]
    assert checked_answers([None, True, False], failure) == [None, True, False]
    assert checked_get_answers([HIT, None, MISS, None, HIT], failure) == [HIT, UNKNOWN, MISS, MISS, HIT]
    assert checked_get_answers([None, HIT], failure) == [UNKNOWN, HIT]
    with pytest.raises(RemoteError, match="one of many"):
        checked_get_answers([None, None], failure)
