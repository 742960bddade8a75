"""The options of `kv_connector_extra_config`: their defaults, and the vLLM settings that are refused by name at start."""

from __future__ import annotations

import os
from typing import Any

from ...config import Config, format_nbytes, reject_unknown
from ...errors import ConfigError, UnsupportedError
from ...remote.stores.url import hide_password
from ..vllm_variables import CONNECTOR, MODULE, OPTIONS_KEY, refuse_chunk_size
from . import shim
from .worker import SYNC_LOADS

SPEC_NAME = "KvkernSpec"
INSTANCE_KEY = "instance"  # names this start of the engine; `fill_defaults` sets it, users do not
SYNC_LOAD_KEY = "sync_load_budget_bytes"  # vLLM 0.33; 0 switches synchronous loads off
# vLLM's own keys of kv_connector_extra_config that keep their meaning
_VLLM_KEYS = {"spec_name", "spec_module_path", "block_size", "blocks_per_chunk", "offload_prompt_only", SYNC_LOAD_KEY}
_HASHES = ("sha256", "sha256_cbor")
_CHUNK_NAMES = "chunk_tokens (KVKERN_CHUNK_TOKENS, AIBRIX_LLM_KV_CACHE_CHUNK_SIZE)"


def kv_transfer_config(
    capacity: str | int | None = None, blocks_per_chunk: int = 1, **options: Any
) -> shim.KVTransferConfig:
    """Build the `kv_transfer_config` argument of `vllm.LLM`. Give capacity or `socket`; see `kvkern.config.Config`."""
    if capacity is not None:
        options["capacity"] = capacity
    return shim.KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "blocks_per_chunk": blocks_per_chunk,
            OPTIONS_KEY: options,
        },
    )


def parse_options(extra_config: Any) -> Config:
    """Parse `kv_connector_extra_config["kvkern"]`, and what KVKERN_* variables and the configuration file add to it.

    Raises ConfigError for unknown keys and values out of range.
    """
    refuse_sync_loads(extra_config.get(SYNC_LOAD_KEY, 0))
    given = {key: value for key, value in extra_config.items() if key != INSTANCE_KEY}
    reject_unknown(given, _VLLM_KEYS | {OPTIONS_KEY}, "kv_connector_extra_config")
    options = extra_config.get(OPTIONS_KEY, {})
    if not isinstance(options, dict):
        raise ConfigError(
            f"kv_connector_extra_config[{OPTIONS_KEY!r}] is no object. Give it one, such as "
            f'{{"kvkern": {{"capacity": "8GiB"}}}} or {{"kvkern": {{"socket": "/run/kvkern.sock"}}}}'
        )
    config = Config.resolve(options, f"kv_connector_extra_config[{OPTIONS_KEY!r}]")
    if hide_password(config.remote) != config.remote:
        shim.logger.warning_once(
            "kvkern: the URL in `remote` contains a password, and whoever lists this host's processes can read it. Take it out "
            "of the URL, and append ?password_file=PATH or ?password_env=NAME to the URL."
        )
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


def fill_chunk_size(vllm_config: shim.VllmConfig, kv_cache_config: shim.KVCacheConfig, config: Config) -> None:
    """Say in vLLM's own option how many blocks make a chunk of `chunk_tokens`. Idempotent.

    A `blocks_per_chunk` or `block_size` that the user has written counts instead. Raises ConfigError if a chunk would be no
    whole number of blocks.
    """
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    if not config.chunk_tokens or "blocks_per_chunk" in extra or "block_size" in extra:
        return
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    if len(sizes) > 1:
        raise ConfigError(
            f"chunk_tokens is {config.chunk_tokens}, but the KV groups of this model have blocks of {sorted(sizes)} tokens. "
            f"Leave chunk_tokens out (and unset the variable that sets it), and set blocks_per_chunk if you need to"
        )
    for block_tokens in sizes:
        refuse_chunk_size(config.chunk_tokens, block_tokens, _CHUNK_NAMES)
        extra["blocks_per_chunk"] = config.chunk_tokens // block_tokens


def refuse_sync_loads(
    budget: Any,  # bytes that vLLM may load within a step
) -> None:
    """Raise UnsupportedError unless vLLM's synchronous loads are off: they would serve a chunk that failed its checksum."""
    if budget != 0:
        raise UnsupportedError(f"{SYNC_LOAD_KEY} is {budget!r}. {SYNC_LOADS}")


def refuse_unshareable(config: Config, vllm_config: shim.VllmConfig) -> None:
    """Raise for settings that work with an embedded cache but not on a daemon: names of blocks that no other engine has."""
    if config.socket and not shim.HASH_SEED_IS_FIXED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ConfigError(
            f"PYTHONHASHSEED is not set, and vLLM {shim.VLLM_VERSION} then names blocks differently in every engine, so "
            f"nothing would be shared. Start every engine of this cache with the same seed, for example PYTHONHASHSEED=0."
        )


def refuse_data_parallel(config: Config, vllm_config: shim.VllmConfig) -> None:
    """Raise for an embedded cache in a data parallel rank. A rank of a dense model cannot know how many ranks there are."""
    parallel = vllm_config.parallel_config
    ending = f"_dp{parallel.data_parallel_index}"  # vLLM appends it to the engine id of a rank
    is_rank = parallel.data_parallel_size > 1 or str(vllm_config.kv_transfer_config.engine_id).endswith(ending)
    if not config.socket and is_rank:
        raise UnsupportedError(
            f"This engine is a data parallel rank, and every rank would take the whole capacity of "
            f"{format_nbytes(config.capacity_nbytes)} and share nothing with the others. Start one cache for all ranks, "
            f"`kvkern serve --capacity SIZE`, and give `socket` instead of `capacity`."
        )


def refuse_divided_states(recurrent_groups: list[int], blocks_per_chunk: int) -> None:
    """Raise for chunks of several blocks if vLLM offers the states of recurrent layers one block at a time.

    No chunk would ever be complete, so the engine would store the other groups' chunks and never load one.
    """
    if recurrent_groups and blocks_per_chunk > 1:
        raise UnsupportedError(
            f"blocks_per_chunk is {blocks_per_chunk}, and this model has recurrent layers. vLLM offers the state of such a "
            f"layer at the end of a block, so a chunk of several blocks would never be complete and nothing would be loaded. "
            f"Set blocks_per_chunk to 1, or leave it and block_size out."
        )


def is_outer(vllm_config: shim.VllmConfig, engine_config: shim.VllmConfig | None) -> bool:
    """Return True if `vllm_config` is not known to be a child's copy that MultiConnector made of the engine's configuration."""
    outer = None if engine_config is None else engine_config.kv_transfer_config
    return outer is None or outer is vllm_config.kv_transfer_config or outer.kv_connector == CONNECTOR


def refuse_outer(vllm_config: shim.VllmConfig, engine_config: shim.VllmConfig | None) -> None:
    """Raise for settings of a MultiConnector around kvkern. Its scheduler reads them from the outer configuration alone.

    `engine_config` is the engine's own configuration, which a connector inside MultiConnector sees in workers only.
    """
    if is_outer(vllm_config, engine_config):
        return
    assert engine_config is not None
    outer = engine_config.kv_transfer_config
    if outer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy of {outer.kv_connector} is {outer.kv_load_failure_policy!r}, and vLLM reads only this "
            f"one. With it a chunk that fails its checksum would fail the request. Set "
            f'"kv_load_failure_policy": "recompute" next to "kv_connector": "{outer.kv_connector}" too.'
        )
    children = [child.get("kv_connector") for child in outer.kv_connector_extra_config.get("connectors", ())]
    if children.count(CONNECTOR) > 1:
        raise ConfigError(
            f"{outer.kv_connector} has {CONNECTOR} {children.count(CONNECTOR)} times. Give it once, because both would be one "
            f"cache with one name."
        )


def fill_defaults(vllm_config: shim.VllmConfig) -> None:
    """Fill in the name of kvkern's spec, so that users need not give it, and the name of this start. Idempotent."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra.setdefault("spec_name", SPEC_NAME)
    extra.setdefault("spec_module_path", MODULE)
    if shim.FEATURES.sync_loads:
        extra.setdefault(SYNC_LOAD_KEY, 0)  # whatever vLLM's default is
    extra[INSTANCE_KEY] = vllm_config.instance_id  # vLLM passes one configuration to all processes of an engine


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
    if vllm_config.model_config.enable_sleep_mode and not shim.FEATURES.sleep_hooks:  # vLLM has it on GPUs only
        raise UnsupportedError(
            f"enable_sleep_mode is set. vLLM {shim.VLLM_VERSION} then frees the GPU's memory without waiting for queued "
            f"transfers, and such a transfer would end the engine. To use kvkern, leave it out, or use vLLM 0.33 or newer."
        )
    if vllm_config.model_config.is_encoder_decoder:
        raise UnsupportedError(
            "The model has an encoder and a decoder. Its cross attention keeps KV of what the encoder reads, which no token "
            "names. Run the engine without kvkern."
        )
    if vllm_config.diffusion_config is not None:
        raise UnsupportedError(
            "diffusion_config is set. Such a model computes the KV of a token several times before it accepts the token, and "
            "kvkern could store what was not accepted. Run the engine without kvkern."
        )
    if vllm_config.attention_config.hisparse_config is not None:
        raise UnsupportedError(
            "hisparse_config is set. HiSparse keeps a part of the KV cache on the host, which kvkern does not support. Leave "
            "hisparse_config out, or run the engine without kvkern."
        )
