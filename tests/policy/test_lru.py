"""Golden orders of least recently used, tail first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvkern.policy.base import EvictionPolicy
from kvkern.policy.lru import LRU


def drain(policy: LRU) -> list[int]:
    return policy.victims(len(policy), ())


def test_tail_first_and_oldest_sequence_first() -> None:
    policy = LRU()
    policy.insert([1, 2, 3])
    policy.insert([4, 5])
    assert drain(policy) == [3, 2, 1, 5, 4]


def test_touch_moves_a_prefix_behind_its_tail() -> None:
    policy = LRU()
    policy.insert([1, 2, 3])
    policy.insert([4, 5])
    policy.touch([1, 2])
    assert drain(policy) == [3, 5, 4, 2, 1]


def test_touch_ignores_the_unknown_and_the_pinned() -> None:
    policy = LRU()
    policy.insert([1, 2, 3])
    policy.pin([2])
    policy.touch([1, 2, 9])
    assert drain(policy) == [3, 1]
    policy.unpin([2])
    assert drain(policy) == [2]


def test_pinned_is_no_victim() -> None:
    policy = LRU()
    policy.insert([1, 2, 3])
    policy.pin([1, 3])
    assert policy.victims(3, ()) == [2]
    assert policy.victims(1, ()) == []
    policy.unpin([1, 3])
    assert drain(policy) == [3, 1]


def test_remove_takes_pinned_and_unknown() -> None:
    policy = LRU()
    policy.insert([1, 2])
    policy.pin([1])
    policy.remove([1, 2, 7])
    assert drain(policy) == []


def test_keep_is_passed_over_and_stays() -> None:
    policy = LRU()
    policy.insert([1, 2, 3, 4])
    assert policy.victims(2, {4, 2}) == [3, 1]
    assert drain(policy) == [4, 2]


def test_sizes_zero_and_one() -> None:
    policy: EvictionPolicy = LRU()
    for call in (policy.insert, policy.touch, policy.pin, policy.unpin, policy.remove):
        call([])
    assert policy.victims(0, ()) == []
    assert policy.victims(5, ()) == []
    policy.insert([7])
    assert policy.victims(0, ()) == []
    assert policy.victims(5, {7}) == []
    assert policy.victims(5, ()) == [7]
    assert policy.victims(5, ()) == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=40))
def test_ancestors_outlive_descendants(touches: list[tuple[int, int]]) -> None:
    """Whatever prefixes of four sequences are used, each sequence leaves from its tail on."""
    policy = LRU()
    for sequence in range(4):
        policy.insert([10 * sequence + i for i in range(4)])
    for sequence, length in touches:
        policy.touch([10 * sequence + i for i in range(length)])
    gone: dict[int, list[int]] = {}
    for slot in drain(policy):
        gone.setdefault(slot // 10, []).append(slot % 10)
    assert gone == {sequence: [3, 2, 1, 0] for sequence in range(4)}
