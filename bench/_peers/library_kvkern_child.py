"""kvkern as a library: keys, gather with checksums into shared memory, verify and scatter. In library_common.py's loop."""

from __future__ import annotations

import numpy as np
import torch
from library_common import BLOCK_TOKENS, PAGES, BlockPages, Cache, Job, LayerPages, Pages, main

import kvkern


class Kvkern:
    """A kvkern.PagedCache over FlashAttention pages or whole blocks; chunks of one block."""

    def __init__(self, job: Job, pages: LayerPages | BlockPages) -> None:
        if isinstance(pages, LayerPages):
            tensors = pages.layers
            layout = kvkern.layout.flash_attention(tensors)
        else:
            tensors = [pages.blocks.view(torch.uint8).view(job.num_blocks, -1)]
            layout = kvkern.layout.from_pages(tensors, BLOCK_TOKENS)
        self._cache = kvkern.open_cache(
            layout, tensors, model="bench", weights="none", capacity=f"{job.capacity_gib}GiB", threads=job.threads
        )

    def store(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None:
        stored = self._cache.store(tokens.numpy().astype(np.uint32), blocks.numpy())
        if stored != len(blocks):
            raise RuntimeError(f"kvkern stored {stored} of {len(blocks)} chunks. Raise capacity_gib.")

    def retrieve(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None:
        with self._cache.match(tokens.numpy().astype(np.uint32)) as hit:
            loaded = self._cache.load(hit, blocks.numpy())
        if loaded != len(blocks) * BLOCK_TOKENS:
            raise RuntimeError(f"kvkern loaded {loaded} of {len(tokens)} tokens that were stored. Raise capacity_gib.")

    def forget(self) -> None:
        self._cache.clear()


def open_cache(job: Job) -> tuple[Pages, Cache]:
    pages = PAGES[job.pages](job.num_blocks)
    return pages, Kvkern(job, pages)


if __name__ == "__main__":
    main(open_cache)
