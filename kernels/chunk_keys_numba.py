"""CPU production backend of `chunk_keys`: BLAKE3 keyed hashing in numba, a whole sequence in one call without the GIL.

Only what the keys need of BLAKE3: keyed mode and inputs of at most one BLAKE3 chunk (1024 bytes, so chunk_tokens <= 256
without extras). Longer chunks take the reference. Formula in chunk_keys_ref.py; BLAKE3: https://github.com/BLAKE3-team/BLAKE3-specs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from numba import njit

from . import chunk_keys_ref
from .chunk_keys_ref import SEGMENT_CHUNKS, segment_key

if TYPE_CHECKING:
    from .chunk_keys import ChainState

_IV = np.array([0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A], dtype=np.uint32)  # the half that keyed mode uses
_CHUNK_START, _CHUNK_END, _ROOT, _KEYED = 1, 2, 8, 16
_MAX_NBYTES = 1024
_U32 = np.uint32


@njit(inline="always")
def _rotr(x, n):  # type: ignore[no-untyped-def]
    return _U32((x >> _U32(n)) | (x << _U32(32 - n)))


@njit(inline="always")
def _mix(a, b, c, d, x, y):  # type: ignore[no-untyped-def]
    a = _U32(a + b + x)
    d = _rotr(_U32(d ^ a), 16)
    c = _U32(c + d)
    b = _rotr(_U32(b ^ c), 12)
    a = _U32(a + b + y)
    d = _rotr(_U32(d ^ a), 8)
    c = _U32(c + d)
    b = _rotr(_U32(b ^ c), 7)
    return a, b, c, d


@njit("void(uint32[::1], uint32[::1], int64, int64)", nogil=True, cache=True, boundscheck=False)
def _compress(cv, m, nbytes, flags):  # type: ignore[no-untyped-def]
    """cv <- compression of one 64-byte block m (counter 0). The state lives in scalars, that is, in registers."""
    m0, m1, m2, m3, m4, m5, m6, m7 = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    m8, m9, m10, m11, m12, m13, m14, m15 = m[8], m[9], m[10], m[11], m[12], m[13], m[14], m[15]
    a0, a1, a2, a3, b0, b1, b2, b3 = cv[0], cv[1], cv[2], cv[3], cv[4], cv[5], cv[6], cv[7]
    c0, c1, c2, c3 = _IV[0], _IV[1], _IV[2], _IV[3]
    d0, d1, d2, d3 = _U32(0), _U32(0), _U32(nbytes), _U32(flags)
    for _ in range(7):
        a0, b0, c0, d0 = _mix(a0, b0, c0, d0, m0, m1)
        a1, b1, c1, d1 = _mix(a1, b1, c1, d1, m2, m3)
        a2, b2, c2, d2 = _mix(a2, b2, c2, d2, m4, m5)
        a3, b3, c3, d3 = _mix(a3, b3, c3, d3, m6, m7)
        a0, b1, c2, d3 = _mix(a0, b1, c2, d3, m8, m9)
        a1, b2, c3, d0 = _mix(a1, b2, c3, d0, m10, m11)
        a2, b3, c0, d1 = _mix(a2, b3, c0, d1, m12, m13)
        a3, b0, c1, d2 = _mix(a3, b0, c1, d2, m14, m15)
        m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15 = (
            m2, m6, m3, m10, m7, m0, m4, m13, m1, m11, m12, m5, m9, m14, m15, m8
        )  # fmt: skip
    cv[0], cv[1], cv[2], cv[3] = a0 ^ c0, a1 ^ c1, a2 ^ c2, a3 ^ c3
    cv[4], cv[5], cv[6], cv[7] = b0 ^ d0, b1 ^ d1, b2 ^ d2, b3 ^ d3


@njit("void(uint32[::1], uint32[::1], int64, int64, uint32[::1])", nogil=True, cache=True, boundscheck=False)
def _keyed_hash(cv, words, start, num_words, block):  # type: ignore[no-untyped-def]
    """cv (the key) <- BLAKE3 keyed hash of words[start:start+num_words], 1 to 256 words. `block` is scratch."""
    blocks = (num_words + 15) // 16
    for b in range(blocks):
        size = min(16, num_words - 16 * b)
        for i in range(16):
            block[i] = words[start + 16 * b + i] if i < size else _U32(0)
        flags = _KEYED
        if b == 0:
            flags |= _CHUNK_START
        if b == blocks - 1:
            flags |= _CHUNK_END | _ROOT
        _compress(cv, block, 4 * size, flags)


@njit(
    "void(uint32[::1], int64, int64, uint32[::1], uint32[::1], uint32[::1], uint32[:, ::1])",
    nogil=True, cache=True, boundscheck=False,
)  # fmt: skip
def _chain(tokens, chunk_tokens, first_index, segment, chain, parent, keys):  # type: ignore[no-untyped-def]
    """Fill keys[n, 8]; chain and parent are updated in place."""
    block = np.empty(16, dtype=np.uint32)
    for i in range(keys.shape[0]):
        index = first_index + i
        if index % SEGMENT_CHUNKS == 0:
            chain[:] = segment
        _keyed_hash(chain, tokens, i * chunk_tokens, chunk_tokens, block)
        keys[i] = parent
        _keyed_hash(keys[i], chain, 0, 8, block)
        if index % SEGMENT_CHUNKS == SEGMENT_CHUNKS - 1:
            parent[:] = keys[i]


def extend(
    state: ChainState,
    tokens: npt.NDArray[np.uint32],  # [chunks * chunk_tokens] uint32, whole chunks
    chunk_tokens: int,
    extras: Mapping[int, bytes],  # absolute chunk index -> 32 bytes
) -> tuple[npt.NDArray[np.uint8], ChainState]:
    """([chunks, 32] uint8 keys, state after them). See chunk_keys_ref.extend."""
    if extras or 4 * chunk_tokens > _MAX_NBYTES:
        return chunk_keys_ref.extend(state, tokens, chunk_tokens, extras)
    count = len(tokens) // chunk_tokens
    keys = np.empty((count, 8), dtype=np.uint32)
    segment, chain, parent = (
        np.frombuffer(b, dtype="<u4").copy() for b in (segment_key(state.root), state.chain, state.segment_end)
    )
    _chain(np.require(tokens, np.uint32, ["C", "W"]), chunk_tokens, state.num_chunks, segment, chain, parent, keys)
    end = type(state)(state.root, state.num_chunks + count, chain.tobytes(), parent.tobytes())
    return keys.view(np.uint8), end
