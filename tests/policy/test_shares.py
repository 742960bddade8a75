"""Shares: each namespace's own order, the largest gives way first, and nothing is counted twice."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvkern.policy.base import EvictionPolicy
from kvkern.policy.lru import LRU
from kvkern.policy.shares import Shares


def shares() -> Shares:
    """Slots 0..99 are a's, 100..199 b's, and so on."""
    return Shares(LRU, lambda slot: "abcdefgh"[slot // 100])


def test_the_largest_share_gives_way_first_then_both_by_turns() -> None:
    policy = shares()
    policy.insert([100, 101])
    policy.insert([0, 1, 2, 3])
    assert policy.victims(2, ()) == [3, 2]
    assert sorted(policy.victims(2, ())) in ([0, 101], [1, 101])
    assert (policy.size("a"), policy.size("b")) == (1, 1)


def test_a_scanner_evicts_itself() -> None:
    policy = shares()
    policy.insert([100, 101, 102])
    for slot in range(90):
        policy.insert([slot])
        if policy.size("a") > 10:
            policy.victims(1, ())
    assert (policy.size("a"), policy.size("b")) == (10, 3)


def test_pinned_and_kept_slots_stay_and_others_are_found_behind_them() -> None:
    policy = shares()
    policy.insert([0, 1, 2, 3])
    policy.insert([100, 101])
    policy.pin([0, 1, 2, 3])
    assert policy.victims(1, {100, 101}) == []
    assert policy.victims(3, {100}) == [101]
    policy.unpin([0, 1, 2, 3])
    assert sorted(policy.victims(9, ())) == [0, 1, 2, 3, 100]


def test_victims_of_a_share_are_its_own() -> None:
    policy = shares()
    policy.insert([0, 1, 2])
    policy.insert([100, 101, 102, 103])
    assert policy.victims_of("a", 2, ()) == [2, 1]
    assert policy.victims_of("a", -1, ()) == []
    assert policy.victims_of("nobody", 3, ()) == []
    assert (policy.size("a"), policy.size("b"), policy.size("nobody")) == (1, 4, 0)


def test_equal_shares_take_turns() -> None:
    policy = shares()
    for first in (0, 100, 200, 300):
        policy.insert(list(range(first, first + 5)))
    for left in (4, 3, 2):
        assert len(policy.victims(4, ())) == 4
        assert {policy.size(share) for share in "abcd"} == {left}
    policy.pin([100, 101])
    assert len(policy.victims(99, ())) == 6
    assert (policy.size("b"), policy.victims(1, ())) == (2, [])
    policy.unpin([100, 101])
    assert policy.victims(1, ()) == [101]


class Tenant:
    """A share that counts how often any of them is looked up or compared."""

    looked_up = 0

    def __init__(self, number: int) -> None:
        self._number = number

    def __hash__(self) -> int:
        Tenant.looked_up += 1
        return self._number


def test_victims_of_many_equal_shares_cost_no_look_at_all_of_them() -> None:
    tenants = [Tenant(number) for number in range(2000)]
    policy = Shares(LRU, lambda slot: tenants[slot // 2])
    policy.insert(list(range(4000)))
    Tenant.looked_up = 0
    assert len(policy.victims(64, ())) == 64
    assert Tenant.looked_up < 30 * 64


def test_sizes_that_were_do_not_pile_up() -> None:
    policy = shares()
    for _ in range(1000):
        policy.insert([0, 100])
        policy.victims_of("a", 1, ())
        policy.remove([100])
        policy.insert([200])
        policy.remove([200])
    policy.insert([0, 300])
    for slot in range(1, 100):
        policy.insert([slot])
        policy.victims(1, ())
    assert len(policy._heap) < 200


def test_touch_and_remove_ignore_the_unknown() -> None:
    policy: EvictionPolicy = shares()
    policy.insert([0, 1])
    policy.touch([0, 7])
    policy.remove([1, 7, 300])
    assert policy.victims(5, ()) == [0]


@given(st.lists(st.tuples(st.sampled_from(["insert", "pin", "unpin", "remove", "victims"]), st.integers(0, 399))))
def test_sizes_are_what_is_there(steps: list[tuple[str, int]]) -> None:
    policy, there, pinned = shares(), set[int](), set[int]()
    for step, slot in steps:
        if step == "insert" and slot not in there:
            policy.insert([slot])
            there.add(slot)
        elif step == "pin" and slot in there - pinned:
            policy.pin([slot])
            pinned.add(slot)
        elif step == "unpin" and slot in pinned:
            policy.unpin([slot])
            pinned.discard(slot)
        elif step == "remove":
            policy.remove([slot])
            there.discard(slot)
            pinned.discard(slot)
        elif step == "victims":
            count = slot % 5
            found = policy.victims(count, ())
            assert len(found) == len(set(found)) == min(count, len(there - pinned))
            assert set(found) <= there - pinned
            there.difference_update(found)
        sizes = Counter("abcdefgh"[slot // 100] for slot in there)
        assert {share: policy.size(share) for share in "abcd"} == {share: sizes[share] for share in "abcd"}
