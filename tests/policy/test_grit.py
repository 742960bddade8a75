"""GRIT: its tree stays consistent under any calls, its tables are the right statistics, its index is the Gittins index."""

from __future__ import annotations

import random
from collections import Counter
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest

from kvkern.errors import ConfigError
from kvkern.policy import grit_store as store
from kvkern.policy.base import Stop, Use
from kvkern.policy.grit import Grit
from kvkern.policy.grit_model import (
    CLASS_WEIGHT,
    EDGES,
    LEAST_S,
    NUM_BINS,
    GritModel,
    add_exposure,
    bin_of,
    index_class,
    main_class,
    return_probability,
)


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def replay(policy: Grit, capacity: int, requests: list[tuple[float, list[int], Stop]]) -> int:
    """Return the number of hit chunks. Checks that the chunks that stay form a prefix of every chain."""
    resident: set[bytes] = set()
    hits = 0
    for number, (now, chain, stop) in enumerate(requests, 1):
        keys = [key(i) for i in chain]
        held = [k in resident for k in keys]
        assert held == sorted(held, reverse=True), "a hole in a prefix"
        hits += sum(held)
        use = Use(now, number, stop=stop)
        policy.access(keys, use)
        missing = [k for k in keys if k not in resident]
        policy.insert(missing, use)
        resident.update(missing)
        over = max(len(resident) - capacity, 0)
        gone = policy.victims(over)
        assert len(gone) == len(set(gone)) == over
        resident.difference_update(gone)
    return hits


def sessions(seed: int, count: int = 60) -> list[tuple[float, list[int], Stop]]:
    """Agents that come back within seconds, chats that come back within minutes or never, and documents read once."""
    rng = random.Random(seed)
    requests, fresh = [], iter(range(1, 1 << 30))
    for _ in range(count):
        now, chain = rng.uniform(0, 1200), [0]
        kind = rng.choice(["agent", "chat", "document"])
        for _turn in range({"agent": 12, "chat": rng.randint(1, 5), "document": 1}[kind]):
            chain = chain + [next(fresh) for _ in range({"agent": 2, "chat": 3, "document": 20}[kind])]
            requests.append((now, chain, Stop.TOOL_CALL if kind == "agent" else Stop.END_TURN))
            now += rng.expovariate(1 / (5 if kind == "agent" else 120))
    return sorted(requests)


def lru_hits(capacity: int, requests: list[tuple[float, list[int], Stop]]) -> int:
    order: dict[int, None] = {}
    hits = 0
    for _, chain, _ in requests:
        hits += sum(i in order for i in chain)
        for i in reversed(chain):
            order.pop(i, None)
            order[i] = None
        for i in list(order)[: max(len(order) - capacity, 0)]:
            del order[i]
    return hits


def check_books(policy: Grit, resident: set[bytes], pinned: set[bytes]) -> None:
    """Check every count and list of the tree against a computation from scratch."""
    nodes, rows, state = policy._nodes, policy._rows, policy._state
    used = [i for i in range(state[store.NODES]) if nodes[i]["row"] >= 0]
    keys = {i: policy._keys[i].tobytes() for i in used}
    assert len(set(keys.values())) == len(used), "a key has two nodes"
    assert {keys[i] for i in used if nodes[i]["flags"] & store.RESIDENT} == resident
    assert {keys[i] for i in used if nodes[i]["flags"] & store.PINNED} == pinned
    children = Counter(int(nodes[i]["parent"]) for i in used if nodes[i]["flags"])
    for i in used:
        node = nodes[i]
        assert node["children"] == children[i]
        is_leaf = keys[i] in resident - pinned and not node["children"]
        assert (node["leaf"] >= 0) == is_leaf
        if is_leaf:
            assert policy._leaves[node["leaf"]] == i
        if node["flags"] and node["parent"] >= 0:
            assert nodes[node["parent"]]["depth"] < node["depth"]
    refs = Counter(int(nodes[i]["row"]) for i in used)
    assert all(rows[row]["refs"] == count for row, count in refs.items())
    assert state[store.LEAVES] == sum(nodes[i]["leaf"] >= 0 for i in used)
    assert state[store.RESIDENTS] == len(resident)
    assert state[store.EVICTABLE] == len(resident - pinned)
    assert state[store.GHOSTS] == len(used) - len(resident)


@pytest.mark.parametrize("seed", range(12))
def test_books_are_kept_whatever_is_called(seed: int) -> None:
    """Chains that contradict each other, keys twice in a chain, time that stands still, few ghosts, pins everywhere."""
    rng = random.Random(seed)
    policy = Grit(8, max_ghosts=rng.choice([4, 20, 1000]))
    resident: set[bytes] = set()
    pinned: set[bytes] = set()
    now = 0.0
    for step in range(400):
        some = [key(rng.randrange(30)) for _ in range(rng.randint(0, 9))]
        act = rng.choice(["access", "insert", "insert", "pin", "unpin", "remove", "victims"])
        now += rng.choice([0.0, 0.3, 7.0, 400.0])
        use = Use(now, rng.choice([0, rng.randrange(6)]), b"", rng.choice([-1, 300]), Stop(rng.randrange(3)))
        if act == "access":
            policy.access(some, use)
        elif act == "insert":
            if rng.random() < 0.8:
                policy.access(some, use)
            policy.insert(some, use)
            resident.update(some)
        elif act == "pin":
            chosen = sorted((resident - pinned).intersection(some))
            policy.pin(chosen)
            pinned.update(chosen)
        elif act == "unpin":
            chosen = sorted(pinned.intersection(some))
            policy.unpin(chosen)
            pinned.difference_update(chosen)
        elif act == "remove":
            policy.remove(some)
            resident.difference_update(some)
            pinned.difference_update(some)
        else:
            count = rng.randint(0, 12)
            gone = policy.victims(count)
            assert len(gone) == min(count, len(resident - pinned))
            assert set(gone) <= resident - pinned
            resident.difference_update(gone)
        if step % 20 == 0:
            check_books(policy, resident, pinned)
    check_books(policy, resident, pinned)


def test_arrays_stay_small_under_a_flood_of_single_chunks() -> None:
    policy = Grit(50, max_ghosts=200)
    resident: set[bytes] = set()
    for number in range(20_000):
        use = Use(number * 0.01, number + 1)
        policy.access([key(number)], use)
        policy.insert([key(number)], use)
        resident.add(key(number))
        resident.difference_update(policy.victims(len(resident) - 50))
    assert len(resident) == 50
    assert len(policy._nodes) <= 2 * 256
    assert len(policy._rows) <= 2 * 512
    assert len(policy.model.requests) <= 4096


def test_a_request_goes_on_under_its_number_and_counts_once() -> None:
    policy = Grit(100)
    chain = [key(i) for i in range(6)]
    policy.access(chain[:4], Use(0.0, request=7))
    policy.access(chain, Use(3.0, request=7))
    policy.access((), Use(4.0, request=7, output_tokens=500, stop=Stop.END_TURN))
    assert policy.model.events.sum() == 0
    row = policy._rows[policy.model.requests[policy._member, 7][0]]
    assert row["cls"] == main_class(1, 6, -1.0, -1.0, 6, 500, int(Stop.END_TURN))
    assert row["refs"] == 6
    policy.access(chain, Use(10.0, request=8))
    assert policy.model.events[row["cls"], bin_of(10.0)] == pytest.approx(6 * row["weight"])
    assert np.count_nonzero(policy.model.events) == 1


def test_time_that_runs_backwards_stands_still() -> None:
    policy = Grit(100)
    policy.access([key(1)], Use(100.0, 1))
    policy.access([key(1)], Use(50.0, 2))
    assert policy.model.events[:, 0].sum() > 0
    assert np.isfinite(policy.model.exposure).all()
    assert (policy.model.exposure >= 0).all()


@pytest.mark.parametrize("capacity", [30, 60, 120, 240])
def test_at_least_as_good_as_lru_on_mixed_sessions(capacity: int) -> None:
    ours = theirs = 0
    for seed in range(4):
        requests = sessions(seed)
        ours += replay(Grit(capacity), capacity, requests)
        theirs += lru_hits(capacity, requests)
    assert ours >= theirs


def test_same_trace_same_hits_whatever_the_memory_for_ghosts_and_requests_longer_than_the_cache() -> None:
    requests = sessions(9)
    assert replay(Grit(60), 60, requests) == replay(Grit(60), 60, requests)
    replay(Grit(60, max_ghosts=40), 60, requests)
    assert replay(Grit(5), 5, requests) > 0


def test_restart_inserts_without_a_request() -> None:
    policy = Grit(10)
    policy.insert([key(i) for i in range(10)], Use())
    assert policy.victims(3) == [key(9), key(8), key(7)]


# -- the model --------------------------------------------------------------------------------------------------------


def test_bins_cover_time_without_gaps() -> None:
    assert EDGES[0] == 0
    assert all(a < b for a, b in pairwise(EDGES))
    for b in range(NUM_BINS):
        assert bin_of(EDGES[b] * 1.0001 + 1e-9) == b
        assert bin_of(EDGES[b + 1] * 0.9999) == b
    assert bin_of(1e12) == NUM_BINS - 1


def test_exposure_adds_up() -> None:
    x = np.zeros((3, NUM_BINS))
    add_exposure(x, 1, 0.1, 5000.0, 2.0)
    add_exposure(x, 1, 5000.0, 1e7, 2.0)
    assert x.sum() == pytest.approx(2.0 * (1e7 - 0.1))
    assert x[1, 8] == pytest.approx(2.0 * (EDGES[9] - EDGES[8]))


def test_fit_finds_the_hazard_of_exponential_returns() -> None:
    model, rng = GritModel(), np.random.default_rng(5)
    cls = main_class(2, 3, 20.0, 20.0, 30, 300, 1)
    model.fitted[cls] = 0
    for age in rng.exponential(40.0, size=20_000):
        model.events[cls, bin_of(age)] += 1
        add_exposure(model.exposure, cls, 0.0, age, 1.0)
    model.fit(0.0)
    index_class(model.events, model.exposure, model.base, model.rho, cls, model.hazard, model.index)
    well_seen = slice(4, 18)
    assert model.hazard[cls, well_seen] == pytest.approx(1 / 40, rel=0.1)
    assert return_probability(model.hazard, cls, 10.0, 30.0) == pytest.approx(1 - np.exp(-30 / 40), rel=0.03)
    sibling = main_class(2, 3, 20.0, 20.0, 30, 300, 2)  # never seen; one feature differs
    index_class(model.events, model.exposure, model.base, model.rho, sibling, model.hazard, model.index)
    assert model.hazard[sibling, 12] == pytest.approx(1 / 40, rel=0.3)


def test_index_is_the_best_stopping_rule_by_brute_force() -> None:
    model, rng = GritModel(), np.random.default_rng(6)
    model.events[5] = rng.uniform(0, 400, NUM_BINS)
    model.exposure[5] = rng.uniform(1, 4000, NUM_BINS) * np.diff(EDGES)
    index_class(model.events, model.exposure, model.base, model.rho, 5, model.hazard, model.index)
    rate = model.hazard[5]
    prior = (model.events[5] + CLASS_WEIGHT) / rate - model.exposure[5]
    assert (prior > 0).all()
    step = 0.02
    for start in (0, 6, 12):
        ages = np.arange(EDGES[start], EDGES[20], step) + step / 2
        risk = np.concatenate([[0.0], np.cumsum(rate[np.searchsorted(EDGES, ages, side="right") - 1] * step)])
        alive = np.exp(-risk)
        seconds = np.concatenate([[0.0], np.cumsum((alive[1:] + alive[:-1]) / 2 * step)])
        at_edges = np.round((EDGES[start + 1 : 21] - EDGES[start]) / step).astype(int).clip(max=len(alive) - 1)
        best = ((1 - alive[at_edges]) / (seconds[at_edges] + LEAST_S)).max()
        assert model.index[5, start] >= best * 0.98  # later horizons may be better still


def test_nothing_learned_ranks_like_lru() -> None:
    model = GritModel()
    cls = main_class(1, 10, -1.0, -1.0, 10, -1, 0)
    index_class(model.events, model.exposure, model.base, model.rho, cls, model.hazard, model.index)
    assert (np.diff(model.index[cls, 2:]) < 0).all()


def test_what_was_learned_can_be_shipped() -> None:
    policy = Grit(60)
    replay(policy, 60, sessions(3))
    data = policy.model.dump()
    other = GritModel()
    other.load(data)
    assert other.dump() == data
    replay(Grit(60, other), 60, sessions(4))
    assert other.events.sum() > policy.model.events.sum()


@pytest.mark.parametrize("damage", [b"", b"short", None, "flip", "version"])
def test_damaged_state_is_refused_and_nothing_changes(damage: bytes | str | None) -> None:
    policy = Grit(60)
    replay(policy, 60, sessions(3, 20))
    data = bytearray(policy.model.dump())
    if damage is None:
        data = data[:-5]
    elif damage == "flip":
        data[50] ^= 1
    elif damage == "version":
        from blake3 import blake3

        body = data[32:].replace(b"\x95\x01", b"\x95\x63", 1)
        data = bytearray(blake3(bytes(body)).digest()) + body
    else:
        assert isinstance(damage, bytes)
        data = bytearray(damage)
    model = GritModel()
    before = model.dump()
    with pytest.raises(ConfigError, match=r"checksum|version 99"):
        model.load(bytes(data))
    assert model.dump() == before


def test_caches_that_share_a_model_share_its_ghosts() -> None:
    model = GritModel()
    many = [Grit(4, model, max_ghosts=400) for _ in range(8)]
    for number in range(4000):
        policy = many[0] if number % 3 else many[number % 8]
        policy.access([key(number)], Use(float(number), number + 1))
    assert 200 <= model.num_ghosts <= 640
    assert model.num_ghosts >= sum(policy.num_chunks for policy in many) - 8
    del many[1:], policy
    assert (model.num_members, model.num_ghosts) == (1, many[0]._ghosts[0])


def test_arrays_shrink_and_keep_their_books_when_another_cache_takes_the_ghosts() -> None:
    model, rng = GritModel(), random.Random(2)
    small, *others = (Grit(40, model, max_ghosts=2000) for _ in range(6))
    held: dict[Grit, set[bytes]] = {policy: set() for policy in (small, *others)}

    def request(policy: Grit, numbers: list[int], serial: int) -> None:
        keys, resident = [key(i) for i in numbers], held[policy]
        use = Use(serial * 0.1, serial)
        policy.access(keys, use)
        policy.insert([k for k in keys if k not in resident], use)
        resident.update(keys)
        resident.difference_update(policy.victims(len(resident) - 40))

    for serial in range(1, 1000):
        request(small, [3 * serial, 3 * serial + 1, 3 * serial + 2], serial)
    largest = len(small._nodes)
    pinned = sorted(held[small])[:5]
    small.pin(pinned)
    small.access([key(1 << 40)], Use(100.0, 999_999))
    for serial in range(1000, 4000):
        request(others[serial % 5], [10 * serial], serial)
        if not serial % 7:
            request(small, [rng.randrange(3000)], serial)
        if not serial % 100:
            check_books(small, held[small], set(pinned))
            check_books(others[0], held[others[0]], set())
    assert len(small._nodes) < largest / 2
    assert len(small._rows) < largest / 2
    open_rows = [rows for (member, _), rows in model.requests.items() if member == small._member]
    serials = [(int(small._rows[row]["serial"]), serial) for row, serial in open_rows if row >= 0]
    assert sum(found == wanted for found, wanted in serials) > 100
    small.unpin(pinned)
    assert set(small.victims(40)) == held[small]


def test_what_idle_caches_hold_counts_too() -> None:
    """Each cache is filled, emptied except for one chunk, and never used again."""
    model, many = GritModel(), list[Grit]()
    for number in range(40):
        policy = Grit(1000, model, max_ghosts=1000)
        many.append(policy)
        for first in range(0, 1000, 50):
            chain, use = [key(1000 * number + first + i) for i in range(50)], Use(float(number), number + 1)
            policy.access(chain, use)
            policy.insert(chain, use)
        assert len(policy.victims(999)) == 999
    ghosts = [policy.num_chunks - 1 for policy in many]
    assert model.num_ghosts == sum(ghosts)
    assert sum(ghosts) <= 1000 * (1 + sum(1 / (2 * members) for members in range(2, 41)))
    assert sum(policy.nbytes for policy in many) < 500 * sum(ghosts)
    assert Grit(1000, model).nbytes < 3000
