"""Textbook policies against slow, obvious versions of themselves, and golden counts of a seeded trace."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest

from kvkern.policy import make_policy
from kvkern.policy.base import Use


def misses(name: str, capacity: int, numbers: list[int]) -> int:
    """Of a stream of single chunks."""
    policy, resident, count = make_policy(name, capacity), set[bytes](), 0
    for step, number in enumerate(numbers):
        k = sha256(b"%d" % number).digest()
        use = Use(float(step), step + 1)
        policy.access([k], use)
        if k not in resident:
            count += 1
            policy.insert([k], use)
            resident.add(k)
            resident.difference_update(policy.victims(max(len(resident) - capacity, 0)))
        assert len(resident) <= capacity
    return count


def slow_lru(capacity: int, numbers: list[int]) -> int:
    cache: list[int] = []
    count = 0
    for x in numbers:
        if x in cache:
            cache.remove(x)
        else:
            count += 1
            if len(cache) == capacity:
                cache.pop(0)
        cache.append(x)
    return count


def slow_s3fifo(capacity: int, numbers: list[int]) -> int:
    small: list[list[int]] = []  # [key, uses], the newest last
    main: list[list[int]] = []
    ghosts: list[int] = []
    count, small_size = 0, max(int(capacity * 0.3), 1)
    for x in numbers:
        found = [entry for entry in small + main if entry[0] == x]
        if found:
            found[0][1] = min(found[0][1] + 1, 3)
            continue
        count += 1
        while len(small) + len(main) >= capacity:
            if small and (len(small) >= small_size or not main):
                key, uses = small.pop(0)
                if uses >= 1:
                    main.append([key, 0])
                else:
                    ghosts = [*ghosts, key][-32 * capacity :]
                    break
            else:
                key, uses = main.pop(0)
                if not uses:
                    break
                main.append([key, uses - 1])
        if x in ghosts:
            ghosts.remove(x)
            main.append([x, 0])
        else:
            small.append([x, 0])
    return count


def slow_arc(capacity: int, numbers: list[int]) -> int:
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p, count = 0.0, 0

    def replace(in_b2: bool) -> None:
        if t1 and (len(t1) > p or (in_b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in numbers:
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
            continue
        count += 1
        if x in b1:
            p = min(capacity, p + max(len(b2) / len(b1), 1))
            replace(False)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0, p - max(len(b1) / len(b2), 1))
            replace(True)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == capacity:
                if len(t1) < capacity:
                    b1.pop(0)
                    replace(False)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= capacity:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * capacity:
                    b2.pop(0)
                replace(False)
            t1.append(x)
    return count


def stream(seed: int, length: int = 3000) -> list[int]:
    """Hot chunks, a drifting working set and scans."""
    rng = random.Random(seed)
    numbers = []
    for step in range(length):
        kind = rng.random()
        if kind < 0.4:
            numbers.append(int(rng.paretovariate(1.0)) % 50)
        elif kind < 0.7:
            numbers.append(100 + step // 100 + rng.randrange(30))
        else:
            numbers.append(10_000 + step)
    return numbers


@pytest.mark.parametrize("capacity", [2, 5, 20, 60])
@pytest.mark.parametrize("seed", range(4))
def test_every_decision_is_the_textbooks(seed: int, capacity: int) -> None:
    numbers = stream(seed)
    assert misses("lru", capacity, numbers) == slow_lru(capacity, numbers)
    assert misses("s3fifo", capacity, numbers) == slow_s3fifo(capacity, numbers)
    assert misses("arc", capacity, numbers) == slow_arc(capacity, numbers)


def test_lirs_keeps_what_recurs_under_a_scan() -> None:
    """The paper's own example: a loop somewhat larger than the cache. LRU misses always, LIRS seldom."""
    numbers = [i % 25 for i in range(2500)]
    assert misses("lru", 20, numbers) == 2500
    assert misses("lirs", 20, numbers) < 1000


GOLDEN = {"lru": 2663, "s3fifo": 2216, "arc": 1984, "lirs": 1975, "grit": 1962}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_misses(name: str) -> None:
    assert misses(name, 40, stream(11, 5000)) == GOLDEN[name]
