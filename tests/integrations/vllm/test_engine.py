"""One real engine and all that can happen to requests: hits, replies, preemption, aborts, resets, broken bytes."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

from kvkern.integrations.vllm import never_hits, shim
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_hit_equals_native_hit_and_recompute(engine: Engine) -> None:
    recompute, native, hit = engine.three_ways(prompt(700, 1))
    assert (recompute.cached_tokens, native.cached_tokens, hit.cached_tokens) == (0, 672, 672)
    assert hit.tokens == native.tokens == recompute.tokens
    assert hit.logprobs == native.logprobs == recompute.logprobs  # float32: bit for bit


def test_longer_prompt_loads_the_shared_prefix(engine: Engine) -> None:
    text = prompt(600, 2)
    engine.one(text[:320])
    engine.reset_native()
    extended = engine.one(text)
    assert extended.cached_tokens == 320
    engine.reset_everything()
    assert extended.tokens == engine.one(text).tokens


def test_load_goes_on_where_the_native_hit_ends(engine: Engine) -> None:
    text = prompt(700, 3)
    first = engine.one(text)
    engine.reset_native()
    engine.one(text[:200])  # vLLM holds 192 tokens again, kvkern all
    again = engine.one(text)
    assert again.cached_tokens == 672
    assert again.tokens == first.tokens


def test_replies_are_stored(engine: Engine) -> None:
    question = prompt(150, 4)
    answer = engine.one(question, tokens=200)
    engine.reset_native()
    turn = question + list(answer.tokens) + prompt(50, 5)
    reply = engine.one(turn)
    assert reply.cached_tokens > len(question) + 100
    engine.reset_everything()
    assert reply.tokens == engine.one(turn).tokens


def test_new_prompts_miss(engine: Engine) -> None:
    before = engine.cache.counters.hit_chunks
    replies = engine.run([prompt(300, seed) for seed in range(10, 18)])
    assert [reply.cached_tokens for reply in replies] == [0] * 8
    assert engine.cache.counters.hit_chunks == before
    assert engine.cache.counters.hit_ratio <= 1


def test_preemption_keeps_the_tokens(engine: Engine) -> None:
    """Eight requests need 8 * 500 tokens in a pool of 40 * 32. vLLM preempts requests and later loads their computed chunks."""
    texts = [prompt(300, seed) for seed in range(20, 28)]
    preemptions = _count_preemptions(engine)
    together = engine.run(texts, tokens=200)
    assert preemptions[0] > 0
    engine.reset_everything()
    for text, reply in zip(texts, together, strict=True):
        assert engine.one(text, tokens=200).tokens == reply.tokens
    engine.settle()
    assert engine.accounted()


def _count_preemptions(engine: Engine) -> list[int]:
    count = [0]
    original = engine.scheduler._preempt_request

    def counting(*args: object, **kwargs: object) -> object:
        count[0] += 1
        return original(*args, **kwargs)

    engine.scheduler._preempt_request = counting
    return count


def test_priority_and_shared_prefix_under_load(engine: Engine) -> None:
    """Requests of different priority share a prefix. They are loaded and computed at the same time."""
    prefix = prompt(256, 30)
    texts = [prefix + prompt(100, 31 + i) for i in range(8)]
    engine.one(prefix)
    engine.reset_native()
    replies = engine.run(texts, tokens=40, priority=[7 - i for i in range(8)])
    assert all(reply.cached_tokens >= 256 for reply in replies)
    engine.reset_everything()
    for text, reply in zip(texts, replies, strict=True):
        assert engine.one(text, tokens=40).tokens == reply.tokens


def test_abort_during_load_leaks_nothing(engine: Engine) -> None:
    text = prompt(700, 40)
    engine.one(text)
    for seed in range(5):
        engine.reset_native()
        name = f"aborted-{seed}"
        llm_engine = engine.llm.llm_engine
        llm_engine.add_request(name, {"prompt_token_ids": text + prompt(8, seed)}, engine.params())
        engine.steps(lambda: bool(engine.scheduler.connector._transfers))  # the load has been submitted
        llm_engine.abort_request([r for r in engine.scheduler.requests if r.startswith(name)], internal=True)
        engine.steps(lambda: not engine.scheduler.requests)
        engine.settle()
        assert engine.accounted()
    assert engine.one(text).cached_tokens == 672


def test_reset_with_connector_forgets_everything(engine: Engine) -> None:
    text = prompt(700, 50)
    before = engine.one(text)
    engine.reset_everything()
    assert len(engine.dram) == 0
    after = engine.one(text)
    assert after.cached_tokens == 0
    assert after.tokens == before.tokens


def test_reset_while_stores_are_in_flight(engine: Engine) -> None:
    """The stock scheduler forgets its jobs. Their slots are freed only when the worker has flushed them."""
    engine.llm.llm_engine.add_request("r", {"prompt_token_ids": prompt(600, 51)}, engine.params(64))
    engine.steps(lambda: bool(engine.scheduler.connector._transfers))
    engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    assert engine.scheduler.connector._transfers  # quarantined
    engine.steps(lambda: not engine.scheduler.requests)
    engine.settle()
    assert engine.accounted()


@pytest.mark.parametrize("chunk", [0, 7, 20])
def test_one_flipped_byte_is_a_counted_miss(engine: Engine, chunk: int) -> None:
    text = prompt(700, 60 + chunk)
    first = engine.one(text)
    engine.reset_native()
    bad_before = engine.cache.counters.bad_chunks
    parts = engine.dram._arena.parts(0)
    slot = _slot_of_chunk(engine, chunk)
    parts[slot, 12345] ^= np.uint8(4)
    again = engine.one(text)
    assert again.tokens == first.tokens
    assert again.logprobs == first.logprobs
    assert engine.cache.counters.bad_chunks == bad_before + 1
    engine.reset_native()
    assert engine.one(text).cached_tokens == 672  # stored anew
    engine.settle()
    assert engine.accounted()


def _slot_of_chunk(engine: Engine, chunk: int) -> int:
    """After a reset one request's chunks are the only ones, indexed in sequence order."""
    return list(engine.dram._index.values())[chunk]


def test_overload_of_the_arena_evicts_and_stays_right(engine: Engine) -> None:
    """With more distinct chunks than slots no chunk is dropped, and every loaded chunk is right."""
    dram = engine.dram
    rounds = dram.num_slots // 20 + 3
    dropped = engine.cache.counters.dropped_chunks
    first = engine.one(prompt(700, 100))
    for seed in range(101, 101 + rounds):
        engine.one(prompt(700, seed), tokens=1)
    assert engine.cache.counters.evicted_chunks > 0
    assert engine.cache.counters.dropped_chunks == dropped
    engine.reset_native()
    assert engine.one(prompt(700, 100)).tokens == first.tokens


def test_no_prompt_content_in_logs(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    text = [498] * 700
    with caplog.at_level(logging.DEBUG, logger="kvkern"), caplog.at_level(logging.DEBUG, logger="vllm.kvkern"):
        engine.one(text)
        engine.reset_native()
        engine.one(text)
    assert not any("498" in r.getMessage() for r in caplog.records if "kvkern" in r.name)


def test_cache_salt_separates_tenants(engine: Engine) -> None:
    text = prompt(700, 70)
    salted = {"prompt_token_ids": text, "cache_salt": "tenant-a"}
    engine.llm.generate([salted], engine.params(), use_tqdm=False)
    engine.reset_native()
    assert engine.one(text).cached_tokens == 0
    engine.reset_native()
    other = engine.llm.generate([{**salted, "cache_salt": "tenant-b"}], engine.params(), use_tqdm=False)[0]
    assert not other.num_cached_tokens
    engine.reset_native()
    assert engine.llm.generate([salted], engine.params(), use_tqdm=False)[0].num_cached_tokens == 672


def test_a_request_that_waits_counts_once(engine: Engine) -> None:
    """It waits for blocks for 300 steps, in each of which vLLM asks for its chunks."""
    text, llm_engine = prompt(384, 81), engine.llm.llm_engine
    engine.one(text)
    engine.reset_native()
    llm_engine.add_request("long", {"prompt_token_ids": prompt(700, 82)}, engine.params(300))
    engine.steps(lambda: len(engine.scheduler.running) == 1)
    before = engine.cache.counters.snapshot()
    llm_engine.add_request("waiting", {"prompt_token_ids": text}, engine.params())
    engine.steps(lambda: not engine.scheduler.requests)
    after = engine.cache.counters.snapshot()
    assert [after[name] - before[name] for name in ("lookup_chunks", "hit_chunks")] == [12, 12]


def test_a_line_says_that_nothing_hits(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(never_hits, "LINE_S", 0.0)
    shim.logger.addHandler(caplog.handler)
    try:
        engine.run([prompt(100, 900 + number) for number in range(12)])
    finally:
        shim.logger.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records if "none was served" in record.getMessage()]
    assert lines  # the reason is judged by tests/integrations/vllm/test_notices.py
    assert lines[0].startswith("kvkern: 10 requests have asked for cached chunks, and none was served. ")


def test_stores_without_slots_are_offered_again_without_a_warning(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a daemon's slots are on their way: nothing is lost, and vLLM neither warns nor counts a failure."""
    texts, answers = [prompt(300, 83 + number) for number in range(4)], itertools.cycle([0, 0, 0, 5, 99])
    monkeypatch.setattr(engine.cache, "room", lambda wanted: min(len(wanted), next(answers)) if wanted else 0)
    stock = logging.getLogger("vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler")
    stock.addHandler(caplog.handler)
    try:
        first = engine.run(texts, 20)
    finally:
        stock.removeHandler(caplog.handler)
    assert "cannot store" not in caplog.text
    engine.reset_native()
    again = engine.run(texts, 20)
    assert [reply.cached_tokens for reply in again] == [288] * 4
    assert [reply.tokens for reply in again] == [reply.tokens for reply in first]


def test_hits_are_counted(engine: Engine) -> None:
    text = prompt(700, 80)
    engine.one(text)
    engine.reset_native()
    counters = engine.cache.counters
    before = counters.hit_chunks
    assert engine.one(text).cached_tokens == 672
    assert counters.hit_chunks == before + 21
    assert 0 < counters.hit_chunks <= counters.lookup_chunks
