"""Checks that must pass before an engine starts: packages are installed, and the model is one that the demo can ask.

The checks take milliseconds. Without them the same faults would show minutes later.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "torch", "tokenizers", "safetensors", "matplotlib")
WEIGHTS = ("*.safetensors", "*.bin")


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


@dataclass(frozen=True)
class ModelFacts:
    """What config.json says of a plain attention model, as far as the demo needs it."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    context_tokens: int  # longest sequence that the model was made for

    @classmethod
    def read(
        cls,
        folder: Path,  # a model folder with a config.json
    ) -> ModelFacts:
        """Raises NotReadyError if there is no config.json, or if it describes another kind of model."""
        try:
            return cls.of(json.loads((folder / "config.json").read_text()))
        except FileNotFoundError:
            raise NotReadyError(
                f"{folder} has no config.json. Give --model a folder with a Hugging Face model."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise NotReadyError(
                f"{folder}/config.json does not describe an attention model: {error!r}. Give --model another folder."
            ) from error

    @classmethod
    def of(cls, whole: dict[str, Any]) -> ModelFacts:
        """Take the facts from a parsed config.json. Raises KeyError, TypeError or ValueError for another kind of model."""
        config = whole.get("text_config", whole)
        heads, hidden = (
            int(_first(config, "num_attention_heads", "n_head")),
            int(_first(config, "hidden_size", "n_embd")),
        )
        return cls(
            layers=int(_first(config, "num_hidden_layers", "n_layer")),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            hidden=hidden,
            intermediate=int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
            context_tokens=int(_first(config, "max_position_embeddings", "n_positions")),
        )

    def kv_nbytes_per_token(self, dtype_nbytes: int) -> int:
        """Return the size of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_nbytes

    @property
    def num_weights(self) -> int:
        """Return how many weights a token is multiplied with, without the vocabulary's: one token per prompt sees those."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def flops(self, num_tokens: int) -> float:
        """Return the floating-point operations of a prompt that is computed from its first token."""
        attention = 2 * self.layers * self.heads * self.head_dim * num_tokens**2
        return 2.0 * self.num_weights * num_tokens + attention


def kv_nbytes_per_token(
    folder: Path,  # a model folder with a config.json
    dtype_nbytes: int,  # 2 for bf16, 4 for float32
) -> int:
    """Return the size of one token's keys and values in all layers of a plain attention model."""
    return ModelFacts.read(folder).kv_nbytes_per_token(dtype_nbytes)


def require_files(folder: Path) -> None:
    """Raise NotReadyError if the model's folder has no weights, or no tokenizer that the demo can read."""
    if not (folder / "tokenizer.json").is_file():
        raise NotReadyError(
            f'{folder} has no tokenizer.json. If it has another tokenizer, convert it: python -c "from transformers import '
            f"AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise NotReadyError(
            f"{folder} has no weights: the demo looks for {' and '.join(WEIGHTS)}. Give --model another folder."
        )


def _first(config: dict[str, Any], *names: str) -> Any:
    """Return the value of the first name that the configuration has. Raises KeyError with the usual name if it has none."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise KeyError(names[0])
