"""Chunk keys, version 1: 32 bytes naming a chunk of tokens and everything before it. Formula in chunk_keys_ref.py.

Batched and incremental: a sequence that grows is hashed from its last state on. Partial chunks have no key.
"""

from __future__ import annotations

import array as array_module
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import chunk_keys_ref
from .chain_state import ChainState
from .errors import LayoutError

Tokens = npt.NDArray[np.integer] | Sequence[int]
Backend = Literal["numba", "triton", "ref"]
BACKENDS: tuple[Backend, ...] = ("numba", "triton", "ref")
Extras = Mapping[int, bytes]  # chunk index in the sequence -> 32-byte BLAKE3 of its non-text items
EXTRA_NBYTES = 32


def as_tokens(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """[n] uint32. Arrays of uint32 are taken as they are; negative ids and ids above 2^32 - 1 are refused."""
    if isinstance(tokens, bytes | bytearray | memoryview | str):
        raise LayoutError(f"tokens are {type(tokens).__name__}, expected a sequence of integers or an integer array")
    if isinstance(tokens, np.ndarray):
        array = tokens
    else:
        try:
            words = array_module.array("I", () if isinstance(tokens, list) else tokens)  # checks types and ranges
            if isinstance(tokens, list):
                words.fromlist(tokens)  # three quarters of the constructor's time
            return np.frombuffer(words, dtype=np.uint32)
        except (OverflowError, TypeError) as error:
            raise LayoutError(f"token ids must be integers in [0, 2^32): {error}") from error
    if array.ndim != 1:
        raise LayoutError(f"tokens have {array.ndim} dimensions, expected 1")
    if array.dtype == np.uint32:
        return array.astype(np.uint32, copy=False)
    if array.size and not (array.dtype.kind in "iu" and 0 <= int(array.min()) and int(array.max()) < 1 << 32):
        raise LayoutError(f"tokens are {array.dtype} in [{array.min()}, {array.max()}], expected integers in [0, 2^32)")
    return array.astype(np.uint32)


def extend(
    state: ChainState,
    tokens: Tokens,  # the sequence from token state.num_chunks * chunk_tokens on; a partial last chunk is left out
    chunk_tokens: int,
    extras: Extras | None = None,
    backend: Backend = "numba",
) -> tuple[npt.NDArray[np.uint8], ChainState]:
    """([chunks, 32] uint8 keys, the state after the last whole chunk). O(tokens)."""
    keys, states = extend_batch([state], [tokens], chunk_tokens, [extras or {}], backend)
    return keys[0], states[0]


def extend_batch(
    states: Sequence[ChainState],
    sequences: Sequence[Tokens],  # of each state; see `extend`
    chunk_tokens: int,
    extras: Sequence[Extras] | None = None,  # of each state
    backend: Backend = "numba",
) -> tuple[list[npt.NDArray[np.uint8]], list[ChainState]]:
    """Keys and states of many sequences, of one root or several. On a GPU three launches whatever their number.

    Raises LayoutError on arguments that do not fit, before anything is hashed.
    """
    if chunk_tokens < 1:
        raise LayoutError(f"chunk_tokens is {chunk_tokens}, expected at least 1")
    given: Sequence[Extras] = [{}] * len(states) if extras is None else extras
    if not len(states) == len(sequences) == len(given):
        raise LayoutError(f"{len(states)} states, {len(sequences)} sequences and {len(given)} extras: expected as many")
    for index, extra in (item for items in given for item in items.items()):
        if len(extra) != EXTRA_NBYTES:
            raise LayoutError(f"extra of chunk {index} has {len(extra)} bytes, expected {EXTRA_NBYTES}")
    arrays = [as_tokens(tokens) for tokens in sequences]
    whole = [array[: len(array) // chunk_tokens * chunk_tokens] for array in arrays]
    if backend == "triton":
        from . import chunk_keys_triton

        return chunk_keys_triton.extend_on_device(states, whole, chunk_tokens, given)
    if backend not in BACKENDS:
        raise LayoutError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    from . import chunk_keys_numba

    extend_one = chunk_keys_ref.extend if backend == "ref" else chunk_keys_numba.extend
    batch = zip(states, whole, given, strict=True)
    done = [extend_one(state, tokens, chunk_tokens, items) for state, tokens, items in batch]
    return [keys for keys, _ in done], [state for _, state in done]


def chunk_keys(
    root: bytes,  # 32 bytes
    tokens: Tokens,  # [n]
    chunk_tokens: int,
    extras: Extras | None = None,
    backend: Backend = "numba",
) -> npt.NDArray[np.uint8]:
    """[n // chunk_tokens, 32] uint8: the keys of a whole sequence."""
    return extend(ChainState.start(root), tokens, chunk_tokens, extras, backend)[0]


def adopt_keys(
    root: bytes,
    engine_keys: list[bytes],  # each: the engine's block hash, then the KV group as big-endian u32
) -> list[bytes]:
    """Keys of chunks that the engine names itself (vLLM's block hashes). The namespace must hold the hash's identity."""
    if len(root) != 32:
        raise LayoutError(f"root has {len(root)} bytes, expected 32")
    from . import chunk_keys_numba

    return chunk_keys_numba.adopt(root, engine_keys)
