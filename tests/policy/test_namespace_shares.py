"""Shares: each namespace has its own policy, the largest share loses chunks first, and no chunk is counted twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from kvkern.policy.base import EvictionPolicy, Keys, Use
from kvkern.policy.lru import LRU
from kvkern.policy.namespace_shares import _MAX_EMPTY, _OPEN_REQUESTS, NamespaceShares

A, B = b"a", b"b"


def keys(share: bytes, numbers: Iterable[int]) -> list[bytes]:
    """Make keys like `a7`: the first letter is the namespace."""
    return [share + str(number).encode() for number in numbers]


def of(share: bytes, request: int = 0) -> Use:
    return Use(namespace=share, request=request)


def put(policy: EvictionPolicy, share: bytes, numbers: Iterable[int]) -> None:
    policy.insert(keys(share, numbers), of(share))


class RecordingLRU(LRU):
    """Records the arguments of `access`."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[tuple[list[bytes], Use]] = []

    def access(self, chain: Keys, use: Use) -> None:
        self.uses.append((list(chain), use))
        super().access(chain, use)


def test_the_largest_share_gives_way_first_then_both_by_turns() -> None:
    policy = NamespaceShares(LRU)
    put(policy, B, [0, 1])
    put(policy, A, [0, 1, 2, 3])
    assert policy.victims(2) == [b"a3", b"a2"]
    assert sorted(policy.victims(2)) in ([b"a0", b"b1"], [b"a1", b"b1"])
    assert (policy.size(A), policy.size(B)) == (1, 1)


def test_a_scanner_evicts_itself() -> None:
    policy = NamespaceShares(LRU)
    put(policy, B, [0, 1, 2])
    for number in range(90):
        put(policy, A, [number])
        if policy.size(A) > 10:
            policy.victims(1)
    assert (policy.size(A), policy.size(B)) == (10, 3)


def test_pinned_chunks_stay_and_others_are_found_behind_them() -> None:
    policy = NamespaceShares(LRU)
    put(policy, A, range(4))
    put(policy, B, [0, 1])
    policy.pin(keys(A, range(4)))
    policy.pin([b"b0"])
    assert policy.victims(3) == [b"b1"]
    policy.unpin([b"b0", *keys(A, range(4))])
    assert sorted(policy.victims(9)) == [*keys(A, range(4)), b"b0"]


def test_victims_of_a_share_are_its_own() -> None:
    policy = NamespaceShares(LRU)
    put(policy, A, [0, 1, 2])
    put(policy, B, [0, 1, 2, 3])
    assert policy.victims_of(A, 2) == [b"a2", b"a1"]
    assert policy.victims_of(A, -1) == []
    assert policy.victims_of(b"nobody", 3) == []
    assert (policy.size(A), policy.size(B), policy.size(b"nobody")) == (1, 4, 0)


def test_equal_shares_take_turns() -> None:
    policy = NamespaceShares(LRU)
    for share in (A, B, b"c", b"d"):
        put(policy, share, range(5))
    for left in (4, 3, 2):
        assert len(policy.victims(4)) == 4
        assert {policy.size(share) for share in (A, B, b"c", b"d")} == {left}
    policy.pin([b"b0", b"b1"])
    assert len(policy.victims(99)) == 6
    assert (policy.size(B), policy.victims(1)) == (2, [])
    policy.unpin([b"b0", b"b1"])
    assert policy.victims(1) == [b"b1"]


class Tenant(bytes):
    """A namespace that counts how often any namespace is looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        Tenant.looked_up += 1
        return super().__hash__()


def test_victims_of_many_equal_shares_cost_no_look_at_all_of_them() -> None:
    policy = NamespaceShares(LRU)
    for number in range(2000):
        tenant = Tenant(b"%d" % number)
        policy.insert([tenant + b"-0", tenant + b"-1"], of(tenant))
    Tenant.looked_up = 0
    assert len(policy.victims(64)) == 64
    assert Tenant.looked_up < 40 * 64


def test_sizes_that_were_do_not_pile_up() -> None:
    policy = NamespaceShares(LRU)
    for _ in range(1000):
        put(policy, A, [0])
        put(policy, B, [0])
        policy.victims_of(A, 1)
        policy.remove([b"b0"])
        put(policy, b"c", [0])
        policy.remove([b"c0"])
    put(policy, A, [0])
    put(policy, b"d", [0])
    for number in range(1, 100):
        put(policy, A, [number])
        policy.victims(1)
    assert len(policy._heap) < 200


def test_access_goes_to_the_share_that_is_named_known_or_remembered() -> None:
    made: list[RecordingLRU] = []

    def make() -> RecordingLRU:
        made.append(RecordingLRU())
        return made[-1]

    policy = NamespaceShares(make)
    policy.access([b"a0", b"a1"], of(A, request=5))  # before any of its chunks is resident
    policy.insert([b"a0"], of(A))
    policy.insert([b"b0"], of(B))
    policy.access([b"x", b"b0"], Use(request=6))  # by the first known chunk
    policy.access((), Use(request=5, output_tokens=9))  # how it ended
    policy.access([b"x"], Use(request=7))  # no share is known
    policy.access((), Use())
    assert [[chain for chain, _ in seen.uses] for seen in made] == [[[b"a0", b"a1"], []], [[b"x", b"b0"]]]
    assert made[0].uses[-1][1].output_tokens == 9


def test_an_empty_share_keeps_what_it_has_learnt_within_bounds() -> None:
    policy = NamespaceShares(RecordingLRU)
    put(policy, A, [0])
    learnt = policy._policies[A]
    policy.remove([b"a0"])
    put(policy, A, [0])
    assert policy._policies[A] is learnt
    for number in range(2 * _OPEN_REQUESTS):
        policy.access([b"x"], of(b"tenant%d" % number, request=number + 1))
    assert len(policy._policies) == 1 + _MAX_EMPTY
    assert len(policy._requests) == _OPEN_REQUESTS
    assert policy._policies[A] is learnt
    assert policy.victims(9) == [b"a0"]
    assert len(policy._policies) == _MAX_EMPTY


def test_access_and_remove_ignore_the_unknown() -> None:
    policy: EvictionPolicy = NamespaceShares(LRU)
    put(policy, A, [0, 1])
    policy.access([b"a0", b"a7"], Use())
    policy.remove([b"a1", b"a7", b"d0"])
    assert policy.victims(5) == [b"a0"]


@given(st.lists(st.tuples(st.sampled_from(["insert", "pin", "unpin", "remove", "victims"]), st.integers(0, 39))))
def test_sizes_are_what_is_there(steps: list[tuple[str, int]]) -> None:
    policy, there, pinned = NamespaceShares(LRU), set[bytes](), set[bytes]()
    for step, number in steps:
        (key,) = keys(share := b"abcd"[number // 10 :][:1], [number])
        if step == "insert" and key not in there:
            policy.insert([key], of(share))
            there.add(key)
        elif step == "pin" and key in there - pinned:
            policy.pin([key])
            pinned.add(key)
        elif step == "unpin" and key in pinned:
            policy.unpin([key])
            pinned.discard(key)
        elif step == "remove":
            policy.remove([key])
            there.discard(key)
            pinned.discard(key)
        elif step == "victims":
            count = number % 5
            found = policy.victims(count)
            assert len(found) == len(set(found)) == min(count, len(there - pinned))
            assert set(found) <= there - pinned
            there.difference_update(found)
        sizes = Counter(key[:1] for key in there)
        shares = (A, B, b"c", b"d")
        assert {share: policy.size(share) for share in shares} == {share: sizes[share] for share in shares}
