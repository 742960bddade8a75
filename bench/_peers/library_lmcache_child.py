"""LMCache's in-process engine with its CPU backend, copying by its own CPU fallback. Runs in library_common.py's loop.

LMCache asks an engine to supply a connector. The connector here copies with LMCache's own `multi_layer_kv_transfer`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from library_common import BLOCK_TOKENS, DTYPE, HEAD_DIM, HEADS, LAYERS, Cache, Job, LayerPages, Pages, main
from lmcache import device_ops
from lmcache.lmcache_native import EngineKVFormat, TransferDirection
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata

CHUNK_TOKENS = 256  # LMCache's default


class HostConnector(GPUConnectorInterface):  # type: ignore[misc]
    """Pages in host memory; `slots` are token positions in them."""

    def __init__(self, pages: LayerPages) -> None:
        self._layers = [layer.view(2, -1, HEADS * HEAD_DIM) for layer in pages.layers]

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        self._move(memory_obj, kwargs["slots"][start:end], TransferDirection.D2H)

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        self._move(memory_obj, kwargs["slots"][start:end], TransferDirection.H2D)

    def batched_from_gpu(self, objects: Sequence[Any], starts: list[int], ends: list[int], **kwargs: Any) -> None:
        for memory_obj, start, end in zip(objects, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(self, objects: Sequence[Any], starts: list[int], ends: list[int], **kwargs: Any) -> None:
        for memory_obj, start, end in zip(objects, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, LAYERS, num_tokens, HEADS * HEAD_DIM])

    def initialize_kvcaches_ptr(self, **kwargs: Any) -> None:
        """Do nothing: the constructor has the pages already."""

    def _move(self, memory_obj: Any, slots: torch.Tensor, direction: TransferDirection) -> None:
        device_ops.multi_layer_kv_transfer(
            memory_obj.tensor, self._layers, slots,  # inputs and outputs
            torch.device("cpu"), self._layers[0].shape[1], direction, EngineKVFormat.NL_X_TWO_NB_BS_NH_HS,
            BLOCK_TOKENS, HEAD_DIM,  # sizes
        )  # fmt: skip


class LMCache:
    """An LMCacheEngine with local CPU memory only."""

    def __init__(self, job: Job, pages: LayerPages) -> None:
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, local_cpu=True, max_local_cpu_size=float(job.capacity_gib)
        )
        facts = LMCacheMetadata(
            model_name="bench", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0, kv_dtype=DTYPE,
            kv_shape=(LAYERS, 2, CHUNK_TOKENS, HEADS, HEAD_DIM), role="worker",
        )  # fmt: skip
        self._serial = 0
        self._engine = LMCacheEngineBuilder.get_or_create(
            "bench", config, facts, HostConnector(pages), lambda tensor, _: None, lambda value, _: value
        )
        self._engine.post_init()

    def store(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None:
        self._serial += 1
        self._engine.store(tokens.tolist(), slots=_slots(blocks), req_id=str(self._serial))

    def retrieve(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None:
        loaded = int(self._engine.retrieve(tokens.tolist(), slots=_slots(blocks), req_id=str(self._serial)).sum())
        if loaded != len(tokens):
            raise RuntimeError(
                f"LMCache retrieved {loaded} of {len(tokens)} tokens that were stored. Raise capacity_gib."
            )

    def forget(self) -> None:
        self._engine.clear()


def _slots(blocks: torch.Tensor) -> torch.Tensor:
    """Return an engine's slot mapping of these blocks: [len(blocks) * BLOCK_TOKENS] token positions."""
    return (blocks[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).reshape(-1)


def open_cache(job: Job) -> tuple[Pages, Cache]:
    pages = LayerPages(job.num_blocks)
    return pages, LMCache(job, pages)


if __name__ == "__main__":
    main(open_cache)
    os._exit(0)  # LMCache's threads would keep the process alive
