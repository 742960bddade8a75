"""Chunk keys, version 1: 32 bytes that name a chunk of tokens and everything before it. Formula in chunk_keys_ref.py.

Batched and incremental: if a sequence grows, only its new chunks are hashed. Partial chunks have no key.
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
    """Return the token ids as [n] uint32. A uint32 array is returned itself, not copied.

    Raises LayoutError for ids that are negative or above 2^32 - 1, and for anything but integers.
    """
    if isinstance(tokens, bytes | bytearray | memoryview | str):
        raise LayoutError(
            f"tokens are {type(tokens).__name__}, expected a sequence of integers or an integer array: pass token ids"
        )
    if isinstance(tokens, np.ndarray):
        array = tokens
    else:
        try:
            words = array_module.array("I", () if isinstance(tokens, list) else tokens)  # checks types and ranges
            if isinstance(tokens, list):
                words.fromlist(tokens)  # takes three quarters of the constructor's time
            return np.frombuffer(words, dtype=np.uint32)
        except (OverflowError, TypeError) as error:
            raise LayoutError(
                f"tokens hold a value that is no token id: {error}. Token ids must be integers in [0, 2^32)"
            ) from error
    if array.ndim != 1:
        raise LayoutError(f"tokens have {array.ndim} dimensions, expected 1: pass one sequence at a time")
    if array.dtype == np.uint32:
        return array.astype(np.uint32, copy=False)
    if array.size and not (array.dtype.kind in "iu" and 0 <= int(array.min()) and int(array.max()) < 1 << 32):
        raise LayoutError(f"tokens are {array.dtype} in [{array.min()}, {array.max()}], expected integers in [0, 2^32)")
    return array.astype(np.uint32)


def extend_keys(
    state: ChainState,
    tokens: Tokens,  # from token state.num_chunks * chunk_tokens on; a partial last chunk is ignored
    chunk_tokens: int,
    extras: Extras | None = None,
    backend: Backend = "numba",
) -> tuple[npt.NDArray[np.uint8], ChainState]:
    """Hash the next chunks of a sequence. Returns ([chunks, 32] uint8 keys, state after the last whole chunk). O(tokens)."""
    keys, states = extend_keys_batch([state], [tokens], chunk_tokens, [extras or {}], backend)
    return keys[0], states[0]


def extend_keys_batch(
    states: Sequence[ChainState],
    sequences: Sequence[Tokens],  # one per state; see `extend_keys`
    chunk_tokens: int,
    extras: Sequence[Extras] | None = None,  # one per state
    backend: Backend = "numba",
) -> tuple[list[npt.NDArray[np.uint8]], list[ChainState]]:
    """Hash the next chunks of many sequences, which may have different roots. Returns their keys and their new states.

    On a GPU this takes three launches for any number of sequences. Raises LayoutError on arguments that do not fit, before
    anything is hashed.
    """
    if chunk_tokens < 1:
        raise LayoutError(
            f"chunk_tokens is {chunk_tokens}, expected at least 1: use a multiple of the engine's block size"
        )
    given: Sequence[Extras] = [{}] * len(states) if extras is None else extras
    if not len(states) == len(sequences) == len(given):
        raise LayoutError(
            f"{len(states)} states, {len(sequences)} sequences and {len(given)} extras were given: "
            "give one state and one extras per sequence"
        )
    for index, extra in (item for items in given for item in items.items()):
        if len(extra) != EXTRA_NBYTES:
            raise LayoutError(
                f"extra of chunk {index} has {len(extra)} bytes, expected {EXTRA_NBYTES}: pass a BLAKE3 hash"
            )
    arrays = [as_tokens(tokens) for tokens in sequences]
    whole = [array[: len(array) // chunk_tokens * chunk_tokens] for array in arrays]
    if backend == "triton":
        from . import chunk_keys_triton

        return chunk_keys_triton.extend_keys_from_host(states, whole, chunk_tokens, given)
    if backend not in BACKENDS:
        raise LayoutError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}. Use one of these")
    from . import chunk_keys_numba

    extend_one = chunk_keys_ref.extend_keys if backend == "ref" else chunk_keys_numba.extend_keys
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
    """Return the keys of a whole sequence: [n // chunk_tokens, 32] uint8."""
    return extend_keys(ChainState.start(root), tokens, chunk_tokens, extras, backend)[0]


def adopt_keys(
    root: bytes,
    engine_keys: list[bytes],  # each is the engine's block hash, then the KV group as big-endian u32
) -> list[bytes]:
    """Return the keys of chunks that the engine names itself (vLLM's block hashes).

    The namespace of `root` must hold the hash's identity.
    """
    if len(root) != 32:
        raise LayoutError(f"root has {len(root)} bytes, expected 32: pass the root key of a namespace")
    from . import chunk_keys_numba

    return chunk_keys_numba.adopt_keys(root, engine_keys)
