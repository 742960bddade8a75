"""The tier over a real cluster with one failed server: the keys of the other servers load, and its own stay unknown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvkern.remote import circuit_breaker, cost_model
from kvkern.remote.cost_model import FOREVER_S
from kvkern.remote.stores.base import value_name
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.node.conftest import eventually
from tests.remote.nodes import USE, Node
from tests.remote.required_servers import need
from tests.remote.stores.redis.servers import RedisCluster, redis_cluster, spread
from tests.support import chain_keys

LONG = chain_keys("long", 24)
TIMEOUT_S = 1.0
SOON_S = 10.0  # on a busy machine, for steps that take a second at most


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    need("redis", program="redis-server", module="redis")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    with redis_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def two(tmp_path: Path, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Yield an empty node and a cluster that holds a long chain of another node."""
    monkeypatch.setattr(circuit_breaker, "LONGEST_PAUSE_S", 1.0)
    url = RemoteUrl.parse(f"redis+cluster://127.0.0.1:{cluster.servers[0].port}")
    with ExitStack() as stack:
        one, two = (Node(tmp_path, make_store(url), slots=200, timeout_s=TIMEOUT_S) for _ in range(2))
        stack.callback(one.close)
        stack.callback(two.close)
        assert one.compute(LONG) == 24
        one.settle()
        assert one.counters["remote_written_chunks"] == 24
        two.tier.presence.note_written(
            LONG
        )  # as if this node had written it: a key found gone would change residency_s
        yield two


def owners(chain: list[bytes], cluster: RedisCluster) -> list[int]:
    return spread([value_name(key).encode() for key in chain], cluster)


def nothing_concluded(node: Node) -> None:
    assert not set(LONG) & set(node.tier.presence.absent)
    assert set(LONG) <= set(node.tier.presence.written_at)
    assert node.tier.costs.residency_s == FOREVER_S
    assert node.counters["faults"] == node.counters["remote_bad_chunks"] == 0


def test_a_server_that_is_killed(two: Node, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 30.0)
    has = owners(LONG, cluster)
    dead = next(owner for owner in (0, 1, 2) if has[0] != owner)
    there = has.index(dead)
    new, fresh = chain_keys("new", 24), chain_keys("fresh", 24)
    new_has, fresh_has = owners(new, cluster), owners(fresh, cluster)
    cluster.servers[dead].kill()
    for _ in range(6):
        assert two.hits(LONG) == there
        two.cache.drop(LONG)
        assert not two.tier.breaker.is_open
    assert two.counters["remote_failures"] >= 6
    nothing_concluded(two)
    assert two.compute(new) == 24
    two.settle()
    lost = new_has.count(dead)
    assert (two.counters["remote_written_chunks"], two.counters["remote_dropped_chunks"]) == (24 - lost, lost)
    assert not two.tier.breaker.is_open
    two.cache.drop(new)
    assert two.hits(new) == new_has.index(dead)
    behind = next(i for i, owner in enumerate(fresh_has) if owner != dead)
    assert two.hits(fresh[behind:]) == 0  # its server says that it is not there
    assert fresh[behind] in two.tier.presence.absent


def test_a_server_that_is_paused(two: Node, cluster: RedisCluster) -> None:
    has = owners(LONG, cluster)
    paused = has[3]
    two.tier.costs.note_ask(0.005)
    cluster.servers[paused].stop()
    try:
        waited = 0
        began = time.monotonic()
        while not two.tier.breaker.is_open:
            assert time.monotonic() - began < 30
            asked = time.monotonic()
            answer = two.cache.acquire_soon(LONG, True, USE)
            waited += not answer.done()
            two.cache.release(answer.result(SOON_S))
            assert not answer.result().keys
            assert time.monotonic() - asked < SOON_S
            time.sleep(0.02)
        assert (
            two.counters["remote_failures"] <= waited <= 2 * circuit_breaker.FAILURES
        )  # one failure per call or per request
        assert two.counters["remote_unasked_chunks"] > 0
        nothing_concluded(two)
    finally:
        cluster.servers[paused].go_on()
        cluster.wait()
    eventually(lambda: two.hits(LONG) == 24, "everything that is there")
    nothing_concluded(two)
