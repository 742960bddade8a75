"""Proves before a store that the engine's blocks hold the KV of the tokens that a chunk's key names. Scheduler's thread.

vLLM's offloading side keeps copies of a request's block ids and block hashes and extends them step by step. A copy goes stale
when a streaming-input session goes on, when sampled tokens are dropped, or when blocks left their window. So nothing is
stored on the word of a copy. A chunk is proven if all of these hold:

    name      its key is the request's present hash at the chunk's end
    tokens    the chunk ends at or before min(tokens computed when the copy runs, tokens that the request has)
    blocks    vLLM's copy names the blocks of the scheduler's own table, which have not been handed on to anyone else

A block that left its window is in no table. It counts only while vLLM's pool still has it under the chunk's own hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from . import shim


class EngineBlocks(Protocol):
    """What vLLM knows of its blocks in the present step. `shim.EngineBlocks` reads it from vLLM."""

    def table(self, req_id: str) -> tuple[list[int], ...]:
        """Return the scheduler's own block table of a live request, by group. 0: the block is not held any more."""

    def copied(self, req_id: str) -> dict[int, list[int]]:
        """Return the block ids that a store would copy, by group. Empty if the request is unknown."""

    def pool_hash(self, block_id: int) -> bytes | None:
        """Return the hash and group under which the pool has the block. None: its content is not named."""

    def allocated(self) -> set[int]:
        """Return the blocks that got a new owner in this step."""


class Proof(Protocol):
    """Tells whether a store would copy what its key names. `StoreProof` is the one of an engine."""

    def holds(self, request: shim.Request, key: shim.OffloadKey, end_tokens: int, tokens_per_hash: int) -> bool:
        """Return True if the blocks that a store of `key` would copy hold the request's tokens up to `end_tokens`."""


@dataclass(frozen=True, slots=True)
class _Ended:
    table: tuple[list[int], ...]  # when the request ended, before its blocks were freed
    computed_tokens: int


class StoreProof:
    """The proof for one scheduler. Call `begin_step` before vLLM plans a step's stores, `end_step` after."""

    def __init__(
        self,
        blocks: EngineBlocks,
        block_tokens: dict[int, int],  # of each KV group
        blocks_per_chunk: int,
        windowed: Iterable[int],  # groups whose blocks leave the table while the request runs
    ) -> None:
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._blocks_per_chunk = blocks_per_chunk
        self._windowed = frozenset(windowed)
        self._ended: dict[str, _Ended] = {}
        self._tables: dict[str, tuple[list[int], ...]] = {}
        self._scheduled: dict[str, int] = {}  # request -> tokens that this step computes
        self._handed_over: set[tuple[str, int, int]] = set()  # (request, group, end of the chunk in tokens)

    def note_ended(self, request: shim.Request, table: tuple[Sequence[int], ...]) -> None:
        """Keep the table of an ended request. vLLM plans its last stores in the next step, when its blocks are freed."""
        self._ended[request.request_id] = _Ended(tuple(list(ids) for ids in table), request.num_computed_tokens)

    def begin_step(self, step: shim.SchedulerOutput) -> None:
        """Take what the scheduler decided for this step."""
        self._tables = {}
        self._scheduled = step.num_scheduled_tokens
        self._handed_over = {
            (req_id, group_id, end_tokens)
            for req_id, entries in shim.boundary_states(step).items()
            for group_id, _, end_tokens in entries
        }

    def end_step(self, step: shim.SchedulerOutput) -> None:
        """Forget the tables of requests whose last stores have been planned."""
        self._tables, self._scheduled, self._handed_over = {}, {}, set()
        for req_id in step.finished_req_ids or ():
            self._ended.pop(req_id, None)

    def holds(
        self,
        request: shim.Request,
        key: shim.OffloadKey,
        end_tokens: int,  # the chunk holds the request's tokens up to this one
        tokens_per_hash: int,
    ) -> bool:
        """Return True if the blocks that a store of `key` would copy hold the tokens that `key` names."""
        group_id = shim.get_offload_group_idx(key)
        hashes, last = request.block_hashes, end_tokens // tokens_per_hash - 1
        if not 0 <= last < len(hashes) or shim.make_offload_key(hashes[last], group_id) != key:
            return False
        ended = self._ended.get(request.request_id)
        computed = request.num_computed_tokens + self._scheduled.get(request.request_id, 0)
        if end_tokens > min(ended.computed_tokens if ended else computed, request.num_tokens):
            return False
        if (request.request_id, group_id, end_tokens) in self._handed_over:
            return True  # the scheduler itself named this block with this boundary, in this step
        return self._blocks_hold(request, ended, group_id, end_tokens, tokens_per_hash)

    def _blocks_hold(
        self, request: shim.Request, ended: _Ended | None, group_id: int, end_tokens: int, tokens_per_hash: int
    ) -> bool:
        block_tokens, per_chunk = self._block_tokens[group_id], self._blocks_per_chunk
        first = (end_tokens - 1) // (block_tokens * per_chunk) * per_chunk
        if end_tokens % (block_tokens * per_chunk) and group_id not in self._windowed:
            first = 0  # vLLM 0.33 may name a part of a chunk by a hash behind it, and copies an earlier block then
        end = -(-end_tokens // block_tokens)
        copied = self._blocks.copied(request.request_id).get(group_id, [])[first:end]
        if len(copied) != end - first or 0 in copied:
            return False
        windowed = group_id in self._windowed
        fenced = ended is None or not windowed or self._blocks.allocated().isdisjoint(copied)
        if fenced and copied == self._table(request.request_id, ended)[group_id][first:end]:
            return True  # of full attention vLLM copies freed blocks out before their next owner writes
        names = request.block_hashes[
            (first + 1) * block_tokens // tokens_per_hash - 1 :: block_tokens // tokens_per_hash
        ]
        return (
            windowed
            and end * block_tokens == end_tokens
            and all(
                self._blocks.pool_hash(block_id) == shim.make_offload_key(name, group_id)
                for block_id, name in zip(copied, names, strict=False)
            )
        )

    def _table(self, req_id: str, ended: _Ended | None) -> tuple[list[int], ...]:
        if ended is not None:
            return ended.table
        if (table := self._tables.get(req_id)) is None:
            table = self._tables[req_id] = self._blocks.table(req_id)
        return table
