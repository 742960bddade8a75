"""A tiny Idefics3 with images: equal images hit, unlike images under one text never share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kvkern.integrations.vllm import shim
from tests.integrations.vllm.engine import VOCAB, Engine, prompt
from tests.integrations.vllm.rounds import Answer, answer_of, check_rounds
from tests.integrations.vllm.server import write_word_tokenizer
from tests.integrations.vllm.test_namespace import identity

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]
SPECIAL = {"<image>": 508, "<fake_token_around_image>": 507, "<global-img>": 506, "<end_of_utterance>": 505}
IMAGE_TOKEN = SPECIAL["<image>"]
EDGE, PATCH, SEQUENCE = 112, 14, 16  # pixels; pixels; tokens of an image, which three others surround
BEFORE, AFTER = [t % 500 for t in prompt(40, 1)], [t % 500 for t in prompt(150, 2)]
TEXT = [*BEFORE, IMAGE_TOKEN, *AFTER]
CACHED, CACHED_OF_TEXT = 192, 32  # of 209 tokens; of what precedes the image


def build_idefics3(path: Path) -> str:
    """Write a random Idefics3: a vision tower of two layers in front of the tests' Llama, and the files of its processor.

    Its image processor needs no torchvision, which the CPU set-up lacks.
    """
    import transformers as hf
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    torch.manual_seed(0)
    text = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = Idefics3VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=EDGE, patch_size=PATCH,
        initializer_range=0.1,
    )  # fmt: skip
    config = hf.Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=2, pad_token_id=0
    )
    hf.Idefics3ForConditionalGeneration(config).to(torch.float32).save_pretrained(path)
    write_word_tokenizer(path, SPECIAL)
    edge = {"longest_edge": EDGE}
    pixels = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    hf.Idefics3Processor(pixels, tokenizer, image_seq_len=SEQUENCE).save_pretrained(path)
    return str(path)


def image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize((EDGE, EDGE), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_idefics3(tmp_path_factory.mktemp("idefics3"))


def need_whole_images() -> None:
    if shim.VLLM_VERSION.startswith("0.30."):
        pytest.skip("vLLM 0.30 counts no patches in an image that the processor does not split, and its worker ends")


@pytest.fixture(scope="module")
def engine(idefics3: str) -> Iterator[Engine]:
    need_whole_images()
    with Engine(idefics3, skip_tokenizer_init=False) as running:
        yield running


def ask(engine: Engine, shown: Image.Image, text: list[int] = TEXT, **more: Any) -> tuple[Answer, int]:
    """Return (the answer, its cached tokens)."""
    question = {"prompt_token_ids": text, "multi_modal_data": {"image": shown}, **more}
    outputs = engine.llm.generate([question], engine.params(8), use_tqdm=False)
    engine.settle()
    return answer_of(outputs), outputs[0].num_cached_tokens or 0


def test_an_image_hits_its_own_kv_only(engine: Engine) -> None:
    first, second = image(1), image(2)
    answer = check_rounds(engine, lambda: ask(engine, first)[0], CACHED // 32)
    engine.reset_native()
    other, cached = ask(engine, second)
    assert cached == CACHED_OF_TEXT
    assert other.tokens != answer.tokens
    engine.reset_native()
    assert ask(engine, image(2)) == (other, CACHED)  # another object, equal pixels
    engine.reset_native()
    again, cached = ask(engine, first)
    assert cached == CACHED
    again.check_same(answer)


def test_two_images_in_either_order(engine: Engine) -> None:
    engine.reset_everything()
    first, second = image(3), image(4)
    text = [IMAGE_TOKEN, *BEFORE, IMAGE_TOKEN, *AFTER]

    def both(shown: list[Image.Image]) -> tuple[Answer, int]:
        return ask(engine, shown, text)  # type: ignore[arg-type]

    one, _ = both([first, second])
    engine.reset_native()
    other, cached = both([second, first])
    assert cached == 0
    assert other.tokens != one.tokens
    engine.reset_native()
    assert both([first, second]) == (one, 224)
    engine.reset_native()
    assert both([first, first])[1] == 32  # up to the block in which the second image begins


def test_a_name_that_the_client_chose_is_not_trusted(engine: Engine) -> None:
    """Another engine's client may give the same name to another image."""
    engine.reset_everything()
    named = {"multi_modal_uuids": {"image": ["cat"]}}
    first, _ = ask(engine, image(5), **named)
    engine.settle()
    assert len(engine.dram) == 0
    engine.reset_native()
    engine.llm.llm_engine.reset_mm_cache()
    engine.llm.llm_engine.reset_encoder_cache()
    second, cached = ask(engine, image(6), **named)
    assert cached == 0
    assert second.tokens != first.tokens
    truth, _ = ask(engine, image(6))
    second.check_same(truth)


def test_numbers_instead_of_digests_are_not_trusted(idefics3: str) -> None:
    """Without prefix caching and processor cache vLLM only counts images, and every engine begins with 1."""
    need_whole_images()
    options = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0, "skip_tokenizer_init": False}
    with Engine(idefics3, **options) as engine:
        counter = engine.llm.renderer._mm_req_counter
        answers = []
        for shown in (image(7), image(8)):
            engine.llm.renderer._mm_req_counter = type(counter)()  # as after a new start
            answers.append(ask(engine, shown))
            engine.llm.llm_engine.reset_encoder_cache()
        assert [cached for _, cached in answers] == [0, 0]
        assert answers[0][0].tokens != answers[1][0].tokens
        assert engine.one(TEXT[:40]).cached_tokens == 0
        assert engine.one(TEXT[:40]).cached_tokens == 32  # tokens are cached


def test_how_images_become_pixels_is_in_the_name(idefics3: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(idefics3, copy)
    assert identity(str(copy)) == identity(idefics3)
    settings = [file for file in copy.glob("*processor*.json") if "image_mean" in file.read_text()]
    assert settings
    for file in settings:
        file.write_text(json.dumps(_replaced(json.loads(file.read_text()), "image_mean", [0.1, 0.2, 0.3])))
    assert identity(str(copy)) != identity(idefics3)
    assert identity(idefics3, mm_processor_kwargs={"do_normalize": False}) != identity(idefics3)


def _replaced(value: Any, name: str, new: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: new if key == name else _replaced(inner, name, new) for key, inner in value.items()}
