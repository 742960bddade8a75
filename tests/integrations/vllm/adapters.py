"""Random LoRA adapters for the models of `engine.py`, in the files of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
OPTIONS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}  # of an engine that serves them


def write_adapter(folder: Path, seed: int) -> str:
    """Write an adapter of query and value projections. Returns the folder's path."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for name, width in (("q_proj", 128), ("v_proj", 64)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            tensors[f"{prefix}A.weight"] = torch.randn(RANK, 128, generator=random) * 0.3
            tensors[f"{prefix}B.weight"] = torch.randn(width, RANK, generator=random) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)
