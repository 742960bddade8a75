"""The options of `kv_connector_extra_config`: their defaults, and the vLLM settings that are refused by name at start."""

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
    """Build the `kv_transfer_config` argument of `vllm.LLM`. Give capacity or `socket`; see `kvkern.config.Config`."""
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
    """Parse `kv_connector_extra_config["kvkern"]`. Raises ConfigError for unknown keys and values out of range."""
    reject_unknown(extra_config, _VLLM_KEYS | {OPTIONS_KEY}, "kv_connector_extra_config")
    options = extra_config.get(OPTIONS_KEY)
    if not isinstance(options, dict):
        raise ConfigError(
            f"kv_connector_extra_config[{OPTIONS_KEY!r}] is {options!r}. Give it an object, such as "
            f'{{"kvkern": {{"capacity": "8GiB"}}}} or {{"kvkern": {{"socket": "/run/kvkern.sock"}}}}'
        )
    config = Config.parse(options, f"kv_connector_extra_config[{OPTIONS_KEY!r}]")
    if config.hbm_nbytes:
        raise ConfigError(
            f"hbm is {config.hbm_nbytes} bytes, but vLLM's own prefix cache is the tier above DRAM. Leave hbm out, and give "
            f"vLLM the memory (--gpu-memory-utilization)."
        )
    prompt_only = extra_config.get("offload_prompt_only")
    if prompt_only is not None and "store_replies" in options and bool(prompt_only) == config.store_replies:
        raise ConfigError(
            f"offload_prompt_only={prompt_only} and store_replies={config.store_replies} contradict each other. Give only "
            f"one of them."
        )
    return config


def refuse_unshareable(config: Config, vllm_config: shim.VllmConfig) -> None:
    """Raise for settings that work with an embedded cache but not on a daemon.

    Without PYTHONHASHSEED vLLM names blocks differently in every process, so engines would share nothing. And vLLM tells
    LoRA adapters apart by name and path, so a retrained adapter would be given the old one's KV.
    """
    if config.socket and vllm_config.lora_config is not None:
        raise UnsupportedError(
            f"LoRA is on, and socket is {config.socket!r}. vLLM tells adapters apart by name and path, not by content, and the "
            f"daemon's cache outlives the engine. So a changed adapter would load KV of the old one. "
            f"Use `capacity` instead of `socket`."
        )
    if config.socket and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ConfigError(
            "PYTHONHASHSEED is not set or is 'random', so vLLM names blocks differently in every engine and nothing would be "
            "shared. Start every engine of this cache with the same seed, for example PYTHONHASHSEED=0."
        )


def fill_defaults(vllm_config: shim.VllmConfig) -> None:
    """Fill in the name of kvkern's spec, so that users need not give it. Idempotent."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra.setdefault("spec_name", SPEC_NAME)
    extra.setdefault("spec_module_path", MODULE)


def refuse_unsupported(vllm_config: shim.VllmConfig) -> None:
    """Raise for settings under which kvkern would serve wrongly or not at all, before anything is allocated."""
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}, with which a chunk that fails its checksum would "
            f'fail the request. Set "kv_load_failure_policy": "recompute".'
        )
    if transfer.kv_role != "kv_both":
        raise ConfigError(f'kv_role is {transfer.kv_role!r}, but kvkern stores and loads. Set "kv_role": "kv_both".')
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in _HASHES:
        raise UnsupportedError(
            f"prefix_caching_hash_algo is {algorithm!r}, which is not collision resistant. Use {' or '.join(_HASHES)}."
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
                f"{name} is {size}, but kvkern supports tensor parallelism on one node only. Set {name} to 1."
            )
    if parallel.distributed_executor_backend not in ("mp", "uni"):
        raise UnsupportedError(
            f"distributed_executor_backend is {parallel.distributed_executor_backend!r}, whose workers may run on other nodes, "
            f"and nodes share no memory. Use 'mp'."
        )
    spec = transfer.kv_connector_extra_config.get("spec_name", SPEC_NAME)
    if spec != SPEC_NAME:
        raise ConfigError(f"spec_name is {spec!r}, but KvkernConnector brings its own spec. Leave spec_name out.")
    if vllm_config.model_config.enable_sleep_mode:  # vLLM has it on GPUs only
        raise UnsupportedError(
            "enable_sleep_mode is set. vLLM then frees the GPU's memory without waiting for queued transfers, and such a "
            "transfer would end the engine. To use kvkern, leave it out."
        )
    if vllm_config.attention_config.hisparse_config is not None:
        raise UnsupportedError(
            "hisparse_config is set. HiSparse keeps a part of the KV cache on the host, which kvkern does not support. Leave "
            "hisparse_config out, or run the engine without kvkern."
        )
