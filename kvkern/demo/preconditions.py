"""Checks that must pass before an engine starts: packages are installed, and the size of the model's KV cache is known.

The checks take milliseconds. Without them the same faults would show minutes later.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

PACKAGES = ("vllm", "torch", "tokenizers", "safetensors", "matplotlib")


class NotReadyError(RuntimeError):
    """Something that the demo needs is missing. The message names the remedy."""


def require_packages() -> None:
    """Raise NotReadyError if a package is not installed. Imports none of them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise NotReadyError(
            f"These packages of the demo are not installed: {', '.join(missing)}. Run `make demo`, or "
            f"`pip install 'kvkern[demo,vllm]'` on a GPU host."
        )


def kv_nbytes_per_token(
    folder: Path,  # a model folder with a config.json
    dtype_nbytes: int,  # 2 for bf16, 4 for float32
) -> int:
    """Return the size of one token's keys and values in all layers of a plain attention model."""
    try:
        whole = json.loads((folder / "config.json").read_text())
        config = whole.get("text_config", whole)
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return 2 * int(config["num_hidden_layers"]) * kv_heads * head_dim * dtype_nbytes
    except FileNotFoundError:
        raise NotReadyError(f"{folder} has no config.json. Give --model a folder with a Hugging Face model.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotReadyError(
            f"{folder}/config.json does not describe an attention model: {error!r}. Give --model another folder."
        ) from error
