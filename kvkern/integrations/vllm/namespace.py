"""Builds the namespace of a vLLM engine's KV: model, weights, layout, parallel sizes and the identity of its block hashes."""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3

from ...config import Config
from ...errors import ConfigError
from ...keys import Namespace, weights_fingerprint
from . import shim

_VOLATILE = ("_name_or_path", "transformers_version")


def _model_path(vllm_config: shim.VllmConfig) -> Path | None:
    path = Path(vllm_config.model_config.model)
    return path if path.exists() else None


def _weights(vllm_config: shim.VllmConfig, config: Config) -> str:
    """Return the identity of the weights: the user's name, a fingerprint of local files, or the hub's resolved revision."""
    if config.weights:
        return config.weights
    model = vllm_config.model_config
    if (path := _model_path(vllm_config)) is not None:
        return weights_fingerprint(path, progress=lambda line: shim.logger.info("kvkern: %s", line))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    if not isinstance(found, str):
        raise ConfigError(
            f"kvkern cannot find out the revision of the loaded model {model.model!r}. "
            f'Set "weights" in the kvkern options to a name that changes with the weights.'
        )
    return Path(found).parent.name  # snapshots/<commit>/config.json


def _architecture(vllm_config: shim.VllmConfig) -> str:
    """Hash the model's configuration, because rope scaling, quantisation and dtype change KV without changing weights."""
    model = vllm_config.model_config
    values = {k: v for k, v in model.hf_config.to_dict().items() if k not in _VOLATILE}
    values |= {"runtime_quantization": str(model.quantization), "runtime_dtype": str(model.dtype)}
    return blake3(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _packing(vllm_config: shim.VllmConfig) -> str:
    """Name the code that lays out a page. kvkern treats a page as opaque bytes, and another build may pack it differently."""
    return f"vllm-{shim.VLLM_VERSION}:{vllm_config.device_config.device_type}:{vllm_config.attention_config.backend}"


def resolve_weights(vllm_config: shim.VllmConfig, config: Config) -> str:
    """Return the `weights` field of the namespace. Reads files; call it once, at start."""
    return f"{_weights(vllm_config, config)}:{_architecture(vllm_config)}"


def namespace_of(
    vllm_config: shim.VllmConfig, offload: shim.OffloadingConfig, config: Config, weights: str
) -> Namespace:
    """Return the namespace of adopted keys. Call after the engine has started, because the hash seed is unknown before."""
    path = _model_path(vllm_config)
    cache, parallel = offload.cache, offload.parallel
    tokens = {group.tokens_per_block for group in offload.groups}
    layers = sum(len(group.layer_names) for group in offload.groups)
    blocks = "+".join(str(size) for size in sorted(tokens))
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    return Namespace(
        model=path.resolve().name if path else offload.model.name,
        weights=weights,
        dtype=offload.model.dtype,
        layout=f"{offload.kv_cache_layout}:{offload.worker_kv_bytes_per_block}:{layers}:{blocks}:{_packing(vllm_config)}",
        chunk_tokens=max(tokens) * cache.blocks_per_chunk,
        group=None,  # the adopted key contains the group
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        salt=config.salt or None,
        engine_hash=f"{algorithm}:{shim.block_hash_seed().hex()}:{cache.tokens_per_hash}",
    )
