"""Daemons of two nodes on one store: engines of one load what engines of the other stored. A failing store costs hits only."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvkern.arena.slots import SlotGeometry
from kvkern.assemble import open_remote_store
from kvkern.cache.base import RequestEnd
from kvkern.config import RemoteConfig
from kvkern.errors import ConfigError
from kvkern.node.client import reconnecting_link
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon import server as server_module
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.server import Server
from kvkern.policy.base import Use
from kvkern.remote import cost_model
from kvkern.remote.stores import registry
from kvkern.remote.stores.base import RemoteError
from kvkern.remote.stores.url import RemoteUrl
from tests.node.conftest import GEOMETRY, Daemon, MakeDaemon, eventually, read_verified, served, store
from tests.remote.stores.memory import MemoryStore
from tests.support import NAMESPACE, chain_keys

A, B = chain_keys("a", 6), chain_keys("b", 6)
USE = Use(namespace=NAMESPACE)


def hits(client: NodeClient, chain: list[bytes]) -> int:
    lease = client.acquire(chain, use=USE)
    assert lease.keys == tuple(chain[: len(lease.keys)])
    assert read_verified(client.arena, lease)
    client.release(lease)
    return len(lease.keys)


@pytest.fixture(autouse=True)
def remote_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait long enough for a slow machine."""
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 30.0)


@pytest.fixture
def values() -> dict[bytes, bytes]:
    return {}


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch, values: dict[bytes, bytes]) -> list[MemoryStore]:
    """All stores that daemons of this process make, over the same values."""
    made: list[MemoryStore] = []

    def make(url: RemoteUrl) -> MemoryStore:
        made.append(MemoryStore(values))
        return made[-1]

    monkeypatch.setattr(registry, "make_store", make)
    return made


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Server, NodeClient]]]:
    """Starts a daemon with the store and a client of it. Both end with the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def begin(name: str, engine: str = "e", **options: Any) -> tuple[Server, NodeClient]:
            remote = RemoteConfig("memory://m", **({"persist": "all"} | options))
            config = NodeConfig(folder / name, 1 << 20, name=name, arena_dir=tmp_path, prefault=False, remote=remote)
            server = stack.enter_context(served(config))
            opened = NodeClient.open(config.socket, engine, GEOMETRY, patience_s=30.0, prefault=False)
            return server, stack.enter_context(closing(opened))

        yield begin


def test_a_prompt_computed_on_another_node_is_loaded(start: Any, stores: list[MemoryStore], values: Any) -> None:
    (_, one), (server, two) = start("one"), start("two")
    assert store(one, A) == 6
    eventually(lambda: len(values) == 6, "the write")
    assert hits(two, A + B) == 6
    eventually(lambda: two.usage()["known_chunks"] == 6, "the index")
    assert hits(two, A) == 6
    assert server.sessions is not None
    sessions = server.sessions
    assert sessions.usage()["remote_hit_chunks"] == 6
    eventually(lambda: sessions.usage()["leases"] == 0, "the release")


def test_an_answer_that_takes_long_is_no_daemon_that_is_gone(
    start: Any, stores: list[MemoryStore], values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnecting_link, "ANSWER_S", 0.6)
    monkeypatch.setattr(server_module, "SWEEP_S", 0.1)
    (_, one), (server, two) = start("one"), start("two")
    store(one, A)
    eventually(lambda: len(values) == 6, "the write")
    store(two, B)
    two.finish(Use(request=1), RequestEnd(prefill_tokens_s=6 * 16 / 10))  # 10 s to compute A
    eventually(lambda: server._remote is not None and server._remote.costs.prefill_tokens_s, "the speed")
    stores[-1].delay_s = 1.0
    began = time.monotonic()
    assert hits(two, A) == 6
    assert time.monotonic() - began > 2
    assert two.connected


def test_a_client_that_goes_while_it_waits_leaves_nothing(start: Any, stores: list[MemoryStore], values: Any) -> None:
    (_, one), (server, two) = start("one"), start("two")
    store(one, A)
    eventually(lambda: len(values) == 6, "the write")
    stores[-1].delay_s = 0.2
    answer = two.acquire_soon(A, use=USE)
    eventually(lambda: server._waiting, "the request")
    two.close()
    assert answer.result(30).keys == ()
    eventually(lambda: not server._waiting, "the end of the wait")
    assert server.sessions is not None
    usage = server.sessions.usage()
    assert (usage["leases"], usage["sessions"]) == (0, 0)


def test_a_failing_store_costs_hits_only(start: Any, stores: list[MemoryStore], values: Any) -> None:
    _, one = start("one")
    stores[-1].broken = True
    assert store(one, A) == 6
    assert hits(one, A) == 6
    assert hits(one, B) == 0
    stores[-1].broken = False


def test_an_arena_of_another_size_takes_the_place_of_one_whose_chunks_still_come(
    start: Any, stores: list[MemoryStore], values: Any
) -> None:
    _, one = start("one")
    store(one, A)
    eventually(lambda: len(values) == 6, "the write")
    server, two = start("two")
    stores[-1].delay_s = 0.3
    answer = two.acquire_soon(A, use=USE)
    eventually(lambda: server._waiting, "the request")
    two.close()
    eventually(lambda: server.sessions is not None and not server.sessions.sessions, "the end of the client")
    other = SlotGeometry(part_nbytes=512, max_planes=2, world_size=1)
    with closing(NodeClient.open(server.config.socket, "f", other, patience_s=30.0, prefault=False)) as three:
        assert answer.result(30).keys == ()
        assert server.sessions is not None
        sessions = server.sessions
        assert three.arena.spec.geometry == other
        assert hits(three, A) == 0  # values of another size
        assert store(three, B) == 6
        assert hits(three, B) == 6
        eventually(lambda: sessions.usage()["leases"] == 0, "the release")
        assert not any(sessions.cache._dram._pins)
        assert sessions.usage()["faults"] == 0


def test_the_store_is_opened_once(
    start: Any, stores: list[MemoryStore], folder: Path, tmp_path: Path, values: Any
) -> None:
    """At the start, to find mistakes, and never again. Also by a daemon that takes an arena over, or that gets no engine."""

    def lives(what: MemoryStore) -> list[str]:
        return [call for call, _ in what.calls if call in ("open", "register", "close")]

    config = NodeConfig(
        folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False, remote=RemoteConfig("memory://m", "all")
    )
    for number in range(2):
        with served(config):
            assert lives(stores[number]) == ["open", *["register"] * number]
            with closing(NodeClient.open(config.socket, "e", GEOMETRY, patience_s=30.0, prefault=False)) as client:
                assert store(client, chain_keys(number, 3)) == 3
                eventually(lambda count=3 * number + 3: len(values) == count, "the write")  # type: ignore[misc]
        assert lives(stores[number]) == ["open", "register", "close"]
    with served(replace(config, name="other")):
        pass
    assert lives(stores[2]) == ["open", "close"]
    assert len(stores) == 3


def test_a_store_that_is_refused_when_the_first_engine_comes(
    start: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gets the reason, nothing of the attempt is left, and the next engine connects once the mistake is mended."""
    away, wrong = True, False

    class Guarded(MemoryStore):
        async def open(self) -> None:
            if away:
                raise RemoteError("nobody there")
            if wrong:
                raise ConfigError("wrong password; mend it")

    monkeypatch.setattr(registry, "make_store", lambda url: Guarded())
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False, remote=RemoteConfig("memory://m"))
    with served(config):

        def opened() -> NodeClient:
            return NodeClient.open(config.socket, "e", GEOMETRY, patience_s=30.0, prefault=False)

        away, wrong, count = False, True, 0
        for attempt in range(4):
            with pytest.raises(ConfigError, match="wrong password"):
                opened()
            if attempt == 1:
                count = len(os.listdir("/proc/self/fd"))
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= count, "no descriptors of failed attempts")
        wrong = False
        with closing(opened()) as client:
            assert store(client, A) == 6


@pytest.mark.parametrize("why", [RemoteError("nobody there"), ConfigError("wrong password; mend it")], ids=type)
def test_a_store_that_neither_opens_nor_closes(monkeypatch: pytest.MonkeyPatch, why: Exception) -> None:
    """The error names why the store did not open, not why it did not close."""

    class Gone(MemoryStore):
        async def open(self) -> None:
            raise why

        async def close(self) -> None:
            raise RemoteError("not that either")

    monkeypatch.setattr(registry, "make_store", lambda url: Gone())
    if isinstance(why, ConfigError):
        with pytest.raises(ConfigError, match="wrong password"):
            open_remote_store(RemoteConfig("memory://m"))
    else:
        assert open_remote_store(RemoteConfig("memory://m")) is None
    assert "kvkern-remote" not in {thread.name for thread in threading.enumerate()}


def test_all_is_compiled_before_an_engine_can_connect(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first engine does not wait for it: on a busy machine it would give up."""
    calls: list[object] = []
    real = server_module.load_policy
    monkeypatch.setattr(
        server_module, "load_policy", lambda name: calls.append((name, config.socket.exists())) or real(name)
    )
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=folder, prefault=False)
    with served(config):
        assert calls == [(config.policy, False)]
    monkeypatch.setattr(server_module, "load_checksums", lambda: calls.append("checksums"))
    monkeypatch.setattr(registry, "make_store", lambda url: MemoryStore())
    with served(replace(config, remote=RemoteConfig("memory://m"))):
        assert "checksums" in calls


def test_a_real_store_through_the_command_line(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/values?capacity=64MiB"
    one, two = (make_daemon(options=["--name", name, "--remote", url, "--persist", "all"]) for name in ("one", "two"))
    one.start()
    two.start()
    with closing(one.client()) as first:
        assert store(first, A) == 6
        eventually(lambda: one.stat()["remote_written_chunks"] == 6, "the write")
    assert one.stop() == 0
    with closing(two.client()) as second:
        assert hits(second, A) == 6
        assert two.stat()["remote_hit_chunks"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--remote", "ftp://h"], "No remote store has the scheme 'ftp'"),
        (["--remote", "nonsense"], "has no scheme"),
        (["--remote", "file:///proc/nowhere/x"], "/proc/nowhere"),
        (["--persist", "all"], "persist is 'all', but there is no --remote"),
        (["--remote", "file:///tmp/x", "--persist", "some"], "persist is 'some'; expected one of all"),
        (["--remote", "file:///tmp/x", "--policy", "lru", "--persist", "predicted"], "policy 'lru' predicts nothing"),
        (["--remote", "file:///tmp/x", "--remote-timeout", "0"], "remote_timeout is 0.0; it must lie in"),
        (["--remote-timeout", "inf"], "remote_timeout is inf; it must lie in"),
        (["--http-host", "a.example"], "http_host is 'a.example', but no port is served"),
        (["--remote", "file:///tmp/x", "--remote-queue", "many"], "remote_queue is 'many'"),
    ],
)
def test_a_wrong_option_is_an_error_at_start(make_daemon: MakeDaemon, options: list[str], message: str) -> None:
    daemon: Daemon = make_daemon(options=options)
    assert daemon.launch().wait() == 2
    assert message in daemon.log
    assert daemon.log.count("\n") == 1


def test_a_password_is_never_printed(folder: Path, tmp_path: Path) -> None:
    remote = RemoteConfig("redis://me:hush@127.0.0.1:1/")
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, remote=remote)
    assert "hush" not in repr(config)
    with pytest.raises(ConfigError, match="persist"):
        replace(config, remote=replace(remote, persist="some"))


def test_fifos_in_the_place_of_values_cost_only_those_values(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """No thread of the daemon waits for their other ends: it serves all others, counts no fault, and hears SIGTERM."""
    path = tmp_path / "store"
    options = ["--remote", f"file://{path}?threads=2", "--persist", "all"]
    one, two = (make_daemon(options=["--name", name, *options]) for name in ("one", "two"))
    with closing(one.start().client()) as client:
        for chain in (A, B):
            eventually(lambda chain=chain: store(client, chain) == 6 or hits(client, chain) == 6, "slots")
        eventually(lambda: len(list(path.glob("kvkern1/??/????????*"))) == 12, "that all values are written")
    for key in A:
        value = path / "kvkern1" / key.hex()[:2] / key.hex()
        value.unlink()
        os.mkfifo(value)
    with closing(two.start().client()) as client:
        assert hits(client, A) == 0
        assert hits(client, B) == 6
        assert hits(client, A) == 0
        row = two.stat()
        assert (row["remote_works"], row["remote_failures"], row["remote_bad_chunks"]) == (1, 0, 0)
    assert two.stop() == one.stop() == 0
