"""GPU backend of `paged_copy`: a persistent, capped grid copies blocks to and from slots, and sums the checksum in registers.

    for item in (chunk, plane, split), strided over the grid:                A = D = 0, one cell per thread and lane
      for tile of W words x UNROLL, over all groups of blocks in split:      read the block ids
        v = load 16 B per thread, all of the tile before its first store;  store v, unless only the checksum is wanted
        A += v;  D += v * (row of the tile's first word)
      atomic: checksum[chunk, plane] += sum (P + row in tile * Q) * A + Q * D          see checksum.py; in any order

The number of bytes in flight limits the speed. There are two ways to keep bytes in flight:
- Wide tiles (`stages` 1): up to 32 KiB in registers, but none while the tile is stored.
- A ring (`stages` 3 or 4): `cp.async` copies tiles of up to 16 KiB into shared memory. stages - 2 to stages - 1 of them
  are always in flight.
Neither was timed yet. Wide tiles are the default.

The constants of a layout (run length, runs per block) are `constexpr`, so divisions become shifts and multiplications. A layout
compiles once per chunk size. Strides, ids and counts are arguments. Addresses are int64. Offsets inside a group of blocks are
int32.
16-byte accesses need runs, strides and addresses that are multiples of 16. `TileGeometry` finds the alignment that the layout
allows. The kernel tells it to the compiler after the cast from integer to pointer; before the cast it has no effect.
Loads skip L1 (`.cg`). Stores are marked as the first to be evicted (`.cs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from .checksum import LANE_WEIGHT, LENGTH_WEIGHT, ROW_NBYTES, ROW_WEIGHT
from .errors import LayoutError
from .paged_tensors import PagedTensors
from .target import register_limit, require_current_device, warp_size

MAX_CTAS = 32  # a copy on the whole GPU stalls decode: +47 % inter-token latency at p99, see pegaflow issue 408
VECTOR_NBYTES = 16
MAX_REGISTERS = 128  # per thread, so that two CTAs of 256 threads fit an SM
STAGES = (1, 3, 4)  # 1: wide tiles; 3 and 4: depth of the ring
_WIDTH = 4096  # width of a tile in bytes: 16 for each of 256 threads
_MAX_UNROLL = 8  # most widths in a wide tile: 32 KiB
_RING_UNROLL = 4  # most widths in a tile of the ring: 16 KiB


@triton.jit(do_not_specialize=["num_chunks", "blocks_per_chunk", "num_planes", "checksum_stride", "num_splits"])
def copy_chunks(
    planes_ptr,  # [planes, 6] int64: base, stride_block, stride_outer, stride_inner, offset in the part, plane index
    weights_ptr,  # [32] uint64: P, then Q
    block_ids_ptr,  # [chunks, blocks_per_chunk] int32; -1: absent
    slot_ids_ptr,  # [chunks] int64; None if not STORE
    slots_ptr,  # uint8, slot 0; None if not STORE
    checksums_ptr,  # in and out: [chunks, all planes] int64, holds nbytes * R at the start
    slot_stride,  # bytes
    num_chunks,
    blocks_per_chunk,
    num_planes,  # rows of planes_ptr
    checksum_stride,  # number of planes of the layout
    num_splits,
    TO_SLOTS: tl.constexpr,  # True: gather, False: scatter
    STORE: tl.constexpr,  # False: only compute the checksum of a gather
    BYTES: tl.constexpr,  # per element: 4, or 1 if runs or addresses are odd
    ALIGN: tl.constexpr,  # every address is a multiple of it: 16, 8, 4 or 1 bytes
    PIECE: tl.constexpr,  # elements in a piece: the largest power of two that divides a run and fits the tile's width
    RUN_PIECES: tl.constexpr,
    INNER_RUNS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    GROUP: tl.constexpr,  # blocks in one outer step: whole 64-byte rows, or the whole chunk
    ROWED: tl.constexpr,  # lanes stay in their columns, so the loop sums without weights
    PAD: tl.constexpr,  # planes end in padding
    ROWS: tl.constexpr,  # pieces side by side in the tile's width
    UNROLL: tl.constexpr,
    TILES: tl.constexpr,  # tiles in a whole group
    STAGES: tl.constexpr,  # 1: no ring
):
    PIECE_BYTES: tl.constexpr = PIECE * BYTES
    dtype: tl.constexpr = tl.uint32 if BYTES == 4 else tl.uint8
    row = tl.arange(0, ROWS)
    col = tl.arange(0, PIECE)
    place = row[:, None] * PIECE_BYTES + col[None, :] * BYTES  # byte within the tile's width
    num_groups = tl.cdiv(blocks_per_chunk, GROUP)
    for item in range(tl.program_id(0), num_chunks * num_planes * num_splits, tl.num_programs(0)):
        split = item % num_splits
        chunk = tl.cast(item // num_splits // num_planes, tl.int64)
        meta = planes_ptr + item // num_splits % num_planes * 6
        base = tl.load(meta)
        stride_block = tl.load(meta + 1)
        stride_outer = tl.load(meta + 2)
        stride_inner = tl.load(meta + 3)
        part = tl.cast(0, tl.int64)
        if STORE:
            part = slots_ptr.to(tl.int64) + tl.load(slot_ids_ptr + chunk) * slot_stride + tl.load(meta + 4)
        ids_ptr = block_ids_ptr + chunk * blocks_per_chunk
        lanes = tl.zeros([ROWS, PIECE], tl.uint64)  # A
        moments = tl.zeros([ROWS, PIECE], tl.uint64)  # D; if not ROWED, the weighted sum itself
        last_group = num_groups - 1  # it may hold fewer blocks, and so fewer tiles
        last_tiles = tl.cdiv((blocks_per_chunk - last_group * GROUP) * BLOCK_PIECES, ROWS * UNROLL)
        begin = num_groups * split // num_splits * TILES
        end = tl.minimum(num_groups * (split + 1) // num_splits * TILES, last_group * TILES + last_tiles)
        for tile in tl.range(begin, end, num_stages=STAGES):
            group = tile // TILES
            first = tile % TILES * (ROWS * UNROLL)
            num_pieces = tl.minimum(GROUP, blocks_per_chunk - group * GROUP) * BLOCK_PIECES
            group_offset = tl.cast(group, tl.int64) * (GROUP * BLOCK_PIECES * PIECE_BYTES)
            if GROUP == 1:
                block = tl.load(ids_ptr + group).to(tl.int64)
                block_base = base + block * stride_block
            values = ()
            outs = ()
            masks = ()
            for v in tl.static_range(UNROLL):
                piece = first + v * ROWS + row
                inside = piece < num_pieces
                if GROUP > 1:
                    block = tl.load(ids_ptr + group * GROUP + piece // BLOCK_PIECES, inside, other=-1).to(tl.int64)
                    block_base = base + block * stride_block
                present = inside & (block >= 0)
                run = piece % BLOCK_PIECES // RUN_PIECES
                page = (
                    block_base
                    + (run // INNER_RUNS).to(tl.int64) * stride_outer
                    + (run % INNER_RUNS).to(tl.int64) * stride_inner
                    + piece % RUN_PIECES * PIECE_BYTES
                )
                slot = part + group_offset + piece.to(tl.int64) * PIECE_BYTES
                page_ptrs = (page[:, None] + col[None, :] * BYTES).to(tl.pointer_type(dtype))
                slot_ptrs = (slot[:, None] + col[None, :] * BYTES).to(tl.pointer_type(dtype))
                page_ptrs = tl.max_contiguous(tl.multiple_of(page_ptrs, [ALIGN, ALIGN]), [1, PIECE])
                slot_ptrs = tl.max_contiguous(tl.multiple_of(slot_ptrs, [ALIGN, ALIGN]), [1, PIECE])
                if TO_SLOTS:
                    values += (tl.load(page_ptrs, present[:, None], other=0, cache_modifier=".cg"),)
                    outs += (slot_ptrs,)
                    masks += (inside[:, None],)
                else:
                    values += (tl.load(slot_ptrs, inside[:, None], other=0, cache_modifier=".cg"),)
                    outs += (page_ptrs,)
                    masks += (present[:, None],)
            for v in tl.static_range(UNROLL):
                if STORE:
                    tl.store(outs[v], values[v], masks[v], cache_modifier=".cs")
                value = values[v].to(tl.uint64)
                at = group_offset + (first + v * ROWS) * PIECE_BYTES  # byte of the plane
                if ROWED:
                    lanes += value
                    row_of_tile = (at // 64).to(tl.uint32)  # 32 bits: one instruction per lane instead of three
                    moments += value * row_of_tile.to(tl.uint64)
                else:
                    moments += _weighted(value, at + place, weights_ptr)
        p = tl.load(weights_ptr + place // 4 % 16)
        q = tl.load(weights_ptr + 16 + place // 4 % 16)
        total = (p + (place // 64).to(tl.uint64) * q) * lanes + q * moments if ROWED else moments
        if PAD and STORE:  # padding is zeros, which add nothing; but a slot that is read may hold others
            payload = tl.cast(blocks_per_chunk, tl.int64) * (BLOCK_PIECES * PIECE_BYTES)
            tail = payload + tl.arange(0, 64 // BYTES) * BYTES
            is_pad = (tail < tl.cdiv(payload, 64) * 64) & (split == num_splits - 1)
            ptrs = (part + tail).to(tl.pointer_type(dtype))
            if TO_SLOTS:
                tl.store(ptrs, tl.zeros([64 // BYTES], dtype), is_pad)
            else:
                value = tl.load(ptrs, is_pad, other=0).to(tl.uint64)
                pad_sum = tl.sum(_weighted(value, tail, weights_ptr)).to(tl.int64, bitcast=True)
                tl.atomic_add(checksums_ptr + chunk * checksum_stride + tl.load(meta + 5), pad_sum)
        whole = tl.sum(tl.sum(total, 1), 0).to(tl.int64, bitcast=True)
        tl.atomic_add(checksums_ptr + chunk * checksum_stride + tl.load(meta + 5), whole)


@triton.jit
def _weighted(value, at, weights_ptr):
    """Return value (a byte or a lane at byte `at` of its plane) times its weight."""
    lane = at // 4 % 16
    weight = tl.load(weights_ptr + lane) + (at // 64).to(tl.uint64) * tl.load(weights_ptr + 16 + lane)
    return (value << (at % 4 * 8).to(tl.uint64)) * weight


@dataclass(frozen=True, slots=True)
class TileGeometry:
    """The kernel's constants for one kind of plane. `num_warps` x warp size x 16 bytes are the tile's width."""

    BYTES: int
    ALIGN: int
    PIECE: int
    RUN_PIECES: int
    INNER_RUNS: int
    BLOCK_PIECES: int
    GROUP: int
    ROWED: bool
    PAD: bool
    ROWS: int
    UNROLL: int
    TILES: int
    STAGES: int
    num_warps: int

    @classmethod
    def of(
        cls,
        runs: tuple[int, int, int],  # outer count, inner count, bytes of a run
        align: int,  # bytes; every address and stride is a multiple of it
        blocks_per_chunk: int,
        threads_per_warp: int,
        stages: int = 1,  # one of STAGES
    ) -> TileGeometry:
        """Return the geometry with the widest accesses and the fewest address computations that this plane allows.

        Raises LayoutError for other `stages`, and for planes or blocks that overflow the kernel's counters.
        """
        if stages not in STAGES:
            raise LayoutError(f"stages is {stages}, expected one of {STAGES}: use 1 for wide tiles, 3 or 4 for a ring")
        outer, inner, run_nbytes = runs
        align = math.gcd(align, run_nbytes, VECTOR_NBYTES)
        bytes_ = 4 if align >= 4 else 1
        align = align if align >= 4 else 1
        stages = stages if bytes_ == 4 else 1  # cp.async moves 4 bytes or more
        piece_nbytes = math.gcd(run_nbytes, _WIDTH)
        block_nbytes = outer * inner * run_nbytes
        whole_group = ROW_NBYTES // math.gcd(ROW_NBYTES, block_nbytes)  # this many blocks are whole 64-byte rows
        group = max(1, _WIDTH * _MAX_UNROLL // block_nbytes // whole_group) * whole_group
        group = min(group, blocks_per_chunk)
        if block_nbytes * blocks_per_chunk >= 1 << 38:  # rows of a plane are counted in 32 bits
            raise LayoutError(
                f"a chunk has {block_nbytes * blocks_per_chunk} bytes in one plane, but the limit is 256 GiB: "
                "use fewer blocks per chunk"
            )
        if group * block_nbytes >= 1 << 31:  # offsets inside a group are 32 bits wide
            raise LayoutError(
                f"{group} blocks of {block_nbytes} bytes in one plane are {group * block_nbytes} bytes, but the limit is below "
                "2 GiB: use smaller blocks"
            )
        steps = -(-group * block_nbytes // _WIDTH)
        tiles = -(-steps // (_MAX_UNROLL if stages == 1 else _RING_UNROLL))
        unroll = -(-steps // tiles)  # equal tiles, so that the last one is not mostly masked
        return cls(
            BYTES=bytes_, ALIGN=align, PIECE=piece_nbytes // bytes_, RUN_PIECES=run_nbytes // piece_nbytes,
            INNER_RUNS=inner, BLOCK_PIECES=block_nbytes // piece_nbytes, GROUP=group, ROWED=bytes_ == 4,
            PAD=block_nbytes * blocks_per_chunk % ROW_NBYTES != 0, ROWS=_WIDTH // piece_nbytes, UNROLL=unroll,
            TILES=-(-steps // unroll), STAGES=stages, num_warps=_WIDTH // VECTOR_NBYTES // threads_per_warp,
        )  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """Return the kernel's `constexpr` arguments, except TO_SLOTS and STORE."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name.isupper()}


@dataclass(frozen=True, slots=True)
class _PlaneGroup:
    """The planes of one geometry, which one launch copies, and their table on the device."""

    geometry: TileGeometry
    planes: torch.Tensor  # [planes, 6] int64
    num_block_groups: int  # groups of blocks in a chunk


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """The tables of one layout, chunk size and slot alignment, on the device. Made once."""

    groups: tuple[_PlaneGroup, ...]  # one launch each
    lengths: torch.Tensor  # [all planes] int64: nbytes * R
    weights: torch.Tensor  # [32] uint64

    @classmethod
    def of(cls, paged: PagedTensors, blocks_per_chunk: int, slot_align: int, stages: int) -> CopyPlan:
        """Group the planes by geometry and upload their tables."""
        layout, device = paged.layout, paged.tensors[0].device
        offsets = layout.plane_offsets(blocks_per_chunk)
        kinds: dict[TileGeometry, list[list[int]]] = {}
        for i, (plane, base) in enumerate(zip(layout.planes, paged.bases, strict=True)):
            outer, stride_outer, inner, stride_inner, run = plane.runs
            align = math.gcd(slot_align, int(base), plane.stride_block, stride_outer, stride_inner)
            geometry = TileGeometry.of((outer, inner, run), align, blocks_per_chunk, warp_size(), stages)
            meta = [int(base), plane.stride_block, stride_outer, stride_inner, int(offsets[i]), i]
            kinds.setdefault(geometry, []).append(meta)
        groups = tuple(
            _PlaneGroup(g, torch.tensor(rows, dtype=torch.int64, device=device), -(-blocks_per_chunk // g.GROUP))
            for g, rows in kinds.items()
        )
        with np.errstate(over="ignore"):
            lengths = (np.diff(offsets).astype(np.uint64) * np.uint64(LENGTH_WEIGHT)).view(np.int64)
        weights = np.concatenate([LANE_WEIGHT, ROW_WEIGHT]).view(np.int64)
        return cls(
            groups, torch.from_numpy(lengths).to(device), torch.from_numpy(weights).to(device).view(torch.uint64)
        )


def _launch_copies(
    to_slots: bool,
    paged: PagedTensors,
    block_ids: torch.Tensor,
    slots: torch.Tensor | None,  # None: only compute the checksums
    slot_ids: torch.Tensor | None,
    checksums: torch.Tensor,
    max_ctas: int,
    stages: int,
) -> None:
    num_chunks, blocks_per_chunk = block_ids.shape
    require_current_device(paged.tensors[0].device)
    for name, tensor in (("block_ids", block_ids), ("slot_ids", slot_ids), ("checksums", checksums)):
        if tensor is not None and not tensor.is_contiguous():
            raise LayoutError(
                f"{name} has strides {tensor.stride()}, expected a contiguous tensor: pass {name}.contiguous()"
            )
    slot_stride = 0 if slots is None else slots.stride(0)
    align = math.gcd(0 if slots is None else slots.data_ptr(), slot_stride, VECTOR_NBYTES)
    plan = paged.cached_plan(
        ("triton", blocks_per_chunk, align, stages), lambda: CopyPlan.of(paged, blocks_per_chunk, align, stages)
    )
    sums = checksums.view(torch.int64)
    sums.copy_(plan.lengths.expand_as(sums))
    for group in plan.groups:
        num_planes = len(group.planes)
        items = num_chunks * num_planes
        splits = max(1, min(group.num_block_groups, 2 * max_ctas // max(1, items)))  # few items: split each
        copy_chunks[(min(max_ctas, items * splits),)](
            group.planes, plan.weights, block_ids, slot_ids,  # inputs
            slots, sums,  # outputs
            slot_stride, num_chunks, blocks_per_chunk, num_planes, sums.shape[1], splits,  # sizes
            TO_SLOTS=to_slots, STORE=slots is not None, **group.geometry.constants(),  # constants
            num_warps=group.geometry.num_warps, **register_limit(MAX_REGISTERS),  # options
        )  # fmt: skip


def gather_chunks(
    paged: PagedTensors,
    block_ids: torch.Tensor,  # [n, blocks_per_chunk] int32 on the device; -1: absent, its bytes in the slot become zeros
    slots: torch.Tensor,  # [num_slots, >= part_nbytes] uint8, rows contiguous: device memory, or pinned host memory
    slot_ids: torch.Tensor,  # [n] int64 on the device, distinct rows of `slots`
    checksums: torch.Tensor,  # out: [n, planes] uint64 on the device
    max_ctas: int = MAX_CTAS,
    stages: int = 1,  # one of STAGES; planes with odd runs or addresses have no ring
) -> None:
    """Enqueue the gather of n > 0 chunks on the current stream. Keep the arguments alive and unchanged until it has run.

    Writes the same bytes as `paged_copy.gather_chunks`, but does not check ids and never synchronises with the host. Raises
    LayoutError for tensors that are not contiguous or not on the current device, and for other `stages`.
    """
    _launch_copies(True, paged, block_ids, slots, slot_ids, checksums, max_ctas, stages)


def scatter_chunks(
    paged: PagedTensors,
    block_ids: torch.Tensor,  # [n, blocks_per_chunk] int32 on the device; -1: absent, nothing is written for it
    slots: torch.Tensor,  # [num_slots, >= part_nbytes] uint8, rows contiguous: device memory, or pinned host memory
    slot_ids: torch.Tensor,  # [n] int64 on the device
    checksums: torch.Tensor,  # out: [n, planes] uint64 on the device, of the bytes that were read
    max_ctas: int = MAX_CTAS,
    stages: int = 1,  # one of STAGES
) -> None:
    """Enqueue the scatter of n > 0 chunks on the current stream. See `gather_chunks`."""
    _launch_copies(False, paged, block_ids, slots, slot_ids, checksums, max_ctas, stages)


def checksum_chunks(
    paged: PagedTensors,
    block_ids: torch.Tensor,  # [n, blocks_per_chunk] int32 on the device; -1: absent, counts as zeros
    checksums: torch.Tensor,  # out: [n, planes] uint64 on the device
    max_ctas: int = MAX_CTAS,
    stages: int = 1,  # one of STAGES
) -> None:
    """Enqueue the checksums that a gather of n > 0 chunks would give, without moving a byte. Reads each block once.

    Use this for blocks that DMA moves without a kernel. See `gather_chunks`.
    """
    _launch_copies(True, paged, block_ids, None, None, checksums, max_ctas, stages)
