"""One vLLM engine: sends a request, measures it, empties vLLM's prefix cache. Knows nothing of kvkern or the demo.

Needs only the standard library and vLLM. bench/_peers/engine_child.py loads this file by its path in environments of
rivals, so it must import nothing of kvkern. It imports vLLM when an engine is opened: only engine processes pay for that.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOP_LOGPROBS = 5
FORGET_LIMIT_S = 30.0
EXTERNAL_HITS = "vllm:external_prefix_cache_hits"  # vLLM's counter of tokens that a KV connector promised


class EngineBusyError(RuntimeError):
    """vLLM did not drop its prefix cache because its blocks stayed in use."""


class Reply(NamedTuple):
    """One greedy request and its answer."""

    prompt_tokens: int
    cached_tokens: int  # not computed: from vLLM's own cache and from the connector
    loaded_tokens: int  # of these, from the connector, by vLLM's counter
    ttft_s: float  # client's wall clock, from handing the request over to the first token
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]  # per token: the best five as (token, log-probability)


class StandaloneEngine:
    """Owns a vLLM engine with its processes until `close()`. One request at a time."""

    def __init__(
        self,
        arguments: Mapping[str, Any],  # of vLLM's `LLM`
        transfer: Any,  # vLLM's KVTransferConfig; None: no connector
    ) -> None:
        from vllm import LLM

        self._llm = LLM(**arguments, kv_transfer_config=transfer, disable_log_stats=False)
        self._request_ids = itertools.count()

    def send(
        self,
        prompt: Sequence[int],  # tokens
        reply_tokens: int,
        salt: str | None = None,  # requests with different salts never share blocks or chunks
    ) -> Reply:
        """Send one greedy request and wait for its end. The clock starts when vLLM gets the request."""
        loaded_before = self._loaded_tokens()
        vllm_prompt: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            vllm_prompt["cache_salt"] = salt
        output, ttft_s = self._run(vllm_prompt, reply_tokens)
        completion = output.outputs[0]
        return Reply(
            prompt_tokens=len(prompt),
            cached_tokens=output.num_cached_tokens or 0,
            loaded_tokens=self._loaded_tokens() - loaded_before,
            ttft_s=ttft_s,
            tokens=tuple(completion.token_ids),
            logprobs=tuple(_best_first(position) for position in completion.logprobs),
        )

    def forget(self) -> None:
        """Empty vLLM's own prefix cache; the connector keeps its chunks. Raises EngineBusyError after 30 s of refusals."""
        deadline_s = time.monotonic() + FORGET_LIMIT_S
        while not self._llm.reset_prefix_cache():  # vLLM refuses while a store still reads blocks
            if time.monotonic() > deadline_s:
                raise EngineBusyError(still_in_use())
            time.sleep(0.02)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, prompt: Any, reply_tokens: int) -> tuple[Any, float]:
        """Return the request's last output and the seconds to its first token."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=reply_tokens, ignore_eos=True, logprobs=TOP_LOGPROBS)
        engine = self._llm.llm_engine
        outputs: list[Any] = []
        ttft_s = 0.0
        sent_s = time.perf_counter()
        rendered = self._llm.renderer.render_cmpl([prompt])[0]
        engine.add_request(str(next(self._request_ids)), rendered, params)
        while engine.has_unfinished_requests():
            outputs += engine.step()
            if outputs and not ttft_s:
                ttft_s = time.perf_counter() - sent_s
        return outputs[-1], ttft_s

    def _loaded_tokens(self) -> int:
        return sum(int(metric.value) for metric in self._llm.get_metrics() if metric.name == EXTERNAL_HITS)


def still_in_use() -> str:
    """Return the message of an engine that does not forget."""
    return (
        f"vLLM refused to reset its prefix cache for {FORGET_LIMIT_S:.0f} s because blocks are in use. Wait until no request "
        f"and no transfer is running, then try again."
    )


def _best_first(position: dict[int, Any]) -> tuple[tuple[int, float], ...]:
    """Return the (token, log-probability) pairs of one position, the best first."""
    pairs = ((token, entry.logprob) for token, entry in position.items())
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
