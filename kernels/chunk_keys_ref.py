"""Reference of `chunk_keys`, on the `blake3` package: key version 1, straight from the formula.

    seg     = derive_key("kvkern segment v1", root)
    c_i     = keyed_hash(key = seg if i % 128 == 0 else c_{i-1},  data = tokens of chunk i as uint32le + extra_i)
    key_i   = keyed_hash(key = root if segment 0 else key_{128*s - 1},  data = c_i)           s = i // 128

Tokens are little-endian uint32; `extra_i` is empty for text.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from .chain_state import ChainState

SEGMENT_CHUNKS = 128


@lru_cache(maxsize=64)
def segment_key(root: bytes) -> bytes:
    """Return the 32-byte key that hashes the first chunk of every segment."""
    return blake3(root, derive_key_context="kvkern segment v1").digest()


def extend_keys(
    state: ChainState,
    tokens: npt.NDArray[np.uint32],  # [chunks * chunk_tokens] uint32, whole chunks
    chunk_tokens: int,
    extras: Mapping[int, bytes],  # chunk index in the sequence -> 32 bytes
) -> tuple[npt.NDArray[np.uint8], ChainState]:
    """Hash the next chunks of one sequence. Returns ([chunks, 32] uint8 keys, the state after the last chunk)."""
    data = np.ascontiguousarray(tokens, dtype="<u4").tobytes()
    step = 4 * chunk_tokens
    segment = segment_key(state.root)
    chain, parent = state.chain, state.segment_end
    keys = []
    for i in range(len(data) // step):
        index = state.num_chunks + i
        first = index % SEGMENT_CHUNKS == 0
        payload = data[i * step : (i + 1) * step] + extras.get(index, b"")
        chain = blake3(payload, key=segment if first else chain).digest()
        keys.append(blake3(chain, key=parent).digest())
        if index % SEGMENT_CHUNKS == SEGMENT_CHUNKS - 1:
            parent = keys[-1]
    out = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)
    return out, ChainState(state.root, state.num_chunks + len(keys), chain, parent)


def adopt_keys(root: bytes, engine_keys: list[bytes]) -> list[bytes]:
    """Return `keyed_hash(root, engine_hash + group)` of each engine key."""
    return [blake3(key, key=root).digest() for key in engine_keys]
