"""Builds models for the demo and the benches: a Llama of random weights and a byte-level BPE tokenizer trained on local text.

Knows files, shapes and seeds; knows nothing of engines. Downloads nothing. Random weights cost an engine exactly as much
as trained weights do; only the replies make no sense. The module smollm2 has the real model.

    std(weight)   = init_std                               q.k spreads enough for attention to pick a few tokens,
    std(o, down)  = init_std / sqrt(2 * layers)            so a wrong KV block changes the reply
    std(lm_head)  = init_std                               top-1 and top-2 logits stay apart: greedy has no ties
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import corpus

if TYPE_CHECKING:
    import torch

FORMAT = 1  # part of the folder's name: raise it when the same config starts to give different files
TRAIN_CHARS = 1_500_000


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: by default 152 M parameters and 12 KiB of KV per token in bf16."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 12
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 64
    vocab_size: int = 8192
    max_tokens: int = 16384
    init_std: float = 0.05
    seed: int = 20

    def name(self) -> str:
        """Return the name of this model's folder. Two different configs never share a folder."""
        digest = hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()
        return f"llama-{self.num_layers}x{self.hidden_size}-{digest[:8]}"

    def hf_config(self) -> dict[str, object]:
        """Return the `config.json` that Hugging Face and vLLM read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_tokens,
            "rope_theta": 500_000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


# For comparing eviction policies where the demo's model is too slow: 13 M parameters, a tenth of the work per token.
SMALL = ModelConfig(hidden_size=384, intermediate_size=1024, num_layers=4, num_heads=6, num_kv_heads=2)


def ensure(
    config: ModelConfig,
    folder: Path,  # holds one subfolder per model
) -> Path:
    """Return the model's folder. Builds it on first use, atomically: no process ever sees a half-built model."""
    return ensure_folder(folder / config.name(), lambda building: _write(config, building))


def ensure_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """Return `target`, a model's folder. If it is not there, let `write` fill a folder that then takes its name."""
    if target.is_dir():
        return target
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        write(building)
        os.replace(building, target)
    except OSError:
        if not target.is_dir():  # otherwise another process finished the same model first
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _write(config: ModelConfig, folder: Path) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config.hf_config(), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    train_tokenizer(config.vocab_size, config.max_tokens, folder)
    save_file(dict(_weights(config)), folder / "model.safetensors", metadata={"format": "pt"})


def train_tokenizer(vocab_size: int, max_tokens: int, folder: Path) -> None:
    """Train a byte-level BPE on this Python's own text and write the files that Hugging Face reads."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    text = corpus.text(TRAIN_CHARS)
    tokenizer.train_from_iterator(
        text.splitlines(keepends=True), vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "model_max_length": max_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _weights(config: ModelConfig) -> "Iterator[tuple[str, torch.Tensor]]":
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    hidden, wide = config.hidden_size, config.intermediate_size
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    residual_std = config.init_std / (2 * config.num_layers) ** 0.5

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, std, generator=generator).to(torch.bfloat16)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    yield "model.embed_tokens.weight", normal(config.vocab_size, hidden, 1.0)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", ones.clone()
        yield f"{layer}.self_attn.q_proj.weight", normal(q_dim, hidden, config.init_std)
        yield f"{layer}.self_attn.k_proj.weight", normal(kv_dim, hidden, config.init_std)
        yield f"{layer}.self_attn.v_proj.weight", normal(kv_dim, hidden, config.init_std)
        yield f"{layer}.self_attn.o_proj.weight", normal(hidden, q_dim, residual_std)
        yield f"{layer}.post_attention_layernorm.weight", ones.clone()
        yield f"{layer}.mlp.gate_proj.weight", normal(wide, hidden, config.init_std)
        yield f"{layer}.mlp.up_proj.weight", normal(wide, hidden, config.init_std)
        yield f"{layer}.mlp.down_proj.weight", normal(hidden, wide, residual_std)
    yield "model.norm.weight", ones.clone()
    yield "lm_head.weight", normal(config.vocab_size, hidden, config.init_std)
