"""Golden eviction orders of LRU, tail first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvkern.policy.base import EvictionPolicy, Use
from kvkern.policy.lru import LRU
from tests.support import chain_keys

USE = Use()
A, B = chain_keys("a", 4), chain_keys("b", 4)
NAMES = {key: f"{name}{i}" for name, chain in (("a", A), ("b", B)) for i, key in enumerate(chain)}


def drain(policy: LRU) -> str:
    return " ".join(NAMES[key] for key in policy.victims(len(policy)))


def store(policy: EvictionPolicy, chain: list[bytes], missing: int | None = None) -> None:
    policy.access(chain, USE)
    policy.insert(chain[missing or 0 :], USE)


def lru_with(*chains: list[bytes]) -> LRU:
    """Make a policy and store whole chains, one after the other."""
    policy = LRU()
    for chain in chains:
        store(policy, chain)
    return policy


def test_tail_first_and_oldest_sequence_first() -> None:
    policy = lru_with(A[:3], B[:2])
    assert drain(policy) == "a2 a1 a0 b1 b0"


def test_access_moves_a_prefix_behind_its_tail() -> None:
    policy = lru_with(A[:3], B[:2])
    policy.access(A[:2], USE)
    assert drain(policy) == "a2 b1 b0 a1 a0"


def test_a_new_tail_goes_before_its_ancestors() -> None:
    policy = lru_with(A[:2], B[:1])
    store(policy, A, missing=2)
    assert drain(policy) == "b0 a3 a2 a1 a0"


def test_what_a_restart_finds_was_not_accessed() -> None:
    policy = lru_with(A[:2])
    policy.insert(B[:2], USE)
    assert drain(policy) == "a1 a0 b1 b0"


def test_access_ignores_the_unknown_and_the_pinned() -> None:
    policy = lru_with(A[:3])
    policy.pin(A[1:2])
    policy.access([*A[:2], B[0]], USE)
    policy.access((), USE)
    assert drain(policy) == "a2 a0"
    policy.unpin(A[1:2])
    assert drain(policy) == "a1"


def test_pinned_is_no_victim_and_finds_its_place_when_it_is_let_go() -> None:
    policy = lru_with(A[:3], B[:1])
    policy.pin([A[0], A[2]])
    assert policy.victims(1) == A[1:2]
    policy.unpin([A[0], A[2]])
    assert drain(policy) == "b0 a2 a0"


def test_remove_takes_pinned_and_unknown() -> None:
    policy = lru_with(A[:2])
    policy.pin(A[:1])
    policy.remove([*A[:2], B[0]])
    assert drain(policy) == ""
    store(policy, A[:1])
    assert drain(policy) == "a0"


def test_sizes_zero_and_one() -> None:
    policy: EvictionPolicy = LRU()
    for keys in ((), A[:1]):
        policy.access((), USE)
        policy.insert(keys, USE)
        for call in (policy.pin, policy.unpin):
            call(keys)
        policy.remove(())
        assert policy.victims(0) == policy.victims(-1) == []
        assert policy.victims(5) == list(keys)
        assert policy.victims(5) == []


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(1, 4), st.sampled_from(["store", "pin", "unpin"]))))
def test_ancestors_outlive_descendants(steps: list[tuple[list[bytes], int, str]]) -> None:
    """Store and lease prefixes of two sequences in any order: unpinned chunks are evicted from the tail on."""
    policy, there, pinned = LRU(), set[bytes](), set[bytes]()
    for chain, length, step in steps:
        prefix = chain[:length]
        if step == "store":
            policy.access(prefix, USE)
            policy.insert([key for key in prefix if key not in there], USE)
            there.update(prefix)
        elif step == "pin":
            fresh = [key for key in prefix if key in there - pinned]
            policy.pin(fresh)
            pinned.update(fresh)
        elif not any(key in pinned for key in chain[length:]):  # a lease of a longer prefix ends before
            policy.unpin([key for key in prefix if key in pinned])
            pinned.difference_update(prefix)
    left = policy.victims(99)
    assert sorted(left) == sorted(there - pinned)
    for chain in (A, B):
        assert [key for key in left if key in chain] == [key for key in reversed(chain) if key in left]
