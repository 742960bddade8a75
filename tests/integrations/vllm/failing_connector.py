"""A connector beside kvkern in MultiConnector whose loads can be made to fail. vLLM imports it in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

FAIL = "loads-fail"  # name of a file in the folder of prompts; while it is there, loads write noise and are reported


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
        for layer in forward_context.no_compile_layers.values():
            if invalid and (cache := getattr(layer, "kv_cache", None)) is not None:
                cache[torch.tensor(sorted(invalid))] = 7.0
        self._invalid |= invalid

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Report each failed block once."""
        invalid, self._invalid = set(self._invalid), frozenset()
        return invalid
