"""The running tier does what the two-tier replay predicts: as many hits and as many writes, in every mode."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from kvkern.policy.base import Stop
from kvkern.policy.persist_modes import Persist
from kvkern.remote import cost_model, presence_cache
from kvkern.remote.cost_model import FOREVER_S, CostModel
from kvkern.remote.stores.base import Got, Parts
from kvkern.replay import two_tier
from kvkern.replay.policy_driver import trace_requests
from kvkern.replay.trace import Trace
from tests.node.conftest import write_payload
from tests.remote.nodes import node
from tests.remote.stores.memory import MemoryStore
from tests.support import NAMESPACE, SHAPE

DRAM, REMOTE, THRESHOLD = 210, 840, 0.3


class LRUStore(MemoryStore):
    """A store of a fixed size that drops the values read or written longest ago."""

    def __init__(self) -> None:
        super().__init__()
        self.values: OrderedDict[bytes, bytes] = OrderedDict()
        self.now_s = 0.0
        self.used_s: dict[bytes, float] = {}
        self.residency_s = FOREVER_S  # the age of dropped values, smoothed as the replay does

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        for key in reversed(keys):
            if key in self.values:
                self.values.move_to_end(key)
                self.used_s[key] = self.now_s
        return await super().get(keys, into, timeout_s)

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool]:
        order = range(len(keys) - 1, -1, -1)  # tails first, so that they go first
        result = await super().put([keys[i] for i in order], [values[i] for i in order], timeout_s)
        self.used_s.update(dict.fromkeys(keys, self.now_s))
        while len(self.values) > REMOTE:
            age_s = self.now_s - self.used_s.pop(self.values.popitem(last=False)[0])
            known = self.residency_s < FOREVER_S
            self.residency_s = self.residency_s + 0.05 * (age_s - self.residency_s) if known else age_s
        return result


def conversations(seed: int, count: int = 600) -> Trace:
    """Conversations that go on after seconds or minutes, and documents that are read once."""
    rng = random.Random(seed)
    now, fresh = 0.0, 0
    live: list[list[int]] = []
    chains: list[list[int]] = []
    times: list[float] = []
    for _ in range(count):
        now += rng.expovariate(1.0)
        if live and rng.random() < 0.65:
            chain = live[rng.randrange(len(live))]
        else:
            chain = []
            if rng.random() < 0.6:
                live.append(chain)
        grow = rng.randrange(1, 4) if chain else rng.randrange(2, 8)
        chain += range(fresh, fresh + grow)
        fresh += grow
        chains.append(list(chain))
        times.append(now)
        if len(live) > 50 or (live and rng.random() < 0.08):
            live.pop(rng.randrange(len(live)))
    return Trace(
        "made", np.array(times), np.cumsum([len(chain) for chain in chains]), np.concatenate(chains).astype(np.int32),
        np.full(count, 40, dtype=np.int32), np.full(count, int(Stop.UNKNOWN), dtype=np.int8),
        np.zeros(count, dtype=np.int64), fresh, 0,
    )  # fmt: skip


@pytest.mark.parametrize("mode", list(Persist))
def test_hits_and_writes_are_those_of_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Persist
) -> None:
    monkeypatch.setattr(presence_cache, "ABSENT_S", 0.0)  # the trace's time is not the wall clock's
    monkeypatch.setattr(cost_model, "FIRST_WAIT_S", 60.0)
    monkeypatch.setattr(cost_model, "LEAST_WAIT_S", 60.0)
    monkeypatch.setattr(CostModel, "note_gone", lambda self, age_s: None)
    monkeypatch.setattr(CostModel, "note_still_there", lambda self, age_s: None)
    monkeypatch.setattr(CostModel, "write_threshold", lambda self, tokens, as_if_fast=False: THRESHOLD)
    trace = conversations(1)
    replayed = two_tier.replay(trace, "grit", DRAM, REMOTE, mode, THRESHOLD, hints=False)
    hits = 0
    store = LRUStore()
    spare = 0 if mode is Persist.HOT else DRAM // 7  # an eighth of all slots
    with node(tmp_path, store, mode=mode, slots=DRAM + spare, predict=True) as one:
        now = [0.0]
        one.cache._clock = lambda: now[0]
        for chain, use in trace_requests(trace, False, lambda done: None):
            now[0] = store.now_s = use.now_s
            one.tier.costs.residency_s = store.residency_s
            mine = replace(use, namespace=NAMESPACE)
            lease = one.cache.acquire(chain, use=mine)
            hits += len(lease.keys)
            one.cache.release(lease)
            reservation = one.cache.reserve(chain, chain, SHAPE, mine)
            write_payload(one.arena, reservation)
            one.cache.commit(reservation)
            one.settle()
        written = one.counters["remote_written_chunks"]
        assert one.counters["remote_bad_chunks"] == one.counters["faults"] == 0
        assert one.counters["remote_hit_chunks"] > 0
    expected = replayed.dram_hits + replayed.remote_hits
    assert hits == pytest.approx(expected, rel=0.02)
    assert written == pytest.approx(replayed.written, rel=0.05)
