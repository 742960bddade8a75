"""Redis and Valkey against real servers: plain, on a Unix socket, with TLS, and with every kind of fault."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores.base import RemoteError, value_name
from tests.remote.required_servers import free_port, need
from tests.remote.stores.conformance import (
    HIT,
    MISS,
    TIMEOUT_S,
    UNKNOWN,
    WRONG_SIZE,
    Bench,
    Conformance,
    MakeStore,
    key_of,
)
from tests.remote.stores.redis.servers import (
    LATE_S,
    Proxy,
    RedisServer,
    bench_of,
    fails,
    fresh,
    make_certificates,
    redis_server,
    refused,
    store_of,
)  # fmt: skip

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    need("redis", program="redis-server", module="redis")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RedisServer]:
    with redis_server(folder, "--unixsocket", str(folder / "s")) as server:
        yield server


@pytest.fixture(scope="module")
def tls(folder: Path) -> Iterator[RedisServer]:
    """A server with a user who has the rights that a store needs, and no others."""
    make_certificates(folder)
    with redis_server(
        folder, "--tls-cert-file", f"{folder}/server.crt", "--tls-key-file", f"{folder}/server.key",
        "--tls-ca-cert-file", f"{folder}/ca.crt", "--requirepass", "root", "--user", "me", "on", ">se@cret", "~*/kvkern*",
        "+get", "+set", "+exists", "+unlink", "--user", "reader", "on", ">r", "~*", "+get", "+exists", tls=True,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def files(folder: Path) -> str:
    return f"ca_file={folder}/ca.crt&cert_file={folder}/server.crt&key_file={folder}/server.key"


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


# -- the suite ---------------------------------------------------------------------------------------------------------


class TestTcp(Conformance):
    @pytest.fixture
    def make(self, server: RedisServer) -> MakeStore:
        return fresh(f"redis://127.0.0.1:{server.port}/3")


class TestUnixSocket(Conformance):
    @pytest.fixture
    def make(self, server: RedisServer, folder: Path) -> MakeStore:
        return fresh(f"valkey:///0?socket={folder}/s&connections=1&ttl=600")


class TestTls(Conformance):
    @pytest.fixture
    def make(self, tls: RedisServer, files: str) -> MakeStore:
        return fresh(f"rediss://me:se%40cret@127.0.0.1:{tls.port}?{files}")


# -- what is in the server ---------------------------------------------------------------------------------------------


def test_a_value_is_one_string(server: RedisServer) -> None:
    with (
        bench_of(lambda: store_of(f"redis://127.0.0.1:{server.port}?prefix=it/&ttl=100")) as bench,
        server.client() as client,
    ):
        value = bench.values()[0]
        bench.put([key_of(1)], [value])
        name = f"it/{value_name(key_of(1))}"
        assert client.get(name) == bytes(value[0]) + bytes(value[1])
        assert 90 <= client.ttl(name) <= 100


def test_nothing_is_left_by_open(server: RedisServer) -> None:
    with server.client(db=5) as client, bench_of(f"redis://127.0.0.1:{server.port}/5"):
        assert client.dbsize() == 0


def test_not_all_is_read_behind_a_miss(server: RedisServer) -> None:
    with bench_of(f"redis://127.0.0.1:{server.port}", count=40, payload_nbytes=MIB) as bench, server.client() as client:
        keys = [key_of(i) for i in range(40)]
        bench.put(keys[1:], bench.values()[1:])
        client.config_resetstat()
        assert bench.get(keys, bench.into())[0] == MISS
        # The windows of two connections, of some five reads each, and what one reads before the other has seen the miss.
        assert client.info("commandstats")["cmdstat_get"]["calls"] <= 20


def test_values_of_another_size_keep_the_connection(server: RedisServer, proxy: Proxy) -> None:
    with bench_of(lambda: store_of(f"redis://127.0.0.1:{proxy.port}?connections=1&prefix=size/")) as bench:
        opened = proxy.connections
        keys, values = [key_of(i) for i in range(8)], bench.values()
        bench.put(keys, values)
        whole = len(values[0][0]) + len(values[0][1])
        with server.client() as client:
            for index, nbytes in enumerate((0, 1, whole - 1, whole + 1, 3_000_000)):
                client.set(f"size/{value_name(key_of(index))}", b"\r" * nbytes)
        assert bench.get(keys, bench.into()) == [WRONG_SIZE] * 5 + [HIT] * 3
        assert all(bench.read(row) for row in (5, 6, 7))
        assert proxy.connections <= opened + 2  # one for gets, one for puts


def test_what_the_server_evicts_is_a_miss(tmp_path: Path) -> None:
    options = ("--maxmemory", "16mb", "--maxmemory-policy", "allkeys-lru")
    with (
        redis_server(tmp_path, *options) as server,
        bench_of(f"redis://127.0.0.1:{server.port}", count=24, payload_nbytes=MIB) as bench,
    ):
        keys = [key_of(i) for i in range(24)]
        assert bench.put(keys, bench.values()) == [True] * 24
        there = bench.exists(keys)
        assert 0 < sum(there) < 24
        row = there.index(True)
        assert bench.get([keys[row], keys[there.index(False)]], bench.into()[:2]) == [HIT, MISS]
        assert bench.memory.holds(24, bench.memory.parts(row))


def test_a_full_server_takes_nothing(tmp_path: Path) -> None:
    with (
        redis_server(tmp_path, "--maxmemory", "16mb", "--maxmemory-policy", "noeviction") as server,
        bench_of(f"redis://127.0.0.1:{server.port}", count=24, payload_nbytes=MIB) as bench,
    ):
        keys = [key_of(i) for i in range(24)]
        stored = bench.put(keys, bench.values())
        assert 0 < sum(stored) < 24
        assert bench.exists(keys) == stored
        there = [key for key, ok in zip(keys, stored, strict=True) if ok]
        assert bench.get(there, bench.into()[: len(there)]) == [HIT] * len(there)
        more = [key_of(100 + i) for i in range(24)]  # memory that requests took may be free by now
        assert not all(bench.put([key], bench.values()[:1])[0] for key in more)
        bench.another()  # opening another store is no error
        bench.run(bench.store.delete([*there, *more], 10))
        assert bench.put([key_of(99)], bench.values()[:1]) == [True]


# -- servers that fail -------------------------------------------------------------------------------------------------


def test_a_server_that_is_restarted(tmp_path: Path) -> None:
    port = free_port()
    keys = [key_of(i) for i in range(8)]
    with redis_server(tmp_path, port=port) as server:
        bench = Bench(fresh(f"redis://127.0.0.1:{port}"))
        assert bench.put(keys, bench.values()) == [True] * 8
        assert bench.get(keys, bench.into()) == [HIT] * 8
        server.kill()
        message = fails(bench, bench.store.get(keys, bench.into(), 5), 0)
        assert f"127.0.0.1:{port} cannot be reached" in message
        assert "refused" in fails(bench, bench.store.put(keys, bench.values(), 5), 0)
        with pytest.raises(RemoteError, match="cannot be reached"):
            bench.another()
    for _ in range(2):  # the second time the connection's end goes unnoticed
        with redis_server(tmp_path, port=port):
            assert bench.get(keys, bench.into()) == [MISS] * 8
            assert bench.put(keys, bench.values()) == [True] * 8
            assert bench.exists(keys) == [True] * 8
    bench.close()


def test_a_server_that_is_stopped(tmp_path: Path) -> None:
    with (
        redis_server(tmp_path) as server,
        bench_of(f"redis://127.0.0.1:{server.port}", payload_nbytes=2 * MIB) as bench,
    ):
        store, keys, values, into = bench.store, [key_of(i) for i in range(8)], bench.values(), bench.into()
        bench.put(keys, values)
        bench.get(keys, into)
        server.stop()
        assert "in time" in fails(bench, store.get(keys, into, 0.3), 0.3)
        for _ in range(2):  # on existing connections, and on new ones
            fails(bench, store.get(keys, into, 0.3), 0.3)
            fails(bench, store.put(keys, values, 0.3), 0.3)
            fails(bench, store.exists(keys, 0.3), 0.3)
            fails(bench, store.delete(keys, 0.3), 0.3)
        overlapping = [asyncio.wait_for(store.get(keys, into, 0.3), 20) for _ in range(6)]

        async def at_once() -> Sequence[Any]:
            return await asyncio.gather(*overlapping, return_exceptions=True)

        began = time.monotonic()
        assert all(isinstance(end, RemoteError) for end in bench.run(at_once()))
        assert time.monotonic() - began < 0.3 + LATE_S
        bench.memory.bytes[8:] = 0xCD
        server.go_on()
        time.sleep(0.2)
        assert (bench.memory.bytes[8:] == 0xCD).all()
        bench.put(keys, values)
        assert bench.get(keys, into) == [HIT] * 8
        assert all(bench.read(row) for row in range(8))


def test_nobody_takes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that drops packets, and one that accepts a connection and says nothing."""
    monkeypatch.setattr("kvkern.remote.stores.redis.store._OPEN_S", 0.3)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        runner = asyncio.Runner()
        for scheme in ("redis", "redis+cluster"):
            store = store_of(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}")
            for call in (store.open(), store.exists([key_of(1)], 0.3)):
                began = time.monotonic()
                with pytest.raises(RemoteError):
                    runner.run(call)
                assert time.monotonic() - began < 0.3 + LATE_S
            runner.run(store.close())
        runner.close()


VALUE_NBYTES = len("$74096\r\n") + 74_096 + 2  # one of bench's values, as a reply


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "stalled"])
@pytest.mark.parametrize("nbytes", [0, 3, 8, 100, 4_104, 50_000, VALUE_NBYTES - 1, VALUE_NBYTES])
def test_a_reply_that_ends_early(proxy: Proxy, nbytes: int, cut: bool) -> None:
    with bench_of(f"redis://127.0.0.1:{proxy.port}?connections=1") as bench:
        keys, into = [key_of(i) for i in range(8)], bench.into()
        bench.put(keys, bench.values())
        bench.get(keys, into)
        proxy.break_after(nbytes, cut=cut)
        if nbytes < VALUE_NBYTES:
            fails(bench, bench.store.get(keys, into, 0.15), 0.15)
        else:
            assert bench.run(bench.store.get(keys, into, 0.15)) == [HIT] + [UNKNOWN] * 7
            assert bench.read(0)
        bench.memory.bytes[8:] = 0xCD
        proxy.heal()
        time.sleep(0.01)
        assert (bench.memory.bytes[8:] == 0xCD).all()
        assert bench.get(keys, into) == [HIT] * 8
        assert all(bench.read(row) for row in range(8))


@pytest.mark.parametrize("nbytes", [0, 100, 50_000, 3 * VALUE_NBYTES + 9])
def test_a_connection_that_breaks_once(proxy: Proxy, nbytes: int) -> None:
    with bench_of(f"redis://127.0.0.1:{proxy.port}?connections=1") as bench:
        keys, into = [key_of(i) for i in range(8)], bench.into()
        bench.put(keys, bench.values())
        bench.get(keys, into)
        opened = proxy.connections
        proxy.break_after(nbytes, cut=True, once=True)
        assert bench.get(keys, into) == [HIT] * 8
        assert all(bench.read(row) for row in range(8))
        assert proxy.connections == opened + 1


NONSENSE = [
    b"nonsense\r\n", b"$12x\r\n", b"$-5\r\n", b"$ 12\r\n", b"$\r\n", b"$99999999999999999999\r\n", b"*1\r\n", b"\r\n",
    b"\0" * 5000, b"+QUEUED\r\n", b":7\r\n", b"-ERR it is broken\r\n", b"_\r\n", b">2\r\n",
]  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_replies_that_make_no_sense(proxy: Proxy, nonsense: bytes) -> None:
    with bench_of(f"redis://127.0.0.1:{proxy.port}", count=2) as bench:
        store, keys, values, into = bench.store, [key_of(0), key_of(1)], bench.values(), bench.into()
        calls: list[Callable[[], Any]] = [
            lambda: store.get(keys, into, 20), lambda: store.put(keys, values, 20), lambda: store.exists(keys, 20),
            lambda: store.delete(keys, 20),
        ]  # fmt: skip
        for call in calls:
            bench.put(keys, values)
            bench.get(keys, into)
            proxy.break_after(0, then=nonsense, once=True)
            assert "sent" in (message := fails(bench, call(), 0)) or "it is broken" in message
        assert bench.put(keys, values) == [True, True]
        assert bench.get(keys, into) == [HIT, HIT]


def test_a_value_with_no_end(proxy: Proxy) -> None:
    with bench_of(f"redis://127.0.0.1:{proxy.port}?connections=1") as bench:
        bench.put([key_of(0)], bench.values()[:1])
        proxy.break_after(VALUE_NBYTES - 2, then=b"!!\r\n")
        assert "sent b'!!'" in fails(bench, bench.store.get([key_of(0)], bench.into()[:1], 20), 0)


def test_a_server_that_says_more_than_it_was_asked(proxy: Proxy) -> None:
    """Bytes behind a reply are never taken for the next reply."""
    with bench_of(f"redis://127.0.0.1:{proxy.port}?connections=1") as bench:
        assert bench.exists([key_of(0)]) == [False]
        proxy.break_after(4, then=b":1\r\n", once=True)
        assert bench.exists([key_of(0)]) == [False]
        time.sleep(0.05)
        assert bench.exists([key_of(0)]) == [False]


# -- what a user can mend ----------------------------------------------------------------------------------------------


def test_urls_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("")
    for url, says in {
        "redis://": r"names no host\. Say redis://HOST:6379",
        "redis://h/one": r"names the database 'one'\. Give a number",
        "redis+cluster://h/1": "a cluster has only /0",
        "redis://h?conections=2": "unknown key 'conections'.* did you mean 'connections'",
        "redis://h?connections=0": r"connections of redis://h is '0'\. Give an integer in 1..16",
        "redis://h?ttl=soon": "ttl of redis://h is 'soon'",
        "redis://h?verify=no": r"verify of redis://h is only for TLS\. Say rediss://",
        "valkey+cluster://h?ca_file=x": r"ca_file of .* is only for TLS\. Say valkeys\+cluster://",
        "rediss://h?verify=maybe": r"verify of rediss://h is 'maybe'\. Give yes or no",
        "rediss://h?ca_file=/none": "ca_file of rediss://h is '/none', which is not a file",
        f"rediss://h?key_file={tmp_path}/key": "rediss://h has key_file but no cert_file",
        "redis://h?socket=/s": "redis://h has a socket and also a host",
        "redis://h?seeds=a:1": r"seeds of redis://h is only for clusters\. Say redis\+cluster://",
        "redis+cluster://h?seeds=a": r"contains 'a'\. Give HOST:PORT",
        "redis+cluster://h?prefix={x}": "A brace would send every key to one server",
    }.items():
        with pytest.raises(ConfigError, match=says):
            store_of(url)


def test_a_server_that_does_not_let_us_in(server: RedisServer, tls: RedisServer, files: str, tmp_path: Path) -> None:
    at = f"127.0.0.1:{tls.port}?{files}&prefix=p/"
    assert "Correct user and password" in refused(f"rediss://me:hush@{at}")
    assert "Give user and password" in refused(f"rediss://{at}")
    assert "ACL SETUSER <user> +get +set +exists +unlink" in refused(f"rediss://reader:r@{at}")
    assert "gives too few rights" in refused(
        f"rediss://me:se%40cret@127.0.0.1:{tls.port}?{files}"
    )  # its rights are for keys */kvkern*
    assert "without any password configured" in refused(f"redis://:hush@127.0.0.1:{server.port}")
    with redis_server(tmp_path, "--requirepass", "right") as other:
        assert "Give user and password" in refused(f"redis://127.0.0.1:{other.port}")
        assert "Correct user and password" in refused(f"redis://:hush@127.0.0.1:{other.port}")


def test_certificates_that_do_not_verify(tls: RedisServer, files: str, server: RedisServer, folder: Path) -> None:
    at = f"me:se%40cret@127.0.0.1:{tls.port}"
    ours = f"cert_file={folder}/server.crt&key_file={folder}/server.key"
    assert "does not verify" in refused(f"rediss://{at}?{ours}")
    assert "does not verify" in refused(f"rediss://{at}?{ours}&ca_file={folder}/other.crt")
    assert "not valid for 'localhost'" in refused(f"rediss://{at.replace('127.0.0.1', 'localhost')}?{files}")
    with pytest.raises(
        (ConfigError, RemoteError), match="cert_file and key_file"
    ):  # the reason may or may not come through
        asyncio.run(store_of(f"rediss://{at}?ca_file={folder}/ca.crt").open())
    assert "TLS handshake with" in refused(f"rediss://{at}?ca_file={folder}/names")
    with bench_of(f"rediss://{at}?{ours}&verify=no") as bench:
        assert bench.put([key_of(1)], bench.values()[:1]) == [True]


@pytest.mark.parametrize(
    ("certificate", "why"), [("expired", "certificate has expired"), ("own", "self-signed certificate")]
)
def test_certificates_that_prove_nothing(folder: Path, tls: RedisServer, certificate: str, why: str) -> None:
    """An error by name at the start, a miss by name later, and no command is sent, above all no password."""
    with redis_server(
        folder, "--tls-cert-file", f"{folder}/{certificate}.crt", "--tls-key-file", f"{folder}/server.key",
        "--tls-ca-cert-file", f"{folder}/ca.crt", "--tls-auth-clients", "no", tls=True,
    ) as server:  # fmt: skip
        url = f"rediss://me:hush@127.0.0.1:{server.port}?ca_file={folder}/ca.crt"
        message = refused(url)
        assert f"The certificate of 127.0.0.1:{server.port} does not verify ({why}" in message
        assert "ca_file=PATH" in message

        async def later() -> None:
            store = store_of(url)
            with pytest.raises(RemoteError, match=re.escape(why)):
                await store.exists([key_of(1)], TIMEOUT_S)
            await store.close()

        asyncio.run(later())
        with server.client(ssl=True, ssl_cert_reqs="none") as client:
            assert "cmdstat_auth" not in client.info("commandstats")


def test_only_the_named_authority_counts(tls: RedisServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the system beside it."""
    monkeypatch.setenv("SSL_CERT_FILE", f"{folder}/ca.crt")
    ours = f"cert_file={folder}/server.crt&key_file={folder}/server.key"
    url = f"rediss://me:se%40cret@127.0.0.1:{tls.port}?{ours}"
    with bench_of(url) as bench:
        assert bench.put([key_of(1)], bench.values()[:1]) == [True]
    assert "does not verify" in refused(f"{url}&ca_file={folder}/other.crt")


def test_tls_on_one_side_only(monkeypatch: pytest.MonkeyPatch, server: RedisServer, tls: RedisServer) -> None:
    monkeypatch.setattr("kvkern.remote.stores.redis.store._OPEN_S", 0.3)
    for url, says in {
        f"rediss://127.0.0.1:{server.port}": "If it does not speak TLS, say redis://",
        f"redis://127.0.0.1:{tls.port}": "If it wants TLS, say rediss://",
    }.items():
        with pytest.raises(RemoteError, match=says):
            asyncio.run(store_of(url).open())


def test_the_wrong_kind_of_server(server: RedisServer, tmp_path: Path) -> None:
    assert "has no database 99" in refused(f"redis://127.0.0.1:{server.port}/99")
    assert "is not a cluster" in refused(f"redis+cluster://127.0.0.1:{server.port}")
    with redis_server(tmp_path, "--replicaof", "127.0.0.1", str(server.port)) as replica:
        assert "is a replica" in refused(f"redis://127.0.0.1:{replica.port}")
