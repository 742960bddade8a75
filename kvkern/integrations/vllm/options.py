"""What a user may say in `kv_connector_extra_config`, what it defaults to, and what is refused by name at start."""

from __future__ import annotations

import os
from typing import Any

from ...config import Config, reject_unknown
from ...errors import ConfigError, UnsupportedError
from . import shim

MODULE = "kvkern.integrations.vllm"
OPTIONS_KEY = "kvkern"
SPEC_NAME = "KvkernSpec"
# vLLM's own keys of kv_connector_extra_config that keep their meaning
_VLLM_KEYS = {"spec_name", "spec_module_path", "block_size", "blocks_per_chunk", "offload_prompt_only"}
_HASHES = ("sha256", "sha256_cbor")


def kv_transfer_config(
    capacity: str | int | None = None, blocks_per_chunk: int = 1, **options: Any
) -> shim.KVTransferConfig:
    """The `kv_transfer_config` argument of `vllm.LLM`; options are those of `kvkern.config.Config`: capacity or socket."""
    if capacity is not None:
        options["capacity"] = capacity
    return shim.KVTransferConfig(
        kv_connector="KvkernConnector",
        kv_connector_module_path=MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "blocks_per_chunk": blocks_per_chunk,
            OPTIONS_KEY: options,
        },
    )


def parse_options(extra_config: Any) -> Config:
    """Config of `kv_connector_extra_config["kvkern"]`. Raises ConfigError for keys nobody knows."""
    reject_unknown(extra_config, _VLLM_KEYS | {OPTIONS_KEY}, "kv_connector_extra_config")
    options = extra_config.get(OPTIONS_KEY)
    if not isinstance(options, dict):
        raise ConfigError(
            f"kv_connector_extra_config[{OPTIONS_KEY!r}] is {options!r}; expected an object such as "
            f'{{"kvkern": {{"capacity": "8GiB"}}}} or {{"kvkern": {{"socket": "/run/kvkern.sock"}}}}'
        )
    config = Config.parse(options, f"kv_connector_extra_config[{OPTIONS_KEY!r}]")
    if config.hbm_nbytes:
        raise ConfigError(
            "hbm is set, but vLLM's own prefix cache is the tier above DRAM: leave hbm out, and give vLLM the memory "
            "(--gpu-memory-utilization)"
        )
    prompt_only = extra_config.get("offload_prompt_only")
    if prompt_only is not None and "store_replies" in options and bool(prompt_only) == config.store_replies:
        raise ConfigError(
            f"offload_prompt_only={prompt_only} and store_replies={config.store_replies} contradict; give one of them"
        )
    return config


def refuse_unshareable(config: Config, vllm_config: shim.VllmConfig) -> None:
    """Raise for what an engine of its own may do, but engines on one daemon may not.

    vLLM would name blocks differently in every process, so nothing would be shared; it names adapters by name and path,
    so that one trained anew would be given the old one's KV.
    """
    if config.socket and vllm_config.lora_config is not None:
        raise UnsupportedError(
            "LoRA is on, and vLLM tells adapters apart by name and path, not by content: with a cache that outlives the "
            "engine a changed adapter would load the old one's KV; use `capacity` instead of `socket`"
        )
    if config.socket and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ConfigError(
            "PYTHONHASHSEED is not set, so vLLM names blocks differently in every engine and nothing would be shared; "
            "start every engine of this cache with the same one, for example PYTHONHASHSEED=0"
        )


def fill_defaults(vllm_config: shim.VllmConfig) -> None:
    """Name our spec, so that users need not. Idempotent."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra.setdefault("spec_name", SPEC_NAME)
    extra.setdefault("spec_module_path", MODULE)


def refuse_unsupported(vllm_config: shim.VllmConfig) -> None:
    """Raise for what would be served wrongly or not at all, before anything is allocated."""
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: a chunk that fails its checksum would fail "
            f'the request; set "kv_load_failure_policy": "recompute"'
        )
    if transfer.kv_role != "kv_both":
        raise ConfigError(f'kv_role is {transfer.kv_role!r}; kvkern stores and loads: set "kv_role": "kv_both"')
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in _HASHES:
        raise UnsupportedError(
            f"prefix_caching_hash_algo is {algorithm!r}, which is not collision resistant; use {' or '.join(_HASHES)}"
        )
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
        "nnodes": parallel.nnodes,
    }
    for name, size in sizes.items():
        if size > 1:
            raise UnsupportedError(
                f"{name} is {size}; kvkern supports tensor parallelism on one node only, set it to 1"
            )
    if parallel.distributed_executor_backend not in ("mp", "uni"):
        raise UnsupportedError(
            f"distributed_executor_backend is {parallel.distributed_executor_backend!r}: its workers may run on other "
            f"nodes, which share no memory; use 'mp'"
        )
    spec = transfer.kv_connector_extra_config.get("spec_name", SPEC_NAME)
    if spec != SPEC_NAME:
        raise ConfigError(f"spec_name is {spec!r}; leave it out, KvkernConnector brings its own")
    if vllm_config.model_config.enable_sleep_mode:  # vLLM has it on GPUs only
        raise UnsupportedError(
            "enable_sleep_mode is set: vLLM takes the GPU's memory away without waiting for transfers that are queued, and one "
            "of them would end the engine; leave it out"
        )
    if vllm_config.attention_config.hisparse_config is not None:
        raise UnsupportedError("HiSparse keeps part of the KV cache on the host already; kvkern does not support it")
