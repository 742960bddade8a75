"""The offloading spec that vLLM builds in the scheduler and in every worker. It makes the arena, and a manager or a worker."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from ...arena.file import Arena
from ...arena.slots import SlotGeometry
from ...assemble import attach_remote_tier, build_cache, build_copier, choose_device, open_arena
from ...cache.base import ChunkCache
from ...cache.observed import ObservedCache
from ...errors import UnsupportedError
from ...kernels.checksum import ROW_NBYTES
from ...kernels.layout import from_pages
from ...kernels.paged_tensors import PagedTensors
from ...metrics import CacheCounters
from ...node.client.cache_client import NodeClient
from ...observability.logs import set_up_engine
from ...transfer.base import Copier
from . import shim
from .engine_meter import EngineMeter
from .late_start import NoCopier
from .manager import KvkernManager
from .metric_definitions import metric_definitions
from .options import INSTANCE_KEY, parse_options
from .rank_arenas import ArenaId
from .request_state import KvGroup
from .rpc_check import start_rpc_check
from .worker import KvkernWorker

SCHEDULER_WAIT_S = 10  # the workers have waited for the daemon already


class KvkernSpec(shim.OffloadingSpec):
    """Opens the arena that scheduler and workers share. They are different processes; the arena's name is the engine's.

    With `socket` the arena is the one of the node's daemon.
    """

    def __init__(self, config: shim.OffloadingConfig) -> None:
        super().__init__(config)
        self.options = parse_options(config.extra_config)
        set_up_engine(self.options.log_format)
        if "offload_prompt_only" not in config.extra_config:
            self.offload_prompt_only = not self.options.store_replies
        if config.worker_kv_bytes_per_block <= 0:
            raise UnsupportedError(
                f"vLLM reports {config.worker_kv_bytes_per_block} KV bytes per block for this model, so kvkern cannot size its "
                f"slots. Run this model without kvkern."
            )
        self._arena: Arena | None = None
        self._client: NodeClient | None = None  # scheduler: of the daemon

    def _daemons_arena(self) -> ArenaId:
        """Return the arena that the daemon has given the scheduler. Empty: it has given none yet, or there is no daemon."""
        arena = self._client.wait_for_arena(0) if self._client is not None else None
        return () if arena is None else arena.file_id()

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, shim.OffloadingMetricMetadata]:
        """Return the counters that vLLM exports for kvkern."""
        options = parse_options(extra_config)
        return metric_definitions(bool(options.socket), bool(options.remote), options.published_metrics)

    @property
    def geometry(self) -> SlotGeometry:
        """Return the size of slots that hold a chunk of any KV group, for all ranks."""
        planes = max(len(group.layer_names) for group in self.config.groups)
        nbytes = self.config.worker_kv_bytes_per_block * self.blocks_per_chunk + planes * ROW_NBYTES
        return SlotGeometry(nbytes, planes, self.config.parallel.world_size)

    def get_manager(self) -> KvkernManager:
        """Build the scheduler side."""
        groups = [
            KvGroup(
                group_id=group.group_id,
                hashes_per_chunk=group.tokens_per_block * self.blocks_per_chunk // self.tokens_per_hash,
                chunk_tokens=group.tokens_per_block * self.blocks_per_chunk,
            )
            for group in self.config.groups
        ]
        cache, meter = self._open_cache(groups[0].chunk_tokens)
        manager = self._manager_class(cache, groups)
        manager.watch(meter)
        manager.ranks.own = self._daemons_arena
        return manager

    @property
    def _manager_class(self) -> type[KvkernManager]:
        if self.options.tracing:
            from .traced_manager import TracedManager

            return TracedManager
        return KvkernManager

    def get_worker(self, kv_caches: shim.CanonicalKVCaches) -> KvkernWorker:
        """Build the worker side: one layout per KV group, proven by a round trip through vLLM's tensors."""
        device = kv_caches.tensors[0].tensor.device
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedError(
                f"The KV cache is on device {device}. kvkern moves KV of CPU and CUDA tensors only. Run the engine without it."
            )
        groups = []
        for group, refs in zip(self.config.groups, kv_caches.group_data_refs, strict=True):
            pages = [kv_caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
            groups.append(PagedTensors.bind(from_pages(pages, group.tokens_per_block), pages))
        build = partial(self._build_copier, groups)
        if not self.options.socket:
            arena = self._open_own_arena(self.config.parallel.rank)
            return KvkernWorker(build(arena), self.blocks_per_chunk, arena.close, arena.file_id())
        client = self._connect(index=False, wait_s=self.options.connect_s)
        if (found := client.wait_for_arena(0)) is not None:
            return KvkernWorker(build(found), self.blocks_per_chunk, client.close, found.file_id())
        worker = KvkernWorker(NoCopier(), self.blocks_per_chunk, client.close)
        worker.start_late(client, build)
        return worker

    def _build_copier(self, groups: list[PagedTensors], arena: Arena) -> Copier:
        """Build the copier of this rank and prove it. In a thread that has not used the GPU yet it chooses the GPU."""
        choose_device(groups[0].device)
        transfer = build_copier(self.options, arena, groups, self.config.parallel.rank, self.blocks_per_chunk)
        if self.options.tracing:
            from ...observability.tracing import traced_copier

            transfer = traced_copier(transfer)
        return transfer

    def _open_cache(self, chunk_tokens: int) -> tuple[ChunkCache, EngineMeter]:
        """Open the scheduler's cache: the node's daemon, or a cache over this engine's own arena. Returns it measured."""
        options, counters = self.options, CacheCounters()
        meter = EngineMeter(
            counters, bool(options.socket), bool(options.remote), options.published_metrics, chunk_tokens
        )
        if options.socket:
            client = self._client = self._connect(index=True, wait_s=min(options.connect_s, SCHEDULER_WAIT_S))
            start_rpc_check(client, options)
            meter.watch(client.counters)
            meter.usage = client.usage
            return ObservedCache(client, meter), meter
        arena = self._open_own_arena(self.config.parallel.world_size)
        cache = build_cache(arena, policy=options.policy, counters=counters, observer=meter)
        meter.usage = lambda: {**cache.usage(), "ready_slots": cache.num_ready()}
        remote = attach_remote_tier(cache, arena, options.remote_config, options.policy, meter=meter)
        if remote is not None:
            meter.remote_usage = remote.usage
        return ObservedCache(cache, meter), meter

    def _connect(self, index: bool, wait_s: float) -> NodeClient:
        """Connect to the daemon. If none answers, the client connects later: the engine serves without a cache until then."""
        shim.logger.info(
            "kvkern: connecting to the node's daemon on %(socket)s",
            {"event": "daemon_connecting", "socket": self.options.socket},
        )
        return NodeClient.open(
            Path(self.options.socket),
            self._name,
            self.geometry,
            index=index,
            timeout_s=wait_s,
            prefault=self.options.prefault,
            daemon_uid=self.options.daemon_uid,
            dump_arena=self.options.dump_arena,
            required=False,
        )

    @property
    def _name(self) -> str:
        """The engine's name: the same in all its processes, and no other engine's, even if that has the same `engine_id`."""
        instance = self.config.extra_config.get(INSTANCE_KEY, "")
        return blake3(f"{self.config.engine_id}/{instance}".encode()).hexdigest()[:16]

    def _open_own_arena(self, seat: int) -> Arena:
        """Create the arena or attach to it. The first process creates the file, and the last one unlinks its name.

        Each worker takes the seat of its rank, and the scheduler the one behind them.
        """
        if self._arena is None:
            layout = f"{self.config.kv_cache_layout}:{self.config.groups}:{self.blocks_per_chunk}"
            self._arena = open_arena(
                self.options,
                self.geometry,
                name=self._name,
                expected=self.config.parallel.world_size + 1,
                identity=blake3(layout.encode()).digest(),
                progress=shim.logger.info,
                seat=seat,
            )
        return self._arena
