"""Whatever happens to a value's bytes in a store, an accepted value is the one that was stored under that key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvkern.arena.file import Arena, ArenaSpec, create_or_attach
from kvkern.arena.slots import SlotGeometry
from kvkern.policy.lru import LRU
from kvkern.remote.value_format import accept_values, allocate_headers, incoming_parts, outgoing_parts
from kvkern.tiers.base import ChunkShape
from kvkern.tiers.dram import DramTier
from kvkern.tiers.slot_headers import begin_slots
from tests.node.conftest import plane_sizes, write_payload
from tests.remote.nodes import A, B, Node
from tests.remote.stores.memory import MemoryStore
from tests.support import NAMESPACE, SHAPE, chain_keys

GEOMETRY = SlotGeometry(part_nbytes=640, max_planes=3, world_size=2)
HEADER, STRIDE = GEOMETRY.header_nbytes, GEOMETRY.part_stride
SIZES_AT = 256 + 2 * 8 + 2 * 3 * 8  # offset of plane_nbytes
KEYS = chain_keys("value", 4)
FIELDS = {
    "magic": 0, "version": 8, "header size": 12, "key": 16, "namespace": 48, "payload size": 80, "part size": 88, "ranks": 96,
    "planes": 100, "generation": 104, "codec": 132, "group": 136, "tokens": 140, "position": 144, "reserved": 200, "hash": 240,
    "written": 256, "written by the second": 264, "checksum": 272, "last checksum": 312, "plane size": SIZES_AT,
    "last plane size": SIZES_AT + 20, "behind the fields": SIZES_AT + 24, "payload": HEADER, "its end": HEADER + 639,
    "the second's payload": HEADER + STRIDE, "its end too": HEADER + STRIDE + 639,
}  # fmt: skip
MEANINGLESS = {112: "owner", 120: "its start", 128: "state", HEADER + 640: "behind the planes"}

Mutation = Callable[[list[bytearray]], None]  # changes all values; the first one is read afterwards


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = create_or_attach(ArenaSpec(GEOMETRY, 8), tmp_path_factory.mktemp("value") / "arena")
    yield arena
    arena.close()


@pytest.fixture(scope="module")
def values(arena: Arena) -> list[bytes]:
    """Values of KEYS. The second is of a group with fewer planes, the last of another namespace."""
    dram = DramTier(arena, LRU())
    for shape, keys in ((SHAPE, KEYS[:3]), (ChunkShape(bytes(32), 0, 16), KEYS[3:])):
        reservation = dram.reserve(keys, keys, shape)
        write_payload(arena, reservation)
        assert dram.commit(reservation) == len(keys)
    headers = arena.headers
    headers["plane_nbytes"][dram._index[KEYS[1]], :, 2] = 0
    slots = np.array([dram._index[key] for key in KEYS], dtype=np.int64)
    dram.records.complete(slots, headers["generation"][slots])
    values, good = outgoing_parts(arena, slots, dram.records, KEYS)
    assert good.all()
    found = [bytes(header) + bytes(payload) for header, payload in values]
    dram.clear()
    return found


def payload_of(value: bytes | bytearray) -> list[bytes]:
    """Return the bytes that an engine would load, by rank."""
    return [bytes(value[HEADER + rank * STRIDE :][: GEOMETRY.part_nbytes]) for rank in range(2)]


def read(arena: Arena, key: bytes, value: bytes | bytearray) -> list[bytes] | None:
    """Read a value into a slot. Returns its bytes by rank, or None if it is rejected; stores reject a wrong size."""
    if len(value) != GEOMETRY.slot_nbytes:
        return None
    slots: npt.NDArray[np.int64] = np.array([7], dtype=np.int64)
    arena.headers["generation"][7] += np.uint64(1)
    begin_slots(arena, slots, arena.headers["generation"][slots], [key], ChunkShape(NAMESPACE, 0, 0), KEYS, (1, 1))
    headers = allocate_headers(GEOMETRY, 1)
    ((header, payload),) = incoming_parts(arena, headers, [7])
    header[:], payload[:] = value[:HEADER], value[HEADER:]
    (good,) = accept_values(arena, headers, slots, np.frombuffer(key, "V32"), NAMESPACE)
    return payload_of(bytes(header) + bytes(payload)) if good else None


def test_what_nobody_has_changed_is_accepted(arena: Arena, values: list[bytes]) -> None:
    for key, value in zip(KEYS[:3], values, strict=False):
        assert read(arena, key, value) == payload_of(value)
    assert read(arena, KEYS[3], values[3]) is None  # of another namespace


@pytest.mark.parametrize("at", FIELDS.values(), ids=FIELDS.keys())
def test_any_flipped_bit_is_seen(arena: Arena, values: list[bytes], at: int) -> None:
    for bit in range(8):
        value = bytearray(values[0])
        value[at] ^= 1 << bit
        assert read(arena, KEYS[0], value) is None


@pytest.mark.parametrize("at", MEANINGLESS)
def test_what_means_nothing_may_be_anything(arena: Arena, values: list[bytes], at: int) -> None:
    value = bytearray(values[0])
    value[at] ^= 0xFF
    assert read(arena, KEYS[0], value) == payload_of(values[0])


def test_a_last_plane_without_a_size_is_not_left_out(arena: Arena, values: list[bytes]) -> None:
    """A disk leaves holes of zeros: one in the sizes, one in the bytes that these sizes protect."""
    value = bytearray(values[0])
    value[SIZES_AT + 8 : SIZES_AT + 12] = bytes(4)
    begin = HEADER + sum(plane_sizes(GEOMETRY)[:2])
    value[begin : begin + 64] = bytes(64)
    assert read(arena, KEYS[0], value) is None


# -- anything ----------------------------------------------------------------------------------------------------------

offsets = st.sampled_from(sorted([*FIELDS.values(), *MEANINGLESS])) | st.integers(0, GEOMETRY.slot_nbytes - 1)
lengths = st.sampled_from([1, 4, 8, 32, 64, 512, HEADER, STRIDE]) | st.integers(1, GEOMETRY.slot_nbytes)
others = st.integers(1, len(KEYS) - 1)


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    kind = draw(
        st.sampled_from(["flip", "truncate", "extend", "zero", "noise", "swap", "header", "range", "move", "shift"])
    )
    at, nbytes, other = draw(offsets), draw(lengths), draw(others)

    def mutate(values: list[bytearray]) -> None:
        value, theirs = values[0], values[other]
        end = min(at + nbytes, len(value))
        if kind == "flip" and at < len(value):
            value[at] ^= 1 << nbytes % 8
        elif kind == "truncate":
            del value[at:]
        elif kind == "extend":
            value += bytes(nbytes)
        elif kind == "zero":
            value[at:end] = bytes(max(0, end - at))
        elif kind == "noise":
            value[at:end] = np.random.default_rng(nbytes).bytes(max(0, end - at))
        elif kind == "swap":
            values[0], values[other] = theirs, value
        elif kind == "header":
            value[:HEADER] = theirs[:HEADER]
        elif kind == "range":
            value[at:end] = theirs[at:end]
        elif kind == "move":
            value[at : at + 64], value[-at - 64 : len(value) - at] = (
                value[-at - 64 : len(value) - at],
                value[at : at + 64],
            )
        elif kind == "shift":
            del value[at : at + 1]
            value += b"\0"

    mutate.__name__ = f"{kind}({at}, {nbytes}, {other})"
    mutate.__qualname__ = mutate.__name__
    return mutate


@given(st.lists(mutations(), min_size=1, max_size=4), st.integers(0, 2))
def test_what_is_accepted_is_what_was_stored(
    arena: Arena, values: list[bytes], changes: list[Mutation], number: int
) -> None:
    mutated = [bytearray(value) for value in [values[number], *values[:number], *values[number + 1 :]]]
    for change in changes:
        change(mutated)
    found = read(arena, KEYS[number], mutated[0])
    wanted = payload_of(values[number])
    if number == 1:  # a value with fewer planes
        nbytes = sum(plane_sizes(GEOMETRY)[:2])
        found, wanted = found and [part[:nbytes] for part in found], [part[:nbytes] for part in wanted]
    assert found is None or found == wanted


# -- through the tier --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, dict[bytes, bytes]]]:
    """Yield a node and the values in its store."""
    store = MemoryStore()
    made = Node(tmp_path_factory.mktemp("node"), store, slots=24, geometry=GEOMETRY)
    for chain in (A, B):
        assert made.compute(chain) == 6
    made.settle()
    yield made, dict(store.values)
    made.close()


@given(st.lists(st.tuples(mutations(), st.permutations(range(4))), max_size=4), st.booleans())
@example([], True)
def test_the_tier_serves_what_was_stored(
    node: tuple[Node, dict[bytes, bytes]], changes: list[tuple[Mutation, list[int]]], prefix: bool
) -> None:
    made, stored = node
    assert isinstance(made.store, MemoryStore)
    made.cache.clear()
    made.tier.presence.absent.clear()
    values = [bytearray(stored[key]) for key in A]
    for change, order in changes:
        some = [values[i] for i in order]
        change(some)
        for i, value in zip(order, some, strict=True):
            values[i] = value
    made.store.values.update({key: bytes(value) for key, value in zip(A, values, strict=True)})
    intact = [bytes(value) == stored[key] for key, value in zip(A, values, strict=True)]
    bad = made.counters["remote_bad_chunks"]
    if prefix:
        assert made.hits(A) >= [*intact, False].index(False)
    else:
        lease = made.acquire(A, prefix=False)
        assert set(lease.keys) >= {key for key, ok in zip(A, intact, strict=True) if ok}
        assert all(
            payload_of_slot(made, slot) == payload_of(stored[key])
            for key, slot in zip(lease.keys, lease.slots, strict=True)
        )
        made.cache.release(lease)
    assert made.counters["remote_bad_chunks"] - bad <= intact.count(False)
    assert made.counters["faults"] == 0
    made.settle()
    assert made.whole()


def payload_of_slot(made: Node, slot: int) -> list[bytes]:
    return [made.arena.parts(rank)[slot, : GEOMETRY.part_nbytes].tobytes() for rank in range(2)]
