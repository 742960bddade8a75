"""Mooncake Store against the real master, with nodes in other processes, and with every kind of fault."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores.base import Got, RemoteError, RemoteStore, value_name
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.remote.required_servers import free_port, need
from tests.remote.stores.conformance import (
    HEADER_NBYTES,
    TIMEOUT_S,
    Bench,
    Conformance,
    MakeStore,
    Part,
    PartConformance,
    key_of,
)
from tests.remote.stores.mooncake import servers as servers

HIT, MISS, UNKNOWN = Got.HIT, Got.MISS, Got.UNKNOWN
KEYS = [key_of(i) for i in range(8)]
SOON_S = 1.0  # far below the library's own limits, 4 s and 30 s


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    need("mooncake", program=servers.MASTER or "mooncake_master", module="mooncake.store")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mooncake")


@pytest.fixture(scope="module")
def master(folder: Path) -> Iterator[Any]:
    with servers.mooncake_master(folder) as master:
        yield master


@pytest.fixture(scope="module")
def shared_node(master: servers.MooncakeMaster) -> Iterator[Any]:
    with servers.node(master, "1GiB") as node:
        yield node


@pytest.fixture
def node(shared_node: servers.Node) -> servers.Node:
    """The node of the shared master, with an empty store."""
    shared_node.forget_all()
    return shared_node


def store_of(url: str) -> RemoteStore:
    return make_store(RemoteUrl.parse(url))


class TestFromNodeToNode(Conformance):
    """Values lie in another process."""

    @pytest.fixture
    def make(self, master: servers.MooncakeMaster, node: servers.Node) -> MakeStore:
        return lambda: store_of(master.url())


class TestANodeThatDies(PartConformance):
    """The master does not notice for a minute. New values may go to the dead node's segment: they are not taken then."""

    @pytest.fixture
    def part(self, folder: Path) -> Iterator[Part]:
        options = ("--client_ttl=60", "--default_kv_lease_ttl=60s")  # a dead peer takes a second
        with servers.mooncake_master(folder, *options) as master, servers.node(master, "64MiB") as first:
            bench = Bench(lambda: store_of(master.url("segment=0")), count=16)
            assert bench.put([key_of(i) for i in range(4)], bench.values()[:4]) == [True] * 4
            with servers.node(master, "64MiB"):
                living: list[bytes] = []

                def fail() -> None:
                    first.kill()
                    tried = (key_of(i) for i in range(100, 200))
                    living.extend(key for key in tried if len(living) < 4 and works(bench, key))
                    bench.memory.bytes[:4] = bench.memory.bytes[0]  # `works` has written there

                yield Part(bench, living, [key_of(i) for i in range(4)], fail, exists_fails=False)
            bench.close()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_more_pieces_than_the_library_can_bear(master: servers.MooncakeMaster, node: servers.Node) -> None:
    bench = Bench(lambda: store_of(master.url()), count=1500, payload_nbytes=100)
    keys, values, into = [key_of(row) for row in range(1500)], bench.values(), bench.into()
    beside = np.zeros((1500, HEADER_NBYTES), dtype=np.uint8)
    assert bench.put(keys, values) == [True] * 1500
    apart = [(memoryview(header), payload) for header, (_, payload) in zip(beside, into, strict=True)]
    assert bench.get(keys, apart) == [HIT] * 1500
    assert all(bytes(apart[row][part]) == bytes(values[row][part]) for row in range(1500) for part in (0, 1))
    bench.close()


@pytest.fixture(scope="module")
def contributing(folder: Path) -> Iterator[Any]:
    """Yield a store that is the only node of its master, and the master."""
    with servers.mooncake_master(folder) as master:
        bench = Bench(lambda: store_of(master.url("segment=64MiB")))
        yield bench, master
        bench.close()


Contributing = tuple[Bench, servers.MooncakeMaster]


def test_a_segment_of_its_own(contributing: Contributing) -> None:
    bench, master = contributing
    other = store_of(master.url())
    bench.run(other.open())
    assert bench.put(KEYS, bench.values()) == [True] * 8
    for store in (bench.store, other):
        assert bench.get(KEYS, bench.into(), store) == [HIT] * 8
        assert all(bench.read(row) for row in range(8))
    bench.run(other.close())
    assert bench.exists(KEYS) == [True] * 8


@pytest.mark.parametrize("registered", [False, True], ids=["tcp", "as rdma"])
def test_headers_beside_the_arena(
    master: servers.MooncakeMaster, node: servers.Node, monkeypatch: pytest.MonkeyPatch, registered: bool
) -> None:
    """RDMA moves only registered memory; small pieces elsewhere go through the store's own memory."""
    from kvkern.remote.stores.mooncake import client

    if registered:
        monkeypatch.setattr(client, "REGISTERED_PROTOCOLS", {"tcp"})
    bench = Bench(lambda: store_of(master.url()))
    for count in (8, 1, 5):  # larger and smaller blocks
        keys = [key_of(100 * count + row) for row in range(count)]
        beside = np.zeros((2 * count, HEADER_NBYTES), dtype=np.uint8)
        values = bench.values(count)[:count]
        beside[:count] = [np.frombuffer(header, dtype=np.uint8) for header, _ in values]
        apart = [(memoryview(beside[row]), values[row][1]) for row in range(count)]
        into = [(memoryview(beside[count + row]), bench.into()[row][1]) for row in range(count)]
        assert bench.put(keys, apart) == [True] * count
        assert bench.get(keys, bench.into()) == [HIT] * count
        assert all(bench.read(row) for row in range(count))
        assert bench.get(keys, into) == [HIT] * count
        assert (beside[count:] == beside[:count]).all()
        assert bench.get(keys[:1] * 2, into[:1] * 2) == [HIT] * 2
    bench.close()


def test_memory_is_not_open_to_others_over_tcp(contributing: Contributing) -> None:
    """Whoever reaches a node's port can read what is registered there: the segment, and nothing else."""
    from mooncake.engine import TransferEngine

    bench, master = contributing
    assert bench.put([key_of(20)], bench.values()[:1]) == [True]
    client, name = servers.library_client(master.port), value_name(key_of(20))
    segment = client.batch_get_replica_desc([name])[name][0].get_memory_descriptor().buffer_descriptor
    engine, mine = TransferEngine(), np.zeros(HEADER_NBYTES, dtype=np.uint8)
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(mine.ctypes.data, mine.nbytes) == 0

    def read(start: int) -> int:
        return int(engine.transfer_sync_read(segment.transport_endpoint, mine.ctypes.data, start, mine.nbytes))

    assert read(segment.buffer_address) == 0
    assert bytes(mine) == bytes(bench.memory.parts(0)[0])
    assert read(bench.memory.bytes.ctypes.data) != 0
    client.close()


def test_a_store_that_is_full(folder: Path) -> None:
    """Some values find no room or push others out, but there is never a wrong byte and never an error."""
    with servers.mooncake_master(folder, "--default_kv_lease_ttl=1s") as master:
        bench = Bench(lambda: store_of(master.url("segment=0")), count=8, payload_nbytes=2 << 20)
        assert bench.put(KEYS, bench.values()) == [False] * 8  # no node contributes memory
        with servers.node(master, "32MiB"):
            written = [[key_of(10 * turn + row) for row in range(8)] for turn in range(6)]
            there = [bench.put(keys, bench.values(turn)) for turn, keys in enumerate(written)]
            assert there[0] == [True] * 8
            assert not all(all(flags) for flags in there)
            time.sleep(1.2)  # leases end
            for turn, keys in enumerate(written):
                got = bench.get(keys, bench.into())
                assert set(got) <= {HIT, MISS}
                bench.values(turn)
                assert all(bench.read(row) for row in range(8) if got[row] is HIT)
        bench.close()


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mooncake://", r"does not name a Mooncake master\. Say mooncake://host:50051"),
        ("mooncake://u:p@h", "does not name a Mooncake master"), ("mooncake://h/path", "does not name a Mooncake master"),
        ("mooncake://h?segmnt=1GiB", "unknown key 'segmnt' .*did you mean"), ("mooncake://h?segment=x", "expected a size"),
        ("mooncake://h?protocol=udp", "Give tcp or rdma"), ("mooncake://h?devices=mlx5_0", "are only for protocol=rdma"),
        ("mooncake://h?replicas=0", "Give an integer in 1..64"), ("mooncake://h?threads=65", "integer in 1..64"),
        ("mooncake://h?logs=maybe", "Give yes or no"), ("mooncake://h?metadata=redis://h", "Give P2PHANDSHAKE or"),
    ],
)  # fmt: skip
def test_options_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        store_of(url)


def test_what_cannot_be_set_up(master: servers.MooncakeMaster, node: servers.Node) -> None:
    async def refused(url: str) -> str:
        with pytest.raises(ConfigError) as error:
            await (store := store_of(url)).open()
        await asyncio.wait_for(store.close(), TIMEOUT_S)  # as the opener of a store does
        return str(error.value)

    async def something_else() -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"-ERR unknown command, with args beginning with: ")
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await refused(f"mooncake://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    assert "is not a Mooncake master" in asyncio.run(something_else())
    assert "This node has no RDMA device mlx9_9" in asyncio.run(refused(master.url("protocol=rdma&devices=mlx9_9")))
    said = asyncio.run(refused(master.url(f"segment=0&metadata=http://127.0.0.1:{free_port()}/metadata")))
    assert "refuses the setup" in said
    assert "metadata=http://127.0.0.1" in said
    assert "refuses the segment of 70368744177664 bytes" in asyncio.run(refused(master.url("segment=64TiB")))


def test_a_metadata_server(folder: Path) -> None:
    with servers.mooncake_master(folder) as master:
        metadata = f"http://127.0.0.1:{master.metadata_port}/metadata"
        options = f"metadata={metadata}&segment=16MiB&buffer=1MiB&host=127.0.0.1&replicas=2"
        bench = Bench(lambda: store_of(master.url(options)))
        assert works(bench, KEYS[0])
        bench.close()


# -- faults ------------------------------------------------------------------------------------------------------------


def all_fail(bench: Bench, timeout_s: float = 0.3, within_s: float = SOON_S) -> None:
    """Check that every call raises RemoteError, and soon."""
    store, values, into = bench.store, [bench.memory.parts(0)], bench.into()[:1]
    calls: list[Callable[[], Any]] = [
        lambda: store.exists(KEYS[:1], timeout_s), lambda: store.get(KEYS[:1], into, timeout_s),
        lambda: store.put(KEYS[:1], values, timeout_s), lambda: store.delete(KEYS[:1], timeout_s),
    ]  # fmt: skip
    for call in calls:
        began = time.monotonic()
        with pytest.raises(RemoteError):
            bench.run(call())
        assert time.monotonic() - began < within_s


def eventually(check: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def works(bench: Bench, key: bytes) -> bool:
    """Return True if a value can be written and read back."""
    try:
        there = bench.put([key], [bench.memory.fill(0, 99)])
        return there == [True] and bench.get([key], bench.into()[:1]) == [HIT] and bench.read(0)
    except RemoteError:
        return False


def test_a_master_that_comes_late_and_is_restarted(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    bench = Bench(lambda: _Unopened(store_of(f"mooncake://127.0.0.1:{port}?segment=64MiB&threads=1")))
    with pytest.raises(RemoteError, match="cannot be reached"):
        bench.run(bench.store.open())
    all_fail(bench)
    with servers.mooncake_master(folder, port=port):
        eventually(lambda: works(bench, KEYS[0]))
    all_fail(bench)
    with servers.mooncake_master(folder, port=port):
        eventually(lambda: works(bench, KEYS[1]))  # the segment is back
        assert bench.exists(KEYS[:2]) == [False, True]
        assert bench.get(KEYS[:1], bench.into()[:1]) == [MISS]
        bench.close()
    assert capfd.readouterr().err == ""


class _Unopened:
    """A store that the test opens itself."""

    def __init__(self, store: RemoteStore) -> None:
        self._store = store
        self._bench_opens = True

    async def open(self) -> None:
        if self._bench_opens:
            self._bench_opens = False
        else:
            await self._store.open()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_master_that_freezes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.mooncake_master(folder) as master, servers.node(master):
        bench = Bench(lambda: store_of(master.url("segment=0")))
        assert works(bench, KEYS[0])
        master.stop()
        all_fail(bench)
        master.go_on()
        assert works(bench, KEYS[1])

        async def yes(deadline: float) -> None:
            pass

        monkeypatch.setattr(bench.store._master, "check_alive", yes)  # type: ignore[attr-defined]
        master.stop()  # between the check of the master and the call
        for message in ("not answered in time", "not answered in time", "all 2 threads of ask hang"):
            with pytest.raises(RemoteError, match=message):
                bench.run(bench.store.exists(KEYS, 0.3))
        master.go_on()
        eventually(lambda: works(bench, KEYS[2]))
        assert bench.exists(KEYS[:4]) == [True, True, True, False]
        bench.close()


def test_a_node_that_dies(folder: Path) -> None:
    with servers.mooncake_master(folder, "--client_ttl=1") as master, servers.node(master, "64MiB") as first:
        bench = Bench(lambda: store_of(master.url("segment=0")))
        values = bench.values()
        assert bench.put(KEYS[:4], values[:4]) == [True] * 4
        with servers.node(master, "64MiB"):
            first.kill()
            assert bench.exists(KEYS[:4]) == [True] * 4  # the master has not noticed yet
            with pytest.raises(RemoteError, match="the node that has it is gone"):
                bench.get(KEYS[:4], bench.into()[:4])
            written = [key for key in map(key_of, range(50, 90)) if works(bench, key)]
            assert written
            keys = [KEYS[0], written[0], KEYS[1]]
            bench.memory.fill(0, 99)
            first_key, *others = bench.get(keys, bench.into()[:3])  # everything readable is read
            assert first_key in (MISS, UNKNOWN)  # before or after the master has noticed
            assert others in ([HIT, MISS], [HIT, UNKNOWN])
            assert bench.memory.holds(bench.count + 1, bench.memory.parts(0))
            eventually(lambda: bench.exists(KEYS[:4]) == [False] * 4)
            assert bench.get(KEYS[:4], bench.into()[:4]) == [MISS] * 4
            eventually(lambda: bench.put(KEYS[:4], values[:4]) == [True] * 4)
        bench.close()


def test_a_client_with_transfers_that_may_not_have_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is reused before the client is closed; a new client replaces it."""
    from kvkern.remote.stores.mooncake import client

    with servers.mooncake_master(folder) as master, servers.node(master, "64MiB") as first:
        bench = Bench(lambda: store_of(master.url("segment=64MiB")), count=64)
        keys = [key_of(row) for row in range(64)]
        assert all(bench.put(keys, bench.values()))  # on both nodes
        first.kill()
        monkeypatch.setattr(client, "GIVES_UP_S", 0.0)
        client = bench.store._client  # type: ignore[attr-defined]

        async def several() -> list[Any]:
            gets = [bench.store.get(keys[i::4], bench.into()[i::4], TIMEOUT_S) for i in range(4)]
            return await asyncio.gather(*gets, return_exceptions=True)

        for answer in bench.run(several()):
            assert isinstance(answer, RemoteError) or set(answer) <= {HIT, MISS, UNKNOWN}
        assert client.closing
        monkeypatch.undo()
        eventually(lambda: works(bench, key_of(1000)))
        assert bench.store._client is not client  # type: ignore[attr-defined]
        bench.close()
