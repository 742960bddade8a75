"""The demo's engine: a vLLM engine with or without kvkern. Knows vLLM's arguments; knows nothing of what is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .messages import WARM_UP_TOKENS, Answer, EngineSpec
from .standalone_engine import StandaloneEngine

if TYPE_CHECKING:
    from collections.abc import Sequence


def engine_kwargs(spec: EngineSpec) -> dict[str, Any]:
    """Return the arguments of vLLM's `EngineArgs` and `LLM`, except the connector."""
    return {
        "model": spec.model,
        "dtype": spec.dtype,
        "kv_cache_memory_bytes": spec.kv_pool_nbytes,
        "block_size": spec.block_tokens,
        "max_model_len": spec.max_model_tokens,
        "max_num_batched_tokens": spec.max_batched_tokens,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "seed": 0,
    }


def kvkern_transfer_config(spec: EngineSpec) -> Any:
    """Return the `KVTransferConfig` that puts kvkern into vLLM, or None for vLLM alone."""
    if spec.kvkern_capacity is None and spec.kvkern_socket is None:
        return None
    from ..integrations.vllm import kv_transfer_config

    if spec.kvkern_socket is not None:
        return kv_transfer_config(socket=spec.kvkern_socket)
    options: dict[str, Any] = {} if spec.kvkern_policy is None else {"policy": spec.kvkern_policy}
    return kv_transfer_config(spec.kvkern_capacity, **options)


class Engine(StandaloneEngine):
    """Owns the spec's vLLM engine with its processes until `close()`. One request at a time."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(engine_kwargs(spec), kvkern_transfer_config(spec))

    def warm_up(self, library_tokens: Sequence[int], salt: str | None = None) -> None:
        """Run two short requests: the first one in a process pays seconds for set-up inside torch and oneDNN."""
        for num_tokens in WARM_UP_TOKENS:
            self.ask("warm_up", "warm_up", library_tokens[:num_tokens], 2, salt)

    def ask(
        self, case: str, prompt_id: str, prompt: Sequence[int], reply_tokens: int, salt: str | None = None
    ) -> Answer:
        """Send one greedy request, wait for its end, and label the reply. See `StandaloneEngine.send`."""
        return Answer(case=case, prompt_id=prompt_id, **self.send(prompt, reply_tokens, salt)._asdict())
