"""Describes a transfer for the worker. Plain data that vLLM carries from the scheduler's process to the workers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...transfer.base import ChunkBatch
from . import shim
from .adapter_digest import AdapterUse


@dataclass(frozen=True)
class GroupChunks:
    """Chunks of one KV group in sequence order, leased (load) or reserved (store)."""

    slots: npt.NDArray[np.int64]  # [n]
    generations: npt.NDArray[np.uint64]  # [n]; empty in loads
    keys: npt.NDArray[np.void]  # [n] V32
    fingerprints: npt.NDArray[np.uint64] | None = None  # [n], of a daemon's leases, see ChunkBatch

    @classmethod
    def from_lists(cls, keys: Sequence[bytes], slots: Sequence[int], generations: Sequence[int] = ()) -> GroupChunks:
        """Build the arrays from lists."""
        return cls(
            np.array(slots, dtype=np.int64),
            np.array(generations, dtype=np.uint64),
            np.frombuffer(b"".join(keys), dtype="V32"),
        )

    @classmethod
    def from_places(cls, keys: Sequence[bytes], places: Sequence[tuple[int, int | None]]) -> GroupChunks:
        """Build the arrays of leased chunks from `Lease.places`. An engine's leases are all of one kind of cache."""
        slots = np.array([slot for slot, _ in places], dtype=np.int64)
        known = [fingerprint for _, fingerprint in places if fingerprint is not None]
        fingerprints = np.array(known, dtype=np.uint64) if len(known) == len(places) else None
        return cls(slots, np.zeros(0, dtype=np.uint64), np.frombuffer(b"".join(keys), dtype="V32"), fingerprints)


@dataclass
class StepMetadata(shim.OffloadingConnectorMetadata):
    """The jobs of a step."""

    idle: bool = False  # the engine computes nothing in this step, so a worker may wait for its loads
    step: int = 0  # number of the step, from 1 on


@dataclass
class SlotSpec(shim.LoadStoreSpec):
    """The arena's side of a transfer."""

    ticket: int  # names the leases or reservations that the transfer runs under
    namespace: bytes  # 32-byte root
    groups: tuple[GroupChunks, ...]  # in the order of the connector's KV groups
    adapter: AdapterUse | None = None  # LoRA: the transfer is right only if the worker's adapter has this content


def pair_blocks_with_slots(
    engine: shim.GPULoadStoreSpec, arena: SlotSpec, blocks_per_chunk: int, whole: bool
) -> list[ChunkBatch] | None:
    """Pair a job's engine blocks with its slots, group by group. Return None if they cannot be paired.

    A group's blocks are consecutive from logical block `block_indices[g]` on, which may lie inside the first chunk. With
    `whole` (stores) a chunk that lacks blocks is left out, so that no chunk with holes is published.
    """
    result, begin = [], 0
    block_ids: npt.NDArray[np.int32] = np.asarray(engine.block_ids, dtype=np.int32)
    for index, chunks in enumerate(arena.groups):
        count = int(engine.group_sizes[index])
        skip = int(engine.block_indices[index]) % blocks_per_chunk
        ids = block_ids[begin : begin + count]
        begin += count
        room = len(chunks.slots) * blocks_per_chunk
        if whole and skip + count < room:
            continue  # blocks are missing, and which ones is unknown: this group's chunks stay unpublished
        if skip + count > room:
            return None  # more blocks than slots: it is unknown which block belongs to which chunk
        flat = np.full(room, -1, dtype=np.int32)
        flat[skip : skip + count] = np.where(ids > 0, ids, -1)  # block 0 is vLLM's null block
        table = flat.reshape(-1, blocks_per_chunk)
        rows = np.flatnonzero((table >= 0).all(axis=1) if whole else (table >= 0).any(axis=1))
        if len(rows):
            generations = chunks.generations[rows] if whole else chunks.generations
            fingerprints = None if chunks.fingerprints is None else chunks.fingerprints[rows]
            block_rows, keys = np.ascontiguousarray(table[rows]), chunks.keys[rows]
            result.append(
                ChunkBatch(index, block_rows, chunks.slots[rows], generations, keys, arena.namespace, fingerprints)
            )
    return result
