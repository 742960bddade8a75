"""Scans for chunks: what they find, and how much of the daemon's thread they take."""

from __future__ import annotations

import asyncio
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from kvkern.node.web import chunk_scan
from kvkern.node.web.chunk_scan import SHARE, SLICE, TURN_S, Busy, ChunkScan
from tests.node.conftest import store
from tests.node.web.conftest import Web, ask, connected, read_answer
from tests.support import chain_keys, key

SLICE_S = 0.0004  # what a slice takes in these tests


class World:
    """A cache of many slots, and a clock that only work and waits move."""

    def __init__(self, num_slots: int) -> None:
        self.now_s = 100.0
        self.turns: list[float] = [0.0]  # seconds of work between two waits
        self.waits: list[float] = []
        self.keys = [key("chunk", i) if i % 3 else None for i in range(num_slots)]
        self.sessions: Any = SimpleNamespace(
            arena=SimpleNamespace(spec=SimpleNamespace(num_slots=num_slots)), cache=self
        )

    def keys_in(self, slots: range) -> list[bytes]:
        self.now_s += SLICE_S
        self.turns[-1] += SLICE_S
        return [found for found in self.keys[slots.start : slots.stop] if found is not None]

    def describe_chunks(self, keys: list[bytes]) -> list[dict[str, str]]:
        return [{"key": found.hex()} for found in keys]

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.waits.append(seconds)
        self.turns.append(0.0)

    def scan(self, monkeypatch: pytest.MonkeyPatch) -> ChunkScan:
        monkeypatch.setattr(chunk_scan, "time", SimpleNamespace(perf_counter=lambda: self.now_s))
        monkeypatch.setattr(chunk_scan, "asyncio", SimpleNamespace(sleep=self.sleep))
        return ChunkScan(self)


@pytest.mark.parametrize("num_slots", [0, 1, SLICE - 1, SLICE, SLICE + 1, 100 * SLICE + 7])
def test_every_chunk_is_found(monkeypatch: pytest.MonkeyPatch, num_slots: int) -> None:
    world = World(num_slots)
    scan = world.scan(monkeypatch)
    want = [found.hex() for found in world.keys if found is not None]
    assert [row["key"] for row in asyncio.run(scan.rows(b"", 1 << 30))] == want
    for text in want[-1:]:
        assert asyncio.run(scan.rows(bytes.fromhex(text), 5)) == [{"key": text}]


def test_scans_take_a_tenth_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, without a match: each looks at every slot."""
    world = World(200 * SLICE)
    scan, began_s = world.scan(monkeypatch), world.now_s
    for _ in range(5):
        assert asyncio.run(scan.rows(bytes(32), 1)) == []
    assert max(world.turns) <= TURN_S + SLICE_S
    assert sum(world.turns) == pytest.approx(5 * 200 * SLICE_S)
    assert world.now_s - began_s >= SHARE * (sum(world.turns) - max(world.turns))


def test_a_scan_ends_when_it_has_found_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(200 * SLICE)
    assert len(asyncio.run(world.scan(monkeypatch).rows(b"", 3))) == 3
    assert sum(world.turns) == pytest.approx(SLICE_S)


def test_the_arena_goes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(200 * SLICE)
    scan, slept = world.scan(monkeypatch), world.sleep

    async def sleep(seconds: float) -> None:
        await slept(seconds)
        world.sessions = None

    monkeypatch.setattr(chunk_scan.asyncio, "sleep", sleep)
    assert asyncio.run(scan.rows(bytes(32), 1)) == []
    assert len(world.turns) == 2
    assert asyncio.run(scan.rows(b"", 1)) == []


def test_one_scan_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(200 * SLICE)
    monkeypatch.setattr(chunk_scan, "SHARE", 0)
    scan = ChunkScan(world)

    async def main() -> None:
        task = asyncio.get_running_loop().create_task(scan.rows(bytes(32), 1))
        monkeypatch.setattr(scan, "_free_s", float("inf"))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await scan.rows(b"", 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.setattr(scan, "_free_s", 0.0)
        assert len(await scan.rows(b"", 1)) == 1

    asyncio.run(main())


def test_a_second_request_is_told_to_come_later(monkeypatch: pytest.MonkeyPatch, web: Web) -> None:
    """Engines and probes are answered while a scan is under way."""
    with closing(web.client()) as client:
        assert store(client, chain_keys("a", 20)) == 20
        monkeypatch.setattr(chunk_scan, "SLICE", 4)
        monkeypatch.setattr(chunk_scan, "TURN_S", 0.0)
        monkeypatch.setattr(chunk_scan, "SHARE", 10_000)  # some seconds in all
        with connected(web.rpc) as sock:
            sock.sendall(b"GET /v1/chunks?limit=20 HTTP/1.1\r\nhost: localhost\r\n\r\n")
            lease = client.acquire(chain_keys("a", 20))
            assert len(lease.keys) == 20
            client.release(lease)
            refused = ask(web.rpc, "/v1/chunks")
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert "ask again" in refused.json["error"]
            assert ask(web.rpc).status == 200
            assert len(read_answer(sock).json) == 20
    assert ask(web.rpc, "/v1/chunks?limit=1").status == 200
