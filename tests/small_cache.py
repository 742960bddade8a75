"""A small cache over noise in FlashAttention pages, and one prompt with its block tables. For tests of the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvkern
from kvkern.api import PagedCache
from tests.support import guarded

NUM_BLOCKS, BLOCK_TOKENS, PER_CHUNK = 40, 4, 2
CHUNK = BLOCK_TOKENS * PER_CHUNK
SLOT_NBYTES = 4096 + 4096  # header and one part


def make_tensors(seed: int = 0, num_blocks: int = NUM_BLOCKS) -> list[torch.Tensor]:
    shape = (2, num_blocks, BLOCK_TOKENS, 2, 16)
    return [guarded(2 * num_blocks * 256, seed + i)[0].view(torch.bfloat16).view(shape) for i in range(2)]


def open_cache(tensors: list[torch.Tensor], folder: Path, slots: int = 16, **options: Any) -> PagedCache:
    defaults = {
        "model": "m", "weights": "w", "blocks_per_chunk": PER_CHUNK, "capacity": 4096 + slots * SLOT_NBYTES,
        "arena_dir": folder, "threads": 1,
    }  # fmt: skip
    return kvkern.open_cache(kvkern.layout.flash_attention(tensors), tensors, **(defaults | options))


def blocks_of(tensors: list[torch.Tensor], table: Any) -> list[np.ndarray[Any, Any]]:
    return [t[:, np.asarray(table).tolist()].contiguous().view(torch.uint8).numpy() for t in tensors]


def same(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


TOKENS = list(range(100, 100 + 3 * CHUNK + 5))  # three chunks and a rest
TABLE = [9, 3, 0, 39, 17, 4, 8]
ELSEWHERE = [20, 21, 30, 29, 28, 27, 11]
