"""Engines of real daemons on a Redis server that fails: they hit or miss in time, and afterwards nothing is still held."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvkern.cache.base import RequestEnd
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.server import Server
from kvkern.policy.base import Use
from tests.node.conftest import ROOT, Daemon, MakeDaemon, eventually, read_verified, store
from tests.remote.fault_proxy import FaultProxy, Redis, flips, redis_behind_proxy
from tests.remote.required_servers import need
from tests.support import NAMESPACE, chain_keys

A, B = chain_keys("a", 6), chain_keys("b", 6)
PATIENCE_S, TIMEOUT_S = 0.5, 2.0  # limits of a request for six chunks, and of a call to the store
LATE_S = 5.0  # time that a busy machine may add


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Redis, FaultProxy]]:
    need("redis", program="redis-server", module="redis")
    with redis_behind_proxy(tmp_path) as both:
        yield both


@pytest.fixture
def start(make_daemon: MakeDaemon, ends: tuple[Redis, FaultProxy]) -> Callable[[str, int], Daemon]:
    """Starts a daemon with the store at a port."""

    def begin(name: str, port: int) -> Daemon:
        url = f"redis://127.0.0.1:{port}"
        options = [
            "--name",
            name,
            "--remote",
            url,
            "--persist",
            "all",
            "--remote-timeout",
            str(TIMEOUT_S),
            "--drain",
            "1",
        ]
        return make_daemon(options=options).start()

    return begin


def hits(client: NodeClient, chain: list[bytes]) -> int:
    """Acquire in time, verify and release. Returns how many chunks were hit."""
    began = time.monotonic()
    lease = client.acquire(chain, use=Use(namespace=NAMESPACE))
    assert time.monotonic() - began < PATIENCE_S + LATE_S
    assert lease.keys == tuple(chain[: len(lease.keys)])
    assert read_verified(client.arena, lease)
    client.release(lease)
    return len(lease.keys)


def stores(client: NodeClient, chain: list[bytes]) -> int:
    began = time.monotonic()
    stored = store(client, chain)
    assert time.monotonic() - began < LATE_S
    return stored


def impatient(daemon: Daemon, client: NodeClient) -> None:
    """Report a prefill speed at which a request for six chunks waits for PATIENCE_S."""
    assert stores(client, chain_keys(("own", daemon.socket), 1)) == 1
    client.finish(Use(request=1), RequestEnd(prefill_tokens_s=6 * 16 / PATIENCE_S))
    eventually(lambda: daemon.stat().get("prefill_tokens_s"), "the speed")


def at_rest(daemon: Daemon) -> dict[str, Any]:
    """Wait until nothing is held and every slot is free, a chunk's, or granted to a client. Returns the daemon's counters."""

    def settled() -> dict[str, Any] | None:
        row = daemon.stat()
        held = row["leases"] + row["quarantined_leases"] + row["quarantined_slots"] + row["remote_waiting_requests"]
        return row if not held and row["free_slots"] + row["chunks"] + row["granted_slots"] == row["slots"] else None

    row: dict[str, Any] = eventually(settled, "that every slot is accounted for")
    assert row["faults"] == row["bad_chunks"] == 0
    return row


FAULTS: dict[str, tuple[Callable[[Redis, FaultProxy], object], Callable[[Redis, FaultProxy], object]]] = {
    "paused": (lambda redis, proxy: redis.pause(), lambda redis, proxy: redis.go_on()),
    "killed": (lambda redis, proxy: redis.kill(save=True), lambda redis, proxy: redis.start()),
    "partitioned": (lambda redis, proxy: setattr(proxy, "silent", True), lambda redis, proxy: proxy.heal()),
    "garbled": (
        lambda redis, proxy: setattr(proxy, "garble_replies", flips(Random(1), 0.9)),
        lambda redis, proxy: proxy.heal(),
    ),
}


@contextmanager
def two_nodes(
    start: Callable[[str, int], Daemon], ends: tuple[Redis, FaultProxy]
) -> Iterator[tuple[Daemon, Daemon, NodeClient, NodeClient]]:
    """Two daemons, the second behind the proxy, and a client of each. The first one's chunks A are in the store."""
    redis, proxy = ends
    first, second = start("one", redis.port), start("two", proxy.port)
    with closing(first.client()) as one, closing(second.client()) as two:
        assert stores(one, A) == 6
        eventually(lambda: first.stat()["remote_written_chunks"] == 6, "the write")
        yield first, second, one, two


def test_engines_live_on_and_hit_again(start: Any, ends: tuple[Redis, FaultProxy]) -> None:
    redis, proxy = ends
    with two_nodes(start, ends) as (first, second, one, two):
        impatient(second, two)
        eventually(lambda: hits(two, A) == 6, "a hit")
        for name, (begin, end) in FAULTS.items():
            written = first.stat()["remote_written_chunks"]
            chain = chain_keys(name, 6)
            assert stores(one, chain) == 6
            eventually(lambda written=written: first.stat()["remote_written_chunks"] >= written + 6, "the write")  # type: ignore[misc]
            begin(redis, proxy)
            for turn in range(3):
                assert hits(two, chain) == 0 or name == "garbled"  # some of the garbled values may be correct
                assert stores(two, chain_keys((name, turn), 2)) == 2
                assert hits(two, A) == 6
            end(redis, proxy)
            if name == "garbled":  # wrong values are deleted, and must be stored once more
                eventually(lambda chain=chain: stores(two, chain) >= 0 and hits(two, chain) == 6)  # type: ignore[misc]
            else:
                eventually(lambda chain=chain: hits(two, chain) == 6, "a hit")  # type: ignore[misc]
            assert two.connected
        at_rest(second)
        at_rest(first)
    assert second.stop() == first.stop() == 0


def test_a_kill_while_the_store_hangs(start: Any, ends: tuple[Redis, FaultProxy]) -> None:
    """The slots that the killed daemon was reading into are free again, and its engine goes on."""
    _, proxy = ends
    with two_nodes(start, ends) as (_, second, _, two):
        assert stores(two, B) == 6
        proxy.nbytes_s = 20_000.0  # it begins to answer and does not finish
        answer = two.acquire_soon(A, use=Use(namespace=NAMESPACE))
        eventually(lambda: second.stat()["remote_waiting_requests"] == 1, "the request")
        time.sleep(0.3)
        second.kill()
        assert answer.result(LATE_S).keys == ()
        proxy.heal()
        second.start()
        eventually(lambda: two.connected and hits(two, B) == 6, "the engine's own chunks")
        eventually(lambda: hits(two, A) == 6, "the other node's")
        at_rest(second)


def test_sigterm_while_nobody_answers(start: Any, ends: tuple[Redis, FaultProxy]) -> None:
    _, proxy = ends
    daemon = start("one", proxy.port)
    with closing(daemon.client()) as client:
        assert stores(client, A) == 6
        eventually(lambda: daemon.stat()["remote_written_chunks"] == 6, "the write")
        proxy.silent = True
        answer = client.acquire_soon(B, use=Use(namespace=NAMESPACE))
        assert stores(client, chain_keys("c", 6)) == 6
        eventually(lambda: daemon.stat()["remote_waiting_requests"] == 1, "the request")
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert time.monotonic() - began < 1.0 + TIMEOUT_S + LATE_S
        assert answer.result(LATE_S).keys == ()


def test_sigterm_with_a_frozen_store(
    make_daemon: MakeDaemon, ends: tuple[Redis, FaultProxy], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With the limits as they are by default: reads and writes wait, and the daemon ends within 10 s. Only its arena stays."""
    redis, _ = ends
    arena_dir = tmp_path_factory.mktemp("arena")
    options = ["--remote", f"redis://127.0.0.1:{redis.port}", "--persist", "all"]
    daemon = make_daemon(options=options, arena_dir=arena_dir).start()
    with closing(daemon.client()) as client:
        impatient(daemon, client)
        assert stores(client, A) == 6
        eventually(lambda: daemon.stat()["remote_written_chunks"] == 7, "the writes")
        redis.pause()
        answer = client.acquire_soon(B, use=Use(namespace=NAMESPACE))
        assert stores(client, chain_keys("c", 6)) == 6
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 10
        assert answer.result(LATE_S).keys == ()
    assert not daemon.socket.exists()
    assert [path.name for path in arena_dir.iterdir() if path.suffix != ".lock"] == [
        f"kvkern-node-{os.getuid()}-default"
    ]
    redis.go_on()
    daemon.start()
    with closing(daemon.client()) as client:
        assert hits(client, A) == 6
    at_rest(daemon)


def test_transfers_and_writes_share_the_time_after_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    server = Server(NodeConfig(tmp_path / "s", 1 << 20, arena_dir=tmp_path, drain_s=0.2))
    monkeypatch.setattr(server, "_end_remote", left.append)
    for busy in (True, False):
        monkeypatch.setattr(server, "_has_transfers", lambda busy=busy: busy)
        asyncio.run(server._drain())
    assert left[0] == 0.0
    assert 0.1 < left[1] <= 0.2


CLIENT = """
import os, sys, time
from pathlib import Path
from kvkern.node.client.cache_client import NodeClient
from kvkern.policy.base import Use
from tests.node.conftest import GEOMETRY
from tests.support import NAMESPACE, chain_keys

client = NodeClient.open(Path(sys.argv[1]), sys.argv[2], GEOMETRY, prefault=False, timeout_s=30.0)
client.acquire_soon(chain_keys("a", 6), use=Use(namespace=NAMESPACE))
time.sleep(float(sys.argv[3]))
os._exit(0)
"""


def test_engines_that_are_gone_before_the_answer(start: Any, ends: tuple[Redis, FaultProxy]) -> None:
    redis, proxy = ends
    first, second = start("one", redis.port), start("two", proxy.port)
    with closing(first.client()) as one:
        assert stores(one, A) == 6
        eventually(lambda: first.stat()["remote_written_chunks"] == 6, "the write")
    proxy.delay_s = 0.3
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    engines = [
        subprocess.Popen([sys.executable, "-c", CLIENT, str(second.socket), f"e{n}", str(0.2 * n)], env=environment)
        for n in range(4)
    ]
    assert [engine.wait(60) for engine in engines] == [0] * 4
    proxy.heal()
    with closing(second.client()) as two:
        eventually(lambda: hits(two, A) == 6, "a hit")
        row = at_rest(second)
        assert row["sessions"] == 2  # and the admin client that asks
        assert row["remote_hit_chunks"] >= 6
