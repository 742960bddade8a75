"""Sizes and offsets of a slot, as other processes and remote stores read them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvkern.arena.file import ArenaSpec
from kvkern.arena.slots import MAGIC, PAGE, SlotGeometry, SlotState, round_up

GEOMETRY = SlotGeometry(part_nbytes=5000, max_planes=3, world_size=2)
SPEC = ArenaSpec(GEOMETRY, num_slots=5)


def test_sizes() -> None:
    assert GEOMETRY.header_nbytes == PAGE
    assert GEOMETRY.part_stride == 2 * PAGE
    assert GEOMETRY.slot_nbytes == PAGE + 2 * 2 * PAGE
    assert SPEC.nbytes == PAGE + 5 * 5 * PAGE
    assert SlotGeometry(64, 400).header_nbytes == 2 * PAGE  # 400 checksums and sizes do not fit in one page
    assert [round_up(n, 64) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("planes", [1, 3, 64, 600])
def test_header_fields_do_not_overlap(planes: int, world_size: int) -> None:
    dtype = SlotGeometry(64, planes, world_size).dtype
    spans = sorted((offset, offset + field.itemsize) for field, offset in dtype.fields.values())  # type: ignore[union-attr]
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= dtype.itemsize == SlotGeometry(64, planes, world_size).header_nbytes
    published = {
        "magic": 0,
        "key": 16,
        "namespace": 48,
        "payload_nbytes": 80,
        "generation": 104,
        "state": 128,
        "written": 256,
    }
    assert {name: dtype.fields[name][1] for name in published} == published  # type: ignore[index]


def test_published_numbers() -> None:
    assert MAGIC.to_bytes(8, "little") == b"KVKERNS1"
    assert {state.name: int(state) for state in SlotState} == {"FREE": 0, "WRITING": 1, "READY": 2, "BAD": 3}
