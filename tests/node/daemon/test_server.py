"""A real daemon: which clients it lets in, and what it grants."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvkern.arena.slots import SlotGeometry
from kvkern.errors import ConfigError
from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon import server as server_module
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.server import Server
from tests.node.conftest import (
    GEOMETRY,
    ROOT,
    SIZES,
    Daemon,
    MakeClient,
    Peer,
    eventually,
    hits,
    read_verified,
    served,
    stock,
    store,
    write_payload,
)
from tests.support import NAMESPACE, SHAPE, chain_keys

FOR_MANY = "16MiB"  # an eighth of it is enough stock for three clients
OTHER = SlotGeometry(part_nbytes=5000, max_planes=3, world_size=2)


def test_uptime_when_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(NodeConfig(tmp_path / "s", 1 << 20, arena_dir=tmp_path))
    monkeypatch.setattr(server_module.time, "time", lambda: 0.0)
    assert 0 <= float(server.stat()["uptime_s"]) < 600


def test_a_daemon_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine does not wait for `connect_s` seconds for a daemon that cannot make its cache."""

    def fail(*_: object) -> None:
        raise RuntimeError("a fault in this test")

    monkeypatch.setattr(server_module, "build_cache", fail)
    config = NodeConfig(tmp_path / "s", 1 << 20, arena_dir=tmp_path)
    with served(config), pytest.raises(ConfigError, match="the daemon refuses: the daemon failed while it let"):
        NodeClient.open(config.socket, "a", GEOMETRY)


# -- who is let in -----------------------------------------------------------------------------------------------------


def test_the_socket_is_for_the_owner_and_the_group(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660


def test_another_protocol_version(daemon: Daemon) -> None:
    for version in (0, p.VERSION + 1, (1 << 16) - 1):
        with Peer(daemon.socket) as peer:
            reason = f"protocol version {version} is not the daemon's {p.VERSION}; upgrade the older side"
            assert peer.say(p.Hello(version)).hear() == p.Refused(reason)
            assert peer.hung_up()


def test_another_geometry(daemon: Daemon, make_client: MakeClient) -> None:
    """Refused while the cache is used, with both sizes and the remedy. Let in once the cache is empty."""
    client = make_client()
    chain = chain_keys("a", 3)
    assert store(client, chain) == 3
    wanted = r"holds chunks of 256 bytes in 2 planes on 1 rank.*needs 5000 bytes in 3 planes on 2.*another daemon"
    with pytest.raises(ConfigError, match=wanted):
        daemon.client("other", OTHER)
    assert hits(client, chain) == 3
    client.close()
    with pytest.raises(ConfigError, match=wanted):  # no client is connected, but the chunks are cached
        daemon.client("other", OTHER)
    daemon.ask(p.Clear(1, None))
    with closing(daemon.client("other", OTHER)) as other:
        assert other.arena.spec.geometry == OTHER
        assert store(other, chain) == 3
        assert hits(other, chain) == 3


def test_the_first_word_is_hello(daemon: Daemon) -> None:
    with Peer(daemon.socket) as peer:
        assert peer.say(p.Stat(1)).hung_up()
    with Peer(daemon.socket) as peer:
        peer.greet()
        assert peer.say(p.Hello(p.VERSION)).hung_up()
    assert daemon.stat()["bad_frames"] == 2


def test_operators_have_no_slots(daemon: Daemon, make_client: MakeClient) -> None:
    """Before there is an arena, a request for slots ends the connection. Afterwards operators are granted none."""
    for request in (p.Grant(1, 1), p.Acquire(1, b"", True), p.Settle(), p.GiveBack([1])):
        with Peer(daemon.socket) as peer:
            assert isinstance(peer.greet(geometry=None), p.Welcome)
            assert peer.say(request).hung_up()
    make_client()
    with Peer(daemon.socket) as peer:
        assert isinstance(peer.greet(geometry=None), p.Welcome)
        granted = peer.say(p.GiveBack([1]), p.Settle(), p.Grant(1, 1)).hear()
        assert isinstance(granted, p.Granted)
        assert granted.slots == []


def test_what_is_said_right_behind_hello_is_answered(daemon: Daemon) -> None:
    """The arena is being made when the requests arrive."""
    with Peer(daemon.socket) as peer:
        peer.say(p.Hello(p.VERSION, "e", SIZES), *(p.Stat(number) for number in range(10)))
        assert isinstance(peer.hear(), p.Welcome)
        for number in range(10):
            answer = peer.hear()
            assert isinstance(answer, p.Answer)
            assert answer.id == number


# -- many clients, one index -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("daemon", [FOR_MANY], indirect=True)
def test_clients_share_what_each_of_them_stores(make_client: MakeClient) -> None:
    one, two = make_client("one"), make_client("two")
    chains = [chain_keys(name, 3) for name in range(4)]
    for number, chain in enumerate(chains):
        assert store((one, two)[number % 2], chain, seed=number) == 3
    for client in (one, two):
        for number, chain in enumerate(chains):
            assert hits(client, chain, seed=number) == 3
            assert client.lookup(chain) == 3
            assert client.reserve(chain, chain, SHAPE).slots == ()  # no client stores it again
    late = make_client("late")
    eventually(lambda: late.lookup(chains[3]) == 3)


@pytest.mark.parametrize("daemon", [FOR_MANY], indirect=True)
def test_what_is_acknowledged_is_hit_at_once(make_client: MakeClient) -> None:
    """Several pairs of clients at the same time: no round of any pair misses."""

    def rounds(name: str, writer: NodeClient, reader: NodeClient) -> None:
        for number in range(100):
            chain = chain_keys((name, number), 2)
            reservation = writer.reserve(chain, chain, SHAPE)
            write_payload(writer.arena, reservation)
            assert writer.commit(reservation) == 2
            lease = reader.acquire(chain)
            assert len(lease.keys) == 2, f"round {number} of {name} missed"
            reader.release(lease)

    clients = [make_client(f"e{number}") for number in range(3)]
    with ThreadPoolExecutor(3) as threads:
        pairs = [("ab", 0, 1), ("bc", 1, 2), ("ca", 2, 0)]
        for done in [threads.submit(rounds, name, clients[w], clients[r]) for name, w, r in pairs]:
            done.result(120)


@pytest.mark.parametrize("daemon", [FOR_MANY], indirect=True)
def test_the_first_of_two_writers_publishes(make_client: MakeClient) -> None:
    one, two = make_client("one"), make_client("two")
    chain = chain_keys("a", 2)
    reservations = [client.reserve(chain, chain, SHAPE) for client in (one, two)]
    for seed, (client, reservation) in enumerate(zip((one, two), reservations, strict=True)):
        assert len(reservation.slots) == 2
        write_payload(client.arena, reservation, seed)
    assert two.commit(reservations[1]) == 2
    assert one.commit(reservations[0]) == 0
    assert hits(one, chain, seed=1) == 2


def test_eviction_when_full(daemon: Daemon, make_client: MakeClient) -> None:
    """More is stored than fits. The newest chunks are cached, and every client learns what was evicted."""
    client, other = make_client("one"), make_client("two")
    chains = [chain_keys(number, 3) for number in range(80)]  # 240 chunks, 127 slots
    for number, chain in enumerate(chains):
        assert store(client, chain, seed=number) == 3
    assert hits(other, chains[-1], seed=79) == 3
    assert daemon.stat()["evicted_chunks"] >= 240 - 127
    for one in (client, other):  # a client that fills up its stock evicts more at any time
        eventually(lambda one=one: one.usage()["known_chunks"] == daemon.stat()["chunks"])
        assert one.lookup(chains[0]) == 0
    assert hits(other, chains[0]) == 0


def test_a_lease_pins(daemon: Daemon, make_client: MakeClient) -> None:
    """However much is stored meanwhile, and also when a leased chunk is evicted by an operator, its bytes stay."""
    client, other = make_client("one"), make_client("two")
    chain = chain_keys("pinned", 4)
    assert store(client, chain, seed=7) == 4
    lease = other.acquire(chain)
    for number in range(60):
        assert store(client, chain_keys(number, 3)) == 3
    assert hits(client, chain, seed=7) == 4
    assert daemon.ask(p.Evict(1, chain[0]))[0] == {"chunks": 1}
    for number in range(60, 120):
        assert store(client, chain_keys(number, 3)) == 3
    assert read_verified(other.arena, lease, seed=7)
    other.release(lease)
    assert hits(client, chain, seed=7) == 0
    eventually(lambda: daemon.stat()["leases"] == 0)


def test_what_may_be_granted_is_divided_among_clients(daemon: Daemon, make_client: MakeClient) -> None:
    one = make_client("one")
    eventually(lambda: stock(one)[0] == 63)  # half of 127 empty ones
    assert stock(one) == (63, 63)
    two = make_client("two")
    eventually(lambda: (stock(one), stock(two)) == ((31, 31), (31, 31)))  # the first has given back its unused slots
    assert daemon.stat()["granted_slots"] == 62
    chain = chain_keys("c", 40)
    reservation = two.reserve(chain, chain, SHAPE)
    assert (len(reservation.slots), reservation.dropped) == (31, 9)
    copier = make_client("two", index=False)
    assert copier.reserve(chain, chain, SHAPE).slots == ()  # a worker only copies and is granted none
    assert daemon.stat()["granted_slots"] == 62
    two.commit(reservation)


def test_an_idle_engine_gives_back_what_a_full_arena_cannot_spare(daemon: Daemon, make_client: MakeClient) -> None:
    idle, busy = make_client("idle"), make_client("busy")
    eventually(lambda: stock(idle) == (31, 31))
    for number in range(60):
        assert store(busy, chain_keys(number, 3)) == 3
    eventually(lambda: stock(idle)[0] <= 127 // 8)
    assert daemon.stat()["granted_slots"] <= 2 * 127 // 8


def test_slots_of_others_are_not_published(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client()
    chain = chain_keys("a", 3)
    reservation = client.reserve(chain, chain, SHAPE)
    write_payload(client.arena, reservation)
    slots, generations, keys = list(reservation.slots), list(reservation.generations), framing.join_keys(chain)
    with Peer(daemon.socket) as peer:
        peer.greet(index=True)
        peer.say(p.Publish(1, NAMESPACE, slots, generations, keys, keys), p.GiveBack(slots), p.Release([1, 2, 3]))
        peer.say(p.Publish(2, NAMESPACE, [1 << 39], [1], chain[0], b""), p.Stat(3))
        answers: dict[int, p.Response] = {}
        while 3 not in answers:
            if not isinstance(answer := peer.hear(), p.Changed):
                answers[answer.id] = answer  # type: ignore[union-attr]
    assert answers[1] == p.Published(1, [False] * 3)
    assert answers[2] == p.Published(2, [False])
    assert client.commit(reservation) == 3
    assert hits(client, chain) == 3


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"name": ""}, "name is ''; use up to 64 letters"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": "x" * 65}, "up to 64 letters"),
        ({"socket": Path("/" + "x" * 107)}, "longer than the 107 bytes"),
        ({"arena_dir": Path("/nowhere")}, "arena_dir is '/nowhere', which is no directory"),
        ({"drain_s": -1.0}, "must lie in 0..3600"),
        ({"drain_s": float("nan")}, "must lie in 0..3600"),
    ],
)  # fmt: skip
def test_bad_configurations(tmp_path: Path, values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        NodeConfig(**{"socket": tmp_path / "s", "capacity_nbytes": 1, "arena_dir": tmp_path} | values)


@pytest.mark.parametrize("module", ["kvkern.node.daemon.server", "kvkern.node.client.cache_client", "kvkern.cli"])
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_running_daemon_has_no_torch(daemon: Daemon, make_client: MakeClient) -> None:
    assert store(make_client(), chain_keys("a", 3)) == 3
    daemon.stop()
    daemon.start()  # verifies payload with a compiled kernel
    assert "libtorch" not in Path(f"/proc/{daemon.pid}/maps").read_text()
