"""Scheduler side of LoRA: the digest under which a request's KV is named, and what the workers say of it.

    a worker has loaded the adapter      the digest that it reported
    no worker has yet                    the digest of the files as they are now

The digest is a forecast. Every worker compares it with what it has loaded before it stores or loads a byte (adapter_loads.py).

Blocks of vLLM's own cache are named by the adapter's name and path, so they may be of an earlier content. A request that starts
from such blocks is cached only if the content has been the same since vLLM's cache was empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import shim
from .adapter_digest import AdapterDigests, AdapterUse, lora_settings


class AdapterNames:
    """Names the adapters of requests. Runs in the scheduler's thread."""

    def __init__(
        self,
        lora_config: Any,  # vLLM's LoRAConfig
        engine_cache_is_empty: Callable[[], bool],  # vLLM's own prefix cache
    ) -> None:
        self.settings = lora_settings(lora_config)
        # vLLM's cache of encoder outputs holds results of adapters then, and no reset of the prefix cache empties it
        self._always_shared = bool(getattr(lora_config, "enable_tower_connector_lora", False))
        self._digests = AdapterDigests()
        self._engine_cache_is_empty = engine_cache_is_empty
        self._reported: dict[int, str | None] = {}
        self._numbers: dict[tuple[str, str], set[int]] = {}  # (name, path) -> numbers since vLLM's cache was empty
        self._empty_since = 0  # step since which vLLM's cache holds only what later steps computed

    def use_of(
        self,
        request_id: str,
        request: shim.LoRARequest,
        step: int,  # the next step
    ) -> AdapterUse | None:
        """Return the adapter under which the request's KV is named. None: its content is not known."""
        self._note_reset(step)
        self._numbers.setdefault((request.lora_name, request.lora_path), set()).add(request.lora_int_id)
        if request.lora_int_id in self._reported and not request.load_inplace:
            digest = self._reported[request.lora_int_id]
        else:
            digest = self._digests.digest(request)
        return None if digest is None else AdapterUse(request_id, request, digest, step)

    def since(
        self,
        use: AdapterUse,
        step: int,  # the step that is being scheduled
        engine_tokens: int,  # tokens that vLLM's own cache gave the request
    ) -> int | None:
        """Return the first step that computed some of the request's KV. None: other adapters may have computed some."""
        self._note_reset(step)
        if not engine_tokens and not self._always_shared:
            return step
        name = use.request.lora_name, use.request.lora_path
        return self._empty_since if self._numbers.get(name, set()) <= {use.adapter_id} else None

    def note_loaded(self, adapters: dict[int, str | None]) -> None:
        """Take the workers' report."""
        self._reported |= adapters

    def _note_reset(self, step: int) -> None:
        if not self._always_shared and self._engine_cache_is_empty():
            self._empty_since = step
            self._numbers = {}
