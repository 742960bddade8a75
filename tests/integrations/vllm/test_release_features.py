"""Features are found in vLLM's classes. The one that is installed agrees with the description of its wheel."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.release_features import Features, find_features
from tests.integrations.vllm.test_contract import RELEASES, described

pytestmark = pytest.mark.vllm
_KV = "vllm.v1.kv_offload.base"
_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"


@dataclass
class _OldGroup:
    group_id: int = 0


@dataclass
class _NewGroup(_OldGroup):
    sliding_window_size_in_chunks: int | None = None


@dataclass
class _OldState:
    req: Any = None


@dataclass
class _NewState(_OldState):
    max_load_tokens: int | None = None


class _Old:
    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool: ...


class _New:
    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool: ...

    def get_load_source(self) -> None: ...

    def on_reset_flushed(self) -> None: ...

    def unregister_kv_caches(self) -> None: ...


def test_classes_tell_what_they_can() -> None:
    names = [field.name for field in fields(Features)]
    old = find_features(_Old, _Old, _Old, _OldGroup, _OldState)
    new = find_features(_New, _New, _New, _NewGroup, _NewState)
    assert [getattr(old, name) for name in names] == [False] * len(names)
    assert [getattr(new, name) for name in names] == [True] * len(names)


def test_the_installed_release_has_what_its_wheel_has() -> None:
    if shim.VLLM_VERSION not in RELEASES:
        pytest.skip(f"vLLM {shim.VLLM_VERSION} is not in tests/data/vllm")
    bases = described(shim.VLLM_VERSION).bases
    found = shim.FEATURES
    assert found.hit_sources == ("get_load_source" in bases[f"{_KV}:OffloadingManager"])
    assert found.reset_fence == ("on_reset_flushed" in bases[f"{_KV}:OffloadingManager"])
    assert found.sync_loads == ("expedited=" in bases[f"{_KV}:OffloadingWorker"]["submit_load"])
    assert found.sleep_hooks == ("unregister_kv_caches" in bases[f"{_V1}.offloading_connector:OffloadingConnector"])
    assert found.hit_sources == (shim.CacheHitSource is not None)
