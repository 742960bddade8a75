"""What kvkern relies on in vLLM, and the self-test that a release which no test has seen must pass.

    names         what shim.py and ../vllm_plugin.py import, read from their own source
    calls         functions that kvkern calls or wraps, with the parameters that it passes
    implements    methods that kvkern overrides, read from its own classes: each takes what vLLM passes
    reads         attributes that kvkern reads or sets, also private ones

A self-test sees names and parameters, not what the code behind them does. So a release that passes it gets a warning.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from .surface import Surface, describe, methods_of

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_OFF = f"{_V1}.offloading"
_KV = "vllm.v1.kv_offload"
_CONNECTOR = f"{_V1}.offloading_connector:OffloadingConnector"
_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory"
_LORA = "vllm.lora.worker_manager:WorkerLoRAManager"
CONFIGURATION = "vllm.config:VllmConfig"
SOURCES = (Path(__file__).with_name("shim.py"), Path(__file__).parent.with_name("vllm_plugin.py"))

# Classes from which kvkern derives. All their methods are described.
BASES = (
    _CONNECTOR,
    f"{_V1}.base:KVConnectorHandshakeMetadata",
    f"{_OFF}.common:OffloadingConnectorMetadata",
    f"{_OFF}.common:OffloadingWorkerMetadata",
    f"{_KV}.base:LoadStoreSpec",
    f"{_KV}.base:OffloadingManager",
    f"{_KV}.base:OffloadingSpec",
    f"{_KV}.base:OffloadingWorker",
)

# Parameters that kvkern passes, in this order; `name=` by name.
CALLS = {
    f"{_CONNECTOR}.get_finished": "self finished_req_ids",
    f"{_FACTORY}.register_connector": "name module_path class_name",
    _LORA + "._load_adapter": "self lora_request",
    _LORA + ".list_adapters": "self",
    _LORA + ".set_active_adapters": "self requests mapping",
    f"{_OFF}.common:OffloadingConnectorMetadata": "load_jobs store_jobs jobs_to_flush",
    f"{_OFF}.common:OffloadingWorkerMetadata": "completed_jobs transfer_stats",
    f"{_OFF}.config:build_offloading_config": "vllm_config kv_cache_config",
    f"{_OFF}.metrics:OffloadingConnectorStats.increase_counter": "self counter_name counter_increase_value labelvalues",
    f"{_OFF}.metrics:OffloadingConnectorStats.observe_histogram": "self histogram_name histogram_value labelvalues",
    f"{_OFF}.metrics:OffloadingConnectorStats.set_gauge": "self gauge_name gauge_value labelvalues",
    f"{_OFF}.metrics:OffloadingConnectorStats.is_empty": "self",
    f"{_OFF}.worker:OffloadingConnectorWorker.start_kv_transfers": "self metadata",
    f"{_V1}.base:KVConnectorTransferResults": "finished_sending finished_recving failed_recving",
    f"{_KV}.base:OffloadingCounterMetadata": "documentation= labelnames=",
    f"{_KV}.base:OffloadingGaugeMetadata": "documentation= labelnames=",
    f"{_KV}.base:OffloadingHistogramMetadata": "documentation= labelnames= buckets=",
    f"{_KV}.base:PrepareStoreOutput": "keys_to_store store_spec evicted_keys",
    f"{_KV}.base:RequestOffloadingContext": "",
    f"{_KV}.base:TransferResult": "job_id success transfer_size transfer_time",
    f"{_KV}.base:get_offload_group_idx": "key",
    f"{_KV}.base:make_offload_key": "block_hash group_idx",
    "vllm.config:KVTransferConfig": "kv_connector= kv_connector_module_path= kv_role= kv_load_failure_policy= "
    "kv_connector_extra_config=",
    "vllm.config:get_current_vllm_config_or_none": "",
    "vllm.config:get_layers_from_vllm_config": "vllm_config layer_type",
    "vllm.logger:init_logger": "name",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_attn_backend": "self",
    "vllm.v1.attention.backends.cpu_attn:_get_attn_isa": "dtype block_size head_size kv_cache_dtype",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids": "self request_id",
    "vllm.v1.kv_cache_interface:iter_layer_specs": "kv_cache_spec",
    "vllm.v1.request:Request.is_finished": "self",
    "vllm.v1.request:Request.update_block_hashes": "self",
}

READS = {
    _CONNECTOR: "connector_scheduler connector_worker _connector_metadata _kv_cache_config _kv_cache_manager _vllm_config",
    _FACTORY: "_registry",
    f"{_OFF}.common:TransferJob": "req_id src_spec dst_spec",
    f"{_OFF}.common:OffloadingWorkerMetadata": "completed_jobs transfer_stats",
    f"{_OFF}.scheduler:GroupOffloadConfig": "group_idx hashes_per_chunk",
    f"{_OFF}.scheduler:OffloadingConnectorScheduler": "_current_batch_allocated_block_ids _req_status config manager",
    f"{_OFF}.scheduler:RequestGroupState": "block_ids next_stored_chunk_idx offload_keys",
    f"{_OFF}.scheduler:RequestOffloadState": "group_states",
    f"{_OFF}.scheduler:SchedulerOffloadConfig": "kv_group_configs",
    f"{_OFF}.worker:OffloadingConnectorWorker": "worker",
    f"{_KV}.base:CanonicalKVCacheRef": "page_size_bytes tensor_idx",
    f"{_KV}.base:CanonicalKVCacheTensor": "tensor",
    f"{_KV}.base:CanonicalKVCaches": "group_data_refs tensors",
    f"{_KV}.base:GPULoadStoreSpec": "block_ids block_indices group_sizes",
    f"{_KV}.base:LookupResult": "HIT MISS RETRY",
    f"{_KV}.base:OffloadingSpec": "blocks_per_chunk config offload_prompt_only tokens_per_hash",
    f"{_KV}.base:PrepareStoreOutput": "keys_to_store store_spec",
    f"{_KV}.base:ReqContext": "req_id",
    f"{_KV}.base:ScheduleEndContext": "new_req_ids",
    f"{_KV}.config:OffloadingCacheConfig": "blocks_per_chunk tokens_per_hash",
    f"{_KV}.config:OffloadingConfig": "cache engine_id extra_config groups kv_cache_layout model parallel "
    "worker_kv_bytes_per_block",
    f"{_KV}.config:OffloadingGroupConfig": "group_id layer_names tokens_per_block",
    f"{_KV}.config:OffloadingModelConfig": "dtype",
    f"{_KV}.config:OffloadingParallelConfig": "pp_size rank tp_size world_size",
    "vllm.config:CacheConfig": "cache_dtype prefix_caching_hash_algo",
    "vllm.config:DeviceConfig": "device_type",
    "vllm.config:KVTransferConfig": "engine_id kv_connector kv_connector_extra_config kv_load_failure_policy kv_role",
    "vllm.config:LoadConfig": "load_format",
    "vllm.config:ModelConfig": "dtype enable_sleep_mode hf_config max_model_len model revision seed tokenizer "
    "tokenizer_revision trust_remote_code",
    "vllm.config:ParallelConfig": "data_parallel_index data_parallel_size decode_context_parallel_size "
    "distributed_executor_backend nnodes pipeline_parallel_size prefill_context_parallel_size world_size",
    "vllm.config:SpeculativeConfig": "draft_model_config index_share_for_mtp_iteration kv_cache_dtype method parallel_drafting",
    CONFIGURATION: "attention_config cache_config device_config diffusion_config instance_id kv_transfer_config load_config "
    "lora_config model_config parallel_config speculative_config",
    "vllm.config.attention:AttentionConfig": "backend hisparse_config",
    "vllm.lora.request:LoRARequest": "is_3d_lora_weight load_inplace lora_int_id lora_name lora_path",
    "vllm.v1.core.block_pool:BlockPool": "blocks cached_block_hash_to_block",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "block_pool",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": "block_hash",
    "vllm.v1.core.sched.output:KVConnectorBlockState": "boundary_state_offloads",
    "vllm.v1.core.sched.output:NewRequestData": "req_id",
    "vllm.v1.core.sched.output:SchedulerOutput": "finished_req_ids kv_connector_block_state num_scheduled_tokens "
    "scheduled_new_reqs scheduled_spec_decode_tokens total_num_scheduled_tokens",
    "vllm.v1.kv_cache_interface:AttentionSpec": "block_size head_size",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec",
    "vllm.v1.kv_cache_interface:MambaSpec": "mamba_cache_mode",
    "vllm.v1.outputs:KVConnectorOutput": "failed_recving kv_connector_worker_meta",
    "vllm.v1.request:Request": "block_hashes cache_salt kv_transfer_params lora_request num_computed_tokens "
    "num_output_tokens num_prompt_tokens num_tokens output_token_ids request_id session_id status",
    "vllm.v1.request:RequestStatus": "FINISHED_STOPPED",
}


def imports(paths: Iterable[Path] = SOURCES) -> Iterator[tuple[str, str, bool]]:
    """Yield (module, name, whether the code works without it) of all that these files import from vLLM."""
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tried = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "vllm":
                yield from ((node.module, alias.name, id(node) in tried) for alias in node.names)


def describe_vllm() -> Surface:
    """Describe the vLLM that is imported."""
    names: dict[str, set[str]] = {}
    for module, name, _ in imports():
        names.setdefault(module, set()).add(name)
    reads = {path: names.split() for path, names in READS.items()}
    return describe(names, CALLS, BASES, reads, CONFIGURATION)


def differences(
    surface: Surface,
    classes: Iterable[type] = (),  # kvkern's classes that derive from vLLM's
) -> list[str]:
    """Return what kvkern relies on and `surface` does not have, a sentence each."""
    return [
        *_missing_names(surface),
        *_missing_parameters(surface),
        *_missing_attributes(surface),
        *(difference for ours in classes for difference in _unlike(ours, surface)),
    ]


def _missing_names(surface: Surface) -> Iterator[str]:
    for module, name, optional in imports():
        if not optional and name not in surface.names.get(module, ()):
            yield f"{module} has no {name}"


def _missing_parameters(surface: Surface) -> Iterator[str]:
    for path, passed in CALLS.items():
        if (taken := surface.functions.get(path)) is None:
            yield f"{path} does not exist"
        elif not _takes(taken, passed.split()):
            yield f"{path} takes ({', '.join(taken)}), and kvkern passes ({', '.join(passed.split())})"


def _takes(taken: list[str], passed: list[str]) -> bool:
    """Return True if a call with these arguments binds, and every parameter gets what it is named for."""
    by_position = [name for name in passed if not name.endswith("=")]
    by_name = {name.rstrip("=") for name in passed if name.endswith("=")}
    names = [name.rstrip("=") for name in taken]
    if names[: len(by_position)] != by_position:
        return False
    rest = taken[len(by_position) :]
    required = {name for name in rest if not name.endswith("=") and not name.startswith("*")}
    return required <= by_name <= {name.rstrip("=") for name in rest}


def _missing_attributes(surface: Surface) -> Iterator[str]:
    for path, wanted in READS.items():
        if (there := surface.attributes.get(path)) is None:
            yield f"{path} does not exist"
        else:
            yield from (f"{path} has no {name}" for name in wanted.split() if name not in there)


def _unlike(ours: type, surface: Surface) -> Iterator[str]:
    """Yield what vLLM would pass to a class's methods and they do not take, and methods that it lacks."""
    methods = methods_of(ours)
    for base in (f"{base.__module__}:{base.__qualname__}" for base in ours.__mro__[1:]):
        if base not in BASES:
            continue
        if (theirs := surface.bases.get(base)) is None:
            yield f"{base} does not exist"
            continue
        yield from (f"{base}.{name} is abstract" for name in surface.abstract[base] if name not in methods)
        for name, passed in theirs.items():
            if name in methods and _is_called_by_vllm(ours, name) and not _accepts(methods[name], passed):
                yield f"{base}.{name} takes ({', '.join(passed)}), and kvkern's takes ({', '.join(methods[name])})"


def _is_called_by_vllm(ours: type, name: str) -> bool:
    """Return True unless kvkern builds the object itself. vLLM builds connectors and specs."""
    return name != "__init__" or ours.__name__ in ("KvkernConnector", "KvkernSpec")


def _accepts(ours: list[str], theirs: list[str]) -> bool:
    """Return True if `ours` can be called in each way in which `theirs` can, and gets the same arguments by name."""
    if ours[-2:] == ["*args", "**kwargs"]:
        ours, theirs = ours[:-2], theirs[: len(ours) - 2]
    if len(ours) < len(theirs):
        return False
    same = all(own in (given, given + "=") for own, given in zip(ours, theirs, strict=False))
    return same and all(name.endswith("=") or name.startswith("**") for name in ours[len(theirs) :])
