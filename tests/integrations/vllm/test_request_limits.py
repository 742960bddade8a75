"""How much one request may load and store: `max_load_tokens` and `max_offload_tokens` of its `kv_transfer_params`."""

from __future__ import annotations

from typing import Any

import pytest

from kvkern.integrations.vllm import shim
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def limited(engine: Engine, tokens: list[int], **limits: int) -> tuple[int, tuple[int, ...]]:
    """Return (cached tokens, the reply)."""
    params: Any = engine.params(4)
    params.extra_args = {"kv_transfer_params": limits}
    (output,) = engine.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    return output.num_cached_tokens or 0, tuple(output.outputs[0].token_ids)


@pytest.mark.skipif(
    not shim.FEATURES.load_limit,
    reason="this vLLM has no limit of loads (RequestOffloadState has no field `max_load_tokens`)",
)
def test_a_request_loads_no_more_than_it_may(engine: Engine) -> None:
    text = prompt(700, 31)
    first = engine.one(text)
    for limit, cached in ((0, 0), (31, 0), (320, 320), (5000, 672)):
        engine.reset_native()
        assert limited(engine, text, max_load_tokens=limit) == (cached, first.tokens)


def test_a_request_stores_no_more_than_it_may(engine: Engine) -> None:
    text = prompt(700, 32)
    limited(engine, text, max_offload_tokens=320)
    engine.reset_native()
    assert engine.one(text).cached_tokens == 320
