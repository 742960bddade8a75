"""Streaming-input sessions, speculation and asynchronous scheduling: a later prompt is never served KV of other tokens."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from kvkern.integrations.vllm import shim
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

# Without it vLLM's own cache names the block of a dropped token wrongly, and kvkern stores nothing from then on.
FORGETS_HASHES = "del session.block_hashes" in inspect.getsource(Scheduler._update_request_as_session)


def _prompts_after(engine: Engine, name: str, rng: random.Random) -> list[list[int]]:
    """Run a random session. Return what it computed, with and without the tokens that it dropped, a few tokens longer."""
    lengths = [rng.choice([17, 31, 32, 33, 40, 63, 64, 95]) for _ in range(rng.randint(2, 3))]
    parts = [(prompt(n, rng.randrange(10**6)), rng.choice([1, 1, 2, 5, 9, 40])) for n in lengths]
    replies = engine.session(name, parts, stop_token_ids=[rng.randrange(3, 512) for _ in range(60)])
    tokens: list[int] = []
    asked = []
    for (part, _), reply in zip(parts, replies, strict=True):
        asked.append(tokens + part + reply + prompt(9, 7))
        tokens = tokens + part + reply[:-1]
    return [*asked, tokens + prompt(9, 7)]


def _check(engine: Engine, asked: list[list[int]], least_hits: int, stopped: bool = False) -> None:
    """Compare each prompt's reply after a load with the reply of an empty cache. `stopped`: kvkern stores nothing any more."""
    engine.settle()
    assert engine.scheduler.connector._manager._stores_nothing == stopped
    loaded = []
    for tokens in asked:
        engine.reset_native()
        loaded.append(engine.one(tokens, 6))
    engine.reset_everything()
    for tokens, reply in zip(asked, loaded, strict=True):
        alone = engine.one(tokens, 6)
        assert (alone.cached_tokens, alone.tokens) == (0, reply.tokens), f"{reply.cached_tokens} tokens were loaded"
        engine.reset_everything()
    assert stopped or sum(reply.cached_tokens > 0 for reply in loaded) >= least_hits
    engine.settle()
    assert engine.accounted()


def _check_flipped(engine: Engine, text: list[int], asked: list[int]) -> None:
    """Break every chunk: a session that goes on, and a prompt, are computed and equal."""
    parts = [(text[:64], 3), (text[64:], 3)]
    replies, alone = engine.session("whole", parts), engine.one(asked, 6)
    for name, broken in (("hit", False), ("broken", True)):
        engine.reset_native()
        bad, hits = engine.cache.counters.bad_chunks, engine.cache.counters.hit_chunks
        if broken:
            assert engine.flip_bytes() >= 4
        assert engine.session(name, parts) == replies
        assert engine.one(asked, 6).tokens == alone.tokens
        engine.settle()
        assert (engine.cache.counters.bad_chunks > bad) == broken
        assert (engine.cache.counters.hit_chunks > hits) != broken


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_prompt_after_a_session_gets_the_kv_of_its_own_tokens(llama: str, asynchronous: bool) -> None:
    rng = random.Random(5)
    with Engine(llama, async_scheduling=asynchronous) as engine:
        text = prompt(128, 1)
        engine.session("two whole blocks twice", [(text[:64], 1), (text[64:], 1)])
        dropped, _ = engine.session("a block that ends with a dropped token", [(text[:31], 1), (text[60:100], 1)])
        misnamed = text[:31] + dropped + text[61:100]
        asked = [[*text, 9], text[:31] + text[60:100] + [9], misnamed]
        _check(engine, asked, least_hits=2, stopped=not FORGETS_HASHES)
        asked = [tokens for i in range(5) for tokens in _prompts_after(engine, f"session {i}", rng)]
        _check(engine, asked, least_hits=12, stopped=not FORGETS_HASHES)
        _check_flipped(engine, text, asked[-1])


def test_speculation_stores_accepted_tokens_and_nothing_once_a_session_went_on(
    llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM 0.32 takes drafts behind the end of a reply for computed tokens when a session goes on: its own KV is wrong."""
    with Engine(llama, speculative_config=NGRAM, async_scheduling=False) as engine:
        question = (prompt(7, 2) * 30)[:200]
        forced: Any = engine.params(150)
        forced.allowed_token_ids = [7]  # drafts are accepted
        (output,) = engine.llm.generate([{"prompt_token_ids": question}], forced, use_tqdm=False)
        turn = question + list(output.outputs[0].token_ids) + prompt(20, 3)
        _check(engine, [turn], least_hits=1)
        assert engine.cache.counters.stored_chunks > 320 // 32
        shim.logger.addHandler(caplog.handler)
        try:
            for i in range(3):
                engine.session(f"s{i}", [(prompt(60, i), 61 + i), (prompt(41, i), 8)], allowed_token_ids=[7])
        finally:
            shim.logger.removeHandler(caplog.handler)
        engine.settle()
        stored = engine.cache.counters.stored_chunks
        engine.one(prompt(300, 9))
        engine.settle()
        assert engine.cache.counters.stored_chunks == stored
        said = {r.getMessage() for r in caplog.records if "stores nothing: a streaming-input session" in r.getMessage()}
        assert len(said) == 1
        engine.reset_everything()
        engine.one(prompt(300, 9))
        engine.settle()
        assert engine.cache.counters.stored_chunks == stored + 9
