"""A real cluster of three: where values go, and what calls do when slots move or a server hangs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkern.remote.stores.base import value_name
from tests.remote.required_servers import free_port, need
from tests.remote.stores.conformance import (
    HIT,
    MISS,
    UNKNOWN,
    Bench,
    Conformance,
    MakeStore,
    Part,
    PartConformance,
    key_of,
)
from tests.remote.stores.redis.servers import (
    RedisCluster,
    bench_of,
    fails,
    fresh,
    redis_cluster,
    refused,
    spread,
    store_of,
)


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    need("redis", program="redis-server", module="redis")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class TestCluster(Conformance):
    @pytest.fixture
    def make(self, cluster: RedisCluster) -> MakeStore:
        return fresh(f"redis+cluster://127.0.0.1:{cluster.servers[1].port}")


def part_of(cluster: RedisCluster, fail: Callable[[], None], heal: Callable[[], None] | None) -> Part:
    """The cluster's last server fails."""
    it = InCluster(cluster)
    keys = it.of(0, 1, 0, 1, 2, 2, 2, 2)
    assert it.bench.put(keys, it.bench.values()) == [True] * 8
    return Part(it.bench, keys[:4], keys[4:], fail, heal, timeout_s=0.5)


class TestAServerIsPaused(PartConformance):
    @pytest.fixture
    def part(self, cluster: RedisCluster) -> Iterator[Part]:
        def heal() -> None:
            cluster.servers[2].go_on()
            cluster.wait()

        part = part_of(cluster, cluster.servers[2].stop, heal)
        yield part
        heal()
        part.bench.close()


class TestAServerIsKilled(PartConformance):
    @pytest.fixture
    def part(self, tmp_path: Path) -> Iterator[Part]:
        with redis_cluster(tmp_path) as cluster:
            part = part_of(cluster, cluster.servers[2].kill, None)
            yield part
            part.bench.close()


class InCluster:
    """A store in a cluster, and keys whose server is known."""

    def __init__(self, cluster: RedisCluster, options: str = "") -> None:
        self.prefix = secrets.token_hex(4) + "/"
        url = f"redis+cluster://127.0.0.1:{cluster.servers[0].port}?prefix={self.prefix}{options}"
        self.bench = Bench(lambda: store_of(url))
        self.keys = [key_of(i) for i in range(60)]
        self.owners = spread([self.name(key) for key in self.keys], cluster)

    def name(self, key: bytes) -> str:
        return f"{self.prefix}{value_name(key)}"

    def of(self, *owners: int) -> list[bytes]:
        """Return keys on these servers, one each, all different."""
        left = list(zip(self.keys, self.owners, strict=True))
        chosen = []
        for owner in owners:
            index = next(i for i, (_, has) in enumerate(left) if has == owner)
            chosen.append(left.pop(index)[0])
        return chosen


@pytest.fixture
def in_cluster(cluster: RedisCluster) -> Iterator[InCluster]:
    it = InCluster(cluster)
    yield it
    it.bench.close()


def test_values_lie_where_a_cluster_wants_them(in_cluster: InCluster, cluster: RedisCluster) -> None:
    keys = in_cluster.of(0, 1, 2, 2, 1, 0)
    assert in_cluster.bench.put(keys, in_cluster.bench.values()[:6]) == [True] * 6
    for index, server in enumerate(cluster.servers):
        with server.client() as client:
            there = {name.decode() for name in client.keys(f"{in_cluster.prefix}*")}
        assert there == {in_cluster.name(keys[i]) for i in (index, 5 - index)}
    got = in_cluster.bench.get([keys[0], key_of(1000), keys[1]], in_cluster.bench.into()[:3])
    assert got[:2] == [HIT, MISS]


def test_a_server_of_a_cluster_that_is_stopped(in_cluster: InCluster, cluster: RedisCluster) -> None:
    bench, store = in_cluster.bench, in_cluster.bench.store
    keys = in_cluster.of(0, 1, 0, 2, 0, 1)
    values, into = bench.values()[:6], bench.into()[:6]
    bench.put(keys, values)
    cluster.servers[2].stop()
    try:
        assert bench.run(store.get(keys, into, 0.3)) == [HIT, HIT, HIT, UNKNOWN, HIT, HIT]
        assert all(bench.read(row) for row in (0, 1, 2, 4, 5))
        assert bench.run(store.exists(keys, 0.3)) == [True, True, True, None, True, True]
        assert bench.run(store.put(keys, values, 0.3)) == [True, True, True, None, True, True]
        fails(bench, store.get(keys[3:4], into[3:4], 0.3), 0.3)
        fails(bench, store.exists(keys[3:4], 0.3), 0.3)
        fails(bench, store.put(keys[3:4], values[3:4], 0.3), 0.3)
        fails(bench, store.delete(keys[2:4], 0.3), 0.3)
        bench.memory.bytes[8:] = 0xCD
    finally:
        cluster.servers[2].go_on()
        cluster.wait()
    assert (bench.memory.bytes[8:] == 0xCD).all()
    assert bench.put(keys, values) == [True] * 6
    assert bench.get(keys, into) == [HIT] * 6


def test_slots_that_move(in_cluster: InCluster, cluster: RedisCluster) -> None:
    """First while the slots move (ASK), then when they have moved (MOVED), then back."""
    bench, (key,) = in_cluster.bench, in_cluster.of(0)
    values, into = bench.values(), bench.into()
    others = in_cluster.of(1, 0, 2, 0)[:3]
    others = [other for other in others if other != key]
    clients = [server.client() for server in cluster.servers]
    slot = clients[0].execute_command("CLUSTER KEYSLOT", in_cluster.name(key))
    keys = [others[0], key, *others[1:]]
    clients[1].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", cluster.ids[0])
    clients[0].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", cluster.ids[1])
    for _ in range(2):
        assert bench.put(keys, values[: len(keys)]) == [True] * len(keys)
        assert bench.exists([*keys, key_of(999)]) == [*([True] * len(keys)), False]
        assert bench.get(keys, into[: len(keys)]) == [HIT] * len(keys)
        assert all(bench.read(row) for row in range(len(keys)))
    for owner in (1, 0):
        for client in (clients[owner], *clients):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", cluster.ids[owner])
        bench.put(keys, values[: len(keys)])
        assert bench.get(keys, into[: len(keys)]) == [HIT] * len(keys)
        with clients[owner] as client:
            assert client.exists(in_cluster.name(key)) == 1
        bench.run(bench.store.delete(keys, 10))
        assert bench.exists(keys) == [False] * len(keys)


def test_a_cluster_whose_first_server_is_gone(cluster: RedisCluster) -> None:
    seeds = f"127.0.0.1:{free_port()},127.0.0.1:{cluster.servers[2].port}"
    with bench_of(f"redis+cluster://127.0.0.1:{free_port()}?seeds={seeds}") as bench:
        assert bench.put([key_of(i) for i in range(8)], bench.values()) == [True] * 8


def test_it_is_told_from_a_single_server(cluster: RedisCluster) -> None:
    for server in cluster.servers:
        assert "Say redis+cluster://" in refused(f"redis://127.0.0.1:{server.port}")
