"""The tier over real servers with every kind of fault: no wrong byte, no long wait, and it recovers by itself.

Two nodes share one store: the first fills it, the second one loses it. Values are spoiled on their way and at rest.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvkern.arena.slots import SlotGeometry
from kvkern.remote import circuit_breaker, cost_model
from kvkern.remote.stores.base import value_name
from kvkern.remote.stores.file.value_files import file_name
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from kvkern.remote.tier import INTERRUPT_S
from tests.node.conftest import GEOMETRY, eventually
from tests.remote.fault_proxy import FaultProxy, Redis, flips, redis_behind_proxy
from tests.remote.nodes import USE, A, B, C, Node
from tests.remote.required_servers import need
from tests.support import NAMESPACE, chain_keys

PATIENCE_S, TIMEOUT_S = 0.3, 4.0  # of a request for six chunks; of a call
LATE_S = 3.0  # delay of a busy machine: less than that of a call that hangs
SLOTS = 96
HEADER = GEOMETRY.header_nbytes


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, so that recovery takes no minutes; long waits for unmeasured loads, however busy the machine is."""
    monkeypatch.setattr(circuit_breaker, "LONGEST_PAUSE_S", 1.0)
    monkeypatch.setattr(cost_model, "PROBE_S", 0.3)
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 30.0)


@contextmanager
def pair(folder: Path, url: str, other_url: str = "", **options: Any) -> Iterator[tuple[Node, Node]]:
    """Yield two nodes; the first has written A, B and C."""
    with ExitStack() as stack:
        one, two = (
            Node(folder, make_store(RemoteUrl.parse(at)), **({"slots": SLOTS, "timeout_s": TIMEOUT_S} | options))
            for at in (url, other_url or url)
        )
        stack.callback(two.close)
        stack.callback(one.close)
        for chain in (A, B, C):
            assert one.compute(chain) == 6
        one.settle()
        assert one.counters["remote_written_chunks"] == 18
        yield one, two
        assert one.counters["faults"] == two.counters["faults"] == 0


def timed(limit_s: float, call: Callable[[], Any]) -> Any:
    """Return the result of a call, which must come soon."""
    began = time.monotonic()
    result = call()
    took_s = time.monotonic() - began
    assert took_s < limit_s + LATE_S, f"{took_s:.1f} s"
    return result


def impatient(node: Node) -> None:
    """Make a request for six chunks wait for PATIENCE_S from now on."""
    assert node.compute(chain_keys((id(node), "own"), 1)) == 1
    node.tier.note_prefill(6 * 16 / PATIENCE_S)


def comes_back(node: Node, chain: list[bytes]) -> None:
    """Wait until all chunks of a chain are hits, in this request or a later one."""
    eventually(lambda: node.hits(chain) == len(chain), "a hit")


def recovers(one: Node, two: Node, name: object) -> None:
    """Check that one node computes and writes a chain, and the other loads it."""
    chain = chain_keys(name, 6)

    def stored() -> bool:
        one.cache.drop(chain)  # it was dropped unwritten the last time, so it is computed again
        one.compute(chain)
        return two.hits(chain) == 6

    eventually(stored, "a new chunk from one node on the other")


# -- a server that is not there ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _redis() -> None:
    need("redis", program="redis-server", module="redis")


Fault = tuple[Callable[[Redis, FaultProxy], object], Callable[[Redis, FaultProxy], object]]


def lock_out(redis: Redis, proxy: FaultProxy) -> None:
    with redis.client() as client:
        client.config_set("requirepass", "new")
        client.execute_command("CLIENT KILL TYPE normal SKIPME yes")


def let_in(redis: Redis, proxy: FaultProxy) -> None:
    with redis.client(password="new") as client:
        client.config_set("requirepass", "")


FAULTS: dict[str, Fault] = {
    "killed": (lambda redis, proxy: redis.kill(save=True), lambda redis, proxy: redis.start()),
    "paused": (lambda redis, proxy: redis.pause(), lambda redis, proxy: redis.go_on()),
    "partitioned": (lambda redis, proxy: setattr(proxy, "silent", True), lambda redis, proxy: proxy.heal()),
    "slow": (lambda redis, proxy: setattr(proxy, "delay_s", 1.5), lambda redis, proxy: proxy.heal()),
    "throttled": (lambda redis, proxy: setattr(proxy, "nbytes_s", 4000.0), lambda redis, proxy: proxy.heal()),
    "locked": (lock_out, let_in),
}
FAILING = ("killed", "partitioned", "locked")  # calls end with errors


@pytest.mark.usefixtures("_redis")
@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_fails_and_is_back(tmp_path: Path, name: str) -> None:
    begin, end = FAULTS[name]
    with redis_behind_proxy(tmp_path) as (redis, proxy):
        direct, through = (f"redis://127.0.0.1:{port}" for port in (redis.port, proxy.port))
        with pair(tmp_path, direct, through) as (one, two):
            impatient(two)
            comes_back(two, A)
            two.settle()
            begin(redis, proxy)
            for turn in range(6):
                assert timed(PATIENCE_S, lambda: two.hits(B)) in range(7)
                assert timed(0, lambda turn=turn: two.compute(chain_keys(("new", turn), 3))) == 3  # type: ignore[misc]
                assert timed(0, lambda: two.hits(A)) == 6  # DRAM needs no store
            if name in FAILING:
                eventually(lambda: two.counters["remote_failures"] > 0, "a failure")
                assert two.counters["remote_hit_chunks"] == 6
            end(redis, proxy)
            comes_back(two, B)
            recovers(one, two, "from one")
            recovers(two, one, "from two")
            comes_back(two, C)
            for node in (one, two):
                node.settle()
                assert node.whole()
                assert node.counters["remote_bad_chunks"] == 0


@pytest.mark.usefixtures("_redis")
def test_a_server_that_forgets_and_is_full(tmp_path: Path) -> None:
    with (
        redis_behind_proxy(tmp_path) as (redis, proxy),
        pair(tmp_path, f"redis://127.0.0.1:{proxy.port}") as (one, two),
    ):
        with redis.client() as client:
            client.config_set("maxmemory", "1")
            two.compute(chain_keys("much", 6))
            two.settle()
            assert two.counters["remote_dropped_chunks"] == 6
            assert not two.tier.breaker.is_open
            assert two.hits(A) == 6
            client.config_set("maxmemory", "0")
            client.flushall()
        assert two.hits(B) == 0
        recovers(one, two, "new")


@pytest.mark.usefixtures("_redis")
def test_no_right_to_delete_what_is_spoiled(tmp_path: Path) -> None:
    with (
        redis_behind_proxy(tmp_path) as (redis, proxy),
        pair(tmp_path, f"redis://127.0.0.1:{proxy.port}") as (_, two),
        redis.client() as client,
    ):
        client.setrange(value_name(A[4]), HEADER + 7, b"spoiled")
        client.execute_command("ACL SETUSER default -unlink")
        for _ in range(5):  # chunks before the bad one are still hit
            assert two.hits(A) == 4
        assert not two.tier.breaker.is_open
        client.execute_command("ACL SETUSER default +unlink")
        two.hits(A)
        assert not client.exists(value_name(A[4]))


@pytest.mark.usefixtures("_redis")
def test_the_end_while_nobody_answers(tmp_path: Path) -> None:
    """A closed tier leaves nothing behind. Closing waits for calls that hang, but not for ever."""
    before: list[tuple[int, int]] = []
    with redis_behind_proxy(tmp_path) as (_, proxy):
        for _ in range(3):
            node = Node(tmp_path, make_store(RemoteUrl.parse(f"redis://127.0.0.1:{proxy.port}")), timeout_s=1.0)
            assert node.hits(A) == 0
            node.compute(B)
            node.settle()
            proxy.silent = True
            answers = [node.cache.acquire_soon(chain_keys(("absent", i), 6), True, USE) for i in range(20)]
            node.compute(C)
            time.sleep(0.2)
            assert not any(answer.done() for answer in answers)
            timed(1.0, node.tier.close)
            for answer in answers:
                assert answer.done()
                node.cache.release(answer.result())
            assert node.whole()
            node.arena.close()
            proxy.heal()
            del node, answers
            before.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
        eventually(lambda: threading.active_count() <= before[0][0], "no more threads than after the first")
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before[0][1], "no more descriptors")


@pytest.mark.usefixtures("_redis")
@pytest.mark.parametrize("connected", [True, False])
def test_the_end_does_not_wait_for_a_server_that_hangs(tmp_path: Path, connected: bool) -> None:
    """A call may take a minute here. The end interrupts it, whether it waits for an answer or for a new connection."""
    with redis_behind_proxy(tmp_path) as (_, proxy):
        node = Node(tmp_path, make_store(RemoteUrl.parse(f"redis://127.0.0.1:{proxy.port}")), timeout_s=60.0)
        if connected:
            node.compute(B)
            node.settle()
        proxy.silent = True
        answers = [node.cache.acquire_soon(chain_keys(("absent", i), 6), True, USE) for i in range(3)]
        node.compute(C)
        time.sleep(0.2)
        timed(INTERRUPT_S, node.tier.close)
        for answer in answers:
            node.cache.release(answer.result())
        assert node.whole()
        node.arena.close()


# -- values that are spoiled on their way ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_redis")
def test_bits_that_flip_on_their_way(tmp_path: Path) -> None:
    """Garbled replies, values, commands and lengths are a miss, an error or nothing, and never a hit."""
    rng = random.Random(5)
    with redis_behind_proxy(tmp_path) as (redis, proxy):
        direct, through = (f"redis://127.0.0.1:{port}" for port in (redis.port, proxy.port))
        with pair(tmp_path, direct, through, timeout_s=1.0) as (one, two):
            for turn in range(25):
                kind = turn % 3
                proxy.garble_replies = flips(rng, 0.8, 0 if kind == 1 else 1000)
                proxy.garble_requests = flips(rng, 0.5) if kind == 2 else None
                for chain in (A, B, C):
                    two.hits(chain)  # verified
                two.compute(chain_keys(("spoiled", turn % 5), 4))
                two.settle()
                two.cache.clear(NAMESPACE)
            proxy.heal()
            assert two.counters["remote_bad_chunks"] + two.counters["remote_failures"] > 0
            for node in (two, one):
                for chain in (A, B, C, *(chain_keys(("spoiled", turn), 4) for turn in range(5))):

                    def right(node: Node = node, chain: list[bytes] = chain) -> bool:
                        node.cache.drop(chain)
                        found = node.hits(chain)
                        node.compute(chain)
                        return found == len(chain)

                    eventually(right, "a chain that is right, by itself or once it was computed again")


# -- values that are spoiled at rest -----------------------------------------------------------------------------------


class Values:
    """Direct access to the values in a store, past the store."""

    def __init__(self, read: Callable[[bytes], bytes | None], write: Callable[[bytes, bytes], object]) -> None:
        self.read, self.write = read, write


@contextmanager
def at_rest(kind: str, folder: Path) -> Iterator[tuple[str, Values]]:
    """Yield a store's URL and its values."""
    if kind == "redis":
        need("redis", program="redis-server", module="redis")
        with redis_behind_proxy(folder) as (redis, _), redis.client() as client:
            named = lambda key: value_name(key)  # noqa: E731
            yield (
                f"redis://127.0.0.1:{redis.port}",
                Values(lambda key: client.get(named(key)), lambda key, value: client.set(named(key), value)),
            )
        return
    root = folder / "values"

    def read(key: bytes) -> bytes | None:
        path = root / file_name(key)
        return path.read_bytes() if path.exists() else None

    yield f"file://{root}?capacity=64MiB", Values(read, lambda key, value: (root / file_name(key)).write_bytes(value))


def replaced(value: bytes, at: int, new: bytes) -> bytes:
    return value[:at] + new + value[at + len(new) :]


SPOILED: dict[str, Callable[[bytes, bytes], bytes]] = {  # of a value and the value of another chunk
    "truncated": lambda value, other: value[:-1],
    "empty": lambda value, other: b"",
    "header only": lambda value, other: value[:HEADER],
    "extended": lambda value, other: value + b"\0",
    "a bit of the payload": lambda value, other: replaced(value, HEADER + 100, bytes([value[HEADER + 100] ^ 4])),
    "its last byte": lambda value, other: replaced(value, HEADER + 255, bytes([value[HEADER + 255] ^ 1])),
    "a hole of zeros": lambda value, other: replaced(value, HEADER + 64, bytes(128)),
    "no header": lambda value, other: replaced(value, 0, bytes(HEADER)),
    "no payload": lambda value, other: replaced(value, HEADER, bytes(256)),
    "nothing but zeros": lambda value, other: bytes(len(value)),
    "another chunk": lambda value, other: other,
    "another chunk's header": lambda value, other: other[:HEADER] + value[HEADER:],
    "another chunk's payload": lambda value, other: value[:HEADER] + other[HEADER:],
    "a later version": lambda value, other: replaced(value, 8, b"\x03"),
    "another format": lambda value, other: replaced(value, 0, b"KVKERNX9"),
    "another codec": lambda value, other: replaced(value, 132, b"\x01"),
}


@pytest.mark.parametrize("kind", ["redis", "file"])
def test_what_is_spoiled_at_rest_is_a_miss_and_is_written_again(tmp_path: Path, kind: str) -> None:
    with at_rest(kind, tmp_path) as (url, values), pair(tmp_path, url, slots=200) as (one, two):
        other = values.read(B[0])
        assert other is not None
        for number, (what, spoil) in enumerate(SPOILED.items()):
            chain = chain_keys(("rest", what), 4)
            assert one.compute(chain) == 4
            one.settle()
            good = values.read(chain[2])
            assert good is not None
            values.write(chain[2], spoil(good, other))
            assert two.hits(chain) == 2, what
            assert two.counters["remote_bad_chunks"] == number + 1, what
            assert values.read(chain[2]) is None, what
            assert two.compute(chain) == 2
            two.settle()
            anew = values.read(chain[2])
            assert anew is not None
            assert anew[HEADER : HEADER + 256] == good[HEADER : HEADER + 256]
            two.cache.drop(chain)
            assert two.hits(chain) == 4
        first, second = (values.read(key) for key in A[:2])
        assert first is not None
        assert second is not None
        values.write(A[0], second)
        values.write(A[1], first)
        assert two.hits(A) == 0
        assert [values.read(key) for key in A[:2]] == [None, None]
        assert not two.tier.breaker.is_open


@pytest.mark.parametrize("kind", ["redis", "file"])
def test_values_of_another_geometry(tmp_path: Path, kind: str) -> None:
    """No two namespaces differ like this: planes of other sizes in values of the same length, other ranks, larger parts."""
    with at_rest(kind, tmp_path) as (url, values), pair(tmp_path, url) as (one, _):
        for geometry in (SlotGeometry(512, 2), SlotGeometry(256, 1), SlotGeometry(256, 2, 2), SlotGeometry(8192, 2)):
            for chain in (A, B, C):
                one.cache.drop(chain)
                eventually(lambda chain=chain: one.compute(chain) in (0, 6) and one.hits(chain) == 6)  # type: ignore[misc]
            one.settle()
            store = make_store(RemoteUrl.parse(url))
            other = Node(tmp_path, store, geometry=geometry, slots=32)
            assert other.hits(A) == 0
            assert values.read(A[0]) is None
            assert other.compute(A) == 6
            other.settle()
            assert other.hits(A) == 6
            other.close()
            one.cache.drop(A)
            assert one.hits(A) == 0


# -- a disk ------------------------------------------------------------------------------------------------------------


class Faulty:
    """os.pwritev or os.preadv that fails while it is told to."""

    def __init__(self, name: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real, self._code, self.on = getattr(os, name), code, False
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any) -> int:
        if self.on:
            raise OSError(self._code, os.strerror(self._code))
        return int(self._real(*args))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_takes_nothing(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty("pwritev", code, monkeypatch)
    with pair(tmp_path, f"file://{tmp_path}/values?capacity=64MiB") as (one, two):
        faulty.on = True
        for turn in range(4):
            assert timed(0, lambda turn=turn: two.compute(chain_keys(("new", turn), 3))) == 3  # type: ignore[misc]
            two.settle()
        assert two.counters["remote_dropped_chunks"] == 12
        assert two.counters["remote_written_chunks"] == 0
        if code in (errno.ENOSPC, errno.EDQUOT):
            assert not two.tier.breaker.is_open  # it can be read; the oldest values made room
            assert two.counters["remote_failures"] == 0
        faulty.on = False
        recovers(two, one, "from two")
        assert not list(tmp_path.glob("values/*/*/.kvkern-*"))


def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty("preadv", errno.EIO, monkeypatch)
    with pair(tmp_path, f"file://{tmp_path}/values?capacity=64MiB") as (one, two):
        faulty.on = True
        for _ in range(8):
            assert timed(0, lambda: two.hits(A)) == 0
        assert 0 < two.counters["remote_failures"] <= 8
        faulty.on = False
        comes_back(two, A)
        recovers(one, two, "new")


def test_a_small_file_system(tmp_path: Path) -> None:
    """kvkern may use half of a tmpfs of 32 values, and another program fills the rest."""
    root = tmp_path / "small"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={32 * GEOMETRY.slot_nbytes}", "kvkern-test", str(root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a tmpfs")
    try:
        with pair(tmp_path, f"file://{root}?capacity={30 * GEOMETRY.slot_nbytes}") as (one, two):
            for turn in range(6):
                one.compute(chain_keys(("much", turn), 6))
                one.settle()
                two.hits(chain_keys(("much", turn), 6))
            with (root / "others").open("wb") as file, suppress(OSError):
                while os.write(file.fileno(), bytes(4096)):
                    pass
            for turn in range(6, 9):
                assert timed(0, lambda turn=turn: one.compute(chain_keys(("much", turn), 6))) == 6  # type: ignore[misc]
                one.settle()
                two.hits(chain_keys(("much", turn), 6))
            assert not one.tier.breaker.is_open
            (root / "others").unlink()
            recovers(one, two, "new")
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_directory_that_is_emptied(tmp_path: Path) -> None:
    with pair(tmp_path, f"file://{tmp_path}/values?capacity=64MiB") as (one, two):
        assert two.hits(A) == 6
        shutil.rmtree(tmp_path / "values")
        assert two.hits(B) == 0
        recovers(one, two, "new")
        recovers(two, one, "newer")


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_redis")
def test_many_requests_while_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are answered in time, the store is soon not asked any more, and the pause does not grow with their number."""
    monkeypatch.setattr(circuit_breaker, "LONGEST_PAUSE_S", 30.0)
    with redis_behind_proxy(tmp_path) as (redis, proxy):
        direct, through = (f"redis://127.0.0.1:{port}" for port in (redis.port, proxy.port))
        with pair(tmp_path, direct, through, timeout_s=1.0) as (_, two):
            impatient(two)
            comes_back(two, A)
            proxy.silent = True
            began = time.monotonic()
            answers = [two.cache.acquire_soon(chain_keys(("many", i), 6), True, USE) for i in range(300)]
            for answer in answers:
                two.cache.release(answer.result(PATIENCE_S + LATE_S))
            assert time.monotonic() - began < PATIENCE_S + LATE_S
            eventually(lambda: two.tier.breaker.is_open, "the breaker")
            eventually(lambda: two.tier.reader.num_waiting == 0, "the end of the calls")
            assert two.tier.breaker._pause_s <= 4 * circuit_breaker.FIRST_PAUSE_S
            proxy.heal()
            comes_back(two, B)
