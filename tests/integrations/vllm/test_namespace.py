"""What names KV: everything that changes it, and nothing that does not. One test runs engines."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kvkern.config import Config
from kvkern.integrations.vllm import kv_transfer_config
from kvkern.integrations.vllm.namespace import LENGTH_FREE_ARCHITECTURES, _model, resolve_weights
from tests.integrations.vllm.engine import Engine, prompt
from tests.node.conftest import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
OWN = Config.parse({"capacity": "64MiB"}, "options")


def build_longrope(path: Path) -> str:
    """Write a model whose positions are rotated by factors that vLLM chooses by max_model_len."""
    import transformers as hf

    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    config = hf.Phi3Config(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=4096, original_max_position_embeddings=256, rope_parameters=rope,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    hf.AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(path)
    return str(path)


def identity(model: str, **changes: Any) -> tuple[str, str]:
    """Return (model, weights) of the namespace of an engine with these arguments."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"max_model_len": 512, "dtype": "float32"} | changes
    config = EngineArgs(
        model=model, skip_tokenizer_init=True, kv_transfer_config=kv_transfer_config("64MiB"), **arguments
    ).create_engine_config()
    return _model(config.model_config, OWN), resolve_weights(config, OWN)


def test_what_changes_kv_changes_the_name_and_nothing_else_does(llama: str, tmp_path: Path) -> None:
    plain = identity(llama)
    for same in (
        {"max_model_len": 1024}, {"max_num_seqs": 3}, {"seed": 5}, {"enforce_eager": True}, {"block_size": 64},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    ):  # fmt: skip
        assert identity(llama, **same) == plain, same
    others = [
        {"dtype": "bfloat16"},
        {"load_format": "dummy"},
        {"load_format": "dummy", "seed": 5},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}}},
        {"additional_config": {"a": 1}},
        {"trust_remote_code": True},
        {"kv_cache_dtype": "fp8"},
    ]
    assert len({plain, *(identity(llama, **changes) for changes in others)}) == 1 + len(others)
    copy = tmp_path / "another name"
    shutil.copytree(llama, copy)
    assert identity(str(copy)) == plain  # models are named by content
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    assert identity(str(copy)) != plain


def test_weights_that_the_user_names_are_told_apart_by_their_folder(llama: str, tmp_path: Path) -> None:
    from types import SimpleNamespace

    named = Config.parse({"capacity": "64MiB", "weights": "v1"}, "options")
    models: list[Any] = [SimpleNamespace(model=str(tmp_path / name)) for name in ("base", "chat")]
    for model in models:
        Path(model.model).mkdir()
    assert [_model(model, named) for model in models] == ["base", "chat"]


def test_architectures_without_max_model_len_do_not_read_it() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for name in sorted(LENGTH_FREE_ARCHITECTURES):
        model = ModelRegistry._try_load_model_cls(name)
        assert model is not None, name
        for base in model.__mro__:
            if base.__module__.startswith("vllm.model_executor.models."):
                source = Path(inspect.getfile(base)).read_text()
                assert "max_model_len" not in source, f"{name} reads max_model_len in {base.__module__}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_longrope_engines_of_different_lengths_never_share(tmp_path: Path) -> None:
    model = build_longrope(tmp_path / "phi")
    shared = {"remote": f"file://{tmp_path}/values", "persist": "all"}
    text = prompt(200, 1)
    with Engine(model, kvkern_options=shared, max_model_len=256) as short:
        short.one(text)
        short.settle()
        eventually(lambda: short.cache.counters.remote_written_chunks >= 6, "the write")
    with Engine(model, kvkern_options=shared, max_model_len=1024) as long:
        reply = long.one(text)
        assert reply.cached_tokens == 0
        long.reset_native()
        assert long.one(text).tokens == reply.tokens
        assert long.scheduler.connector._reported_packing  # by the workers, at start
    assert (
        identity(model, max_model_len=250) != identity(model, max_model_len=256) != identity(model, max_model_len=1024)
    )
