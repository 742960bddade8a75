"""Refusals at start. Each error names the setting, the value, the limit and the remedy. No engine starts to serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from kvkern.errors import ArenaError, ConfigError, KvkernError, UnsupportedError
from kvkern.integrations.vllm import kv_transfer_config, options, shim
from tests.integrations.vllm.engine import Engine, build_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def vllm_config(llama: str, **changes: Any) -> Any:
    transfer = kv_transfer_config("64MiB")
    for name in [n for n in changes if hasattr(transfer, n)]:
        setattr(transfer, name, changes.pop(name))
    return EngineArgs(
        model=llama, skip_tokenizer_init=True, kv_transfer_config=transfer, **changes
    ).create_engine_config()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kv_load_failure_policy": "fail"}, ConfigError, ["fail", "recompute"]),
        ({"kv_role": "kv_producer"}, ConfigError, ["kv_producer", "kv_both"]),
        ({"prefix_caching_hash_algo": "xxhash"}, UnsupportedError, ["xxhash", "sha256"]),
        ({"pipeline_parallel_size": 2}, UnsupportedError, ["pipeline_parallel_size", "2", "1"]),
    ],
)
def test_unsupported_settings(llama: str, changes: dict[str, Any], error: type[KvkernError], words: list[str]) -> None:
    config = vllm_config(llama, **changes)
    with pytest.raises(error) as caught:
        options.refuse_unsupported(config)
    assert all(word in str(caught.value) for word in words)


def test_sleep_is_refused_unless_vllm_waits_for_transfers(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep unmaps memory that queued transfers are about to read. vLLM refuses it on CPUs, so the test sets it afterwards."""
    config = vllm_config(llama)
    config.model_config.enable_sleep_mode = True
    monkeypatch.setattr(shim, "FEATURES", replace(shim.FEATURES, sleep_hooks=False))
    with pytest.raises(UnsupportedError, match=r"enable_sleep_mode is set\..*leave it out, or use vLLM 0\.33"):
        options.refuse_unsupported(config)
    monkeypatch.setattr(shim, "FEATURES", replace(shim.FEATURES, sleep_hooks=True))
    options.refuse_unsupported(config)


def test_models_with_an_encoder_are_refused(llama: str) -> None:
    config = vllm_config(llama)
    config.model_config.is_encoder_decoder = True
    with pytest.raises(
        UnsupportedError, match=r"an encoder and a decoder.*cross attention.*Run the engine without kvkern"
    ):
        options.refuse_unsupported(config)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"kvkern": {"capacity": "1GiB", "capcity": 1}}, ["capcity", "capacity"]),
        ({"kvkern": {"capacity": "1GiB"}, "blocks_per_chnk": 4}, ["blocks_per_chnk", "blocks_per_chunk"]),
        ({"kvkern": {"capacity": "1GiB"}, "self_describing_kv_events": True}, ["self_describing_kv_events"]),
        ({"kvkern": {}}, ["capacity", "8GiB"]),
        ({}, ["kvkern", "capacity"]),
        ({"kvkern": {"capacity": "0"}}, ["0", "1.."]),
        ({"kvkern": {"capacity": "900TiB"}}, ["900TiB", "64 TiB"]),
        ({"kvkern": {"capacity": "1GiB", "threads": 1000}}, ["1000", "64"]),
        ({"kvkern": {"capacity": "1GiB", "hbm": "1GiB"}}, ["hbm", "vLLM's own prefix cache"]),
    ],
)
def test_bad_options(extra: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse_options(extra)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("capacity", "error", "words"),
    [("8KiB", ConfigError, ["8 KiB", "chunk"]), ("40TiB", ArenaError, ["40 TiB", "/dev/shm", "capacity"])],
)
def test_capacity_that_cannot_be(
    llama: str, capacity: str, error: type[KvkernError], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Starts a real engine. A worker's error reaches the user in the log, the scheduler's error as an exception."""
    with pytest.raises((error, RuntimeError)) as caught, Engine(llama, capacity=capacity):
        pass
    shown = "".join([str(caught.value), *capfd.readouterr()])
    assert all(word in shown for word in [*words, error.__name__])


def test_chunks_of_several_blocks_of_a_recurrent_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Starts a real engine. It stored the chunks of full attention, counted hits on them, and loaded nothing."""
    model = build_model("recurrent", tmp_path / "recurrent")
    with pytest.raises((UnsupportedError, RuntimeError)) as caught, Engine(model, blocks_per_chunk=2):
        pass
    shown = "".join([str(caught.value), *capfd.readouterr()])
    assert "blocks_per_chunk is 2, and this model has recurrent layers" in shown
    assert "Set blocks_per_chunk to 1" in shown
    options.refuse_divided_states([], blocks_per_chunk=2)
    options.refuse_divided_states([0], blocks_per_chunk=1)
