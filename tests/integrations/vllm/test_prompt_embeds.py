"""Prompts of embeddings: equal lengths never share, equal bytes do, and what the bytes do not name is not cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integrations.vllm.engine import VOCAB, Engine, build_model, prompt
from tests.integrations.vllm.rounds import Answer, answer_of, check_rounds

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]
LENGTH, CACHED, WIDTH = 200, 192, 128


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """The embeddings of the tokens. The tests' Llama has zeros for token 0, and would not tell it from a row of zeros."""
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, table: torch.Tensor) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("embeds")
    build_model("llama", folder)
    weights = load_file(folder / "model.safetensors") | {"model.embed_tokens.weight": table}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Engine(str(folder), enable_prompt_embeds=True) as running:
        yield running


def rows(seed: int, scale: float = 0.1) -> torch.Tensor:
    return torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


def ask(engine: Engine, embeds: torch.Tensor, **more: Any) -> tuple[Answer, int]:
    """Return (the answer, its cached tokens)."""
    outputs = engine.llm.generate([{"prompt_embeds": embeds, **more}], engine.params(8), use_tqdm=False)
    engine.settle()
    return answer_of(outputs), outputs[0].num_cached_tokens or 0


def test_embeddings_hit_their_own_kv_only(engine: Engine, table: torch.Tensor) -> None:
    first, second = rows(1), rows(2)
    answer = check_rounds(engine, lambda: ask(engine, first)[0], CACHED // 32)
    other, cached = ask(engine, second)
    assert cached == 0
    assert other.tokens != answer.tokens
    engine.reset_native()
    half = torch.cat([first[:128], second[128:]])
    assert ask(engine, half)[1] == 128
    engine.reset_native()
    assert engine.one([0] * LENGTH).cached_tokens == 0  # vLLM counts an embedding as token 0
    engine.reset_native()
    assert ask(engine, second) == (other, CACHED)

    text = prompt(LENGTH, 3)  # the truth: the embeddings of tokens, and the tokens
    as_tokens = engine.one(text, 8)
    as_rows, cached = ask(engine, table[text])
    assert cached == 0
    assert as_rows.tokens == (as_tokens.tokens,)
    engine.reset_native()
    again, cached = ask(engine, table[text])
    assert (again.tokens, cached) == (as_rows.tokens, CACHED)


def test_what_the_bytes_do_not_name_is_not_cached(engine: Engine) -> None:
    """vLLM's hashes of these are equal in pairs, and their KV is not."""
    engine.reset_everything()
    embeds = rows(4)
    embeds[10:150] = 0.0
    mask = [10 <= i < 150 for i in range(LENGTH)]
    mixed = {
        "prompt_token_ids": [0] * LENGTH,
        "prompt_is_token_ids": mask,
    }  # token 0 where the others have rows of zeros
    halves = rows(5).to(torch.float16)
    truth = []
    for prompt_of in (
        lambda: ask(engine, embeds),
        lambda: ask(engine, embeds, **mixed),
        lambda: ask(engine, halves),
        lambda: ask(engine, halves.view(torch.bfloat16)),
    ):
        engine.reset_native()
        truth.append(prompt_of()[0])
        engine.reset_native()
        again, cached = prompt_of()
        assert cached == 0
        again.check_same(truth[-1])
    assert len({answer.tokens for answer in truth}) == 4
    assert len(engine.dram) == 0
    assert ask(engine, rows(6))[1] == 0
    engine.reset_native()
    assert ask(engine, rows(6))[1] == CACHED
