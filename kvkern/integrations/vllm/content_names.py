"""Tells whether vLLM's block hashes name what a request computes. If not, the request is neither stored nor loaded.

tokens               always
images, audio, ...   by a digest of their content. Not by an identifier that the client chose, and not by the number that
                     vLLM gives an item when it does not hash: another engine gives the same one to another item
prompt embeddings    by a digest of their bytes, which shows neither their dtype nor which positions are tokens. A token's
                     position is hashed as token and a row of zeros, and an embedding's position as token 0 and its row
"""

from __future__ import annotations

import re
from typing import Any

from . import shim

_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{128}")  # of blake3, sha256 and sha512
_WIDE_DTYPES = ("torch.float32",)  # another dtype has another number of bytes per row, unless it is the model's own


class ContentNames:
    """Judges the requests of one engine."""

    def __init__(self, vllm_config: shim.VllmConfig) -> None:
        model = vllm_config.model_config
        media = getattr(model, "multimodal_config", None)
        self._dtypes = (*_WIDE_DTYPES, str(model.dtype))
        self._numbers_media = (
            media is not None and not media.mm_processor_cache_gb and not vllm_config.cache_config.enable_prefix_caching
        )

    def name(self, request: shim.Request) -> bool:
        """Return True if equal block hashes mean equal KV. Says once why they do not."""
        reason = self._flaw(request)
        if reason:
            shim.logger.warning_once("kvkern: requests with %s are computed and not cached.", reason)
        return not reason

    def _flaw(self, request: shim.Request) -> str:
        if request.mm_features and self._numbers_media:
            return (
                "images or other media, which vLLM only numbers when prefix caching is off and mm_processor_cache_gb is 0 (set "
                "mm_processor_cache_gb to 1)"
            )
        if not all(_DIGEST.fullmatch(_identifier(feature)) for feature in request.mm_features or ()):
            return "media that a client named by a text of its own (name them by a SHA-256 of their content, or not at all)"
        embeds = getattr(request, "prompt_embeds", None)
        if embeds is None:
            return ""
        if getattr(request, "prompt_is_token_ids", None) is not None:
            return "prompt embeddings among tokens"
        if str(embeds.dtype) not in self._dtypes:
            return f"prompt embeddings of another dtype than {' or '.join(self._dtypes)}"
        if not bool(embeds.any(dim=1).all()):
            return "prompt embeddings with a row of zeros"
        return ""


def _identifier(feature: Any) -> str:
    """Return the name of a medium, without the name of a LoRA adapter in front of it."""
    return str(getattr(feature, "mm_hash", None) or feature.identifier)
