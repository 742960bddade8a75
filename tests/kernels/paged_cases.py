"""Paged KV caches of every kind of layout, in guarded memory. The tests of copies and of the self-test run over them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvkern.kernels import layout as L
from kvkern.kernels.paged_tensors import PagedTensors
from tests.support import guarded

NUM_BLOCKS = 7
BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8


def noise(seed: int, shape: tuple[int, ...], dtype: torch.dtype = BF16) -> torch.Tensor:
    """Return random bytes as a tensor of `dtype`, between GUARD bytes."""
    nbytes = torch.empty(0, dtype=dtype).element_size()
    for size in shape:
        nbytes *= size
    return guarded(nbytes, seed)[0].view(dtype).view(shape)


def _fused(perm: tuple[int, int, int], order: str) -> PagedTensors:
    sizes = (NUM_BLOCKS, 3, 5)  # blocks, heads, tokens
    tensors = []
    for layer in range(2):
        stored = noise(layer, (*(sizes[i] for i in perm), 16))
        view = stored.permute(*(perm.index(i) for i in range(3)), 3)
        tensors.append(view if order == "HND" else view.transpose(1, 2))
    return PagedTensors.bind(L.fused_kv(tensors, order), tensors)


def _flash(shape: tuple[int, ...], dtype: torch.dtype, layers: int = 2) -> PagedTensors:
    tensors = [noise(i, (2, NUM_BLOCKS, *shape), dtype) for i in range(layers)]
    return PagedTensors.bind(L.flash_attention(tensors), tensors)


def _flash_view(cut: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> PagedTensors:
    tensors = [cut(noise(i, shape)) for i in range(2)]
    return PagedTensors.bind(L.flash_attention(tensors), tensors)


def _split(k: list[torch.Tensor], v: list[torch.Tensor]) -> PagedTensors:
    return PagedTensors.bind(L.split_kv(k, v), L.interleave(k, v))


def _split_of_fused() -> PagedTensors:
    fused = [noise(i, (NUM_BLOCKS, 4, 3, 64)) for i in range(2)]
    return _split([t[..., :32] for t in fused], [t[..., 32:] for t in fused])


def _mla(block_tokens: int, latent: int, dtype: torch.dtype) -> PagedTensors:
    tensors = [noise(i, (NUM_BLOCKS, block_tokens, latent), dtype) for i in range(3)]
    return PagedTensors.bind(L.mla(tensors), tensors)


def _pool(shape: tuple[int, ...], page: int, dtype: torch.dtype = BF16) -> PagedTensors:
    tensors = [noise(i, shape, dtype) for i in range(4)]
    return PagedTensors.bind(L.token_pool(tensors, page), tensors)


def _pages(cut: slice) -> PagedTensors:
    tensors = [noise(i, (NUM_BLOCKS, 1024), torch.int8)[:, cut] for i in range(3)]
    return PagedTensors.bind(L.from_pages(tensors, 16), tensors)


CASES: dict[str, Callable[[], PagedTensors]] = {
    "FA bf16": lambda: _flash((16, 2, 32), BF16),
    "FA f32, odd sizes": lambda: _flash((3, 3, 5), F32),
    "FA f16, one head": lambda: _flash((5, 1, 7), torch.float16, layers=1),
    "FA fp8": lambda: _flash((4, 2, 16), torch.float8_e4m3fn),
    "FA, one byte a token": lambda: _flash((1, 1, 1), U8, layers=1),
    "FA, block outermost": lambda: _flash_view(lambda t: t.transpose(0, 1), (NUM_BLOCKS, 2, 4, 3, 32)),
    "FA, offset view": lambda: _flash_view(lambda t: t[:, 2 : 2 + NUM_BLOCKS], (2, NUM_BLOCKS + 3, 4, 3, 32)),
    "FA, some heads of more": lambda: _flash_view(lambda t: t[..., 1:4, :], (2, NUM_BLOCKS, 4, 5, 32)),
    "FA, every other block": lambda: _flash_view(lambda t: t[:, ::2], (2, 2 * NUM_BLOCKS, 4, 3, 32)),
    "FA, odd heads of more": lambda: _flash_view(lambda t: t[..., 1:4, 3:8], (2, NUM_BLOCKS, 4, 5, 9)),
    "split": lambda: _split(
        [noise(i, (NUM_BLOCKS, 4, 2, 16)) for i in range(2)], [noise(9 + i, (NUM_BLOCKS, 4, 2, 12)) for i in range(2)]
    ),
    "split of fused": _split_of_fused,
    **{f"fused {order} {perm}": (lambda perm=perm, order=order: _fused(perm, order))  # type: ignore[misc]
       for order in ("NHD", "HND")
       for perm in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))},
    "MLA 576": lambda: _mla(1, 576, U8),
    "MLA 576 bf16": lambda: _mla(16, 576, BF16),
    "MLA 656": lambda: _mla(1, 656, U8),
    "MLA 656, 3 tokens": lambda: _mla(3, 656, U8),
    "pool": lambda: _pool((NUM_BLOCKS * 4 + 3, 2, 8), 4),
    "pool, page 1": lambda: _pool((NUM_BLOCKS, 2, 32), 1),
    "pool, latent": lambda: _pool((NUM_BLOCKS * 5, 36), 5),
    "pages": lambda: _pages(slice(None)),
    "pages, strided rows": lambda: _pages(slice(64, 960)),
    "pages, odd rows": lambda: _pages(slice(3, 1000)),
}  # fmt: skip
