"""AIBrix KVCache's L1 as a library: allocate_for, fill and put; acquire and copy out. Runs in library_common.py's loop.

AIBrix gathers paged KV with a CUDA kernel only. Its pages here are therefore blocks that hold all their layers: one 2 MiB
copy per block each way, the same as in kvkern's rows of such pages. AIBrix computes no checksums.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from library_common import BLOCK_TOKENS, DTYPE, HEAD_DIM, HEADS, LAYERS, BlockPages, Cache, Job, Pages, main


class AIBrix:
    """A BaseKVCacheManager with L1 only."""

    def __init__(self, pages: BlockPages) -> None:
        from aibrix_kvcache import BaseKVCacheManager, KVCacheConfig, TokenListView, cache_manager
        from aibrix_kvcache.spec import KVCacheBlockLayout, KVCacheBlockSpec, KVCacheTensorSpec, ModelSpec

        cache_manager.TESTING_DISABLE_PIN_MEMORY = True  # torch pins memory only for an accelerator
        spec = KVCacheTensorSpec(list(range(HEADS)), list(range(LAYERS)), HEAD_DIM)
        block = KVCacheBlockSpec(BLOCK_TOKENS, DTYPE, KVCacheBlockLayout.LCND, spec)
        self._manager = BaseKVCacheManager(KVCacheConfig(block_spec=block, model_spec=ModelSpec(1 << 17)))
        self._view = TokenListView
        self._pages = pages.blocks
        self._stored: list[np.ndarray] = []

    def store(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None:
        prompt = tokens.numpy().astype(np.int32)
        handle = self._checked(self._manager.allocate_for(None, self._view(prompt)), "allocate_for")
        targets = handle.to_tensors()
        if len(targets) != len(blocks):
            raise RuntimeError(f"AIBrix allocated {len(targets)} of {len(blocks)} blocks. Raise capacity_gib.")
        for target, block in zip(targets, blocks.tolist(), strict=True):
            target.copy_(self._pages[block])
        stored = self._checked(self._manager.put(None, self._view(prompt), handle), "put")
        if stored != len(tokens):
            raise RuntimeError(f"AIBrix stored {stored} of {len(tokens)} tokens. Raise capacity_gib.")
        self._stored.append(prompt)

    def retrieve(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None:
        view = self._view(
            tokens.numpy().astype(np.int32)
        )  # not the stored buffer, because a new request has another one
        found, handle = self._checked(self._manager.acquire(None, view), "acquire")
        if found != len(tokens):
            raise RuntimeError(f"AIBrix found {found} of {len(tokens)} tokens that were stored. Raise capacity_gib.")
        for source, block in zip(handle.to_tensors(), blocks.tolist(), strict=True):
            self._pages[block].copy_(source)
        handle.release()

    def forget(self) -> None:
        for prompt in self._stored:
            self._manager.delete(None, self._view(prompt))
        self._stored.clear()

    @staticmethod
    def _checked(status, what):  # type: ignore[no-untyped-def]  # AIBrix's own types are not imported at module level
        if not status.is_ok():
            raise RuntimeError(f"AIBrix failed in {what}: {status}. See its log.")
        return status.get()


def open_cache(job: Job) -> tuple[Pages, Cache]:
    os.environ["AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB"] = str(job.capacity_gib)  # AIBrix reads it when it is imported
    pages = BlockPages(job.num_blocks)
    return pages, AIBrix(pages)


if __name__ == "__main__":
    main(open_cache)
