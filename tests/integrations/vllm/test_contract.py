"""The adapter fits every known vLLM, as tests/data/vllm describes its wheel, and says by name where another one differs."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import kvkern.integrations.vllm as adapter
from kvkern.integrations.vllm import contract, shim
from kvkern.integrations.vllm.contract import BASES, CALLS, READS, describe_vllm, differences, imports
from kvkern.integrations.vllm.derived import DERIVED
from kvkern.integrations.vllm.surface import Surface
from kvkern.integrations.vllm.versions import KNOWN, minor_of
from tests.integrations.vllm.describe_versions import DATA, text_of

pytestmark = pytest.mark.vllm
RELEASES = sorted(path.stem for path in DATA.glob("*.json"))
AGAIN = "run python tests/integrations/vllm/describe_versions.py"


def described(release: str) -> Surface:
    return Surface(**json.loads((DATA / f"{release}.json").read_text()))


def test_every_known_release_is_described() -> None:
    assert {minor_of(release) for release in RELEASES} == set(KNOWN)


@pytest.mark.parametrize("release", RELEASES)
def test_the_adapter_fits(release: str) -> None:
    assert differences(described(release), DERIVED) == []


@pytest.mark.parametrize("release", RELEASES)
def test_a_description_covers_the_whole_contract(release: str) -> None:
    """Else the file is older than the contract, and a difference in what was added would not show."""
    surface = described(release)
    assert set(surface.functions) == set(CALLS), AGAIN
    assert set(surface.bases) == set(surface.abstract) == set(BASES), AGAIN
    assert set(surface.attributes) == set(READS), AGAIN
    assert set(surface.names) == {module for module, _, _ in imports()}, AGAIN


def test_the_description_of_the_installed_release_is_true() -> None:
    path = DATA / f"{shim.VLLM_VERSION}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not in tests/data/vllm: {AGAIN} {shim.VLLM_VERSION}")
    assert text_of(describe_vllm()) == path.read_text(), f"{AGAIN} {shim.VLLM_VERSION}"


def test_every_class_that_derives_from_vllm_is_in_the_contract() -> None:
    found = set()
    for module in pkgutil.iter_modules(adapter.__path__):
        for value in vars(importlib.import_module(f"{adapter.__name__}.{module.name}")).values():
            if inspect.isclass(value) and value.__module__.startswith(adapter.__name__):
                theirs = [base for base in value.__mro__ if base.__module__.split(".")[0] == "vllm"]
                if theirs:
                    found.add(value)
                    assert f"{theirs[0].__module__}:{theirs[0].__qualname__}" in BASES
    # A class that derives from another of kvkern's has the same names for vLLM.
    assert {value for value in found if value.__base__ not in found} == set(DERIVED)


MANAGER = "vllm.v1.kv_offload.base:OffloadingManager"
WORKER = "vllm.v1.kv_offload.base:OffloadingWorker"
TABLE = "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids"
STATE = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:RequestGroupState"


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(surface: dict[str, Any]) -> None:
        for step in path[:-1]:
            surface = surface[step]
        surface[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("names", "vllm.v1.request", to=["Request"]), "vllm.v1.request has no RequestStatus"),
        (lambda s: s["names"].pop("vllm.lora.request"), "vllm.lora.request has no LoRARequest"),
        (_set("abstract", MANAGER, to=["lookup_all"]), f"{MANAGER}.lookup_all is abstract"),
        (
            _set("bases", MANAGER, "lookup", to=["self", "key", "req_context", "tiers="]),
            "lookup takes (self, key, req_context, tiers=), and kvkern's takes (self, key, req_context)",
        ),
        (_set("bases", WORKER, "wait", to=["self", "jobs"]), "wait takes (self, jobs), and kvkern's takes (self, job_ids)"),
        (_set("bases", WORKER, "submit_store", to=["self", "job_id="]), "submit_store takes (self, job_id=)"),
        (lambda s: s["bases"].pop(WORKER), f"{WORKER} does not exist"),
        (
            _set("functions", TABLE, to=["self", "req_id"]),
            "get_block_ids takes (self, req_id), and kvkern passes (self, request_id)",
        ),
        (_set("functions", TABLE, to=["self", "request_id", "group"]), "get_block_ids takes (self, request_id, group)"),
        (lambda s: s["functions"].pop(TABLE), f"{TABLE} does not exist"),
        (_set("attributes", STATE, to=["block_ids", "offload_keys"]), f"{STATE} has no next_stored_chunk_idx"),
        (lambda s: s["attributes"].pop(STATE), f"{STATE} does not exist"),
    ],
)  # fmt: skip
def test_a_difference_is_named(change: Callable[[dict[str, Any]], None], words: str) -> None:
    surface = copy.deepcopy(asdict(described(RELEASES[-1])))
    change(surface)
    (found,) = differences(Surface(**surface), DERIVED)
    assert words in found


@pytest.mark.parametrize(
    "change",
    [
        _set("functions", TABLE, to=["self", "request_id", "group="]),
        _set("bases", WORKER, "cancel", to=["self", "job_ids"]),
        _set("attributes", STATE, to=["block_ids", "offload_keys", "next_stored_chunk_idx", "another"]),
        lambda s: s["names"].pop("vllm.v1.metrics.cache_hit_source"),
    ],
)  # fmt: skip
def test_what_kvkern_does_not_need_is_no_difference(change: Callable[[dict[str, Any]], None]) -> None:
    surface = copy.deepcopy(asdict(described(RELEASES[-1])))
    change(surface)
    assert differences(Surface(**surface), DERIVED) == []


def test_imports_are_read_from_the_source(tmp_path: Path) -> None:
    source = tmp_path / "uses"
    source.write_text(
        "from vllm.a import B, C as D\nimport os\n"
        "try:\n    from vllm.e import F\nexcept ImportError:\n    F = None\n"
        "def g():\n    from vllm.h import I\n"
    )
    assert set(imports([source])) == {
        ("vllm.a", "B", False), ("vllm.a", "C", False), ("vllm.e", "F", True), ("vllm.h", "I", False)
    }  # fmt: skip
    found = {name for _, name, _ in imports()}
    assert {"OffloadingManager", "WorkerLoRAManager", "KVConnectorFactory", "_get_attn_isa"} <= found
    assert [name for _, name, optional in imports() if optional] == ["CacheHitSource"]
    assert all(path.exists() for path in contract.SOURCES)
