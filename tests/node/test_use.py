"""The facts that clients send about their requests reach the daemon's policy, and requests of different clients stay apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvkern import assemble
from kvkern.errors import ConfigError
from kvkern.node import protocol as p
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.server import Server
from kvkern.policy.base import Keys, Stop, Use
from kvkern.policy.lru import LRU
from tests.node.conftest import GEOMETRY, Daemon, MakeDaemon, Peer, eventually, served, store, write_payload
from tests.support import NAMESPACE, SHAPE, chain_keys

CHAIN = chain_keys("a", 3)
USE = Use(now_s=1e9, request=7, output_tokens=5, stop=Stop.TOOL_CALL, session=11)  # the daemon replaces the time


class Noting(LRU):
    """An LRU that notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, list[bytes], Use]] = []

    def access(self, chain: Keys, use: Use) -> None:
        self.told.append(("access", list(chain), use))
        super().access(chain, use)

    def insert(self, keys: Keys, use: Use) -> None:
        self.told.append(("insert", list(keys), use))
        super().insert(keys, use)


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[Noting]:
    """All policies that are made."""
    made: list[Noting] = []

    def make() -> Noting:
        made.append(Noting())
        return made[-1]

    monkeypatch.setattr(assemble, "policy_factory", lambda name, capacity, model: make)
    return made


@contextmanager
def daemon(folder: Path, tmp_path: Path) -> Iterator[Server]:
    with served(NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False)) as server:
        yield server


def client(server: Server, engine: str) -> NodeClient:
    return NodeClient.open(server.config.socket, engine, GEOMETRY, patience_s=5.0, prefault=False)


def test_use_and_its_end_arrive(folder: Path, tmp_path: Path, policies: list[Noting]) -> None:
    with daemon(folder, tmp_path) as server, closing(client(server, "one")) as one:
        (policy,) = policies
        reservation = one.reserve(CHAIN, CHAIN[1:], SHAPE, USE)
        write_payload(one.arena, reservation)
        assert one.commit(reservation) == 2
        one.release(one.acquire(CHAIN[1:], prefix=False, use=USE))
        one.finish(replace(USE, output_tokens=99, stop=Stop.END_TURN))
        eventually(lambda: len(policy.told) == 4)
        one.finish(Use(output_tokens=99))  # ends no request
        store(one, chain_keys("b", 1))
    number = policy.told[0][2].request
    assert number not in (0, 7)
    times = [use.now_s for _, _, use in policy.told]
    assert times == sorted(times)
    assert times[-1] < 1e9
    mine = replace(USE, now_s=0.0, request=number)
    told = [(what, keys, replace(use, now_s=0.0, client=0)) for what, keys, use in policy.told]
    assert told == [
        ("access", CHAIN, replace(mine, namespace=NAMESPACE)),
        ("insert", CHAIN[1:], replace(mine, namespace=NAMESPACE)),
        ("access", CHAIN[1:], mine),
        ("access", [], replace(mine, output_tokens=99, stop=Stop.END_TURN)),
        ("access", chain_keys("b", 1), Use(namespace=NAMESPACE)),
        ("insert", chain_keys("b", 1), Use(namespace=NAMESPACE)),
    ]


def test_requests_of_different_clients_are_different(folder: Path, tmp_path: Path, policies: list[Noting]) -> None:
    with (
        daemon(folder, tmp_path) as server,
        closing(client(server, "one")) as one,
        closing(client(server, "two")) as two,
    ):
        assert store(one, CHAIN) == 3
        for engine in (one, two, one):
            engine.release(engine.acquire(CHAIN, use=USE))
        numbers = [use.request for what, _, use in policies[0].told[2:]]
    assert len(numbers) == 3
    assert numbers[0] == numbers[2] != numbers[1]


def test_a_client_that_is_away_loses_the_end_of_a_request(folder: Path, tmp_path: Path) -> None:
    with daemon(folder, tmp_path) as server:
        one = client(server, "one")
    with closing(one):
        eventually(lambda: not one.connected)
        one.finish(USE)
        assert not one._link._outbox


def test_finish_is_not_answered_and_needs_an_arena(folder: Path, tmp_path: Path) -> None:
    with daemon(folder, tmp_path) as server:
        with Peer(server.config.socket) as peer:
            peer.greet(geometry=None)
            assert peer.say(p.Finish(b"", 0, 0.0, 0.0, 1)).hung_up()
        with Peer(server.config.socket) as peer:
            peer.greet()
            peer.say(p.Finish(b"", 0, 0.0, 0.0, 1, 5), p.Stat(3))
            assert isinstance(answer := peer.hear(), p.Answer)
            assert answer.id == 3


def test_a_daemon_with_another_policy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False)
    with pytest.raises(ConfigError, match="policy is 'fifo'; expected one of lru, "):
        dataclasses.replace(config, policy="fifo")
    asked: list[str] = []
    monkeypatch.setattr(assemble, "policy_factory", lambda name, capacity, model: asked.append(name) or LRU)
    with served(dataclasses.replace(config, policy="arc")) as server, closing(client(server, "one")) as one:
        assert store(one, CHAIN) == 3
    assert asked == ["arc"]


def test_every_daemon_is_told_how_fast_the_engine_computes(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """A user says it once. The daemon that replaces a killed one is told too."""
    daemon: Daemon = make_daemon(options=["--remote", f"file://{tmp_path}/values?capacity=64MiB"]).start()
    with closing(daemon.client()) as client:
        client.note_prefill(1234.0)
        eventually(lambda: daemon.stat().get("prefill_tokens_s") == 1234.0, "the speed")
        daemon.kill()
        daemon.start()
        eventually(lambda: daemon.stat().get("prefill_tokens_s") == 1234.0, "the speed")
