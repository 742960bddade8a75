"""What vLLM does with a request beside plain sampling: structured output, several replies, beams, log-probabilities of the
prompt. And its KV events. One engine, with a tokenizer of bytes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from tests.integrations.vllm.engine import BLOCK_TOKENS, VOCAB, Engine, build_model, prompt
from tests.integrations.vllm.rounds import Answer, answer_of, check_rounds

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]
TEXT = prompt(300, 1)
CHUNKS = 9
CITIES = ["Paris", "Rome", "Oslo"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}, "open": {"type": "boolean"}, "code": {"type": "string", "pattern": "^[A-F]{24}$"}},
    "required": ["city", "open", "code"],
    "additionalProperties": False,
}  # fmt: skip


def write_byte_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of exactly VOCAB tokens, trained on the source of a module."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(module) for module in (json, re, inspect)], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("bytes")
    build_model("llama", folder)
    write_byte_tokenizer(folder)
    options = {
        "skip_tokenizer_init": False,
        # a random model would write nothing else than blanks
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
    }
    with Engine(str(folder), **options) as running:
        yield running


def generate(engine: Engine, text: list[int] = TEXT, **params: Any) -> Any:
    sampling = SamplingParams(**{"max_tokens": 24, "temperature": 0, "logprobs": 1, **params})
    return engine.llm.generate([{"prompt_token_ids": text}], sampling, use_tqdm=False)


@pytest.mark.parametrize(
    "constraint",
    [{"json": SCHEMA}, {"regex": "(ab|cd){12}[0-9]{6}"}, {"choice": ["to be " * 6, "not to be"]}],
    ids=["json", "regex", "choice"],
)
def test_structured_output(engine: Engine, constraint: dict[str, Any]) -> None:
    texts = []

    def ask() -> Answer:
        outputs = generate(engine, max_tokens=120, structured_outputs=StructuredOutputsParams(**constraint))
        texts.append(outputs[0].outputs[0].text)
        return answer_of(outputs)

    check_rounds(engine, ask, CHUNKS)
    (text,) = set(texts)
    if "json" in constraint:
        reply = json.loads(text)
        assert reply["city"] in CITIES
        assert re.fullmatch("[A-F]{24}", reply["code"])
    else:
        assert re.fullmatch(constraint.get("regex") or "|".join(constraint["choice"]), text)


def test_several_replies_to_one_prompt(engine: Engine) -> None:
    """The prompt fits in one step: vLLM's CPU workers end when a prompt with a seed is computed in two."""
    params = {"n": 4, "temperature": 0.9, "seed": 5, "max_tokens": 60}
    answer = check_rounds(engine, lambda: answer_of(generate(engine, TEXT[:200], **params)), 6)
    assert len(set(answer.tokens)) == 4


def test_beam_search(engine: Engine) -> None:
    """Each step of a beam is a request of its own, whose prompt is the beam so far."""
    beams = BeamSearchParams(beam_width=3, max_tokens=40, temperature=0, ignore_eos=True)

    def ask() -> Answer:
        (output,) = engine.llm.beam_search([{"prompt_token_ids": TEXT}], beams)
        found = output.sequences
        return Answer(tuple(tuple(beam.tokens) for beam in found), tuple(beam.cum_logprob for beam in found))

    answer = check_rounds(engine, ask, CHUNKS)
    assert len(set(answer.tokens)) == 3
    assert {len(tokens) for tokens in answer.tokens} == {340}


def prompt_logprobs(output: Any) -> list[dict[int, float]]:
    """Return token -> log-probability for each token of the prompt. Nothing precedes the first one."""
    first, *others = output.prompt_logprobs
    assert first is None
    return [{token: entry.logprob for token, entry in entries.items()} for entries in others]


def test_log_probabilities_of_a_prompt_are_never_loaded(engine: Engine) -> None:
    """Its KV would be enough for the next token, but not for those of the prompt. vLLM computes all of it; so must kvkern."""
    engine.reset_everything()
    counters = engine.cache.counters

    def ask(**params: Any) -> tuple[list[dict[int, float]], Answer, int]:
        before = counters.hit_chunks
        (output,) = generate(engine, prompt_logprobs=2, **params)
        engine.settle()
        assert counters.hit_chunks == before
        return prompt_logprobs(output), answer_of([output]), output.num_cached_tokens or 0

    computed, answer, _ = ask()
    assert len(computed) == len(TEXT) - 1
    assert all(token in entries for token, entries in zip(TEXT[1:], computed, strict=True))
    for reset in (lambda: None, engine.reset_native, engine.reset_native):
        reset()
        again, same, cached = ask()
        assert (cached, again) == (0, computed)
        same.check_same(answer)
        engine.settle()
        engine.flip_bytes()  # the last round meets broken chunks, and does not look
    engine.reset_everything()
    ask()
    engine.reset_native()
    before = counters.hit_chunks
    answer.check_same(answer_of(generate(engine)))  # what it computed is stored, and others load it
    assert counters.hit_chunks == before + CHUNKS


def test_a_prompt_s_log_probabilities_where_vllm_may_read_its_cache(engine: Engine) -> None:
    """A client may ask for it. Then vLLM itself returns nothing usable for the tokens of a native hit, so kvkern loads none."""
    engine.reset_everything()
    (computed,) = generate(engine, prompt_logprobs=2)
    engine.reset_native()
    before = engine.cache.counters.hit_chunks
    (again,) = generate(engine, prompt_logprobs=2, skip_reading_prefix_cache=False)
    assert not again.num_cached_tokens
    assert engine.cache.counters.hit_chunks == before
    assert prompt_logprobs(again) == prompt_logprobs(computed)
    answer_of([again]).check_same(answer_of([computed]))


class Events:
    """Replays vLLM's KV events into a picture of its block pool."""

    def __init__(self, scheduler: Any) -> None:
        self._manager = scheduler.kv_cache_manager
        self.pool: dict[Any, BlockStored] = {}  # hash -> the event that stored the block
        self.tokens: dict[Any, tuple[int, ...]] = {}  # hash -> the tokens up to the block's end
        self.wrong: list[str] = []
        scheduler.kv_event_publisher.publish = lambda batch: self._take(batch.events)

    def _take(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.pool.clear()
            elif isinstance(event, BlockRemoved):
                self.wrong += [f"removed, but not there: {h}" for h in event.block_hashes if not self.pool.pop(h, None)]
            elif isinstance(event, BlockStored):
                self._store(event)
            else:
                self.wrong.append(f"unknown: {event}")

    def _store(self, event: BlockStored) -> None:
        if event.medium != "GPU":
            self.wrong.append(f"medium {event.medium}")
        parent = event.parent_block_hash
        if parent is not None and parent not in self.pool:
            self.wrong.append(f"stored below a parent that is not there: {parent}")
        before = () if parent is None else self.tokens.get(parent, ())
        for i, name in enumerate(event.block_hashes):
            before += tuple(event.token_ids[i * event.block_size : (i + 1) * event.block_size])
            if self.tokens.setdefault(name, before) != before:
                self.wrong.append(f"one name for several texts: {name}")
            self.pool[name] = event

    def check(self) -> None:
        """Compare the picture with the pool itself."""
        self._take(self._manager.take_events())
        held = self._manager.block_pool.cached_block_hash_to_block._cache
        assert {maybe_convert_block_hash(get_block_hash(key)) for key in held} == set(self.pool)
        assert not self.wrong

    def holds(self, text: list[int]) -> int:
        """Return how many tokens of a text's beginning the pool has, by the events."""
        held = {self.tokens[name] for name in self.pool}
        length = 0
        while tuple(text[: length + BLOCK_TOKENS]) in held:
            length += BLOCK_TOKENS
        return length


def test_kv_events_tell_what_vllms_pool_holds(engine: Engine) -> None:
    """A router learns from them which prompts an engine has. What was loaded is told like what was computed."""
    engine.reset_everything()
    engine.scheduler.kv_cache_manager.take_events()
    events = Events(engine.scheduler)
    first = engine.one(TEXT)
    events.check()
    assert events.holds(TEXT) == 288
    engine.reset_native()
    events.check()
    assert not events.pool
    assert engine.one(TEXT[:170]).cached_tokens == 160
    events.check()
    assert engine.one(TEXT).cached_tokens == 288  # 160 of vLLM's own, the rest from kvkern
    events.check()
    assert events.holds(TEXT) == 288
    engine.reset_native()
    engine.flip_bytes()
    core, waited = engine.llm.llm_engine, 0
    core.add_request("broken", {"prompt_token_ids": TEXT}, engine.params())
    while core.has_unfinished_requests():
        core.step()
        events.check()
        if any(request.status.name.startswith("WAITING") for request in engine.scheduler.requests.values()):
            waited += 1
            assert not events.pool  # a load that has not ended tells nothing, nor does one that failed
    assert waited
    assert events.holds(TEXT) == 288  # computed
    for seed in range(6):  # each pushes others out of a pool of 40 blocks
        engine.one(prompt(700, 70 + seed), tokens=1)
        events.check()
    assert events.holds(TEXT) == 0
    assert engine.one(TEXT).tokens == first.tokens
    events.check()
    assert events.holds(TEXT) == 288
    engine.run([TEXT + prompt(90, 80 + i) for i in range(5)], tokens=40)
    events.check()
