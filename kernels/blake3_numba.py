"""BLAKE3 keyed hashing for the CPU, 16 messages at a time in LLVM vectors. Knows words and lanes; nothing of namespaces.

    compress(cv[8], m[16], nbytes, flags):             x 16 lanes: every word is a <16 x i32>
      v = cv ‖ IV[:4] ‖ counter 0, 0 ‖ nbytes ‖ flags
      7 times:  mix the 4 columns, then the 4 diagonals, with two words of m each;  m = permuted m
      cv = v[:8] ^ v[8:]
    keyed_hash(key, message) = key compressed with each 64-byte block of the message       at most 1024 bytes: one BLAKE3 chunk

Messages lie in rows (one address each). Sixteen rows are transposed in registers, so that vector w holds word w of every
lane. The code is LLVM IR, because numba has no vectors. LLVM turns it into AVX-512, or splits it for AVX2, SSE and NEON.
A chain of hashes has only one lane. There the 4 x 4 words of the state are four vectors, and diagonals are rotated rows.

Every block is read whole (64 bytes) and masked. So 64 bytes must be readable from the start of each message's last block.
All compiled code that uses the intrinsics is in this file, because numba's cache checks the age of one file only.
Spec: https://github.com/BLAKE3-team/BLAKE3-specs
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .chunk_keys_ref import SEGMENT_CHUNKS
from .jit import compiled

LANES = 16
MAX_WORDS = 256  # words of a message: one BLAKE3 chunk
# Scratch memory in words, from the start of a cache line: cv [8, 16], then 16 segments of c_i. Each segment has one block of
# extra room: its last row is read as a whole block, and rows a power of two apart would share the sets of the L1 cache.
_CHAINS = 8 * LANES
_SEGMENT_WORDS = 8 * SEGMENT_CHUNKS + 16
SCRATCH_WORDS = 16 + _CHAINS  # what `hash_rows` needs
_MIN_LANES = 3  # 16 lanes in lockstep take as long as 2.4 chains of one lane each

_IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A)  # the half of BLAKE3's IV that keyed mode uses
_PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
_CHUNK_START, _CHUNK_END, _ROOT, _KEYED = 1, 2, 8, 16
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_BLOCK_WORDS, _BLOCK_NBYTES, _HASH_NBYTES = 16, 64, 32
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORD_NBYTES = 4  # alignment of every load and store: a row may start at any word


def chunks_scratch_words(count: int) -> int:
    """Return the words of scratch memory that `hash_chunks` needs for `count` chunks."""
    lanes = LANES if count > (_MIN_LANES - 1) * SEGMENT_CHUNKS else 1
    return SCRATCH_WORDS + lanes * _SEGMENT_WORDS


def _vector(*words: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(words)), list(words))


def _broadcast(b: ir.IRBuilder, word: Any, count: int) -> Any:
    return _shuffle(b, b.insert_element(_undefined(count), word, _I32(0)), _undefined(count), [0] * count)


def _undefined(count: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, count), ir.Undefined)


def _shuffle(b: ir.IRBuilder, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, _vector(*lanes))


def _load(b: ir.IRBuilder, address: Any, offset: int, count: int) -> Any:
    pointer = b.inttoptr(b.add(address, _I64(offset)), ir.VectorType(_I32, count).as_pointer())
    return b.load(pointer, align=_WORD_NBYTES)


def _store(b: ir.IRBuilder, vector: Any, address: Any, offset: int) -> None:
    b.store(vector, b.inttoptr(b.add(address, _I64(offset)), vector.type.as_pointer()), align=_WORD_NBYTES)


def _rotate_right(b: ir.IRBuilder, x: Any, bits: int) -> Any:
    right, left = (_vector(*[by] * x.type.count) for by in (bits, 32 - bits))
    return b.or_(b.lshr(x, right), b.shl(x, left))  # LLVM recognises this as a rotation


def _mix(b: ir.IRBuilder, a: Any, p: Any, c: Any, d: Any, x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
    for word, first, second in ((x, 16, 12), (y, 8, 7)):
        a = b.add(b.add(a, word), p)  # p is added last because it is ready last
        d = _rotate_right(b, b.xor(d, a), first)
        c = b.add(c, d)
        p = _rotate_right(b, b.xor(p, c), second)
    return a, p, c, d


def _masked_block(b: ir.IRBuilder, address: Any, num_words: Any) -> Any:
    """<16 x i32>: the block at `address`, with zeros from word num_words on."""
    inside = b.icmp_signed("<", _vector(*range(_BLOCK_WORDS)), _broadcast(b, num_words, _BLOCK_WORDS))
    return b.and_(_load(b, address, 0, _BLOCK_WORDS), b.sext(inside, ir.VectorType(_I32, _BLOCK_WORDS)))


def _transpose(b: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """Transpose 16 x 16 words: first 4 x 4 squares inside the 128-bit quarters, then the quarters themselves."""

    def per_quarter(*lanes: int) -> list[int]:  # lanes 0-3: first operand, 4-7: second operand
        return [4 * q + lane % 4 + LANES * (lane // 4) for q in range(4) for lane in lanes]

    def quarters(*picked: int) -> list[int]:
        return [4 * q + lane for q in picked for lane in range(4)]

    squares = []  # [g][k], quarter q: word 4q + k of rows 4g to 4g + 3
    for g in range(0, LANES, 4):
        r0, r1, r2, r3 = rows[g : g + 4]
        square = []
        for lanes in (per_quarter(0, 4, 1, 5), per_quarter(2, 6, 3, 7)):
            x, y = _shuffle(b, r0, r1, lanes), _shuffle(b, r2, r3, lanes)
            square += [_shuffle(b, x, y, per_quarter(0, 1, 4, 5)), _shuffle(b, x, y, per_quarter(2, 3, 6, 7))]
        squares.append(square)
    out: list[Any] = [None] * LANES
    for k, (g0, g1, g2, g3) in enumerate(zip(*squares, strict=True)):
        for q, picked in ((0, (0, 1, 4, 5)), (2, (2, 3, 6, 7))):
            x, y = _shuffle(b, g0, g1, quarters(*picked)), _shuffle(b, g2, g3, quarters(*picked))
            out[4 * q + k] = _shuffle(b, x, y, quarters(0, 2, 4, 6))
            out[4 * q + 4 + k] = _shuffle(b, x, y, quarters(1, 3, 5, 7))
    return out


def _lane_addresses(b: ir.IRBuilder, first: Any, stride: Any, last: Any) -> list[Any]:
    """Return the addresses of 16 rows that are `stride` bytes apart. No address is above `last`."""
    addresses = [b.add(first, b.mul(stride, _I64(lane))) for lane in range(LANES)]
    return [b.select(b.icmp_signed("<", address, last), address, last) for address in addresses]


def _emit_lanes(b: ir.IRBuilder, cv: Any, first: Any, stride: Any, last: Any, num_words: Any, flags: Any) -> None:
    rows = _lane_addresses(b, first, stride, last)
    m = _transpose(b, [_masked_block(b, row, num_words) for row in rows])
    state = [_load(b, cv, _BLOCK_NBYTES * i, LANES) for i in range(8)]
    state += [_vector(*[word] * LANES) for word in (*_IV, 0, 0)]
    state += [_broadcast(b, word, LANES) for word in (b.shl(num_words, _I32(2)), flags)]
    for _ in range(7):
        for step, (i, j, k, l) in enumerate(_COLUMNS + _DIAGONALS):
            words = m[2 * step : 2 * step + 2]
            state[i], state[j], state[k], state[l] = _mix(b, state[i], state[j], state[k], state[l], *words)
        m = [m[i] for i in _PERMUTATION]
    for i in range(8):
        _store(b, b.xor(state[i], state[i + 8]), cv, _BLOCK_NBYTES * i)


@intrinsic
def _compress_lanes(typingctx, cv, first, stride, last, num_words, flags):  # type: ignore[no-untyped-def]  # numba's protocol
    """Update cv, the address of [8 words, 16 lanes], with a block per lane. Lanes behind address `last` hash the row there."""
    signature = types.void(*[types.int64] * 4, types.int32, types.int32)

    def codegen(context, b, _signature, args):  # type: ignore[no-untyped-def]
        # This is a function of its own. If it were inlined into a loop, LLVM would move its constants out of the loop, and
        # they would push the state out of the registers.
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 4 + [_I32] * 2)
        function = cgutils.get_or_insert_function(b.module, kind, "kvkern_compress_lanes")
        if function.is_declaration:
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            body = ir.IRBuilder(function.append_basic_block())
            _emit_lanes(body, *function.args)
            body.ret_void()
        b.call(function, args)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _load_lanes(typingctx, cv, key):  # type: ignore[no-untyped-def]
    """Copy the 8 words at address `key` to every lane of cv."""

    def codegen(context, b, _signature, args):  # type: ignore[no-untyped-def]
        words = _load(b, args[1], 0, 8)
        for i in range(8):
            _store(b, _shuffle(b, words, _undefined(8), [i] * LANES), args[0], _BLOCK_NBYTES * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _store_lanes(typingctx, cv, first, stride):  # type: ignore[no-untyped-def]
    """Write the 8 words of each lane to 16 rows that are `stride` bytes apart."""

    def codegen(context, b, _signature, args):  # type: ignore[no-untyped-def]
        cv, first, stride = args
        words = [_load(b, cv, _BLOCK_NBYTES * i, LANES) for i in range(8)]
        for lane, row in enumerate(_transpose(b, words + [_undefined(LANES)] * 8)):
            hashed = _shuffle(b, row, _undefined(LANES), list(range(8)))
            _store(b, hashed, b.add(first, b.mul(stride, _I64(lane))), 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _compress_one(typingctx, cv, block, num_words, flags):  # type: ignore[no-untyped-def]
    """Update cv, the address of 8 words, with the message block at address `block`."""
    signature = types.void(types.int64, types.int64, types.int32, types.int32)

    def codegen(context, b, _signature, args):  # type: ignore[no-untyped-def]
        cv, block, num_words, flags = args
        m, nothing = _masked_block(b, block, num_words), _undefined(_BLOCK_WORDS)
        rows = [_load(b, cv, 0, 4), _load(b, cv, 16, 4), _vector(*_IV), _vector(0, 0, 0, 0)]
        for lane, word in ((2, b.shl(num_words, _I32(2))), (3, flags)):
            rows[3] = b.insert_element(rows[3], word, _I32(lane))
        order = list(range(_BLOCK_WORDS))
        # Every step waits for row 1. So row 1 stays, and the other rows rotate, with the message words of the diagonals.
        for _ in range(7):
            for turn, picked in ((-1, (0, 2, 4, 6)), (1, (14, 8, 10, 12))):
                x, y = (_shuffle(b, m, nothing, [order[i + odd] for i in picked]) for odd in (0, 1))
                rows = list(_mix(b, rows[0], rows[1], rows[2], rows[3], x, y))
                for row, by in ((0, turn), (2, -turn), (3, 2)):
                    rows[row] = _shuffle(b, rows[row], rows[row], [(lane + by) % 4 for lane in range(4)])
            order = [order[i] for i in _PERMUTATION]
        for i in range(2):
            _store(b, b.xor(rows[i], rows[i + 2]), cv, 16 * i)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _copy_hash(typingctx, to, frm):  # type: ignore[no-untyped-def]
    def codegen(context, b, _signature, args):  # type: ignore[no-untyped-def]
        _store(b, _load(b, args[1], 0, 8), args[0], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


_OPTIONS = {"nogil": True, "boundscheck": False}


@compiled("int32(int64, int64)", **_OPTIONS)
def _flags(block, blocks):  # type: ignore[no-untyped-def]
    first = _CHUNK_START if block == 0 else 0
    last = _CHUNK_END | _ROOT if block == blocks - 1 else 0
    return np.int32(_KEYED | first | last)


@compiled("void(int64, int64, int64, int64, int64)", **_OPTIONS)
def _hash_lanes(cv, first, stride, last, num_words):  # type: ignore[no-untyped-def]
    """Replace the keys in cv [8, 16] by the keyed hashes of 16 rows of num_words words."""
    blocks = (num_words + _BLOCK_WORDS - 1) // _BLOCK_WORDS
    for i in range(blocks):
        size = np.int32(min(_BLOCK_WORDS, num_words - _BLOCK_WORDS * i))
        at = i * _BLOCK_NBYTES
        _compress_lanes(cv, first + at, stride, last + at, size, _flags(i, blocks))


@compiled("void(int64, int64, int64)", **_OPTIONS)
def _hash_one(cv, row, num_words):  # type: ignore[no-untyped-def]
    """Replace the key in cv [8] by the keyed hash of a row of num_words words."""
    blocks = (num_words + _BLOCK_WORDS - 1) // _BLOCK_WORDS
    for i in range(blocks):
        size = np.int32(min(_BLOCK_WORDS, num_words - _BLOCK_WORDS * i))
        _compress_one(cv, row + i * _BLOCK_NBYTES, size, _flags(i, blocks))


@compiled("int64(uint32[::1])", **_OPTIONS)
def _aligned(scratch):  # type: ignore[no-untyped-def]
    """Return the address of the first whole cache line: vectors that straddle two lines cost twice as much."""
    return (scratch.ctypes.data + 63) & -64


@compiled("void(int64, int64, int64, int64, int64, int64, uint32[::1])", **_OPTIONS)
def hash_rows(key, rows, stride, num_words, count, out, scratch):  # type: ignore[no-untyped-def]
    """Write the keyed hash of each row of num_words words to out[count, 8].

    `key`, `rows` and `out` are addresses. Up to 15 rows behind the end of `out` are overwritten.
    """
    cv = _aligned(scratch)
    last = rows + (count - 1) * stride
    for i in range(0, count, LANES):
        _load_lanes(cv, key)
        _hash_lanes(cv, rows + i * stride, stride, last, num_words)
        _store_lanes(cv, out + i * _HASH_NBYTES, _HASH_NBYTES)


_TOKENS = types.Array(types.uint32, 1, "C", readonly=True)  # accepts read-only and writable arrays
_CHUNKS_SIGNATURE = types.void(
    _TOKENS, types.int64, types.int64,  # inputs
    types.uint32[:, ::1],  # state
    types.uint32[:, ::1], types.uint32[::1],  # keys, scratch
)  # fmt: skip


@compiled(_CHUNKS_SIGNATURE, **_OPTIONS)
def hash_chunks(tokens, chunk_tokens, first, state, keys, scratch):  # type: ignore[no-untyped-def]
    """Fill the first n rows of keys[n + 15, 8] with the keys of the chunks from index `first` on.

    Updates `state`, whose rows are segment, chain and parent.
    """
    stride = _WORD_NBYTES * chunk_tokens
    tokens_at, keys_at = tokens.ctypes.data, keys.ctypes.data
    segment, chain, parent = state.ctypes.data, state[1].ctypes.data, state[2].ctypes.data
    cv = _aligned(scratch)
    chains = cv + _WORD_NBYTES * _CHAINS
    total = keys.shape[0] - (LANES - 1)
    last = tokens_at + (total - 1) * stride
    done = 0
    while done < total:
        into = (first + done) % SEGMENT_CHUNKS
        lanes = min(LANES, (total - done + SEGMENT_CHUNKS - 1) // SEGMENT_CHUNKS)
        if into > 0 or lanes < _MIN_LANES:
            lanes = 1
        steps = min(SEGMENT_CHUNKS - into, total - done)
        row = tokens_at + done * stride
        if lanes == 1:
            if into == 0:
                state[1] = state[0]
            for i in range(steps):
                _hash_one(chain, row + i * stride, chunk_tokens)
                _copy_hash(chains + i * _HASH_NBYTES, chain)
        else:
            _load_lanes(cv, segment)
            for i in range(steps):
                _hash_lanes(cv, row + i * stride, SEGMENT_CHUNKS * stride, last, chunk_tokens)
                _store_lanes(cv, chains + i * _HASH_NBYTES, _WORD_NBYTES * _SEGMENT_WORDS)
        for lane in range(lanes):
            count = min(SEGMENT_CHUNKS - into, total - done)
            c = chains + lane * _WORD_NBYTES * _SEGMENT_WORDS
            hash_rows(parent, c, _HASH_NBYTES, 8, count, keys_at + done * _HASH_NBYTES, scratch)
            _copy_hash(chain, c + (count - 1) * _HASH_NBYTES)
            done += count
            if into + count == SEGMENT_CHUNKS:
                state[2] = keys[done - 1]
