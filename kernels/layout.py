"""Where a token's bytes lie in an engine's paged KV cache: one strided formula for every engine.

    addr(plane, block, token, head) = base[plane] + block * stride_block + token * stride_token + head * stride_head

A plane is the set of bytes that one formula reaches: K or V of a layer, fused K and V, an MLA latent, or an opaque page,
whose inner order only the engine knows (`num_tokens == 1`). K and V of one tensor are two planes with different bases, so
the formula needs no `kv` term. Strides and meaning come from the engine. Nothing is guessed from shapes.

In a slot a plane's bytes are token-major, `[block][token][head][bytes]`, so engines with different block sizes can share.
There is one exception: if heads lie outside tokens (`stride_head > stride_token`), a block stays `[block][head][token]`, to
keep the engine's long contiguous runs. Planes follow one another. Each is padded to 64 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .checksum import ROW_NBYTES
from .errors import LayoutError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Plane:
    """The bytes that one strided formula reaches. Sizes and strides in bytes."""

    tensor: int  # index into the registered tensors
    offset: int  # from the tensor's first element to block 0, token 0, head 0
    stride_block: int
    stride_token: int
    stride_head: int
    num_tokens: int  # per block; 1 for an opaque page
    num_heads: int
    head_nbytes: int  # contiguous bytes of one token and head

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in this plane."""
        return self.num_tokens * self.num_heads * self.head_nbytes

    @property
    def head_major(self) -> bool:
        """True if a block lies in the slot as [head][token], False if as [token][head]."""
        return self.num_heads > 1 and self.num_tokens > 1 and self.stride_head > self.stride_token

    @property
    def runs(self) -> tuple[int, int, int, int, int]:
        """(outer count, outer stride, inner count, inner stride, run bytes): a block in slot order, in the fewest runs."""
        outer, inner = (self.num_tokens, self.stride_token), (self.num_heads, self.stride_head)
        if self.head_major:
            outer, inner = inner, outer
        run = self.head_nbytes
        if inner[0] == 1 or inner[1] == run:
            run, inner = run * inner[0], (1, 0)
            if outer[0] == 1 or outer[1] == run:
                run, outer = run * outer[0], (1, 0)
        return outer[0], outer[1], inner[0], inner[1], run


@dataclass(frozen=True)
class PagedLayout:
    """The planes of one KV group, their number of blocks, and the tokens per block. Immutable. Holds no tensors."""

    name: str  # one of LAYOUTS
    planes: tuple[Plane, ...]
    num_blocks: int
    block_tokens: int

    def __post_init__(self) -> None:
        if not self.planes:
            raise LayoutError(
                "the layout has no planes, but it needs at least one plane: give it the planes of every layer"
            )
        for plane in self.planes:
            if min(plane.num_tokens, plane.num_heads, plane.head_nbytes) < 1:
                raise LayoutError(f"{plane} has a count or size below 1, expected at least 1: check the tensor's shape")
            if plane.stride_token < 0 or plane.stride_head < 0 or plane.stride_block < 0 or plane.offset < 0:
                raise LayoutError(
                    f"{plane} has negative strides or offsets; negative strides and offsets are not supported: flip no axis"
                )
        if self.num_blocks < 1 or self.block_tokens < 1:
            raise LayoutError(
                f"num_blocks={self.num_blocks}, block_tokens={self.block_tokens}: both must be at least 1, check the shapes"
            )

    @property
    def block_nbytes(self) -> int:
        """Payload bytes of one block in all planes, without padding."""
        return sum(plane.block_nbytes for plane in self.planes)

    @property
    def run_nbytes(self) -> int:
        """The shortest contiguous run in bytes. It decides whether a kernel or DMA copies this layout."""
        return min(plane.runs[-1] for plane in self.planes)

    def plane_offsets(self, blocks_per_chunk: int) -> npt.NDArray[np.int64]:
        """Return [planes + 1] int64: the start of each plane in a rank's part of a slot. The last entry is the part's size."""
        sizes = [-(-plane.block_nbytes * blocks_per_chunk // ROW_NBYTES) * ROW_NBYTES for plane in self.planes]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def part_nbytes(self, blocks_per_chunk: int) -> int:
        """Return the bytes that one rank writes for a chunk of `blocks_per_chunk` blocks."""
        return int(self.plane_offsets(blocks_per_chunk)[-1])

    @cached_property
    def slot_order(self) -> str:
        """The order of bytes in a slot, as text for logs. Two layouts can read each other's slots if this is equal."""
        words = []
        for p in self.planes:
            order = f"head-major x{p.num_tokens}" if p.head_major else "token-major"
            opaque = p.num_tokens == 1 and self.block_tokens > 1
            if opaque:
                order = f"page of {self.block_tokens} tokens"
            words.append(f"{order} {p.num_heads}x{p.head_nbytes}")
        return "; ".join(f"{len(list(run))} planes of {word}" for word, run in groupby(words))

    @cached_property
    def fingerprint(self) -> str:
        """`name:` and 16 hex digits of the hash of `slot_order`: the `layout` field of a namespace."""
        digest = hashlib.sha256(self.slot_order.encode()).hexdigest()[:16]
        return f"{self.name}:{digest}"

    def bases(self, tensors: Sequence[torch.Tensor]) -> npt.NDArray[np.int64]:
        """Return [planes] int64: the address of each plane's block 0. Valid as long as the tensors do not move."""
        return np.array([tensors[p.tensor].data_ptr() + p.offset for p in self.planes], dtype=np.int64)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride * tensor.element_size() for stride in tensor.stride())


def _check_alike(tensors: Sequence[torch.Tensor], ndim: int, shape: str) -> None:
    if not tensors:
        raise LayoutError(f"no tensors were given: pass one per layer, of shape {shape}")
    first = tensors[0]
    for i, t in enumerate(tensors):
        if t.dim() != ndim:
            raise LayoutError(f"tensor {i} is {tuple(t.shape)}, expected {ndim} dimensions: pass {shape}")
        if t.shape[0] != first.shape[0] or t.dtype != first.dtype or t.device != first.device:
            raise LayoutError(
                f"tensor {i} is {tuple(t.shape)} {t.dtype} on {t.device}, "
                f"tensor 0 is {tuple(first.shape)} {first.dtype} on {first.device}. Layers of one group must agree: "
                "put others in a group of their own"
            )
        if t.shape[-1] != 1 and t.stride(-1) != 1:
            raise LayoutError(
                f"tensor {i} has stride {t.stride(-1)} in its last dimension, expected 1: pass it without a transpose"
            )


def _plane_of_view(index: int, view: torch.Tensor, root: torch.Tensor) -> Plane:
    """Return the plane of a view [blocks, tokens, heads, elements] into `root`, the registered tensor."""
    strides = _strides(view)
    return Plane(
        tensor=index,
        offset=view.data_ptr() - root.data_ptr(),
        stride_block=strides[0],
        stride_token=strides[1],
        stride_head=strides[2],
        num_tokens=view.shape[1],
        num_heads=view.shape[2],
        head_nbytes=view.shape[3] * view.element_size(),
    )


def plane_views(layout_name: str, tensors: Sequence[torch.Tensor], block_tokens: int = 0) -> list[torch.Tensor]:
    """Return views [blocks, tokens, heads, elements], one per plane, that show the tensors as the engine means them.

    `layout_name` is one of LAYOUTS. The self-test reads and writes blocks through these views and compares them with the
    strided formula.
    """
    views: list[torch.Tensor] = []
    for t in tensors:
        match layout_name:
            case "pages":
                views.append(t[:, None, None, :])
            case "flash_attention":
                views += [t[0], t[1]]
            case "split_kv" | "fused_nhd":
                views.append(t)
            case "fused_hnd":
                views.append(t.transpose(1, 2))
            case "mla":
                views.append(t[:, :, None, :])
            case "token_pool":
                blocks = t.shape[0] // block_tokens
                shaped = t if t.dim() == 3 else t[:, None, :]
                views.append(shaped[: blocks * block_tokens].unflatten(0, (blocks, block_tokens)))
            case _:
                raise LayoutError(f"unknown layout {layout_name!r}; known: {', '.join(LAYOUTS)}. Use one of these")
    return views


LAYOUTS = ("pages", "flash_attention", "split_kv", "fused_nhd", "fused_hnd", "mla", "token_pool")


def layout_of_views(
    name: str, tensors: Sequence[torch.Tensor], views: Sequence[torch.Tensor], block_tokens: int
) -> PagedLayout:
    """Return the layout `name` of these tensors. `views` are their planes, as `plane_views` gives them.

    Raises LayoutError if the planes have different numbers of blocks or tokens.
    """
    per_tensor = len(views) // len(tensors)
    for i, view in enumerate(views):
        if view.shape[:2] != views[0].shape[:2]:
            raise LayoutError(
                f"plane {i} has {view.shape[0]} blocks of {view.shape[1]} tokens, "
                f"plane 0 has {views[0].shape[0]} of {views[0].shape[1]}. Layers of one group must agree: "
                "put others in a group of their own"
            )
    planes = tuple(_plane_of_view(i // per_tensor, view, tensors[i // per_tensor]) for i, view in enumerate(views))
    return PagedLayout(name, planes, num_blocks=views[0].shape[0], block_tokens=block_tokens)


def _layout_of_tensors(name: str, tensors: Sequence[torch.Tensor], block_tokens: int) -> PagedLayout:
    return layout_of_views(name, tensors, plane_views(name, tensors, block_tokens), block_tokens)


def from_pages(
    pages: Sequence[torch.Tensor],  # one per layer: [num_blocks, page_nbytes] int8 or uint8, rows may be strided
    block_tokens: int,
) -> PagedLayout:
    """Layout of vLLM's canonical KV caches: a block of a layer is one opaque run of bytes."""
    _check_alike(pages, 2, "(num_blocks, page_nbytes)")
    if pages[0].element_size() != 1:
        raise LayoutError(f"pages are {pages[0].dtype}, expected int8 or uint8: pass a view of bytes")
    return _layout_of_tensors("pages", pages, block_tokens)


def flash_attention(
    kv_caches: Sequence[torch.Tensor],  # one per layer: [2, num_blocks, block_size, num_kv_heads, head_dim]
) -> PagedLayout:
    """Layout of FlashAttention pages with K and V stacked in dimension 0 (vLLM before the fused layouts)."""
    _check_alike(kv_caches, 5, "(2, num_blocks, block_size, num_kv_heads, head_dim)")
    if kv_caches[0].shape[0] != 2:
        raise LayoutError(
            f"dimension 0 is {kv_caches[0].shape[0]}, expected 2 (K, V): pass K and V of one layer in one tensor"
        )
    return _layout_of_tensors("flash_attention", kv_caches, kv_caches[0].shape[2])


def split_kv(
    k_caches: Sequence[torch.Tensor],  # one per layer: [num_blocks, block_size, num_kv_heads, head_dim]
    v_caches: Sequence[torch.Tensor],  # likewise; head_dim may differ
) -> PagedLayout:
    """Layout of separate K and V tensors, as `flash_attn_with_kvcache` takes them. Register them as K0, V0, K1, V1, ..."""
    if len(k_caches) != len(v_caches):
        raise LayoutError(
            f"{len(k_caches)} K tensors but {len(v_caches)} V tensors were given: pass one of each per layer"
        )
    tensors = interleave(k_caches, v_caches)
    _check_alike(tensors, 4, "(num_blocks, block_size, num_kv_heads, head_dim)")
    return _layout_of_tensors("split_kv", tensors, k_caches[0].shape[1])


def interleave(k_caches: Sequence[torch.Tensor], v_caches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return [K0, V0, K1, V1, ...]: the order in which K and V tensors are registered."""
    return [t for pair in zip(k_caches, v_caches, strict=True) for t in pair]


def fused_kv(
    caches: Sequence[torch.Tensor],  # one per layer: NHD [blocks, tokens, heads, 2D] or HND [blocks, heads, tokens, 2D]
    order: str,  # "NHD" or "HND": which of dimensions 1 and 2 is the token
) -> PagedLayout:
    """Layout with K and V concatenated in the last dimension (vLLM from 0.26, FlashInfer)."""
    if order not in ("NHD", "HND"):
        raise LayoutError(f"order is {order!r}, expected 'NHD' or 'HND': name the order of dimensions 1 and 2")
    _check_alike(caches, 4, "(num_blocks, tokens, heads, 2 * head_dim), or heads before tokens for HND")
    return _layout_of_tensors(f"fused_{order.lower()}", caches, caches[0].shape[1 if order == "NHD" else 2])


def token_pool(
    buffers: Sequence[torch.Tensor],  # K0, V0, K1, ..., each [num_slots, num_kv_heads, head_dim] or [num_slots, latent]
    page_size: int,  # tokens per block: block b is slots [b * page_size, (b + 1) * page_size)
) -> PagedLayout:
    """Layout of SGLang's token pools. A partial last page has no block."""
    if page_size < 1:
        raise LayoutError(f"page_size is {page_size}, expected at least 1: pass the engine's page size")
    ndim = buffers[0].dim() if buffers else 3
    _check_alike(buffers, 2 if ndim == 2 else 3, "(num_slots, num_kv_heads, head_dim)")
    if buffers[0].shape[0] < page_size:
        raise LayoutError(
            f"{buffers[0].shape[0]} slots are less than one page of {page_size} tokens: use a smaller page_size or more slots"
        )
    return _layout_of_tensors("token_pool", buffers, page_size)


def mla(
    caches: Sequence[torch.Tensor],  # one per layer: [num_blocks, block_size, latent]
) -> PagedLayout:
    """Layout of multi-head latent attention: one latent vector per token and layer."""
    _check_alike(caches, 3, "(num_blocks, block_size, latent)")
    return _layout_of_tensors("mla", caches, caches[0].shape[1])
