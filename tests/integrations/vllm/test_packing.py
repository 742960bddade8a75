"""Engines that pack their pages differently have different names. No engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvkern.errors import UnsupportedError
from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.packing import PackingReport, agreed_packing, packing_of_scheduler, packing_of_worker

pytestmark = pytest.mark.vllm


def configs(device: str = "cpu", block_tokens: int = 32) -> tuple[Any, Any]:
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        attention_config=SimpleNamespace(backend=None),
    )
    spec = FullAttentionSpec(block_size=block_tokens, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    return config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])


def test_cpus_with_and_without_amx_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        names.add(packing_of_worker(*configs()))
        assert packing_of_scheduler(*configs()) == packing_of_worker(*configs())
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    names.add(packing_of_worker(*configs()))
    assert len(names) == 3


def test_devices_are_named_by_the_backends_that_their_layers_got(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for backend in ("FlashAttentionBackend", "FlashInferBackend"):
        monkeypatch.setattr(shim, "attention_backends", lambda config, backend=backend: {"layer.0": backend})
        names.add(packing_of_worker(*configs("cuda")))
    monkeypatch.setattr(shim, "packing_environment", lambda: {"VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT": "True"})
    names.add(packing_of_worker(*configs("cuda")))
    assert len(names) == 3
    unknown = [packing_of_scheduler(*configs("cuda")) for _ in range(2)]
    assert len({*unknown, *names}) == 5  # nobody else's


def test_workers_must_agree() -> None:
    a, b = PackingReport("a"), PackingReport("b")
    assert agreed_packing([a, PackingReport("a")]) == "a"
    assert agreed_packing([]) is None
    assert agreed_packing([SimpleNamespace(packing="another connector's")]) is None
    with pytest.raises(UnsupportedError, match="2 ways"):
        agreed_packing([a, b])
