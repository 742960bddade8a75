"""Everything that kvkern uses of vLLM, and what the vLLM that is installed can do.

When vLLM moves a name, only this file changes. vLLM's offloading interfaces are experimental: versions.py names the releases
that kvkern knows, contract.py tests others, and FEATURES says what the one here has.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from .contract import describe_vllm, differences
from .release_features import find_features
from .versions import installed_version, is_known, refusal, refuse_old

VLLM_VERSION = installed_version()
refuse_old(VLLM_VERSION)
if not is_known(VLLM_VERSION) and (missing := differences(describe_vllm())):
    raise refusal(VLLM_VERSION, missing)

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app, multiprocess  # noqa: E402
from vllm import envs  # noqa: E402
from vllm.config import (  # noqa: E402
    KVTransferConfig,
    ModelConfig,
    VllmConfig,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (  # noqa: E402
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (  # noqa: E402
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import RequestOffloadState  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector  # noqa: E402
from vllm.exceptions import LoRAAdapterNotFoundError as AdapterNotFound  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.worker_manager import WorkerLoRAManager  # noqa: E402
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    iter_layer_specs,
)
from vllm.v1.kv_offload.base import (  # noqa: E402
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    TransferResult,
    get_offload_group_idx,
    make_offload_key,
)
from vllm.v1.kv_offload.config import OffloadingConfig, OffloadingGroupConfig  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ModuleNotFoundError:  # before 0.32, which does not ask for a hit's source
    CacheHitSource = None

FEATURES = find_features(
    OffloadingConnector, OffloadingManager, OffloadingWorker, OffloadingGroupConfig, RequestOffloadState
)

HASH_SEED_IS_FIXED = hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")  # without PYTHONHASHSEED, for the SHA-256 hashes
PACKING_VARIABLES = (
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT",
    "VLLM_MLA_DISABLE",
    "VLLM_USE_V2_MODEL_RUNNER",
)
logger = init_logger("vllm.kvkern")  # starts with "vllm", so that vLLM's log handlers apply

__all__ = [
    "FEATURES",
    "HASH_SEED_IS_FIXED",
    "VLLM_VERSION",
    "AdapterNotFound",
    "CacheHitSource",
    "CanonicalKVCaches",
    "EngineBlocks",
    "GPULoadStoreSpec",
    "KVCacheConfig",
    "KVConnectorHandshakeMetadata",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorTransferResults",
    "KVTransferConfig",
    "LoRARequest",
    "LoadStoreSpec",
    "LookupResult",
    "ModelConfig",
    "OffloadKey",
    "OffloadingConfig",
    "OffloadingConnector",
    "OffloadingConnectorMetadata",
    "OffloadingConnectorStats",
    "OffloadingCounterMetadata",
    "OffloadingGaugeMetadata",
    "OffloadingHistogramMetadata",
    "OffloadingManager",
    "OffloadingMetricMetadata",
    "OffloadingSpec",
    "OffloadingWorker",
    "OffloadingWorkerMetadata",
    "PrepareStoreOutput",
    "ReqContext",
    "Request",
    "RequestOffloadingContext",
    "RequestStatus",
    "ScheduleEndContext",
    "SchedulerOutput",
    "TransferResult",
    "VllmConfig",
    "WorkerLoRAManager",
    "allowed_tiers",
    "attention_backends",
    "block_hash_seed",
    "boundary_states",
    "build_offloading_config",
    "count_prompt_tokens",
    "cpu_instruction_sets",
    "current_config",
    "drop_stale_keys",
    "drop_stale_state",
    "finish_transfers",
    "get_offload_group_idx",
    "handed_over_groups",
    "is_first_front_end",
    "logger",
    "make_offload_key",
    "metrics_app",
    "needs_whole_prompt",
    "offer_again",
    "packing_environment",
    "repair_hashes",
    "restart_stores",
    "scheduler_manager",
    "show_histogram",
    "sync_load_budget",
    "unregister_metrics",
    "windowed_groups",
    "worker_of",
]


def block_hash_seed() -> bytes:
    """Return the seed of every block hash chain. It is known once the engine has started, after its connectors are built."""
    return bytes(kv_cache_utils.NONE_HASH)


def current_config() -> VllmConfig | None:
    """Return the engine's own configuration while a worker builds its connectors; inside MultiConnector these get copies."""
    return get_current_vllm_config_or_none()


def allowed_tiers(context: ReqContext) -> tuple[bool, bool]:
    """Return whether the request may load from this host's memory, and from a remote store: its `kv_load_tiers`."""
    if (tiers := getattr(context, "load_tier_filter", None)) is None:
        return True, True
    return tiers.allows(Medium.CPU, Locality.LOCAL), tiers.allows(Medium.STORAGE, None)


def needs_whole_prompt(request: Request) -> bool:
    """Return True if the request wants log-probabilities of its prompt: loaded tokens have none.

    vLLM reads no cache then, unless the request says that it may.
    """
    params = request.sampling_params
    wanted = ("prompt_logprobs", "prompt_logprob_token_ids")
    return params is not None and any(getattr(params, name, None) is not None for name in wanted)


def metrics_app() -> Any:
    """Return a WSGI application that answers with what vLLM's /metrics says, of all of its front ends.

    With several front ends vLLM gives them a folder, in which each writes what it counts.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return make_wsgi_app(REGISTRY)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return make_wsgi_app(registry)


def is_first_front_end(vllm_config: VllmConfig) -> bool:
    """Return True in the first of vLLM's API servers. With `--api-server-count` there are several processes."""
    return int(getattr(vllm_config.parallel_config, "_api_process_rank", 0)) <= 0


def unregister_metrics(prefix: str) -> None:
    """Remove this process's collectors with names that start with `prefix`, as vLLM does with its own for every engine."""
    for collector, names in list(REGISTRY._collector_to_names.items()):
        if any(name.startswith(prefix) for name in names):
            REGISTRY.unregister(collector)


def show_histogram(stats: OffloadingConnectorStats, name: str, labels: tuple[str, ...]) -> None:
    """Make the front end show a histogram without values: it makes a series when it is sent a list, also an empty one."""
    stats.observe_histogram(name, 0.0, labels)
    for section in stats.data.values():  # vLLM 0.33 has one that may be None
        if isinstance(section, dict) and isinstance(values := section.get(name), dict):
            values[labels].clear()


def scheduler_manager(connector: OffloadingConnector) -> Any:
    """Return the manager that kvkern's spec gave to the stock scheduler side, or None on a worker."""
    scheduler = connector.connector_scheduler
    return None if scheduler is None else scheduler.manager


def worker_of(connector: OffloadingConnector) -> Any:
    """Return the worker that kvkern's spec gave to the stock worker side. None on the scheduler and before registration."""
    worker = connector.connector_worker
    return None if worker is None else worker.worker


def windowed_groups(kv_cache_config: KVCacheConfig, offload: OffloadingConfig) -> list[int]:
    """Return the ids of KV groups that are not full attention: sliding windows, local chunks, recurrent states."""
    if FEATURES.window_sizes:
        return [group.group_id for group in offload.groups if group.sliding_window_size_in_chunks is not None]
    groups = enumerate(kv_cache_config.kv_cache_groups)
    return [i for i, group in groups if not isinstance(group.kv_cache_spec, FullAttentionSpec)]


def count_prompt_tokens(step: SchedulerOutput) -> int:
    """Count a step's tokens that belong to prompts. A reply takes one token per step, plus its speculative tokens."""
    speculative = step.scheduled_spec_decode_tokens
    return sum(n for req_id, n in step.num_scheduled_tokens.items() if n > 1 + len(speculative.get(req_id, ())))


def handed_over_groups(kv_cache_config: KVCacheConfig) -> list[int]:
    """Return the ids of KV groups whose states vLLM hands over one block at a time: recurrent layers in the mode "align"."""
    groups = enumerate(kv_cache_config.kv_cache_groups)
    return [i for i, group in groups if getattr(group.kv_cache_spec, "mamba_cache_mode", None) == "align"]


def offer_again(connector: OffloadingConnector, req_id: str, first_chunks: dict[int, int]) -> None:
    """Let the scheduler side offer a request's chunks again in the next step, from these on. By KV group."""
    scheduler = connector.connector_scheduler
    if scheduler is not None and (status := scheduler._req_status.get(req_id)) is not None:
        for group, state in zip(scheduler.config.kv_group_configs, status.group_states, strict=True):
            first = first_chunks.get(group.group_idx, state.next_stored_chunk_idx)
            state.next_stored_chunk_idx = min(state.next_stored_chunk_idx, first)


def restart_stores(connector: OffloadingConnector, req_id: str) -> None:
    """Let the scheduler side offer all chunks of a request again: it counted the chunks of a failed load as stored.

    vLLM 0.33 does so itself when it looks the request up again, and this changes nothing there.
    """
    scheduler = connector.connector_scheduler
    if scheduler is not None and (status := scheduler._req_status.get(req_id)) is not None:
        for group in status.group_states:
            group.next_stored_chunk_idx = 0


def sync_load_budget(connector: OffloadingConnector) -> int:
    """Return how many bytes the scheduler side loads within a step, unverified. 0 on a worker."""
    scheduler = connector.connector_scheduler
    return 0 if scheduler is None else int(getattr(scheduler.config, "sync_load_budget_bytes", 0))


def finish_transfers(connector: OffloadingConnector) -> None:
    """Worker: submit the stores that wait for the next step, and return when every transfer has ended.

    No thread of the worker reads the KV cache before the next step.
    """
    side = connector.connector_worker
    if side is not None and side.worker is not None:
        side.start_kv_transfers(OffloadingConnectorMetadata({}, {}))
        side.worker.hold_late_start()
        side.worker.wait_for_all()


class EngineBlocks:
    """Reads the scheduler's block table and pool, and what the stock scheduler side has copied of them."""

    def __init__(self, connector: OffloadingConnector) -> None:
        self._connector = connector

    def table(self, req_id: str) -> tuple[list[int], ...]:
        """See store_proof.EngineBlocks."""
        manager = self._connector._kv_cache_manager
        assert manager is not None, "vLLM did not call bind_kv_cache_manager"
        table: tuple[list[int], ...] = manager.get_block_ids(req_id)
        return table

    def copied(self, req_id: str) -> dict[int, list[int]]:
        """See store_proof.EngineBlocks."""
        scheduler = self._connector.connector_scheduler
        status = None if scheduler is None else scheduler._req_status.get(req_id)
        if scheduler is None or status is None:
            return {}
        groups = zip(scheduler.config.kv_group_configs, status.group_states, strict=True)
        return {group.group_idx: state.block_ids for group, state in groups}

    def nothing_cached(self) -> bool:
        """Return True if vLLM's own prefix cache is empty."""
        manager = self._connector._kv_cache_manager
        return manager is not None and not len(manager.block_pool.cached_block_hash_to_block)

    def pool_hash(self, block_id: int) -> bytes | None:
        """See store_proof.EngineBlocks."""
        manager = self._connector._kv_cache_manager
        return None if manager is None else manager.block_pool.blocks[block_id].block_hash

    def allocated(self) -> set[int]:
        """See store_proof.EngineBlocks."""
        scheduler = self._connector.connector_scheduler
        return set() if scheduler is None else scheduler._current_batch_allocated_block_ids


def boundary_states(step: SchedulerOutput) -> dict[str, list[tuple[int, int, int]]]:
    """Return the recurrent states that the scheduler hands over in this step: request -> (group, block, end in tokens)."""
    state = step.kv_connector_block_state
    return {} if state is None else state.boundary_state_offloads


def drop_stale_state(connector: OffloadingConnector, request: Request, scheduled_anew: bool = False) -> bool:
    """Make the stock side forget what no longer holds for a request. Return True if a streaming-input session goes on.

    A streaming-input session drops its last sampled token, and with it a block hash that the stock side may have copied. When
    it goes on, vLLM sends all its block ids `scheduled_anew`, and the stock side would append them to those it has.
    """
    scheduler = connector.connector_scheduler
    status = None if scheduler is None else scheduler._req_status.get(request.request_id)
    if scheduler is None or status is None:
        return False
    goes_on = scheduled_anew and any(state.block_ids for state in status.group_states)
    for group, state in zip(scheduler.config.kv_group_configs, status.group_states, strict=True):
        if scheduled_anew:
            state.block_ids.clear()
        drop_stale_keys(state.offload_keys, request.block_hashes, group.hashes_per_chunk, group.group_idx)
        state.next_stored_chunk_idx = min(state.next_stored_chunk_idx, len(state.offload_keys))
    return goes_on


def repair_hashes(request: Request) -> bool:
    """Compute the request's block hashes anew. Return True if they were not those of its tokens.

    vLLM before 0.32 keeps the hash of a block whose last token it dropped when a streaming-input session went on. It names
    that block and all later ones by tokens that they do not hold.
    """
    known = list(request.block_hashes)
    request.block_hashes.clear()
    request.update_block_hashes()
    return bool(request.block_hashes[: len(known)] != known)


def drop_stale_keys(
    keys: list[OffloadKey],  # one per chunk, in sequence order; shortened in place
    hashes: Sequence[bytes],  # the request's present ones
    hashes_per_chunk: int,
    group_id: int,
) -> list[OffloadKey]:
    """Remove the keys of chunks that the request no longer has, and return them. Hashes are chained, so they are a tail."""
    removed = []
    while keys:
        last = len(keys) * hashes_per_chunk - 1
        if last < len(hashes) and make_offload_key(hashes[last], group_id) == keys[-1]:
            break
        removed.append(keys.pop())
    return removed


def attention_backends(vllm_config: VllmConfig) -> dict[str, str]:
    """Return layer -> class of its backend, for every layer with KV or a state. Only workers have layers."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    backends = {name: layer.get_attn_backend() for name, layer in layers.items()}
    return {name: f"{backend.__module__}.{backend.__qualname__}" for name, backend in backends.items()}


def cpu_instruction_sets(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> set[str]:
    """Return the instruction sets for which vLLM's CPU backend packs the pages of attention groups on this machine."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype, cache_dtype = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)]
    attention = [spec for spec in specs if isinstance(spec, AttentionSpec)]
    machine = platform.machine()
    return {f"{machine}:{_get_attn_isa(dtype, spec.block_size, spec.head_size, cache_dtype)}" for spec in attention} | {
        machine
    }


def packing_environment() -> dict[str, str]:
    """Return the variables of vLLM's environment that change what a page's bytes mean."""
    return {name: str(getattr(envs, name, None)) for name in PACKING_VARIABLES}
