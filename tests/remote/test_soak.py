"""Two nodes with several engines each, and a store that is killed, paused, cut off, garbled and spoiled all the time.

No wrong byte, no long wait, and after the faults everything is as if there had been none. KVKERN_SOAK_SECONDS sets the
duration; `make soak` takes ten minutes. Each round has new nodes, with modes and a store drawn at random.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvkern.policy.base import Use
from kvkern.policy.persist_modes import Persist
from kvkern.remote import circuit_breaker, cost_model, presence_cache
from kvkern.remote import tier as tier_module
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from kvkern.tiers.base import ChunkShape, Lease
from kvkern.tiers.dram import DramTier
from tests.node import conftest as worker
from tests.node.conftest import GEOMETRY, eventually, read_verified, write_payload
from tests.remote import nodes as nodes_module
from tests.remote.fault_proxy import FaultProxy, Redis, flips, redis_behind_proxy
from tests.remote.nodes import Node
from tests.remote.required_servers import need
from tests.support import NAMESPACE, SHAPE, chain_keys, key

SECONDS = float(os.environ.get("KVKERN_SOAK_SECONDS", "6"))
ROUND_S = 3.0, 9.0
ENGINES = 3  # per node
PATIENCE_S, TIMEOUT_S = 0.3, 1.0  # of a request; of a call
LATE_S = 10.0  # delay of a busy machine
SLOW_TOKENS_S = 16 / 0.2  # prompt tokens a second of an engine for which every read pays: a chunk takes 0.2 s
MAX_REMEMBERED = 300
SLOTS = 64
ROOTS = (NAMESPACE, key("another namespace"), key("a third one"))


class Counted(DramTier):
    """Count the chunks that become READY, and the half-written ones that a clear finds: neither has a counter."""

    became_ready = cleared_writing = 0

    def _make_ready(self, slots: Sequence[int], keys: Sequence[bytes]) -> None:
        assert not any(key in self._index for key in keys)
        self.became_ready += len(keys)
        super()._make_ready(slots, keys)

    def clear(self, namespace: bytes | None = None, fresh: Collection[int] = ()) -> int:
        before = len(self._index)
        count = super().clear(namespace, fresh)
        self.cleared_writing += count - (before - len(self._index))
        return count


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, so that much happens in little time, and small limits, so that a short run reaches them."""
    monkeypatch.setattr(
        logging.getLogger("kvkern"), "disabled", True
    )  # every fault is one log line, and pytest keeps them all
    monkeypatch.setattr(nodes_module, "DramTier", Counted)
    monkeypatch.setattr(worker, "payload", cache(worker.payload))
    monkeypatch.setattr(circuit_breaker, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", PATIENCE_S)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", PATIENCE_S)
    monkeypatch.setattr(cost_model, "PROBE_S", 0.2)
    monkeypatch.setattr(presence_cache, "ABSENT_S", 0.1)
    monkeypatch.setattr(presence_cache, "MAX_ABSENT", MAX_REMEMBERED)
    monkeypatch.setattr(presence_cache, "MAX_REMEMBERED", MAX_REMEMBERED)
    monkeypatch.setattr(tier_module, "WINDOW_NBYTES", (3 * GEOMETRY.slot_nbytes, 6 * GEOMETRY.slot_nbytes))


# -- engines -----------------------------------------------------------------------------------------------------------


class Engine(threading.Thread):
    """An engine that reads, stores and clears. It holds some leases for long, and writes some chunks slowly or in part."""

    def __init__(self, node: Node, seed: int, stop: threading.Event) -> None:
        super().__init__(name=f"engine-{seed}")
        self._node, self._rng, self._stop_asked = node, random.Random(seed), stop
        self._held: deque[Lease] = deque()
        self._numbers = 0
        self.tally: Counter[str] = Counter()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                self._step()
            while self._held:
                self._let_go()
        except BaseException as error:
            self.error = error
            raise

    def _step(self) -> None:
        what = self._rng.random()
        chain, use = self._sequence()
        if what < 0.45:
            self._read(chain, use)
        elif what < 0.85:
            self._store(chain, use)
        elif what < 0.92:
            while len(self._held) > 1:
                self._let_go()
        elif what < 0.94:
            self._node.cache.clear(use.namespace if self._rng.random() < 0.9 else None)
            self.tally["clears"] += 1
        elif what < 0.97:
            self._node.cache.drop(self._rng.sample(chain, 2))
        else:
            self._node.tier.note_prefill(self._rng.choice((16 / 0.001, 16 / 0.05, SLOW_TOKENS_S)))

    def _sequence(self) -> tuple[list[bytes], Use]:
        """Few names, each with its own namespace, so that nodes and engines use the same chunks."""
        root = self._rng.randrange(len(ROOTS))
        self._numbers += 1
        name = root, self._rng.randrange(12)
        return chain_keys(name, self._rng.randint(2, 14)), Use(
            namespace=ROOTS[root], request=(id(self) % 1000) << 32 | self._numbers
        )

    def _read(self, chain: list[bytes], use: Use) -> None:
        prefix = self._rng.random() < 0.8
        asked = self._rng.choice((chain, chain, [*chain, chain[0]], chain[1:])) if not prefix else chain
        began = time.monotonic()
        answer = self._node.cache.acquire_soon(asked, prefix, use)
        assert time.monotonic() - began < LATE_S
        if self._rng.random() < 0.1:  # the request is gone before it is answered
            answer.add_done_callback(lambda answer: self._node.cache.release_later(answer.result()))
            return
        lease = answer.result(cost_model.LONGEST_WAIT_S + LATE_S)
        patience_s = max(PATIENCE_S, len(chain) * 0.2)
        assert time.monotonic() - began < patience_s + LATE_S
        if prefix:
            assert lease.keys == tuple(chain[: len(lease.keys)])
        assert set(lease.keys) <= set(chain)
        self._verify(lease)
        self._held.append(lease)
        while len(self._held) > 3:
            self._let_go()

    def _verify(self, lease: Lease) -> None:
        assert read_verified(self._node.arena, lease)
        self.tally["verified"] += len(lease.keys)

    def _let_go(self) -> None:
        """A leased chunk does not change, whatever was cleared or read meanwhile."""
        lease = self._held.popleft()
        self._verify(lease)
        if self._rng.random() < 0.2:
            self._node.cache.release_later(lease)
        else:
            assert self._node.cache.release(lease) == 0

    def _store(self, chain: list[bytes], use: Use) -> None:
        began = time.monotonic()
        shape = replace(SHAPE, namespace=use.namespace)
        assert isinstance(shape, ChunkShape)
        reservation = self._node.cache.reserve(chain, chain, shape, use)
        assert time.monotonic() - began < LATE_S
        if self._rng.random() < 0.3:
            time.sleep(self._rng.random() * 0.05)
        what = self._rng.random()
        if what < 0.05:
            self._node.cache.abort(reservation)
            return
        count = len(reservation.slots) if what < 0.9 else self._rng.randrange(len(reservation.slots) + 1)
        write_payload(
            self._node.arena, replace(reservation, keys=reservation.keys[:count], slots=reservation.slots[:count],
                                      generations=reservation.generations[:count]),
        )  # fmt: skip
        began = time.monotonic()
        stored = self._node.cache.commit(reservation)
        assert time.monotonic() - began < LATE_S
        assert stored <= count
        self.tally["stored"] += stored


# -- faults ------------------------------------------------------------------------------------------------------------


def spoiled(rng: random.Random, value: bytes, other: bytes) -> bytes:
    """A value with random damage."""
    at, half = rng.randrange(max(1, len(value))), GEOMETRY.header_nbytes
    flipped = bytearray(value or b"\0")
    flipped[at] ^= 1 << rng.randrange(8)
    hole = value[:at] + bytes(len(value[at : at + 512])) + value[at + 512 :]
    return rng.choice((bytes(flipped), value[:at], value + b"x", hole, other, value[:half] + other[half:], b""))


class Chaos:
    """Faults of a store, one after the other; at the end there is none. A fault is a method `do_NAME`."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.done: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        names = sorted(name for name in dir(self) if name.startswith("do_"))
        while time.monotonic() < end:
            name = self.rng.choice(names)
            getattr(self, name)()
            self.heal()
            self.done[name.removeprefix("do_")] += 1
            self.wait(0.3)

    def heal(self) -> None:
        """End all faults."""

    def wait(self, most_s: float) -> None:
        time.sleep(self.rng.random() * most_s)


class RedisChaos(Chaos):
    """Faults of a server behind a proxy."""

    def __init__(self, seed: int, redis: Redis, proxy: FaultProxy) -> None:
        super().__init__(seed)
        self.redis, self.proxy = redis, proxy

    def heal(self) -> None:
        self.proxy.heal()

    def do_kill(self) -> None:
        self.redis.kill(save=self.rng.random() < 0.5)
        self.wait(0.4)
        self.redis.start()

    def do_pause(self) -> None:
        self.redis.pause()
        self.wait(1.5)
        self.redis.go_on()

    def do_partition(self) -> None:
        self.proxy.silent = True
        self.wait(1.5)

    def do_slow(self) -> None:
        self.proxy.delay_s = self.rng.choice((0.01, 0.1, 0.5))
        self.wait(1.0)

    def do_throttle(self) -> None:
        self.proxy.nbytes_s = self.rng.choice((10e3, 100e3, 1e6))
        self.wait(1.0)

    def do_garble(self) -> None:
        least = self.rng.choice((0, 1000))
        self.proxy.garble_replies = flips(self.rng, self.rng.choice((0.1, 1.0)), least)
        self.proxy.garble_requests = self.rng.choice((None, flips(self.rng, 0.3, least)))
        self.wait(1.0)

    def do_spoil(self) -> None:
        with self.redis.client() as client:
            names = [name for name in (client.randomkey() for _ in range(10)) if name]
            for name, other in zip(names, reversed(names), strict=True):
                client.set(name, spoiled(self.rng, client.get(name) or b"", client.get(other) or b""))

    def do_forget(self) -> None:
        with self.redis.client() as client:
            client.flushall()

    def do_fill(self) -> None:
        with self.redis.client() as client:
            client.config_set("maxmemory", "1")
            self.wait(0.5)
            client.config_set("maxmemory", "0")

    def do_hang_up(self) -> None:
        with self.redis.client() as client:
            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")


class FileChaos(Chaos):
    """Faults of a directory on a disk that fails."""

    def __init__(self, seed: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(seed)
        self.root = root
        self.codes: dict[str, int] = {}  # system call -> errno it fails with
        for name in ("preadv", "pwritev"):
            self._wrap(name, monkeypatch)

    def _wrap(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(os, name)

        def call(*arguments: Any) -> int:
            if (code := self.codes.get(name)) is not None and self.rng.random() < 0.7:
                raise OSError(code, os.strerror(code))
            return int(real(*arguments))

        monkeypatch.setattr(os, name, call)

    def heal(self) -> None:
        self.codes.clear()

    def do_fill(self) -> None:
        self.codes["pwritev"] = self.rng.choice((errno.ENOSPC, errno.EDQUOT))
        self.wait(1.0)

    def do_break(self) -> None:
        self.codes[self.rng.choice(("preadv", "pwritev"))] = self.rng.choice((errno.EIO, errno.ESTALE))
        self.wait(1.0)

    def do_spoil(self) -> None:
        paths = self._values()
        for path, other in zip(paths, reversed(paths), strict=True):
            with suppress(FileNotFoundError):
                path.write_bytes(spoiled(self.rng, path.read_bytes(), other.read_bytes()))

    def do_forget(self) -> None:
        for path in self._values():
            path.unlink(missing_ok=True)

    def _values(self) -> list[Path]:
        paths = [path for path in self.root.glob("kvkern1/??/*") if len(path.name) == 64]
        return self.rng.sample(paths, min(10, len(paths)))


# -- a round -----------------------------------------------------------------------------------------------------------


@contextmanager
def store_of(kind: str, folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, Chaos]]:
    """Yield (URL, the same past the proxy, the faults of the store)."""
    if kind == "redis":
        with redis_behind_proxy(folder) as (redis, proxy):
            yield (
                f"redis://127.0.0.1:{proxy.port}",
                f"redis://127.0.0.1:{redis.port}",
                RedisChaos(seed, redis, proxy),
            )
        return
    url = f"file://{folder}/values?capacity={40 * GEOMETRY.slot_nbytes}&direct={random.Random(seed).choice(('auto', 'no'))}"
    with monkeypatch.context() as patch:
        yield url, url, FileChaos(seed, folder / "values", patch)


def make_node(folder: Path, url: str, mode: Persist, slots: int = SLOTS, grit: bool = False) -> Node:
    store, grit = make_store(RemoteUrl.parse(url)), grit or mode is Persist.PREDICTED
    return Node(folder, store, mode, slots, predict=grit, queue_slots=20, timeout_s=TIMEOUT_S)


def one_round(folder: Path, seed: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    rng = random.Random(seed)
    kind, modes = rng.choice(("redis", "redis", "file")), rng.choices(list(Persist), k=2)
    with store_of(kind, folder, seed, monkeypatch) as (url, direct, chaos), ExitStack() as stack:
        nodes = [make_node(folder, url, mode, grit=rng.random() < 0.5) for mode in modes]
        for node in nodes:
            stack.callback(node.close)
        stop = threading.Event()
        engines = [Engine(node, seed + n, stop) for n, node in enumerate(nodes * ENGINES)]
        for engine in engines:
            engine.start()
        try:
            chaos.run(seconds)
        finally:
            stop.set()
            for engine in engines:
                engine.join(60)
        assert [engine.error for engine in engines if engine.error or engine.is_alive()] == []
        tally: Counter[str] = sum((engine.tally for engine in engines), Counter())
        for node in nodes:
            at_rest(node)
            tally.update({name: int(count) for name, count in node.counters.items() if name != "hit_ratio"})
        recovered(folder, direct, nodes, seed)
        tally.update(chaos.done)
        tally.update({kind: 1} | Counter(str(mode) for mode in modes))
    return tally


def at_rest(node: Node) -> None:
    """Only evicted, cleared or dropped chunks are lost. Nobody holds anything. Everything remembered is bounded."""
    tier, dram, counters = node.tier, node.cache._dram, node.cache.counters

    def let_go() -> bool:
        node.cache.lookup(())  # ends leases that were to be released later; some requests are answered only now
        return not (tier.reader.num_waiting or any(dram._pins))

    eventually(let_go, "the end of every lease")
    node.settle()
    assert isinstance(dram, Counted)
    assert node.whole()
    gone = counters.evicted_chunks + counters.cleared_chunks - dram.cleared_writing
    assert dram.became_ready - gone == len(dram._index)
    assert counters.faults == counters.bad_chunks == 0
    assert counters.hit_chunks <= counters.lookup_chunks
    eventually(lambda: len(tier._tasks) == 1, "the end of every task but the one that writes")
    assert not tier.reader._being_read
    assert len(tier.presence.absent) <= MAX_REMEMBERED
    assert len(tier.presence.written_at) <= MAX_REMEMBERED


def recovered(folder: Path, url: str, nodes: list[Node], seed: int) -> None:
    """Both nodes hit what a third node writes now.

    The engines compute slowly by now. Behind a fast one the tier is right to compute: at the engines' fastest speed a busy
    machine cannot ask for the last chunk in a fifth of the time to compute it, so that chunk would never come.
    """
    for node in nodes:
        for _ in range(50):  # the speed is smoothed
            node.tier.note_prefill(SLOW_TOKENS_S)
    other = make_node(folder, url, Persist.ALL, slots=16)
    try:
        chain = chain_keys(("recovered", seed), 5)

        def written() -> bool:
            other.cache.drop(chain)
            other.compute(chain)
            other.settle()
            return all(node.hits(chain) == 5 for node in nodes)

        eventually(written, "a hit of what somebody else has written")
    finally:
        other.close()


def resources() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd")), "resident_mib": pages >> 8}


@pytest.mark.slow
def test_faults_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("redis", program="redis-server", module="redis")
    seed = int(os.environ.get("KVKERN_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
    rng, end = random.Random(seed), time.monotonic() + SECONDS
    tally: Counter[str] = Counter()
    before: list[dict[str, int]] = []
    print(f"seed {seed}", file=sys.stderr)
    while not before or time.monotonic() < end:
        folder = tmp_path / str(len(before))
        folder.mkdir()
        seconds = min(rng.uniform(*ROUND_S), max(1.0, end - time.monotonic()))
        tally.update(one_round(folder, rng.randrange(1 << 32), seconds, monkeypatch))
        shutil.rmtree(folder)
        before.append(resources())
    most = {name: max(each[name] for each in before[:5]) for name in before[0]}
    most["resident_mib"] += 100  # threads have their own heaps
    eventually(lambda: all(count <= most[name] for name, count in resources().items()), f"what is held within {most}")
    print(f"seed {seed}, {len(before)} rounds: {json.dumps(tally)}; {before[0]}, at the end {resources()}")
    assert min(tally["stored"], tally["verified"]) > 0
    if len(before) > 8:  # all modes and both stores took part
        assert min(tally[name] for name in ("remote_hit_chunks", "remote_written_chunks", "remote_bad_chunks")) > 0
