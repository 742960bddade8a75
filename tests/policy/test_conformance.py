"""The contract of every policy: it evicts no pinned chunk, loses no chunk, does not grow, and is deterministic."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.policy import POLICIES, make_policy
from kvkern.policy.base import EvictionPolicy, Use

PREFIX_CLOSED = ("lru", "grit")  # the chunks that stay of an honest trace always form a prefix
every_policy = pytest.mark.parametrize("name", POLICIES)


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


class Tier:
    """A slow, obvious tier: sets of keys. It checks every answer of the policy against them."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.resident: set[bytes] = set()
        self.pinned: set[bytes] = set()
        self.answers: list[list[bytes]] = []

    def request(self, chain: list[bytes], use: Use) -> None:
        """A new chunk may displace a hit chunk but no pinned chunk. New chunks without room are not written."""
        self.policy.access(chain, use)
        self.write([k for k in chain if k not in self.resident], use)

    def write(self, keys: list[bytes], use: Use) -> None:
        new = [k for k in dict.fromkeys(keys) if k not in self.resident][: self.capacity - len(self.pinned)]
        self.policy.insert(new, use)
        self.resident.update(new)
        self.evict(len(self.resident) - self.capacity)
        assert len(self.resident) <= self.capacity

    def pin(self, keys: list[bytes]) -> None:
        chosen = [k for k in dict.fromkeys(keys) if k in self.resident - self.pinned]
        self.policy.pin(chosen)
        self.pinned.update(chosen)

    def unpin(self, keys: list[bytes]) -> None:
        chosen = [k for k in dict.fromkeys(keys) if k in self.pinned]
        self.policy.unpin(chosen)
        self.pinned.difference_update(chosen)

    def remove(self, keys: list[bytes]) -> None:
        self.policy.remove(keys)
        self.resident.difference_update(keys)
        self.pinned.difference_update(keys)

    def evict(self, count: int) -> None:
        gone = self.policy.victims(count)
        assert len(gone) == len(set(gone)) == max(min(count, len(self.resident - self.pinned)), 0)
        assert set(gone) <= self.resident - self.pinned
        self.resident.difference_update(gone)
        self.answers.append(gone)


Step = tuple[str, list[int], float, int]  # what is called, of which keys, how long after, for which request
# a few keys in any order, some of them twice: chains that contradict each other
steps = st.lists(
    st.tuples(
        st.sampled_from(["request", "request", "access", "write", "pin", "unpin", "remove", "evict"]),
        st.lists(st.integers(0, 19), max_size=8),
        st.sampled_from([0.0, 0.1, 30.0]),
        st.integers(0, 3),
    ),
    max_size=60,
)


def walk(name: str, capacity: int, taken: list[Step]) -> list[list[bytes]]:
    """Make calls as a tier makes them. At the end evict everything: each unpinned chunk leaves exactly once."""
    tier, now = Tier(make_policy(name, capacity), capacity), 0.0
    for call, numbers, later, request in taken:
        now += later
        chain, use = [key(number) for number in numbers], Use(now, request)
        if call == "request":
            tier.request(chain, use)
        elif call == "access":
            tier.policy.access(chain, use)
        elif call == "write":
            tier.write(chain, use)
        elif call == "evict":
            tier.evict(len(chain))
        else:
            getattr(tier, call)(chain)
    tier.evict(0)
    tier.evict(len(tier.resident) + 1)
    assert tier.resident == tier.pinned
    tier.unpin(sorted(tier.pinned))
    tier.evict(capacity + 1)
    assert tier.resident == set()
    return tier.answers


@every_policy
@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 9), taken=steps)
def test_answers_and_repeats(name: str, capacity: int, taken: list[Step]) -> None:
    assert walk(name, capacity, taken) == walk(name, capacity, taken)


@every_policy
@pytest.mark.parametrize("capacity", [1, 2, 7, 40])
def test_long_walks(name: str, capacity: int) -> None:
    rng = random.Random(capacity)
    calls = ["request", "request", "request", "access", "write", "pin", "unpin", "remove", "evict"]
    taken: list[Step] = [
        (
            rng.choice(calls),
            [rng.randrange(3 * capacity) for _ in range(rng.randint(0, capacity // 2 + 1))],
            rng.choice([0.0, 0.1, 30.0]),
            rng.randrange(step + 1),
        )
        for step in range(800)
    ]
    assert walk(name, capacity, taken) == walk(name, capacity, taken)


@every_policy
def test_no_room_and_nothing_to_do(name: str) -> None:
    tier = Tier(make_policy(name, 0), 0)
    for chain in ([], [key(1)], [key(1), key(2)]):
        tier.policy.access(chain, Use())
        tier.policy.remove(chain)
        tier.policy.insert(chain, Use())
        assert set(tier.policy.victims(3)) == set(chain)
        assert tier.policy.victims(-1) == tier.policy.victims(1) == []


@pytest.mark.parametrize("name", POLICIES)
def test_a_request_uses_a_chunk_once_however_often_it_is_told_of(name: str) -> None:
    """A tier names a chunk several times: at the lookup, at the store, and at the request's end with the outcome."""

    def replay(told: int) -> list[list[bytes]]:
        rng, tier = random.Random(5), Tier(make_policy(name, 12), 12)
        for number in range(1, 600):
            session = int(rng.paretovariate(0.7)) % 40
            chain = [key(100 * session + i) for i in range(rng.randint(1, 4))]
            use = Use(float(number), number)
            for _ in range(told):
                tier.policy.access(chain, use)
            tier.request(chain, use)
            for _ in range(told):
                tier.policy.access(chain, use)
                tier.policy.access((), use)
        return tier.answers

    assert replay(1) == replay(3) == replay(0)


@pytest.mark.parametrize("name", PREFIX_CLOSED)
@pytest.mark.parametrize("seed", range(3))
def test_what_stays_is_a_prefix(name: str, seed: int) -> None:
    rng = random.Random(seed)
    tier = Tier(make_policy(name, 60), 60)
    chains: list[list[bytes]] = [[]]
    for step in range(500):
        chain = rng.choice(chains[-30:]) + [key(1000 * step + i) for i in range(rng.randint(0, 6))]
        chains.append(chain)
        held = [k in tier.resident for k in chain]
        assert held == sorted(held, reverse=True)
        tier.request(chain, Use(step * 0.7, step + 1))
        if not rng.randrange(50):
            chains.append([])


@every_policy
@pytest.mark.parametrize("leaves_by", ["eviction", "removal", "eviction after a lease"])
def test_memory_is_bounded(name: str, leaves_by: str) -> None:
    """With chunks that never come back beside a few that stay, no container of the policy grows after a warm-up."""
    tier, sizes = Tier(make_policy(name, 20), 20), []
    for number in range(4000):
        chain = [key(number)]
        tier.request(chain, Use(number * 0.1, number + 1))
        if leaves_by == "removal" and number > 30:
            tier.remove(chain)
        elif leaves_by == "eviction after a lease":
            tier.pin(chain)
            tier.unpin([key(number - 10)])
        tier.policy.access([key(-number)], Use(number * 0.1))  # nothing of this request is written
        if number in (2000, 3999):
            sizes.append(_entries(tier.policy))
    assert len(tier.resident) >= 19
    if name != "grit":  # its ghosts are bounded at 262,144, see tests/policy/test_grit.py
        assert sizes[1] <= sizes[0] + 5


def _entries(value: object, depth: int = 0) -> int:
    """Count the entries of all containers that an object holds."""
    if depth > 3:
        return 0
    if isinstance(value, dict | set | list):
        return len(value)
    return sum(_entries(part, depth + 1) for part in getattr(value, "__dict__", {}).values())
