"""One question, asked of an empty cache, of vLLM's own, of kvkern's, and of broken chunks: the answers must be the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integrations.vllm.engine import Engine

TOLERANCE = 1e-4  # of log-probabilities: a batch of another size may round differently


@dataclass(frozen=True)
class Answer:
    """What an engine said. The tokens are compared exactly."""

    tokens: Any
    logprobs: tuple[float, ...] = ()

    def check_same(self, other: Answer) -> None:
        assert self.tokens == other.tokens
        assert self.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


def check_rounds(
    engine: Engine,
    ask: Callable[[], Answer],
    chunks: int,  # at least so many are loaded
) -> Answer:
    """Ask five times: a miss, a native hit, a hit, a flipped byte in every chunk, and a hit on what was computed anew."""
    counters = engine.cache.counters

    def hits_of(ask: Callable[[], Answer]) -> tuple[Answer, int]:
        before = counters.hit_chunks
        answer = ask()
        engine.settle()
        return answer, counters.hit_chunks - before

    engine.reset_everything()
    computed, hits = hits_of(ask)
    assert hits == 0
    native, hits = hits_of(ask)
    assert hits < chunks  # vLLM itself never hits the last block of a prompt of whole blocks
    native.check_same(computed)
    engine.reset_native()
    loaded, hits = hits_of(ask)
    assert hits >= chunks
    loaded.check_same(native)
    engine.reset_native()
    bad = counters.bad_chunks
    assert engine.flip_bytes() >= chunks
    again, hits = hits_of(ask)
    assert counters.bad_chunks > bad
    again.check_same(computed)
    engine.reset_native()
    stored_anew, hits = hits_of(ask)
    assert hits >= chunks
    stored_anew.check_same(computed)
    assert engine.accounted()
    return computed


def answer_of(outputs: Any) -> Answer:  # what LLM.generate returns, with log-probabilities
    """Return all completions of all prompts."""
    completions = [completion for output in outputs for completion in output.outputs]
    return Answer(
        tuple(tuple(completion.token_ids) for completion in completions),
        tuple(
            step[token].logprob
            for completion in completions
            for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ),
    )
