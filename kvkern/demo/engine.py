"""One real vLLM engine behind three verbs: ask, forget, close. Knows vLLM; knows nothing of what is measured.

Imports vLLM when opened, so only engine processes pay for it.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from .messages import Answer, EngineSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

TOP_LOGPROBS = 5
FORGET_LIMIT_S = 30.0
EXTERNAL_HITS = "vllm:external_prefix_cache_hits"


class EngineBusy(RuntimeError):
    """vLLM would not drop its prefix cache: blocks stay in use."""


def engine_kwargs(spec: EngineSpec) -> dict[str, Any]:
    """Return the arguments of vLLM's `EngineArgs` and `LLM`, but for the connector."""
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


def connector(spec: EngineSpec) -> Any:
    """Return the `KVTransferConfig` that puts kvkern into vLLM, or None for vLLM alone."""
    if spec.kvkern_capacity is None and spec.kvkern_socket is None:
        return None
    from ..integrations.vllm import kv_transfer_config

    if spec.kvkern_socket is not None:
        return kv_transfer_config(socket=spec.kvkern_socket)
    options: dict[str, Any] = {} if spec.kvkern_policy is None else {"policy": spec.kvkern_policy}
    return kv_transfer_config(spec.kvkern_capacity, **options)


class Engine:
    """Owns a vLLM engine with its processes until `close()`. One request at a time."""

    def __init__(self, spec: EngineSpec) -> None:
        from vllm import LLM

        self._llm = LLM(**engine_kwargs(spec), kv_transfer_config=connector(spec), disable_log_stats=False)
        self._serial = itertools.count()

    def warm_up(self, library_tokens: Sequence[int], salt: str | None = None) -> None:
        """Run two short requests: the first one in a process pays seconds for set-up inside torch and oneDNN."""
        for num_tokens in (16, 256):
            self.ask("warm_up", "warm_up", library_tokens[:num_tokens], 2, salt)

    def ask(
        self,
        case: str,
        prompt_id: str,
        prompt: Sequence[int],  # tokens
        reply_tokens: int,
        salt: str | None = None,  # a tenant of its own: meets nobody else's blocks or chunks
    ) -> Answer:
        """Send one greedy request and wait for its end. The clock starts when vLLM gets the request."""
        hits_before = self._external_hits()
        sent: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            sent["cache_salt"] = salt
        final, ttft_s = self._run(sent, _greedy(reply_tokens))
        reply = final.outputs[0]
        return Answer(
            case=case,
            prompt_id=prompt_id,
            prompt_tokens=len(prompt),
            cached_tokens=final.num_cached_tokens or 0,
            loaded_tokens=self._external_hits() - hits_before,
            ttft_s=ttft_s,
            tokens=tuple(reply.token_ids),
            logprobs=tuple(_ranked(position) for position in reply.logprobs),
        )

    def forget(self) -> None:
        """Empty vLLM's own prefix cache; kvkern keeps what it has. Raises `EngineBusy` after 30 s of refusals."""
        deadline_s = time.monotonic() + FORGET_LIMIT_S
        while not self._llm.reset_prefix_cache():  # refused while a store still reads blocks
            if time.monotonic() > deadline_s:
                raise EngineBusy(f"vLLM refused to reset its prefix cache for {FORGET_LIMIT_S:.0f} s: blocks in use")
            time.sleep(0.02)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, prompt: Any, params: Any) -> tuple[Any, float]:
        """Return the request's last output and the seconds to its first token."""
        engine = self._llm.llm_engine
        outputs: list[Any] = []
        ttft_s = 0.0
        sent_s = time.perf_counter()
        rendered = self._llm.renderer.render_cmpl([prompt])[0]
        engine.add_request(str(next(self._serial)), rendered, params)
        while engine.has_unfinished_requests():
            outputs += engine.step()
            if outputs and not ttft_s:
                ttft_s = time.perf_counter() - sent_s
        return outputs[-1], ttft_s

    def _external_hits(self) -> int:
        return sum(int(metric.value) for metric in self._llm.get_metrics() if metric.name == EXTERNAL_HITS)


def _greedy(reply_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=reply_tokens, ignore_eos=True, logprobs=TOP_LOGPROBS)


def _ranked(position: dict[int, Any]) -> tuple[tuple[int, float], ...]:
    pairs = ((token, entry.logprob) for token, entry in position.items())
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
