"""The offloading spec vLLM builds in the scheduler and in every worker: geometry, arena, manager or worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from ...arena.file import Arena
from ...arena.slots import SlotGeometry
from ...assemble import attach_remote_tier, build_cache, build_copier, open_arena
from ...cache.base import ChunkCache
from ...errors import UnsupportedError
from ...kernels.checksum import ROW_NBYTES
from ...kernels.layout import from_pages
from ...kernels.paged_tensors import PagedTensors
from ...node.client.cache_client import NodeClient
from . import shim
from .manager import Group, KvkernManager, metric_definitions
from .options import OPTIONS_KEY, parse_options
from .worker import KvkernWorker


class KvkernSpec(shim.OffloadingSpec):
    """Scheduler and workers are different processes; they meet in an arena named after the engine, or the node's."""

    def __init__(self, config: shim.OffloadingConfig) -> None:
        super().__init__(config)
        self.options = parse_options(config.extra_config)
        if "offload_prompt_only" not in config.extra_config:
            self.offload_prompt_only = not self.options.store_replies
        if config.worker_kv_bytes_per_block <= 0:
            raise UnsupportedError("vLLM reports no KV bytes per block for this model; kvkern cannot size its slots")
        self._arena: Arena | None = None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, shim.OffloadingMetricMetadata]:
        """Counters vLLM exports for us."""
        options = extra_config.get(OPTIONS_KEY) or {}  # `parse_options` says what is wrong with them
        return metric_definitions(daemon="socket" in options, remote="remote" in options)

    @property
    def geometry(self) -> SlotGeometry:
        """Slots that hold a chunk of any KV group, all ranks."""
        planes = max(len(group.layer_names) for group in self.config.groups)
        nbytes = self.config.worker_kv_bytes_per_block * self.blocks_per_chunk + planes * ROW_NBYTES
        return SlotGeometry(nbytes, planes, self.config.parallel.world_size)

    def get_manager(self) -> KvkernManager:
        """Scheduler side."""
        groups = [
            Group(
                group_id=group.group_id,
                hashes_per_chunk=group.tokens_per_block * self.blocks_per_chunk // self.tokens_per_hash,
                chunk_tokens=group.tokens_per_block * self.blocks_per_chunk,
            )
            for group in self.config.groups
        ]
        return KvkernManager(self._open_cache(), groups)

    def get_worker(self, kv_caches: shim.CanonicalKVCaches) -> KvkernWorker:
        """Worker side: one layout per KV group, proven by a round trip through vLLM's tensors."""
        device = kv_caches.tensors[0].tensor.device
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"the KV cache is on {device}; kvkern moves KV of CPU and CUDA tensors")
        groups = []
        for group, refs in zip(self.config.groups, kv_caches.group_data_refs, strict=True):
            pages = [kv_caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
            groups.append(PagedTensors.bind(from_pages(pages, group.tokens_per_block), pages))
        arena, close = self._open_arena()
        rank = self.config.parallel.rank
        transfer = build_copier(self.options, arena, groups, rank, self.blocks_per_chunk)
        return KvkernWorker(transfer, self.blocks_per_chunk, close)

    def _open_cache(self) -> ChunkCache:
        """The scheduler's: the node's daemon, or a cache over this engine's own arena."""
        if self.options.socket:
            return self._connect(index=True)
        arena = self._open_own_arena()
        cache = build_cache(arena, policy=self.options.policy)
        attach_remote_tier(cache, arena, self.options.remote_config, self.options.policy)
        return cache

    def _open_arena(self) -> tuple[Arena, Callable[[], None]]:
        """(a worker's arena, what ends it)."""
        if self.options.socket:
            client = self._connect(index=False)
            return client.arena, client.close
        arena = self._open_own_arena()
        return arena, arena.close

    def _connect(self, index: bool) -> NodeClient:
        shim.logger.info("kvkern: the node's cache is on %s", self.options.socket)
        return NodeClient.open(
            Path(self.options.socket),
            self._name,
            self.geometry,
            index=index,
            timeout_s=self.options.connect_s,
            prefault=self.options.prefault,
        )

    @property
    def _name(self) -> str:
        """Of this engine, the same in all its processes."""
        return blake3(self.config.engine_id.encode()).hexdigest()[:16]

    def _open_own_arena(self) -> Arena:
        """Whoever comes first creates it, the last of all processes unlinks its name."""
        if self._arena is None:
            layout = f"{self.config.kv_cache_layout}:{self.config.groups}:{self.blocks_per_chunk}"
            self._arena = open_arena(
                self.options,
                self.geometry,
                name=self._name,
                expected=self.config.parallel.world_size + 1,
                identity=blake3(layout.encode()).digest(),
                progress=shim.logger.info,
            )
        return self._arena
