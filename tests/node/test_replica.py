"""A client's replica of the index: not more than the daemon has, and not less than it has acknowledged."""

from __future__ import annotations

import threading

from kvkern.node.daemon.sessions import MAX_NAMESPACES
from tests.node.conftest import Daemon, MakeClient, MakeDaemon, eventually, hits, store
from tests.support import NAMESPACE, chain_keys


def test_the_first_acquire_of_a_new_client_hits(daemon: Daemon, make_client: MakeClient) -> None:
    """Even if the index has not arrived completely."""
    chain = chain_keys("a", 4)
    assert store(make_client("writer"), chain) == 4
    for name in range(20):
        assert hits(make_client(f"reader-{name}"), chain) == 4


def test_a_chunk_that_a_quota_evicts_at_once_is_not_believed_in(make_daemon: MakeDaemon) -> None:
    """The daemon sends the eviction before it acknowledges the store."""
    daemon = make_daemon(options=("--quota", "m=64KiB"))  # 8 slots
    daemon.start()
    client = daemon.client()
    try:
        client.describe_namespace(NAMESPACE, {"model": "m"})
        for name in range(4):
            store(client, chain_keys(name, 6))
        assert client.usage()["known_chunks"] == daemon.stat()["chunks"] == 8
        assert store(client, chain_keys("late", 4)) == 4
    finally:
        client.close()


def test_who_came_earlier_gives_back_what_is_above_its_share(daemon: Daemon, make_client: MakeClient) -> None:
    for name in range(4):
        client = make_client(f"engine-{name}")
        assert store(client, chain_keys(name, 3)) == 3  # and asks for twice as many, for its stock
    eventually(lambda: daemon.stat()["granted_slots"] <= (127 - 4 * 3) // 2, "even shares of half of the empty slots")
    assert store(make_client("last"), chain_keys("last", 3)) == 3


def test_a_long_field_of_a_namespace_costs_no_connection(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client()
    client.describe_namespace(NAMESPACE, {"model": "m" * 5000, "weights": "w"})
    chain = chain_keys("a", 2)
    assert store(client, chain) == 2
    eventually(lambda: daemon.stat()["namespaces"] == 1)
    assert daemon.stat()["bad_frames"] == 0


def test_many_tenants_are_described_again_and_nobody_waits(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    client = daemon.client()
    try:
        for tenant in range(MAX_NAMESPACES + 500):
            client.describe_namespace(tenant.to_bytes(32, "little"), {"model": "m", "salt": str(tenant)})
        daemon.kill()
        daemon.start()
        eventually(lambda: client.connected, "the engine's reconnection")
        chain = chain_keys("a", 2)
        assert store(client, chain) == 2
        assert hits(client, chain) == 2
    finally:
        client.close()


def test_leases_of_finalizers_end_once_whatever_thread_ends_them(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client()
    chain = chain_keys("a", 2)
    assert store(client, chain) == 2
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(200):
                client.release_later(client.acquire(chain))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    client.release(client.acquire(chain))
    eventually(lambda: daemon.stat()["leases"] == 0)
