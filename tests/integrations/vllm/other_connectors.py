"""Connectors beside kvkern in MultiConnector, whose loads fail or wait if a test wants it. vLLM imports them in workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    ReqMeta,
)

# names of files in the folder of prompts
FAIL = "loads-fail"  # while it is there, loads write noise and are reported
HOLD = "loads-wait"  # while it is there, loads do not begin


class FailingConnector(ExampleConnector):
    """vLLM's ExampleConnector, which loads within the step that computes with what it has loaded."""

    _invalid: frozenset[int] = frozenset()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load, or spoil the blocks of the load."""
        if not (Path(self._storage_path) / FAIL).exists():
            super().start_load_kv(forward_context, **kwargs)
            return
        loads = [request for request in self._get_connector_metadata().requests if not request.is_store]
        invalid = {int(slot) // self._block_size for load in loads for slot in load.slot_mapping}
        for cache in _caches(forward_context).values():
            cache[torch.tensor(sorted(invalid), dtype=torch.int64)] = 7.0
        self._invalid |= invalid

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Report each failed block once."""
        invalid, self._invalid = set(self._invalid), frozenset()
        return invalid


@dataclass
class AsyncMetadata(ExampleConnectorMetadata):
    """The loads that begin with a step, by request, beside the stores of the step."""

    loads: dict[str, ReqMeta] = field(default_factory=dict)


class AsyncConnector(ExampleConnector):
    """Loads between steps: the request waits until its load is reported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loads: dict[str, ReqMeta] = {}  # scheduler: since the last step; worker: not done yet
        self._done: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As ExampleConnector, but the load takes its time."""
        found, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found, bool(found)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the load."""
        if num_external_tokens:
            tokens, block_ids = list(request.prompt_token_ids), blocks.get_block_ids()[0]
            self._loads[request.request_id] = ReqMeta.make_meta(tokens, block_ids, self._block_size, False, [])

    def build_connector_meta(self, scheduler_output: Any) -> AsyncMetadata:
        """Return the stores of the step, and the new loads."""
        loads, self._loads = self._loads, {}
        return AsyncMetadata(super().build_connector_meta(scheduler_output).requests, loads)

    def start_load_kv(self, forward_context: Any, **_kwargs: Any) -> None:
        """Load what waits, if it is let."""
        self._loads |= self._get_connector_metadata().loads
        if (Path(self._storage_path) / HOLD).exists():
            return
        for load in self._loads.values():
            blocks, offsets = load.slot_mapping // self._block_size, load.slot_mapping % self._block_size
            for name, cache in _caches(forward_context).items():
                file = Path(self._generate_filename_debug(name, load.token_ids, []))
                cache[blocks, :, offsets] = safetensors.torch.load_file(file)["kv_cache"]
        self._done |= self._loads.keys()
        self._loads.clear()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Report each load once."""
        done, self._done = self._done, set()
        return None, done or None


def _caches(forward_context: Any) -> dict[str, torch.Tensor]:
    """Return the KV of every layer that has some."""
    layers = forward_context.no_compile_layers.items()
    return {name: layer.kv_cache for name, layer in layers if getattr(layer, "kv_cache", None) is not None}
