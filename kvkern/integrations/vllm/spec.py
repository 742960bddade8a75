"""The offloading spec vLLM builds in the scheduler and in every worker: geometry, arena, manager or worker."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from ...arena import Arena
from ...assemble import build_cache, build_transfer, open_arena
from ...errors import UnsupportedError
from ...kernels.checksum import ROW_NBYTES
from ...kernels.layout import from_pages
from ...kernels.paged_copy import PagedTensors
from ...slots import SlotGeometry
from . import shim
from .manager import Group, KvkernManager, metric_definitions
from .options import parse_options
from .worker import KvkernWorker


class KvkernSpec(shim.OffloadingSpec):
    """Scheduler and workers are different processes; they meet in an arena named after the engine."""

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
        return metric_definitions()

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
        return KvkernManager(build_cache(self._open()), groups)

    def get_worker(self, kv_caches: shim.CanonicalKVCaches) -> KvkernWorker:
        """Worker side: one layout per KV group, proven by a round trip through vLLM's tensors."""
        device = kv_caches.tensors[0].tensor.device
        if device.type != "cpu":
            raise UnsupportedError(f"the KV cache is on {device}; this kvkern moves KV of CPU tensors only")
        groups = []
        for group, refs in zip(self.config.groups, kv_caches.group_data_refs, strict=True):
            pages = [kv_caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
            groups.append(PagedTensors.bind(from_pages(pages, group.tokens_per_block), pages))
        arena = self._open()
        rank = self.config.parallel.rank
        transfer = build_transfer(self.options, arena, groups, rank, self.blocks_per_chunk)
        return KvkernWorker(transfer, self.blocks_per_chunk, arena.close)

    def _open(self) -> Arena:
        """The engine's arena; whoever comes first creates it, the last of all processes unlinks its name."""
        if self._arena is None:
            layout = f"{self.config.kv_cache_layout}:{self.config.groups}:{self.blocks_per_chunk}"
            self._arena = open_arena(
                self.options,
                self.geometry,
                name=blake3(self.config.engine_id.encode()).hexdigest()[:16],
                expected=self.config.parallel.world_size + 1,
                identity=blake3(layout.encode()).digest(),
                progress=shim.logger.info,
            )
        return self._arena
