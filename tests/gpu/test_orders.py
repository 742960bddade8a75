"""Every order the device may take, and every edge that forbids one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvkern.gpu.planner import Method
from kvkern.gpu.rings import Depths
from tests.gpu.cases import PART, TIGHT, load_program, store_program, world
from tests.gpu.fake import Edge, FakeDevice
from tests.gpu.orders import Program, one_run, search

STAGED, ZERO_COPY, BATCH_DMA = Method
WIDE = Depths(staging_nbytes=PART, staging=2, tables=2, window=3)
# All edges of a method: (event, who waits)
EDGES: dict[tuple[str, Method], list[Edge]] = {
    ("store", STAGED): [
        ("uploaded", "host"),  # ids have left pinned memory -> the next ids
        ("computed", "store.kernels"),  # the engine has written -> gather
        ("stored", "store.kernels"),  # staging has been copied out -> the next gather
        ("gathered", "store.copies"),  # staging is full -> copy
        ("gathered", "engine"),  # blocks are read -> the engine reuses them
        ("stored", "host"),  # payload and sums are in host memory -> WRITTEN
    ],
    ("store", ZERO_COPY): [
        ("uploaded", "host"),
        ("computed", "store.kernels"),
        ("gathered", "engine"),
        ("stored", "host"),
    ],
    ("store", BATCH_DMA): [
        ("uploaded", "host"),
        ("computed", "store.kernels"),  # the engine has written -> checksum
        ("computed", "store.copies"),  # the engine has written -> copy
        ("stored", "store.kernels"),  # sums have been copied out -> the next checksum
        ("summed", "store.copies"),  # sums are there -> copy
        ("stored", "engine"),  # blocks are read -> the engine reuses them
        ("stored", "host"),
    ],
    ("load", STAGED): [
        ("uploaded", "host"),
        ("loaded", "load.copies"),  # staging has been scattered -> the next copy into it
        ("arrived", "load.kernels"),  # staging is full -> scatter
        ("computed", "load.kernels"),  # the engine is done with the blocks -> scatter
        ("loaded", "host"),  # blocks are written and sums are in host memory -> ok
    ],
    ("load", ZERO_COPY): [
        ("uploaded", "host"),
        ("computed", "load.kernels"),
        ("loaded", "host"),
    ],
    ("load", BATCH_DMA): [
        ("uploaded", "host"),
        ("computed", "load.copies"),  # the engine is done with the blocks -> copy
        ("arrived", "load.kernels"),  # blocks are written -> checksum
        ("loaded", "host"),
    ],
}  # fmt: skip
each_way = pytest.mark.parametrize(("direction", "method"), list(EDGES), ids=lambda value: str(value))
each_edge = pytest.mark.parametrize(
    ("direction", "method", "edge"),
    [(*way, edge) for way, edges in EDGES.items() for edge in edges],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)


def program(
    folder: Path, direction: str, method: Method, chunks: int = 2, depths: Depths = TIGHT, corrupt: bool = False
) -> Callable[[FakeDevice], Program]:
    made = world(folder, direction, chunks, corrupt)
    return (store_program if direction == "store" else load_program)(made, method, depths)


@each_way
@pytest.mark.parametrize(("chunks", "depths"), [(1, TIGHT), (2, TIGHT), (3, TIGHT), (3, WIDE)], ids=str)
def test_no_order_is_wrong(tmp_path: Path, direction: str, method: Method, chunks: int, depths: Depths) -> None:
    found = search(program(tmp_path, direction, method, chunks, depths))
    print(
        f"{direction} {method}, {chunks} pieces: {found.interleavings} orders, {found.states} states, {found.runs} runs"
    )
    assert found.wrong == {}
    if chunks > 1:
        own = {("stored", "store.kernels")} if method is ZERO_COPY else set()  # a stream's with itself
        assert found.edges - own == set(EDGES[direction, method])
    assert found.interleavings >= found.states


@each_way
def test_states_that_are_met_again_hide_no_order(tmp_path: Path, direction: str, method: Method) -> None:
    """The search against one that takes every path to its end."""
    build = program(tmp_path, direction, method, 2 if direction == "load" else 1)
    every = search(build, prune=False)
    assert search(build).interleavings == every.runs
    assert every.wrong == {}


@each_way
def test_no_order_is_wrong_of_a_slot_that_does_not_verify(tmp_path: Path, direction: str, method: Method) -> None:
    assert search(program(tmp_path, direction, method, corrupt=True)).wrong == {}


@each_edge
def test_without_an_edge_the_search_finds_wrong_bytes(
    tmp_path: Path, direction: str, method: Method, edge: Edge
) -> None:
    found = search(program(tmp_path, direction, method), drop=[edge], first=True)
    assert edge in found.edges or found.wrong
    assert found.wrong, f"{edge} can go unnoticed"


@each_edge
def test_without_an_edge_there_is_a_race(tmp_path: Path, direction: str, method: Method, edge: Edge) -> None:
    """By the clocks of any single run, whatever its order."""
    build = program(tmp_path, direction, method)
    for seed in range(3):
        races = one_run(build, seed, [edge]).races
        assert races, f"{edge} can go unnoticed"


@each_way
@pytest.mark.parametrize("depths", [TIGHT, WIDE], ids=str)
def test_with_all_edges_there_is_none(tmp_path: Path, direction: str, method: Method, depths: Depths) -> None:
    build = program(tmp_path, direction, method, 3, depths)
    for seed in range(20):
        assert one_run(build, seed).races == set()
