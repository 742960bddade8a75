"""Every field of vLLM's configuration is judged: does it change KV? A new field fails here until somebody has judged it."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig

from docs.list_fields import page
from kvkern.integrations.vllm.contract import describe_vllm
from kvkern.integrations.vllm.judged_fields import JUDGED, Verdict, named_values, verdicts
from kvkern.integrations.vllm.surface import dataclasses_in, reached_classes
from tests.integrations.vllm.test_contract import RELEASES, described

pytestmark = pytest.mark.vllm
PAGE = Path(__file__).parents[3] / "docs" / "vllm_fields.md"


def _unjudged(configuration: dict[str, list[str]]) -> list[str]:
    return [
        f"{name}.{field}" for name, names in configuration.items() for field in names if field not in verdicts(name)
    ]


@pytest.mark.parametrize("release", [*RELEASES, "installed"])
def test_every_field_is_judged(release: str) -> None:
    surface = describe_vllm() if release == "installed" else described(release)
    missing = _unjudged(surface.configuration)
    assert not missing, f"judge these in kvkern/integrations/vllm/judged_fields.py: {missing}"


def test_every_field_is_judged_once() -> None:
    for name, by_verdict in JUDGED.items():
        names = [field for text in by_verdict.values() for field in text.split()]
        assert len(names) == len(set(names)), name


def test_a_field_that_holds_a_class_leads_to_its_judgements() -> None:
    for name, config_class in reached_classes(VllmConfig, {}).items():
        hints = typing.get_type_hints(config_class, vars(sys.modules[config_class.__module__]))
        for field, verdict in verdicts(name).items():
            if verdict is Verdict.INSIDE and field in hints:
                assert any(inner.__name__ in JUDGED for inner in dataclasses_in(hints[field])), f"{name}.{field}"


@dataclasses.dataclass
class ModelConfig:
    dtype: str = "bfloat16"
    quantization: Any = None
    seed: int = 0


@dataclasses.dataclass
class CacheConfig:
    cache_dtype: str = "auto"
    tomorrow: str = ""  # nobody has judged it
    kv_cache_dtype_skip_layers: Any = ()


VllmConfigOf = dataclasses.make_dataclass("VllmConfig", ["model_config", "cache_config", "additional_config"])


def test_values_of_named_fields() -> None:
    def values(**changes: Any) -> dict[str, str]:
        model = ModelConfig(**{k: v for k, v in changes.items() if hasattr(ModelConfig, k)})
        cache = CacheConfig(**{k: v for k, v in changes.items() if hasattr(CacheConfig, k)})
        return named_values(VllmConfigOf(model, cache, changes.get("extra", {})))

    plain = values()
    assert plain["ModelConfig.dtype"] == "bfloat16"
    assert values(seed=3) == plain
    for change in (
        {"dtype": "float16"},
        {"cache_dtype": "fp8"},
        {"kv_cache_dtype_skip_layers": ["3"]},
        {"quantization": "x"},
    ):
        assert values(**change) != plain
    assert values(tomorrow="on") != values(tomorrow="off") != plain
    assert values(extra={"a": 1, "b": {2, 3}}) == values(extra={"b": {3, 2}, "a": 1}) != plain


def test_the_page_is_drawn_from_the_table() -> None:
    assert PAGE.read_text() == page(), "run python docs/list_fields.py"
