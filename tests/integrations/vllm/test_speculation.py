"""N-gram speculation with every kind of KV group: a conversation is stored while drafts are accepted and rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.triton_utils import HAS_TRITON

from tests.integrations.vllm.engine import Engine, build_model, prompt
from tests.integrations.vllm.rounds import Answer, answer_of, check_rounds

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def repeating(length: int, seed: int) -> list[int]:
    """A prompt that repeats itself, so that there is something to propose."""
    part = prompt(23, seed)
    return (part * (length // 23 + 1))[:length]


@pytest.mark.parametrize("kind", ["sliding", "recurrent"])  # full attention: test_sessions.py and test_pressure.py
def test_a_conversation(kind: str, tmp_path: Path) -> None:
    if kind == "recurrent" and not HAS_TRITON:
        pytest.skip("vLLM keeps the states of rejected drafts with Triton kernels, and this platform has none")
    model = build_model(kind, tmp_path / kind)
    with Engine(model, num_gpu_blocks_override=200, speculative_config=NGRAM) as engine:
        drafted, accepted = _count_drafts(engine)

        def talk() -> Answer:
            """Three turns, each behind the reply to the one before. In the second most drafts are accepted."""
            said, answers = repeating(150, 1), []
            for turn, allowed in enumerate((None, [7, 9], None)):
                sampling = engine.params(70)
                sampling.allowed_token_ids = allowed
                (output,) = engine.llm.generate([{"prompt_token_ids": said}], sampling, use_tqdm=False)
                engine.settle()
                answers.append(answer_of([output]))
                said = said + list(output.outputs[0].token_ids) + prompt(17 + turn, 100 + turn)
            return Answer(tuple(a.tokens for a in answers), tuple(x for a in answers for x in a.logprobs))

        check_rounds(engine, talk, 4)
        assert drafted[0] > 100
        assert 0 < accepted[0] < drafted[0]


def _count_drafts(engine: Engine) -> tuple[list[int], list[int]]:
    drafted, accepted = [0], [0]
    original = engine.scheduler.make_spec_decoding_stats

    def counting(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any) -> Any:
        drafted[0] += num_draft_tokens
        accepted[0] += num_accepted_tokens
        return original(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

    engine.scheduler.make_spec_decoding_stats = counting
    return drafted, accepted
