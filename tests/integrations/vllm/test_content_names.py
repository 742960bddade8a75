"""Which requests vLLM's block hashes name by content. No engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvkern.integrations.vllm.content_names import ContentNames

pytestmark = pytest.mark.vllm
DIGEST = "0123456789abcdef" * 4


def named(
    dtype: torch.dtype = torch.bfloat16, media_cache: float | None = None, prefix_caching: bool = True, **request: Any
) -> bool:
    media = None if media_cache is None else SimpleNamespace(mm_processor_cache_gb=media_cache)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype, multimodal_config=media),
        cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
    )
    fields: Any = {"mm_features": [], "prompt_embeds": None, "prompt_is_token_ids": None, **request}
    return ContentNames(config).name(SimpleNamespace(**fields))


def item(name: str | None, identifier: str = "") -> Any:
    return SimpleNamespace(mm_hash=name, identifier=identifier or name)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([item(DIGEST)], True),
        ([item(DIGEST * 2)], True),  # sha512
        ([item(DIGEST, f"adapter:{DIGEST}")], True),
        ([item(None, DIGEST)], True),
        ([item(DIGEST), item("my cat")], False),
        ([item("renderer0-mm-1-image-0")], False),
        ([item(DIGEST[:-1])], False),
        ([item(DIGEST.upper())], False),
        ([item(None, "my cat")], False),
    ],
)
def test_media_count_if_a_digest_names_them(items: list[Any], expected: bool) -> None:
    assert named(media_cache=4, mm_features=items) is expected


def test_media_that_vllm_numbers_do_not_count() -> None:
    """With options of the processor it hashes the number, which then looks like any digest."""
    for cache, prefix_caching in ((4, True), (4, False), (0, True)):
        assert named(media_cache=cache, prefix_caching=prefix_caching, mm_features=[item(DIGEST)])
    assert not named(media_cache=0, prefix_caching=False, mm_features=[item(DIGEST)])
    assert named(media_cache=0, prefix_caching=False)  # text alone


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, True), (torch.float32, True), (torch.float16, False), (torch.int32, False)],
)
def test_embeddings_count_if_their_bytes_name_them(dtype: torch.dtype, expected: bool) -> None:
    ones = torch.ones(3, 4).to(dtype)
    assert named(prompt_embeds=ones) is expected
    assert not named(prompt_embeds=ones, prompt_is_token_ids=[True, False, True])
    ones[1] = 0
    assert not named(prompt_embeds=ones)
