"""The demo's real model: what its package carries becomes a model that Hugging Face reads and that answers sensibly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for _module in ("gguf", "safetensors", "tokenizers", "torch", "transformers"):
    pytest.importorskip(_module, reason="the demo's packages are not installed: make .venv/.stamp")

from kvkern.demo import model, questions, smollm2  # noqa: E402
from kvkern.demo.messages import Answer  # noqa: E402
from kvkern.demo.preconditions import ModelFacts, require_files  # noqa: E402
from tests.demo.fake_engine import FakeEngine, play  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not smollm2.is_installed(), reason=f"the real model is not installed: {smollm2.INSTALL}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("models")
    return model.ensure_folder(workdir / smollm2.name(), smollm2.write)


def test_the_model_can_be_measured(folder: Path) -> None:
    require_files(folder)
    facts = ModelFacts.read(folder)
    assert (facts.context_tokens, facts.kv_nbytes_per_token(2)) == (8192, 23_040)
    assert 2 * facts.num_weights < (folder / "model.safetensors").stat().st_size


def test_the_tokenizer_is_smollm2s(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "In 2024, x = 3.14!\n\n  héllo <b>"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert encoded.tokens[2:6] == ["2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1


def test_the_weights_and_the_chat_template_answer_a_question(folder: Path) -> None:
    """Wrong weights, a wrong order of rotated pairs or a wrong template would give other words."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = llama.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True) == "The capital of France is Paris."


def test_questions_are_asked_and_shown_as_text(folder: Path) -> None:
    asked = questions.prompts(folder)
    assert [len(prompt) > 150 for prompt in asked.values()] == [True, True]
    answers = [
        event for event in play("float32", FakeEngine(kvkern=True), questions=asked) if isinstance(event, Answer)
    ]
    assert {answer.prompt_id for answer in answers} >= set(asked)
    lines = list(questions.shown(answers, folder))
    assert [line.partition(":")[0] for line in lines[::3]] == ["question", "question"]
    computed, loaded = lines[1], lines[2]
    assert "tokens loaded by kvkern" in loaded
    assert computed.partition(" s: ")[2] == loaded.partition(" s: ")[2] != ""


def test_a_reply_is_shown_up_to_its_end(folder: Path) -> None:
    from tokenizers import Tokenizer

    said = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("41 metres<|im_end|>and more").ids
    answer = Answer(
        case="x", prompt_id="x", prompt_tokens=1, cached_tokens=0, loaded_tokens=0, ttft_s=1.0, tokens=tuple(said), logprobs=()
    )  # fmt: skip
    assert questions._text(answer, folder) == "41 metres"


def test_a_model_without_a_chat_template_is_asked_nothing(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert questions.prompts(tmp_path) == {}


def test_the_module_writes_the_model_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smollm2.main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert smollm2.main([str(tmp_path)]) == 2
    assert "no model is in it" in capsys.readouterr().out
    target = tmp_path / "model"
    assert smollm2.main([str(target)]) == 0
    require_files(target)
    assert smollm2.main([str(target)]) == 0
