"""CPU production backend of `chunk_keys`: hashes a whole sequence in one call without the GIL. Formula in chunk_keys_ref.py.

    16 segments of 128 chunks at a time (segments start from the same key, so no chain waits for another):
      c_i    in lockstep, one lane per segment            one or two segments: one after the other
      key_i  segment by segment, 16 chunks at a time      the last key of a segment is the parent of the next one

Handles chunks of at most one BLAKE3 chunk (1024 bytes: chunk_tokens <= 256) and no extras. Others go to the reference.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from . import chunk_keys_ref
from .blake3_numba import LANES, MAX_WORDS, SCRATCH_WORDS, chunks_scratch_words, hash_chunks, hash_rows
from .chain_state import ChainState
from .chunk_keys_ref import segment_key

_BLOCK_WORDS = 16
_ENGINE_KEY_NBYTES = 36  # a SHA-256 hash and the KV group


def extend_keys(
    state: ChainState,
    tokens: npt.NDArray[np.uint32],  # [chunks * chunk_tokens] uint32, whole chunks
    chunk_tokens: int,
    extras: Mapping[int, bytes],  # chunk index in the sequence -> 32 bytes
) -> tuple[npt.NDArray[np.uint8], ChainState]:
    """Same contract as chunk_keys_ref.extend_keys."""
    if extras or chunk_tokens > MAX_WORDS:
        return chunk_keys_ref.extend_keys(state, tokens, chunk_tokens, extras)
    count = len(tokens) // chunk_tokens
    if chunk_tokens % _BLOCK_WORDS:  # the last block is read whole, so 64 bytes must be readable there
        tokens = np.concatenate([tokens, np.zeros(_BLOCK_WORDS, dtype=np.uint32)])
    if not (tokens.flags.c_contiguous and tokens.flags.aligned):
        tokens = tokens.copy()
    keys = np.empty((count + LANES - 1, 8), dtype=np.uint32)  # the kernel writes whole groups of lanes
    words = np.frombuffer(bytearray(segment_key(state.root) + state.chain + state.segment_end), np.uint32).reshape(3, 8)
    hash_chunks(
        tokens, chunk_tokens, state.num_chunks,  # inputs
        words,  # state
        keys, np.empty(chunks_scratch_words(count), dtype=np.uint32),  # outputs, scratch
    )  # fmt: skip
    end = ChainState(state.root, state.num_chunks + count, words[1].tobytes(), words[2].tobytes())
    return keys[:count].view(np.uint8), end


def adopt_keys(
    root: bytes,  # 32 bytes
    engine_keys: list[bytes],
) -> list[bytes]:
    """Same contract as chunk_keys_ref.adopt_keys. Unless every engine key has 36 bytes, all of them go to the reference."""
    if set(map(len, engine_keys)) != {_ENGINE_KEY_NBYTES}:
        return chunk_keys_ref.adopt_keys(root, engine_keys)
    count = len(engine_keys)
    key = np.frombuffer(root, np.uint32)
    # the kernel reads the last block whole, so there is one more block behind the keys
    rows = np.frombuffer(b"".join(engine_keys) + bytes(4 * _BLOCK_WORDS), np.uint32)
    keys = np.empty((count + LANES - 1, 8), dtype=np.uint32)
    hash_rows(
        key.ctypes.data, rows.ctypes.data, _ENGINE_KEY_NBYTES, _ENGINE_KEY_NBYTES // 4, count,  # inputs
        keys.ctypes.data,  # output
        np.empty(SCRATCH_WORDS, dtype=np.uint32),  # scratch
    )  # fmt: skip
    return keys[:count].view("V32").reshape(-1).tolist()
