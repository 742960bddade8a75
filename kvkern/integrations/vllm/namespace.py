"""Builds the namespace of a vLLM engine's KV: model, weights, layout, parallel sizes and the identity of its block hashes.

docs/vllm_fields.md judges every field of vLLM's configuration. Models are named by their content: equal weights in two folders,
or from the hub, have one name.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blake3 import blake3

from ...config import Config
from ...errors import ConfigError
from ...keys import Namespace, weights_fingerprint
from . import shim
from .judged_fields import named_values

_VOLATILE = ("_name_or_path", "transformers_version")
_MODEL_FREE = ("ngram", "ngram_gpu", "suffix")  # methods of speculation that have no KV of their own
# Positions are rotated by these without a look at max_model_len; "longrope" looks, and an unknown one may.
_ROPES = {
    "bailing_mrope", "deepseek_llama_scaling", "deepseek_yarn", "default", "dynamic", "linear", "llama3", "mllama4",
    "mrope", "ntk", "openpangu", "proportional", "yarn",
}  # fmt: skip
# vLLM's code of these models does not read max_model_len; tests/integrations/vllm/test_namespace.py looks.
LENGTH_FREE_ARCHITECTURES = {
    "CohereForCausalLM", "Cohere2ForCausalLM", "FalconForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Glm4ForCausalLM", "GPT2LMHeadModel", "GptOssForCausalLM", "GraniteForCausalLM",
    "GraniteMoeForCausalLM", "Lfm2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "Olmo2ForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
}  # fmt: skip


def resolve_weights(vllm_config: shim.VllmConfig, config: Config) -> str:
    """Return the `weights` field of the namespace. Reads files; call it once, at start."""
    return f"{_weights(vllm_config.model_config, config.weights)}:{_function(vllm_config)}"


def namespace_of(
    vllm_config: shim.VllmConfig, offload: shim.OffloadingConfig, config: Config, weights: str, packing: str
) -> Namespace:
    """Return the namespace of adopted keys. Call after the engine has started, because the hash seed is unknown before."""
    cache, parallel = offload.cache, offload.parallel
    tokens = {group.tokens_per_block for group in offload.groups}
    layers = sum(len(group.layer_names) for group in offload.groups)
    blocks = "+".join(str(size) for size in sorted(tokens))
    build = f"vllm-{shim.VLLM_VERSION}:{packing}"
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    return Namespace(
        model=_model(vllm_config.model_config, config),
        weights=weights,
        dtype=offload.model.dtype,
        layout=f"{offload.kv_cache_layout}:{offload.worker_kv_bytes_per_block}:{layers}:{blocks}:{build}",
        chunk_tokens=max(tokens) * cache.blocks_per_chunk,
        group=None,  # the adopted key contains the group
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        salt=config.salt or None,
        engine_hash=f"{algorithm}:{shim.block_hash_seed().hex()}:{cache.tokens_per_hash}",
    )


def _model(model: shim.ModelConfig, config: Config) -> str:
    """Return a name for people. Weights that the user has named are told apart by the model's name too."""
    if config.weights:
        path = Path(model.model)
        return path.resolve().name if path.exists() else str(model.model)
    return "+".join(model.hf_config.architectures or [model.hf_config.model_type])


def _weights(model: shim.ModelConfig, given: str) -> str:
    """Return the identity of the weights: the user's name, or a fingerprint of their files."""
    if given:
        return given
    path = Path(model.model)
    if not path.exists():
        path = _snapshot(model)
    code = blake3()
    if model.trust_remote_code and path.is_dir():  # a model may bring code of its own
        for file in sorted(path.rglob("*.py")):
            code.update(file.read_bytes())
        return f"{weights_fingerprint(path, shim.logger.info)}+{code.hexdigest()[:16]}"
    return weights_fingerprint(path, shim.logger.info)


def _snapshot(model: shim.ModelConfig) -> Path:
    """Return the folder of the local copy of a model of the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    if not isinstance(found, str):
        raise ConfigError(
            f"The files of the loaded model {model.model!r} cannot be found. "
            f'Set "weights" in the kvkern options to a name that changes with the weights.'
        )
    return Path(found).parent


def _function(vllm_config: shim.VllmConfig) -> str:
    """Hash everything but the weights that changes the function from tokens to KV."""
    model = vllm_config.model_config
    values: dict[str, Any] = {"model": _stable(model.hf_config.to_dict()), **named_values(vllm_config)}
    if _depends_on_length(model):
        values["max_model_len"] = model.max_model_len
    if str(vllm_config.load_config.load_format) == "dummy":  # the weights are random numbers
        values["seed"] = model.seed
    if (draft := _draft(vllm_config)) is not None:
        values["draft"] = draft
    if (processor := _processor(model)) is not None:
        values["processor"] = processor
    return blake3(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _processor(model: shim.ModelConfig) -> dict[str, str] | None:
    """Return what turns images and other media into tensors: settings in the model's folder, and libraries. None: text only.

    vLLM names an item by its content and the path of the model, whatever the folder holds there.
    """
    if model.multimodal_config is None:
        return None
    folder = _folder(model)
    found = {file.name: blake3(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*processor*.json"))}
    for package in ("transformers", "pillow", "torchvision"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _folder(model: shim.ModelConfig) -> Path:
    """Return the folder of the model's files."""
    path = Path(model.model)
    return path if path.is_dir() else path.parent if path.exists() else _snapshot(model)


def _stable(value: Any) -> Any:
    """Return a model's configuration without what its folder and its saver wrote into it."""
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in _VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _depends_on_length(model: shim.ModelConfig) -> bool:
    """Return True if KV may depend on max_model_len: LongRoPE, Llama 4's temperature, and whatever is not known."""
    architectures = set(model.hf_config.architectures or ())
    known = bool(architectures) and architectures <= LENGTH_FREE_ARCHITECTURES
    return not known or not _rope_types(model.hf_config.to_dict()) <= _ROPES


def _rope_types(value: Any, inside_rope: bool = False) -> set[str]:
    """Return the kinds of rotary embeddings that a model's configuration names, at any depth."""
    if not isinstance(value, dict):
        return set()
    found = {str(value[key]) for key in ("rope_type", "type") if key in value and (inside_rope or key == "rope_type")}
    for key, inner in value.items():
        found |= _rope_types(inner, inside_rope or "rope" in str(key))
    return found


def _draft(vllm_config: shim.VllmConfig) -> dict[str, Any] | None:
    """Return what names the draft model, whose KV lies in the same blocks. None: there is none."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in _MODEL_FREE:
        return None
    model = speculative.draft_model_config
    return {
        "method": str(speculative.method),
        "model": _stable(model.hf_config.to_dict()),
        "weights": _weights(model, ""),
        "quantization": str(model.quantization),
        "dtype": str(model.dtype),
        "kv_cache_dtype": str(speculative.kv_cache_dtype),
        "max_model_len": str(model.max_model_len),
        "index_share": str(speculative.index_share_for_mtp_iteration),
        "parallel_drafting": str(speculative.parallel_drafting),
    }
