"""What a tier relies on, held by every policy: nothing pinned goes, nothing is lost or grows, the same calls give the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256

import pytest

from kvkern.policy import POLICIES, make_policy
from kvkern.policy.base import EvictionPolicy, Use

PREFIX_CLOSED = ("lru", "grit")  # what stays of an honest trace is a prefix, always
Victims = list[bytes]


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


@pytest.fixture(params=POLICIES)
def make(request: pytest.FixtureRequest) -> Callable[[int], EvictionPolicy]:
    return lambda capacity: make_policy(request.param, capacity)


def walk(policy: EvictionPolicy, capacity: int, seed: int, steps: int = 600) -> list[Victims]:
    """Random calls as a tier makes them, also about chains that contradict each other; checks every answer."""
    rng = random.Random(seed)
    resident: set[bytes] = set()
    pinned: set[bytes] = set()
    now, answers = 0.0, []
    for step in range(steps):
        now += rng.choice([0.0, 0.1, 30.0])
        chain = [key(rng.randrange(3 * capacity)) for _ in range(rng.randint(0, capacity // 2))]
        act = rng.choice(["request", "request", "request", "pin", "unpin", "remove", "evict"])
        count = 0
        if act == "request":
            use = Use(now, step + 1)
            policy.access(chain, use)
            missing = [k for k in dict.fromkeys(chain) if k not in resident]
            policy.insert(missing, use)
            resident.update(missing)
            count = max(len(resident) - capacity, 0)
        elif act == "pin":
            chosen = [k for k in dict.fromkeys(chain[:2]) if k in resident - pinned]
            policy.pin(chosen)
            pinned.update(chosen)
        elif act == "unpin":
            chosen = [k for k in sorted(pinned) if rng.random() < 0.5]
            policy.unpin(chosen)
            pinned.difference_update(chosen)
        elif act == "remove":
            policy.remove(chain[:3])
            resident.difference_update(chain[:3])
            pinned.difference_update(chain[:3])
        else:
            count = rng.randint(0, 5)
        gone = policy.victims(count)
        assert len(gone) == len(set(gone)) == min(count, len(resident - pinned))
        assert set(gone) <= resident - pinned
        resident.difference_update(gone)
        answers.append(gone)
    return answers


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 2, 7, 40])
def test_answers_and_repeats(make: Callable[[int], EvictionPolicy], capacity: int, seed: int) -> None:
    assert walk(make(capacity), capacity, seed) == walk(make(capacity), capacity, seed)


def test_everything_can_be_evicted_once(make: Callable[[int], EvictionPolicy]) -> None:
    policy = make(50)
    for begin in (0, 100, 200):
        chain = [key(i) for i in range(begin, begin + 15)]
        policy.access(chain, Use(float(begin)))
        policy.insert(chain, Use(float(begin)))
    assert len(set(policy.victims(100))) == 45
    assert policy.victims(1) == []


@pytest.mark.parametrize("name", PREFIX_CLOSED)
@pytest.mark.parametrize("seed", range(3))
def test_what_stays_is_a_prefix(name: str, seed: int) -> None:
    rng = random.Random(seed)
    policy, capacity = make_policy(name, 60), 60
    chains: list[list[bytes]] = [[]]
    resident: set[bytes] = set()
    for step in range(500):
        chain = rng.choice(chains[-30:]) + [key(1000 * step + i) for i in range(rng.randint(0, 6))]
        chains.append(chain)
        held = [k in resident for k in chain]
        assert held == sorted(held, reverse=True)
        use = Use(step * 0.7, step + 1)
        policy.access(chain, use)
        missing = [k for k in chain if k not in resident]
        policy.insert(missing, use)
        resident.update(missing)
        resident.difference_update(policy.victims(max(len(resident) - capacity, 0)))
        if not rng.randrange(50):
            chains.append([])


def test_memory_is_bounded(make: Callable[[int], EvictionPolicy]) -> None:
    """One-chunk requests that never come back: after a warm-up nothing the policy holds grows."""
    policy, resident, sizes = make(20), set[bytes](), []
    for number in range(4000):
        k = key(number)
        policy.access([k], Use(number * 0.1, number + 1))
        policy.insert([k], Use(number * 0.1, number + 1))
        resident.add(k)
        resident.difference_update(policy.victims(max(len(resident) - 20, 0)))
        if number in (2000, 3999):
            sizes.append(_entries(policy))
    assert len(resident) == 20
    if type(policy).__name__ != "Grit":  # its ghosts are bounded at 262,144: tests/policy/test_grit.py
        assert sizes[1] <= sizes[0] + 5


def _entries(value: object, depth: int = 0) -> int:
    """Entries of all containers below an object."""
    if depth > 3:
        return 0
    if isinstance(value, dict | set | list):
        return len(value)
    return sum(_entries(part, depth + 1) for part in getattr(value, "__dict__", {}).values())
