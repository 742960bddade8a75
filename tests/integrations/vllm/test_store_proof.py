"""What is stored must be proven: names, tokens and blocks. No engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.store_proof import StoreProof

pytestmark = pytest.mark.vllm
FULL, WINDOW = 0, 1
HASHES = [bytes([i]) * 32 for i in range(6)]  # one per 16 tokens


class Blocks:
    """An engine with blocks of 16 tokens. `copies` are vLLM's, `tables` the scheduler's."""

    def __init__(self) -> None:
        self.tables: tuple[list[int], ...] = ([1, 2, 3, 4, 5, 6], [0, 0, 13, 14, 15, 16])
        self.copies = {FULL: [1, 2, 3, 4, 5, 6], WINDOW: [11, 12, 13, 14, 15, 16]}
        self.pool: dict[int, bytes] = {}
        self.new: set[int] = set()

    def table(self, req_id: str) -> tuple[list[int], ...]:
        return self.tables

    def copied(self, req_id: str) -> dict[int, list[int]]:
        return self.copies

    def pool_hash(self, block_id: int) -> bytes | None:
        return self.pool.get(block_id)

    def allocated(self) -> set[int]:
        return self.new


class Case:
    """A request of 96 tokens, of which 90 are computed and 6 are scheduled."""

    def __init__(self, blocks_per_chunk: int = 1) -> None:
        self.blocks = Blocks()
        self.proof = StoreProof(self.blocks, {FULL: 16, WINDOW: 16}, blocks_per_chunk, [WINDOW])
        self.request: Any = SimpleNamespace(
            request_id="r", block_hashes=list(HASHES), num_computed_tokens=90, num_tokens=96
        )
        self.chunk_tokens = 16 * blocks_per_chunk
        self.begin()

    def begin(self, scheduled: int = 6, states: Any = None) -> None:
        state = None if states is None else SimpleNamespace(boundary_state_offloads=states)
        step: Any = SimpleNamespace(
            num_scheduled_tokens={"r": scheduled} if scheduled else {}, kv_connector_block_state=state
        )
        self.proof.begin_step(step)

    def proven(self, group: int = FULL) -> list[int]:
        """Return the numbers of the chunks that may be stored."""
        ends = range(self.chunk_tokens, 97, self.chunk_tokens)
        keys = [shim.make_offload_key(HASHES[end // 16 - 1], group) for end in ends]
        return [i for i, key in enumerate(keys) if self.proof.holds(self.request, key, ends[i], 16)]


def test_the_scheduler_s_own_blocks_are_proven() -> None:
    assert Case().proven() == [0, 1, 2, 3, 4, 5]
    assert Case(blocks_per_chunk=3).proven() == [0, 1]
    assert Case().proven(WINDOW) == [2, 3, 4, 5]


def test_a_copy_that_grew_twice_is_refused() -> None:
    case = Case()
    case.blocks.copies = {FULL: [1, 2, 1, 2, 3, 4]}
    assert case.proven() == [0, 1]
    case.blocks.copies = {}
    assert case.proven() == []


def test_a_part_of_a_chunk_needs_all_blocks_before_it() -> None:
    """With drafts, vLLM 0.33 names the part up to a boundary by a hash one block behind it."""
    case = Case()
    case.proof = StoreProof(case.blocks, {FULL: 32}, 1, [])
    case.begin()
    key = shim.make_offload_key(HASHES[4], FULL)  # 80 tokens: half of the third block, or all up to half of the second
    assert case.proof.holds(case.request, key, 80, 16)
    case.blocks.copies = {FULL: [1, 9, 3]}
    assert not case.proof.holds(case.request, key, 80, 16)
    assert case.proof.holds(
        case.request, shim.make_offload_key(HASHES[5], FULL), 96, 16
    )  # a whole chunk: its own block


def test_a_name_that_the_request_has_no_longer_is_refused() -> None:
    case = Case()
    case.request.block_hashes = [*HASHES[:3], b"x" * 32]
    assert case.proven() == [0, 1, 2]


def test_tokens_that_are_not_computed_are_refused() -> None:
    case = Case()
    case.begin(scheduled=5)
    assert case.proven() == [0, 1, 2, 3, 4]
    case.begin(scheduled=60)  # drafts
    case.request.num_tokens = 95
    assert case.proven() == [0, 1, 2, 3, 4]
    case.begin(scheduled=0)
    case.request.num_computed_tokens = 0  # preempted
    assert case.proven() == []


def test_a_block_that_left_its_window_counts_while_the_pool_has_it_under_its_name() -> None:
    case = Case()
    case.blocks.pool = {11: shim.make_offload_key(HASHES[0], WINDOW), 12: shim.make_offload_key(HASHES[5], WINDOW)}
    assert case.proven(WINDOW) == [0, 2, 3, 4, 5]
    several = Case(blocks_per_chunk=2)
    assert several.proven(WINDOW) == [1, 2]
    several.blocks.pool = {11 + i: shim.make_offload_key(HASHES[i], WINDOW) for i in range(2)}
    assert several.proven(WINDOW) == [0, 1, 2]


def test_an_ended_request_is_judged_by_the_table_it_had() -> None:
    case = Case()
    case.proof.note_ended(case.request, ([1, 2, 3, 4, 5, 6], [0, 0, 13, 14, 15, 16]))
    case.blocks.tables = ([], [])  # its blocks are free
    assert case.proven() == [0, 1, 2, 3, 4]  # 90 tokens were computed
    case.blocks.new = {3, 14}  # vLLM copies 3 out before its next owner writes, but nothing in a window
    assert case.proven() == [0, 1, 2, 3, 4]
    assert case.proven(WINDOW) == [2, 4]
    case.proof.end_step(SimpleNamespace(finished_req_ids={"r"}))  # type: ignore[arg-type]
    case.begin(scheduled=0)
    assert case.proven() == []


def test_a_recurrent_state_that_the_scheduler_hands_over_is_proven() -> None:
    case = Case()
    case.blocks.copies = {FULL: [1, 2, 3, 4, 5, 6]}
    assert case.proven(WINDOW) == []
    case.begin(states={"r": [(WINDOW, 77, 48)]})
    assert case.proven(WINDOW) == [2]


def test_stale_keys_are_a_tail() -> None:
    keys = [shim.make_offload_key(HASHES[i], FULL) for i in (1, 3, 5)]
    assert shim.drop_stale_keys(keys, [*HASHES[:4], b"x" * 32, b"y" * 32], 2, FULL) == [
        shim.make_offload_key(HASHES[5], FULL)
    ]
    assert shim.drop_stale_keys(keys, HASHES[:1], 2, FULL) == [shim.make_offload_key(HASHES[i], FULL) for i in (3, 1)]
    assert keys == []
