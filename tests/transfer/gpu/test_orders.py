"""Every order that the device may take gives right bytes, and every edge that forbids an order is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from kvkern.transfer.gpu.planner import Method
from kvkern.transfer.gpu.staging_rings import RingDepths, Rings
from tests.transfer.gpu.fake_device import Edge, FakeDevice
from tests.transfer.gpu.orders import Program, one_run, search
from tests.transfer.gpu.store_load_programs import (
    PART,
    TIGHT,
    failing_load,
    failing_store,
    load_program,
    store_program,
    world,
)

STAGED, ZERO_COPY, BATCH_DMA = Method
WIDE = RingDepths(staging_nbytes=PART, staging=2, tables=2, window=3)
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
# Edges between two operations in a row on one stream
IN_STREAM: dict[tuple[str, Method], list[Edge]] = {
    ("store", STAGED): [
        ("store.kernels: copy h2d", "store.kernels: gather"),  # ids are up -> gather
        ("store.kernels: gather", "store.kernels: copy h2d"),  # ids have been used -> the next ids
    ],
    ("store", ZERO_COPY): [
        ("store.kernels: copy h2d", "store.kernels: gather"),
        ("store.kernels: gather", "store.kernels: copy d2h"),  # sums are there -> copy
    ],
    ("store", BATCH_DMA): [
        ("store.kernels: copy h2d", "store.kernels: checksum"),
        ("store.kernels: checksum", "store.kernels: copy h2d"),
    ],
    ("load", STAGED): [
        ("load.kernels: copy h2d", "load.kernels: scatter"),
        ("load.kernels: scatter", "load.kernels: copy d2h"),
    ],
    ("load", ZERO_COPY): [
        ("load.kernels: copy h2d", "load.kernels: scatter"),
        ("load.kernels: scatter", "load.kernels: copy d2h"),
    ],
    ("load", BATCH_DMA): [
        ("load.kernels: copy h2d", "load.kernels: checksum"),
        ("load.kernels: checksum", "load.kernels: copy d2h"),
    ],
}
each_way = pytest.mark.parametrize(("direction", "method"), list(EDGES), ids=lambda value: str(value))
each_edge = pytest.mark.parametrize(
    ("direction", "method", "edge"),
    [(*way, edge) for table in (EDGES, IN_STREAM) for way, edges in table.items() for edge in edges],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)


def program(
    folder: Path,
    direction: str,
    method: Method,
    chunks: int = 2,
    depths: RingDepths = TIGHT,
    corrupt: bool = False,
    late: bool = False,
) -> Callable[[FakeDevice], Program]:
    made = world(folder, direction, chunks, corrupt)
    return (store_program if direction == "store" else load_program)(made, method, depths=depths, late=late)


@each_way
@pytest.mark.parametrize(("chunks", "depths"), [(1, TIGHT), (2, TIGHT), (3, TIGHT), (3, WIDE)], ids=str)
def test_no_order_is_wrong(tmp_path: Path, direction: str, method: Method, chunks: int, depths: RingDepths) -> None:
    found = search(program(tmp_path, direction, method, chunks, depths), early_reads=depths is TIGHT)
    print(
        f"{direction} {method}, {chunks} pieces: {found.interleavings} orders, {found.states} states, {found.runs} runs"
    )
    assert (found.wrong, found.races) == ({}, set())
    if chunks > 1:
        own = {("stored", "store.kernels")} if method is ZERO_COPY else set()  # an edge of a stream to itself
        assert found.edges - own == set(EDGES[direction, method])
    assert found.interleavings >= found.states


@each_way
@pytest.mark.parametrize(("chunks", "depths"), [(2, TIGHT), (2, WIDE), (3, TIGHT)], ids=str)
def test_no_order_is_wrong_of_a_job_that_comes_late(
    tmp_path: Path, direction: str, method: Method, chunks: int, depths: RingDepths
) -> None:
    """The second job arrives at any time: before the lane begins, while it waits for a piece, or when it is idle again."""
    found = search(program(tmp_path, direction, method, chunks, depths, late=True), early_reads=depths is TIGHT)
    print(f"{direction} {method}, {chunks} pieces: {found.interleavings} orders, {found.states} states")
    assert found.wrong == {}
    assert found.races == set()


def test_pruning_hides_no_order_of_a_late_job_either(tmp_path: Path) -> None:
    """As the next test. Other programs have too many paths to take all. In some orders an arrival ends the wait for a piece."""
    answers: set[bytes] = set()
    build = program(tmp_path, "load", ZERO_COPY, 2, WIDE, late=True)

    def noting(device: FakeDevice) -> Program:
        made = build(device)
        complaints = made.complaints
        made.complaints = lambda end: (answers.update(device.seen), complaints(end))[1]
        return made

    every = search(noting, prune=False, early_reads=False)
    assert search(build, early_reads=False).interleavings == every.runs
    assert (every.wrong, every.races) == ({}, set())
    assert {b"\0", b"\1"} < answers


@each_way
def test_pruning_known_states_hides_no_order(tmp_path: Path, direction: str, method: Method) -> None:
    """The search finds as many orders as one that takes every path to its end."""
    build = program(tmp_path, direction, method, 2 if (direction, method) == ("load", ZERO_COPY) else 1)
    every = search(build, prune=False)
    assert search(build).interleavings == every.runs
    assert (every.wrong, every.races) == ({}, set())


@each_way
def test_no_order_is_wrong_of_a_slot_that_does_not_verify(tmp_path: Path, direction: str, method: Method) -> None:
    assert search(program(tmp_path, direction, method, corrupt=True)).wrong == {}


@pytest.mark.parametrize("methods", list(permutations(Method)), ids=str)
@pytest.mark.parametrize("direction", ["store", "load"])
def test_methods_share_what_they_stage_in(tmp_path: Path, direction: str, methods: tuple[Method, ...]) -> None:
    """One lane and one buffer serve a piece by each method in turn."""
    made = world(tmp_path, direction, 3)
    found = search((store_program if direction == "store" else load_program)(made, *methods))
    assert found.wrong == {}
    assert found.interleavings > 1000


FAILURES: list[tuple[str, Method, tuple[str, int], Edge]] = [
    # the operation of the second piece that fails, and the stream that is drained before the job is done
    ("store", STAGED, ("store.kernels: record gathered", 2), ("store.kernels", "drain")),
    ("store", ZERO_COPY, ("store.kernels: copy d2h", 2), ("store.kernels", "drain")),
    ("store", BATCH_DMA, ("store.copies: copy d2h", 4), ("store.copies", "drain")),
    ("load", STAGED, ("load.kernels: copy d2h", 2), ("load.kernels", "drain")),
    ("load", ZERO_COPY, ("load.kernels: copy d2h", 2), ("load.kernels", "drain")),
    ("load", BATCH_DMA, ("load.copies: record arrived", 2), ("load.copies", "drain")),
]
each_failure = pytest.mark.parametrize(("direction", "method", "at", "edge"), FAILURES, ids=str)


def failing(folder: Path, direction: str, method: Method, at: tuple[str, int]) -> Callable[[FakeDevice], Program]:
    return (failing_store if direction == "store" else failing_load)(world(folder, direction, 2), method, at)


@each_failure
def test_a_failed_piece_ends_before_its_job(
    tmp_path: Path, direction: str, method: Method, at: tuple[str, int], edge: Edge
) -> None:
    build = failing(tmp_path, direction, method, at)
    found = search(build)
    assert found.wrong == {}
    assert edge in found.edges
    for seed in range(10):
        assert one_run(build, seed).races == set()


@each_failure
def test_without_the_drain_a_failed_piece_outlives_its_job(
    tmp_path: Path, direction: str, method: Method, at: tuple[str, int], edge: Edge
) -> None:
    build = failing(tmp_path, direction, method, at)
    assert any(one_run(build, seed, [edge]).races for seed in range(5)), f"{edge} can go unnoticed"
    if (direction, method) != ("store", STAGED):  # there the gathered bytes stay in the buffer
        assert search(build, [edge], first=True).wrong, f"{edge} can go unnoticed"


@each_edge
@pytest.mark.parametrize("late", [False, True])
def test_without_an_edge_the_search_finds_wrong_bytes(
    tmp_path: Path, direction: str, method: Method, edge: Edge, late: bool
) -> None:
    found = search(program(tmp_path, direction, method, late=late), drop=[edge], first=True)
    assert found.wrong, f"{edge} can go unnoticed"


@each_edge
def test_without_an_edge_there_is_a_race(tmp_path: Path, direction: str, method: Method, edge: Edge) -> None:
    """The clocks of one run see it, even if the order of that run did no harm. They name both operations."""
    build = program(tmp_path, direction, method)
    races = set().union(*(one_run(build, seed, [edge]).races for seed in range(3)))
    assert races, f"{edge} can go unnoticed"


@each_way
def test_sums_memory_that_two_pieces_share_is_found(
    tmp_path: Path, direction: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host guards this memory itself, without an event: new checksums must not arrive before the old ones were read."""

    class Careless(Rings):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.sums = deque([self.sums[0]] * len(self.sums))

    monkeypatch.setattr("kvkern.transfer.gpu.copier.Rings", Careless)
    build = program(tmp_path, direction, method)
    assert search(build, first=True).wrong
    assert any(one_run(build, seed).races for seed in range(5))


@each_way
@pytest.mark.parametrize("depths", [TIGHT, WIDE], ids=str)
def test_with_all_edges_there_is_no_race(tmp_path: Path, direction: str, method: Method, depths: RingDepths) -> None:
    build = program(tmp_path, direction, method, 3, depths)
    for seed in range(20):
        assert one_run(build, seed).races == set()


@pytest.mark.parametrize("direction", ["store", "load"])
@pytest.mark.parametrize("depths", [TIGHT, WIDE, RingDepths(staging_nbytes=PART)], ids=str)
def test_many_pieces_have_no_race(tmp_path: Path, direction: str, depths: RingDepths) -> None:
    made = world(tmp_path, direction, 30)
    build = store_program if direction == "store" else load_program
    for seed, methods in enumerate(permutations(Method)):
        assert one_run(build(made, *methods, depths=depths), seed).races == set()
