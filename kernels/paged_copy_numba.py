"""CPU production backend of `paged_copy`: copy and checksum in one pass, 64 bytes at a time, with stores past the cache.

    for each plane of a chunk:
      A, B = 0
      for each 64-byte row, in slot order:  v = load; store v (non-temporal where aligned); A += lanes(v); B += A
      checksum = sum P * A + Q * (rows * A - B) + nbytes * R                              see checksum.py

The row loop is LLVM IR (`_emit_rows`), because numba has neither 512-bit registers nor non-temporal stores. Runs that are no
multiple of 64 bytes are first copied with memcpy, and then summed in a second pass over the slot. Kernels are `nogil` and
single-threaded. The caller splits chunks over its own threads, because numba's `prange` aborts under concurrent calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .checksum import LANE_WEIGHT, LENGTH_WEIGHT, ROW_WEIGHT
from .jit import compiled
from .paged_tensors import PagedTensors

_U64 = np.uint64
_ROW = 64
_AHEAD = (
    4096  # bytes between the row that is read and the row that is prefetched: a page, to fetch its translation as well
)


def _row_loop(store: str, locality: int) -> Any:
    """Make an intrinsic (dst, src, rows, acc, ahead) -> None that copies and sums rows.

    acc is the address of 4 x 8 uint64: A even, A odd, B even, B odd lanes. For each row of `src` the row at the same offset
    from `ahead` is prefetched, into L2 or (locality 0) past it. `store` is "stream" (non-temporal), "plain" or "none".
    """

    @intrinsic
    def rows_intrinsic(typingctx, dst, src, rows, acc, ahead):  # type: ignore[no-untyped-def]  # numba's protocol
        signature = types.void(types.int64, types.int64, types.int64, types.int64, types.int64)

        def codegen(context, builder, _signature, args):  # type: ignore[no-untyped-def]
            dst, src, rows, acc, ahead = args
            _emit_rows(builder, dst, src, rows, acc, ahead, store, locality)
            return context.get_dummy_value()

        return signature, codegen

    return rows_intrinsic


def _emit_rows(
    builder: ir.IRBuilder, dst: Any, src: Any, rows: Any, acc: Any, ahead: Any, store: str, locality: int
) -> None:
    word, i32, byte_ptr = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
    vec = ir.VectorType(word, 8)
    pointer = vec.as_pointer()
    low = ir.Constant(vec, [0xFFFFFFFF] * 8)
    shift = ir.Constant(vec, [32] * 8)
    acc_ptrs = [builder.inttoptr(builder.add(acc, word(i * _ROW)), pointer) for i in range(4)]
    sums = [builder.alloca(vec) for _ in range(4)]  # mem2reg turns these into registers
    for cell, ptr in zip(sums, acc_ptrs, strict=True):
        builder.store(builder.load(ptr, align=8), cell)
    with cgutils.for_range(builder, rows) as loop:
        offset = builder.mul(loop.index, word(_ROW))
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", (byte_ptr,), ir.FunctionType(ir.VoidType(), [byte_ptr, i32, i32, i32])
        )
        place = builder.inttoptr(builder.add(ahead, offset), byte_ptr)
        builder.call(prefetch, [place, i32(0), i32(locality), i32(1)])  # for reading, into the data cache
        value = builder.load(builder.inttoptr(builder.add(src, offset), pointer), align=1)
        if store != "none":
            out = builder.inttoptr(builder.add(dst, offset), pointer)
            inst = builder.store(value, out, align=_ROW if store == "stream" else 1)
            if store == "stream":
                inst.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(i32, 1)]))
        even, odd = builder.and_(value, low), builder.lshr(value, shift)
        for a, b, lanes in ((0, 2, even), (1, 3, odd)):
            total = builder.add(builder.load(sums[a]), lanes)
            builder.store(total, sums[a])
            builder.store(builder.add(builder.load(sums[b]), total), sums[b])
    for cell, ptr in zip(sums, acc_ptrs, strict=True):
        builder.store(builder.load(cell), ptr, align=8)


# Measured on Zen 4: pages in short runs are a seventh slower without L2, because L1 holds too few misses. Slots, which are long
# runs, gain nothing from L2.
_stream_page_rows = _row_loop("stream", locality=2)
_stream_slot_rows = _row_loop("stream", locality=0)
_copy_rows = _row_loop("plain", locality=2)
_sum_rows = _row_loop("none", locality=2)


@intrinsic
def _memcpy(typingctx, dst, src, nbytes):  # type: ignore[no-untyped-def]
    signature = types.void(types.int64, types.int64, types.int64)

    def codegen(context, builder, _signature, args):  # type: ignore[no-untyped-def]
        byte_ptr = ir.IntType(8).as_pointer()
        to, frm = (builder.inttoptr(a, byte_ptr) for a in args[:2])
        cgutils.raw_memcpy(builder, to, frm, args[2], 1)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _zero(typingctx, dst, nbytes):  # type: ignore[no-untyped-def]
    signature = types.void(types.int64, types.int64)

    def codegen(context, builder, _signature, args):  # type: ignore[no-untyped-def]
        cgutils.memset(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _fence(typingctx):  # type: ignore[no-untyped-def]
    """Make the non-temporal stores visible before any later store."""

    def codegen(context, builder, _signature, _args):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


_SUM_SIGNATURE = "uint64(uint64[::1], int64, int64)"
_LANE_W, _ROW_W, _LENGTH_W = LANE_WEIGHT, ROW_WEIGHT, np.uint64(LENGTH_WEIGHT)


@compiled(_SUM_SIGNATURE, nogil=True, boundscheck=False)
def _checksum_of_sums(acc, rows, nbytes):  # type: ignore[no-untyped-def]
    """Return the checksum of a plane from its sums A and B, its rows and its bytes."""
    total = _U64(nbytes) * _LENGTH_W
    for word in range(8):
        for half in range(2):
            a, b = acc[8 * half + word], acc[16 + 8 * half + word]
            lane = 2 * word + half
            total += _LANE_W[lane] * a + _ROW_W[lane] * (_U64(rows) * a - b)
    return total


@compiled("void(boolean, int64, int64, int64, int64, int64)", nogil=True, boundscheck=False)
def _copy_run(to_slots, dst, src, nbytes, acc, following):  # type: ignore[no-untyped-def]
    """Copy and sum a run of whole rows. `following` is the address of the next run.

    Prefetches _AHEAD bytes ahead, or a run ahead if runs are shorter.
    """
    head = max(0, nbytes - _AHEAD)
    rows, last_rows = head >> 6, (nbytes - head) >> 6
    if dst & 63:
        _copy_rows(dst, src, rows, acc, src + _AHEAD)
        _copy_rows(dst + head, src + head, last_rows, acc, following)
    elif to_slots:
        _stream_page_rows(dst, src, rows, acc, src + _AHEAD)
        _stream_page_rows(dst + head, src + head, last_rows, acc, following)
    else:
        _stream_slot_rows(dst, src, rows, acc, src + _AHEAD)
        _stream_slot_rows(dst + head, src + head, last_rows, acc, following)


_BLOCK_IDS = types.Array(types.int32, 2, "C", readonly=True)  # accepts read-only and writable arrays
_SLOT_IDS = types.Array(types.int64, 1, "C", readonly=True)
_SIGNATURE = types.void(
    types.boolean, types.int64[::1], types.int64[:, ::1], types.int64[::1],  # to_slots, bases, geometry, offsets
    _BLOCK_IDS, types.int64, types.int64, _SLOT_IDS, types.uint64[:, ::1],
)  # fmt: skip


@compiled(inline="always")
def _next_block_address(bases, geometry, block_ids, c, p, i):  # type: ignore[no-untyped-def]
    """Return the address of the chunk's next block, in this plane or the next one. If there is none: of this block."""
    next_p, next_i = p, i
    if i + 1 < block_ids.shape[1]:
        next_i = i + 1
    elif p + 1 < bases.shape[0]:
        next_p, next_i = p + 1, 0
    if block_ids[c, next_i] < 0:
        next_p, next_i = p, i
    return bases[next_p] + np.int64(block_ids[c, next_i]) * geometry[next_p, 0]


@compiled(_SIGNATURE, nogil=True, boundscheck=False)
def _copy_chunks(to_slots, bases, geometry, offsets, block_ids, slots, slot_stride, slot_ids, checksums):  # type: ignore[no-untyped-def]
    sums = np.empty(32, dtype=np.uint64)
    acc = np.int64(sums.ctypes.data)
    for c in range(block_ids.shape[0]):
        slot = slots + slot_ids[c] * slot_stride
        for p in range(bases.shape[0]):
            stride_block, outer, stride_outer, inner, stride_inner, run = geometry[p]
            block_nbytes = outer * inner * run
            plane, plane_nbytes = slot + offsets[p], offsets[p + 1] - offsets[p]
            whole_rows = run & 63 == 0
            sums[:] = _U64(0)
            cursor = plane
            for i in range(block_ids.shape[1]):
                block = np.int64(block_ids[c, i])
                if block < 0:
                    if to_slots:
                        _zero(cursor, block_nbytes)
                    if whole_rows:
                        _sum_rows(np.int64(0), cursor, block_nbytes >> 6, acc, cursor + block_nbytes)
                    cursor += block_nbytes
                    continue
                at = bases[p] + block * stride_block
                after = _next_block_address(bases, geometry, block_ids, c, p, i)
                for o in range(outer):
                    for h in range(inner):
                        source = at + o * stride_outer + h * stride_inner
                        if whole_rows and to_slots:
                            if h + 1 < inner:
                                following = source + stride_inner
                            else:
                                following = at + (o + 1) * stride_outer if o + 1 < outer else after
                            _copy_run(to_slots, cursor, source, run, acc, following)
                        elif whole_rows:
                            _copy_run(to_slots, source, cursor, run, acc, cursor + run)
                        elif to_slots:
                            _memcpy(cursor, source, run)
                        else:
                            _memcpy(source, cursor, run)
                        cursor += run
            if to_slots:
                _zero(cursor, plane + plane_nbytes - cursor)
            if not whole_rows:
                _sum_rows(np.int64(0), plane, plane_nbytes >> 6, acc, plane + plane_nbytes)
            checksums[c, p] = _checksum_of_sums(sums, plane_nbytes >> 6, plane_nbytes)
    _fence()


_SUMS_SIGNATURE = types.void(
    types.int64[::1], types.int64[:, ::1], types.int64[::1], _BLOCK_IDS, types.uint8[::1], types.uint64[:, ::1]
)  # fmt: skip


@compiled(_SUMS_SIGNATURE, nogil=True, boundscheck=False)
def _sum_chunks(bases, geometry, offsets, block_ids, scratch, checksums):  # type: ignore[no-untyped-def]
    """Sum the blocks of every chunk, without a copy.

    If runs are no whole rows, lanes straddle runs. So the runs of such a plane are first put side by side in `scratch`.
    """
    sums = np.empty(32, dtype=np.uint64)
    acc = np.int64(sums.ctypes.data)
    for c in range(block_ids.shape[0]):
        for p in range(bases.shape[0]):
            stride_block, outer, stride_outer, inner, stride_inner, run = geometry[p]
            plane_nbytes = offsets[p + 1] - offsets[p]
            whole_rows = run & 63 == 0
            sums[:] = _U64(0)
            cursor = np.int64(scratch.ctypes.data)
            if not whole_rows:
                _zero(cursor, plane_nbytes)
            for i in range(block_ids.shape[1]):
                block = np.int64(block_ids[c, i])
                at = bases[p] + block * stride_block
                after = _next_block_address(bases, geometry, block_ids, c, p, i)
                for o in range(outer):
                    for h in range(inner):
                        source = at + o * stride_outer + h * stride_inner
                        if whole_rows:
                            if block < 0:
                                for word in range(16):  # B += A, once per row of zeros
                                    sums[16 + word] += _U64(run >> 6) * sums[word]
                            else:
                                if h + 1 < inner:
                                    following = source + stride_inner
                                else:
                                    following = at + (o + 1) * stride_outer if o + 1 < outer else after
                                head = max(0, run - _AHEAD)
                                _sum_rows(np.int64(0), source, head >> 6, acc, source + _AHEAD)
                                _sum_rows(np.int64(0), source + head, (run - head) >> 6, acc, following)
                        elif block >= 0:
                            _memcpy(cursor, source, run)
                        cursor += run
            if not whole_rows:
                start = np.int64(scratch.ctypes.data)
                _sum_rows(np.int64(0), start, plane_nbytes >> 6, acc, start)
            checksums[c, p] = _checksum_of_sums(sums, plane_nbytes >> 6, plane_nbytes)


@compiled(
    types.void(types.int64, types.int64, _SLOT_IDS, types.uint32[:, ::1], types.uint64[:, ::1]),
    nogil=True, boundscheck=False,
)  # fmt: skip
def _sum_planes(slots, slot_stride, slot_ids, plane_nbytes, checksums):  # type: ignore[no-untyped-def]
    sums = np.empty(32, dtype=np.uint64)
    acc = np.int64(sums.ctypes.data)
    for c in range(slot_ids.shape[0]):
        plane = slots + slot_ids[c] * slot_stride
        for p in range(plane_nbytes.shape[1]):
            nbytes = np.int64(plane_nbytes[c, p])
            sums[:] = _U64(0)
            _sum_rows(np.int64(0), plane, nbytes >> 6, acc, plane + nbytes)
            checksums[c, p] = _checksum_of_sums(sums, nbytes >> 6, nbytes)
            plane += nbytes


def _layout_tables(paged: PagedTensors, blocks_per_chunk: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ([planes, 6] int64 stride_block and runs, [planes + 1] int64 offsets). They are made once per layout."""

    def make() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        geometry = np.array([(p.stride_block, *p.runs) for p in paged.layout.planes], dtype=np.int64)
        return geometry, paged.layout.plane_offsets(blocks_per_chunk)

    return paged.cached_plan(("numba", blocks_per_chunk), make)  # type: ignore[no-any-return]


def copy_chunks(
    to_slots: bool,  # True: gather, False: scatter
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.CopyBackend`. Targets that are 64-byte aligned are written past the cache."""
    if block_ids.size == 0:
        return
    geometry, offsets = _layout_tables(paged, block_ids.shape[1])
    _copy_chunks(
        to_slots,
        paged.bases, geometry, offsets,  # layout
        block_ids, slots.ctypes.data, slots.strides[0], slot_ids,  # inputs
        checksums,  # outputs
    )  # fmt: skip


def checksum_chunks(
    paged: PagedTensors,
    block_ids: npt.NDArray[np.int32],  # [n, blocks_per_chunk] int32
    checksums: npt.NDArray[np.uint64],  # out: [n, planes] uint64
) -> None:
    """See `paged_copy.CopyBackend`. If runs are no multiple of 64 bytes, this allocates one plane of scratch memory."""
    if block_ids.size == 0:
        return
    geometry, offsets = _layout_tables(paged, block_ids.shape[1])
    odd = geometry[:, -1] % _ROW != 0
    scratch = np.empty(int(np.diff(offsets)[odd].max(initial=0)), dtype=np.uint8)
    _sum_chunks(paged.bases, geometry, offsets, block_ids, scratch, checksums)


def checksum_planes(
    slots: npt.NDArray[np.uint8],  # [num_slots, >= part_nbytes] uint8, rows contiguous
    slot_ids: npt.NDArray[np.int64],  # [n] int64
    plane_nbytes: npt.NDArray[np.uint32],  # [n, planes] uint32, multiples of 64; the planes lie one after the other
) -> npt.NDArray[np.uint64]:
    """Return [n, planes] uint64: the checksums of the planes in slots. Needs no layout. Sizes must fit a slot (unchecked)."""
    checksums = np.zeros(plane_nbytes.shape, dtype=np.uint64)
    if checksums.size:
        ids, sizes = np.ascontiguousarray(slot_ids), np.ascontiguousarray(plane_nbytes)
        _sum_planes(slots.ctypes.data, slots.strides[0], ids, sizes, checksums)
    return checksums
