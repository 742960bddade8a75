"""An engine's client: what it asks, what it does not ask, and that a daemon which is away or stopped costs misses only."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest

from kvkern.arena.slots import SlotState
from kvkern.errors import ConfigError
from kvkern.node import protocol as p
from kvkern.node.client import reconnecting_link
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.client.reconnecting_link import ReconnectingLink
from kvkern.policy.base import Use
from tests.node.conftest import (
    GEOMETRY,
    PATIENCE_S,
    Daemon,
    MakeClient,
    MakeDaemon,
    eventually,
    hits,
    read_verified,
    stock,
    store,
    write_payload,
)
from tests.support import NAMESPACE, SHAPE, chain_keys


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[p.Request]:
    """Every request that clients of this process send from now on."""
    found: list[p.Request] = []
    real = ReconnectingLink.send

    def send(self: ReconnectingLink, message: p.Request) -> None:
        found.append(message)
        real(self, message)

    monkeypatch.setattr(ReconnectingLink, "send", send)
    return found


def test_an_engine_with_a_very_long_name(make_client: MakeClient) -> None:
    """The daemon lets it in, under a name of a length that a message may have."""
    one, same = make_client("e" * 10_000), make_client("e" * 10_000)
    assert store(one, chain_keys("a", 2)) == 2
    assert len(same.acquire(chain_keys("a", 2)).keys) == 2


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_a_lookup_that_misses_waits_for_nothing(
    make_client: MakeClient, daemon: Daemon, asked: list[p.Request]
) -> None:
    client = make_client()
    chain = chain_keys("a", 3)
    assert store(client, chain) == 3
    assert stock(client)[0] == 60  # the client asks for no more before half of the stock is used
    asked.clear()
    before = daemon.stat()
    for unknown in ([], chain_keys("b", 3), [chain_keys("b", 1)[0], *chain]):
        assert client.lookup(unknown) == 0
        assert client.acquire_soon(unknown).done()
        assert client.acquire(unknown).keys == ()
    assert client.reserve(chain, chain, SHAPE).slots == ()
    assert [type(message) for message in asked] == 4 * [p.Acquire]  # no answer is awaited
    asked.clear()
    assert hits(client, [*chain, *chain_keys("b", 1)]) == 3
    assert [type(message) for message in asked] == [p.Acquire, p.Release]
    assert client.counters.lookup_chunks == 2 * (0 + 3 + 4) + 4
    assert client.counters.hit_chunks == 3
    after = daemon.stat()  # the daemon counts misses too, so its hit ratio is that of the engines
    assert after["lookup_chunks"] - before["lookup_chunks"] == client.counters.lookup_chunks
    assert after["hit_chunks"] - before["hit_chunks"] == 3


def test_a_caller_that_counts_itself_counts_once_in_the_daemon_too(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client()
    chain = chain_keys("a", 3)
    assert store(client, chain) == 3
    before = daemon.stat()
    for _ in range(15):
        client.release(client.acquire(chain, use=Use(request=1, counts_itself=True)))
    assert (client.counters.lookup_chunks, client.counters.hit_chunks) == (0, 0)
    client.count_lookups(3, 3)
    assert (client.counters.lookup_chunks, client.counters.hit_chunks) == (3, 3)
    after = daemon.stat()
    assert (after["lookup_chunks"] - before["lookup_chunks"], after["hit_chunks"] - before["hit_chunks"]) == (3, 3)


def test_a_chunk_that_another_engine_published_first_is_no_failure(daemon: Daemon, make_client: MakeClient) -> None:
    first, second = make_client("one"), make_client("two")
    chain = chain_keys("a", 4)
    begun = [client.reserve(chain, chain, SHAPE) for client in (first, second)]
    for client, reservation in zip((first, second), begun, strict=True):
        write_payload(client.arena, reservation)
    assert [first.commit(begun[0]), second.commit(begun[1])] == [4, 0]
    assert (second.counters.failed_chunks, second.counters.duplicate_chunks) == (0, 4)
    assert (first.counters.failed_chunks, first.counters.duplicate_chunks) == (0, 0)
    stat = daemon.stat()
    assert (stat["failed_chunks"], stat["duplicate_chunks"], stat["stored_chunks"]) == (0, 4, 4)


def test_without_prefix_every_cached_chunk(make_client: MakeClient) -> None:
    client = make_client()
    chain = chain_keys("a", 5)
    wanted = [chain[0], chain[2], chain[3]]
    reservation = client.reserve(chain, wanted, SHAPE)
    write_payload(client.arena, reservation)
    assert client.commit(reservation) == 3
    lease = client.acquire(chain, prefix=False)
    assert (list(lease.keys), read_verified(client.arena, lease)) == (wanted, True)
    assert client.release(lease) == 0
    assert hits(client, chain) == 1


@pytest.mark.parametrize("count", [0, 1, 7])
def test_sizes(make_client: MakeClient, count: int) -> None:
    client = make_client()
    chain = chain_keys("a", count)
    assert store(client, chain) == count
    assert client.lookup(chain) == hits(client, chain) == count


def test_what_is_no_key_is_refused_and_leaves_nothing(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stays, and the client waits for no answer."""
    client = make_client()
    with monkeypatch.context() as patch:
        patch.setattr(
            ReconnectingLink, "has_unread", lambda self: True
        )  # else the client would not ask for keys that are not in the index
        with pytest.raises(ConfigError, match="1 keys have 31 bytes in all; give chunk keys of 32 bytes each"):
            client.acquire_soon([bytes(31)])
    eventually(lambda: not client._link._waiting)
    assert store(client, chain_keys("b", 2)) == 2


def test_bad_chunks_are_dropped(daemon: Daemon, make_client: MakeClient) -> None:
    client, other = make_client("one"), make_client("two")
    chain = chain_keys("a", 4)
    assert store(client, chain) == 4
    lease = other.acquire(chain)
    other.arena.headers["state"][lease.slots[2]] = SlotState.BAD
    assert other.release(lease) == 1
    assert (
        other.lookup(chain) == 2
    )  # without waiting for the daemon, because the engine may compute and store the chunk at once
    eventually(lambda: client.lookup(chain) == 2)
    assert hits(client, chain) == 2
    assert store(client, chain) == 1
    assert hits(other, chain) == 4
    assert daemon.stat()["bad_chunks"] == 1


def test_an_aborted_reservation_publishes_nothing_and_gives_its_slots_back(
    daemon: Daemon, make_client: MakeClient
) -> None:
    client, other = make_client("one"), make_client("two")
    chain = chain_keys("a", 5)
    eventually(lambda: stock(client)[0] >= 5)
    reservation = client.reserve(chain, chain, SHAPE)
    assert len(reservation.slots) == 5
    write_payload(client.arena, reservation, seed=7)
    client.abort(reservation)
    client.abort(client.reserve([], [], SHAPE))
    eventually(
        lambda: daemon.stat()["granted_slots"] == stock(client)[0] + stock(other)[0]
    )  # nobody writes into a slot
    assert len(other.acquire(chain).keys) == 0
    assert store(client, chain) == 5
    assert hits(other, chain) == 5
    late = client.reserve(more := chain_keys("b", 3), more, SHAPE)
    daemon.kill()
    eventually(lambda: not client.connected)
    client.abort(late)  # the next daemon is told that this engine has settled


def test_leases_of_finalizers(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client()
    chain = chain_keys("a", 2)
    assert store(client, chain) == 2
    client.release_later(client.acquire(chain))
    assert daemon.stat()["leases"] == 1
    client.acquire([])
    eventually(lambda: daemon.stat()["leases"] == 0)


def test_a_larger_wish_than_the_stock_waits_for_more(make_client: MakeClient) -> None:
    """Although the stock is more than half full: otherwise the client would never ask for the missing slots."""
    client = make_client()
    eventually(lambda: stock(client) == (63, 63))
    assert store(client, chain_keys("a", 4)) == 4  # the stock is not filled up yet
    assert stock(client)[0] == 59
    chain = chain_keys("b", 61)
    reservation = client.reserve(chain, chain, SHAPE)
    assert (len(reservation.slots), reservation.dropped) == (61, 0)


def test_a_wish_above_the_limit_does_not_wait_for_ever(daemon: Daemon) -> None:
    """Also if it is the first wish, before the limit is known."""
    with closing(daemon.client(patience_s=3600)) as client:
        chain = chain_keys("b", 100)
        reservation = client.reserve(chain, chain, SHAPE)
        assert (len(reservation.slots), reservation.dropped) == (63, 37)
        assert list(reservation.keys) == chain[:63]
        with closing(daemon.client(index=False, patience_s=3600)) as copier:
            assert copier.room(chain) == 100
            assert copier.reserve(chain, chain, SHAPE).slots == ()


def test_room_is_told_and_asked_for(daemon: Daemon) -> None:
    """An engine's step asks, and never waits."""
    with closing(daemon.client(patience_s=0)) as client:
        chain = chain_keys("a", 10)
        eventually(lambda: client.room(chain) == 10)
        first = client.reserve(chain, chain, SHAPE)
        assert len(first.slots) == 10
        more = chain_keys("b", 100)
        assert client.room(more) == 0
        write_payload(client.arena, first)
        assert client.commit(first) == 10
        eventually(lambda: client.room([*chain, *more]) == 10 + 58)  # half of the empty slots, beside what is cached
        assert len(client.reserve(more, more, SHAPE).slots) == 58
        daemon.kill()
        eventually(lambda: not client.connected)
        assert client.room(more) == 100  # no slot will come: nothing is worth waiting for


def test_clear(daemon: Daemon, make_client: MakeClient) -> None:
    """A client clears its own namespace. What is stored afterwards is cached, also in slots that were granted before."""
    client, other = make_client("one"), make_client("two")
    chain = chain_keys("a", 5)
    for _ in range(4):  # in the end the stock consists of slots that held this namespace
        assert store(client, chain) == 5
        assert hits(other, chain) == 5
        assert client.clear(bytes(32)) == 0
        assert client.clear(NAMESPACE) == 5
        assert hits(client, chain) == 0
        eventually(lambda: other.lookup(chain) == 0)
    with pytest.raises(ConfigError, match="`kvkern clear` empties the whole cache"):
        client.clear()
    assert store(client, chain) == 5
    assert daemon.ask(p.Clear(1, None)) == [{"chunks": 5}]
    eventually(lambda: client.lookup(chain) == 0)
    assert store(client, chain) == 5
    assert store(other, chain_keys("b", 5)) == 5


def test_what_is_being_written_when_its_namespace_is_cleared_is_not_published(make_client: MakeClient) -> None:
    client = make_client()
    chain = chain_keys("a", 3)
    reservation = client.reserve(chain, chain, SHAPE)
    write_payload(client.arena, reservation)
    assert client.clear(NAMESPACE) == 0
    assert client.commit(reservation) == 0
    assert hits(client, chain) == 0
    assert store(client, chain) == 3


def test_mistaken_settings_are_told(make_client: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
    one, two = make_client("one"), make_client("two")
    one.describe_namespace(bytes(32), {"model": "m", "engine_hash": "seed 1"})
    with caplog.at_level(logging.WARNING, "kvkern"):
        two.describe_namespace(NAMESPACE, {"model": "m", "engine_hash": "seed 2"})
        eventually(lambda: "PYTHONHASHSEED" in caplog.text)


def test_closing_twice(daemon: Daemon) -> None:
    client = daemon.client()
    eventually(lambda: stock(client)[0])
    lease = client.acquire([])
    client.close()
    client.close()
    client.release(lease)
    assert client.acquire(chain_keys("a", 1)).keys == ()
    eventually(lambda: daemon.stat()["connections"] == 1)
    assert daemon.stat()["quarantined_slots"] == 0  # the stock was given back


def test_threads_share_a_client(make_client: MakeClient) -> None:
    client = make_client()
    errors: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for number in range(30):
                chain = chain_keys((name, number), 2)
                stored = store(client, chain)
                assert hits(client, chain) == stored == 2
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert client.usage()["known_chunks"] <= 127


# -- a daemon that is not there ----------------------------------------------------------------------------------------


def test_no_daemon_at_open(folder: Path) -> None:
    path = folder / "s"
    remedy = f"start one: kvkern serve --socket {path} --capacity 8GiB"
    with pytest.raises(ConfigError, match="No such file or directory") as caught:
        NodeClient.open(path, "e", GEOMETRY, timeout_s=0.2)
    assert remedy in str(caught.value)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    with pytest.raises(ConfigError, match="Connection refused"):
        NodeClient.open(path, "e", GEOMETRY, timeout_s=0.2)


def test_a_daemon_that_does_not_answer(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        with pytest.raises(ConfigError, match=rf"the daemon on {path} is there but does not answer \(timed out\)"):
            NodeClient.open(path, "e", GEOMETRY, timeout_s=0.2)


def test_a_daemon_that_comes_a_little_later(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    timer = threading.Timer(0.3, daemon.launch)
    timer.start()
    try:
        with closing(daemon.client()) as client:
            assert store(client, chain_keys("a", 2)) == 2
    finally:
        timer.join()


def test_a_socket_that_may_not_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes at once, because waiting would not help."""

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    with pytest.raises(
        ConfigError, match=r"this user may not open /\S+/s; join the group of the socket, or run as its owner"
    ):
        NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=3600)


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        NodeClient.open(Path("/" + "x" * 107), "e", GEOMETRY, timeout_s=3600)


def test_a_daemon_that_is_stopped(daemon: Daemon, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls miss after a deadline, later calls at once. When the daemon goes on, everything is there again."""
    monkeypatch.setattr(reconnecting_link, "ANSWER_S", 0.3)
    monkeypatch.setattr(reconnecting_link, "CONNECT_S", 0.5)
    client = make_client()
    chain, later = chain_keys("a", 3), chain_keys("b", 2)
    assert store(client, chain) == 3
    begun = client.reserve(later, later, SHAPE)
    write_payload(client.arena, begun)
    lease = client.acquire(chain)
    daemon.signal(signal.SIGSTOP)
    asked, published = client.acquire_soon(chain), client.commit_soon(begun)
    assert asked.result(PATIENCE_S).keys == ()
    assert published.result(PATIENCE_S) == 0
    assert not client.connected
    assert client.lookup(chain) == 0
    assert client.acquire_soon(chain).done()
    assert client.reserve(later, later, SHAPE).slots == ()
    assert client.clear(bytes(32)) == 0
    assert read_verified(client.arena, lease)
    daemon.signal(signal.SIGCONT)
    eventually(lambda: client.connected and client.lookup(chain) == 3)
    client.release(lease)  # it was the last lease of the earlier connection
    assert hits(client, chain) == 3
    eventually(lambda: daemon.stat()["quarantined_leases"] == 0)
    assert store(client, chain_keys("c", 2)) == 2
    assert client.counters.failed_chunks == 2


def test_a_daemon_that_is_killed_while_it_is_asked(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client()
    chain = chain_keys("a", 3)
    assert store(client, chain) == 3
    daemon.signal(signal.SIGSTOP)
    asked = [client.acquire_soon(chain) for _ in range(10)]
    daemon.kill()
    assert [future.result(PATIENCE_S).keys for future in asked] == [()] * 10
    daemon.start()
    eventually(lambda: client.lookup(chain) == 3)
    assert hits(client, chain) == 3


def test_a_clear_while_the_daemon_is_away_comes_first(
    daemon: Daemon, make_client: MakeClient, asked: list[p.Request]
) -> None:
    """The weights have changed: no chunk of before may be read, however soon it is asked for."""
    client = make_client()
    chain = chain_keys("a", 3)
    assert store(client, chain) == 3
    daemon.kill()
    eventually(lambda: not client.connected)
    asked.clear()
    assert client.clear_soon(NAMESPACE).result(PATIENCE_S) == 0  # no daemon is there
    assert client.clear_soon(bytes(32)).result(PATIENCE_S) == 0
    daemon.start()
    eventually(lambda: client.connected)
    assert client.acquire(chain).keys == ()
    namespaces = [message.namespace for message in asked if isinstance(message, p.Clear)]
    assert namespaces == [NAMESPACE, bytes(32)]
    assert all(isinstance(message, p.Clear) for message in asked[:2])
    eventually(lambda: not client._clears)
    assert daemon.stat()["chunks"] == 0
    assert store(client, chain) == 3
    daemon.kill()
    daemon.start()
    eventually(lambda: client.connected and client.lookup(chain) == 3)  # it was cleared only once
    assert hits(client, chain) == 3


def test_slots_that_come_while_it_ends_are_given_back(daemon: Daemon) -> None:
    """The process goes on, and its next client has another name: nothing else would free the slots."""
    for name in range(8):
        client = daemon.client(f"e{name}")
        client.room(chain_keys(name, 100))
        client.close()
    row = eventually(lambda: (row := daemon.stat())["sessions"] == 1 and row, "the end of the clients")
    assert row["quarantined_slots"] == 0
    assert row["free_slots"] == row["slots"]


def test_two_clears_of_which_one_is_answered(make_client: MakeClient) -> None:
    """The second clear is kept: the daemon may be killed before it carries it out."""
    client = make_client()
    with client._lock:
        first = client.clear_soon(NAMESPACE)
        second = client.clear_soon(NAMESPACE)
        (one, two) = sorted(client._link._waiting)[-2:]
        client._link._dispatch(p.Answer(one, [{"chunks": 0}]))
        assert first.done()
        assert NAMESPACE in client._clears
        client._link._dispatch(p.Answer(two, [{"chunks": 0}]))
        assert second.done()
        assert not client._clears


def test_another_arena_behind_the_same_socket(
    daemon: Daemon, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A user removed the file. The engine goes on with misses, and logs what to do."""
    client = make_client()
    chain = chain_keys("a", 3)
    assert store(client, chain) == 3
    lease = client.acquire(chain)
    daemon.kill()
    client.arena.path.unlink()
    with caplog.at_level(logging.WARNING, "kvkern"):
        daemon.start()
        with closing(daemon.client("next")) as other:
            eventually(lambda: "has a new arena; restart this engine to use it again" in caplog.text)
            assert not client.connected
            assert client.acquire(chain).keys == ()
            assert read_verified(client.arena, lease)
            assert store(other, chain) == 3
    eventually(lambda: daemon.stat()["sessions"] <= 2)
