"""Strides, runs and fingerprints of every layout constructor, and the input that each one refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvkern.kernels import layout as L
from kvkern.kernels.errors import KvkernError, LayoutError
from kvkern.kernels.layout import PagedLayout, Plane
from kvkern.kernels.paged_tensors import PagedTensors

BF16 = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def test_flash_attention_is_two_planes_a_layer() -> None:
    tensors = [empty(2, 7, 16, 4, 8) for _ in range(3)]
    layout = L.flash_attention(tensors)
    block = 16 * 4 * 8 * 2
    assert (layout.name, layout.num_blocks, layout.block_tokens) == ("flash_attention", 7, 16)
    assert [p.tensor for p in layout.planes] == [0, 0, 1, 1, 2, 2]
    assert [p.offset for p in layout.planes] == [0, 7 * block] * 3
    assert layout.planes[0] == Plane(0, 0, block, 64, 16, 16, 4, 16)
    assert layout.planes[0].runs == (1, 0, 1, 0, block)
    assert layout.run_nbytes == block
    assert layout.block_nbytes == 6 * block


def test_block_outermost_flash_attention() -> None:
    layout = L.flash_attention([empty(7, 2, 16, 4, 8).transpose(0, 1)])
    k, v = layout.planes
    assert (k.stride_block, v.offset) == (2 * 16 * 4 * 8 * 2, 16 * 4 * 8 * 2)
    assert layout.run_nbytes == 16 * 4 * 8 * 2


def test_split_kv_takes_pairs_and_unequal_head_dims() -> None:
    k, v = [empty(5, 4, 2, 12), empty(5, 4, 2, 12)], [empty(5, 4, 2, 8), empty(5, 4, 2, 8)]
    layout = L.split_kv(k, v)
    assert [p.block_nbytes for p in layout.planes] == [4 * 2 * 24, 4 * 2 * 16] * 2
    assert [a.data_ptr() for a in L.interleave(k, v)] == [t.data_ptr() for t in (k[0], v[0], k[1], v[1])]
    assert list(layout.bases(L.interleave(k, v))) == [t.data_ptr() for t in (k[0], v[0], k[1], v[1])]


def test_a_slice_of_the_fused_tensor_has_short_runs() -> None:
    fused = empty(5, 4, 2, 16)
    layout = L.split_kv([fused[..., :8]], [fused[..., 8:]])
    assert layout.planes[0].runs == (4, 64, 2, 32, 16)
    assert layout.run_nbytes == 16


@pytest.mark.parametrize(("order", "shape", "head_major"), [
    ("NHD", (5, 16, 4, 8), False),
    ("HND", (5, 4, 16, 8), True),
])  # fmt: skip
def test_fused(order: str, shape: tuple[int, ...], head_major: bool) -> None:
    layout = L.fused_kv([empty(*shape)], order)
    plane = layout.planes[0]
    assert (plane.num_tokens, plane.num_heads, plane.head_nbytes) == (16, 4, 16)
    assert plane.head_major is head_major
    assert plane.runs == (1, 0, 1, 0, 16 * 4 * 16)
    assert layout.block_tokens == 16


@pytest.mark.parametrize("perm", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_six_stride_orders_of_the_fused_tensor(perm: tuple[int, int, int]) -> None:
    """The slot order follows the strides, whichever dimension is outermost: heads outside tokens stay outside."""
    sizes = [5, 4, 16]  # blocks, heads, tokens
    stored = empty(*(sizes[i] for i in perm), 8)
    view = stored.permute(*(perm.index(i) for i in range(3)), 3)
    plane = L.fused_kv([view], "HND").planes[0]
    strides = [s * 2 for s in view.stride()]
    assert (plane.stride_block, plane.stride_head, plane.stride_token) == tuple(strides[:3])
    assert plane.head_major is (strides[1] > strides[2])
    adjacent = {perm.index(1), perm.index(2)} == {1, 2}
    assert plane.runs[-1] == (16 * 4 * 16 if adjacent else 16 * 16 if perm[2] == 2 else 16 * 4 if perm[2] == 1 else 16)


def test_token_pool_leaves_out_a_partial_page() -> None:
    layout = L.token_pool([empty(23, 2, 8), empty(23, 2, 8)], page_size=5)
    assert (layout.num_blocks, layout.block_tokens) == (4, 5)
    assert layout.planes[0].runs == (1, 0, 1, 0, 5 * 32)
    latent = L.token_pool([empty(23, 36)], page_size=1)
    assert (latent.num_blocks, latent.planes[0].block_nbytes) == (23, 72)


@pytest.mark.parametrize(("latent", "dtype", "token_nbytes"), [(576, BF16, 1152), (656, torch.uint8, 656)])
def test_mla(latent: int, dtype: torch.dtype, token_nbytes: int) -> None:
    layout = L.mla([empty(3, 64, latent, dtype=dtype)] * 2)
    assert [p.runs for p in layout.planes] == [(1, 0, 1, 0, 64 * token_nbytes)] * 2


def test_pages_with_strided_rows() -> None:
    pages = torch.empty(4, 300, dtype=torch.int8)[:, 20:280]
    layout = L.from_pages([pages], 16)
    plane = layout.planes[0]
    assert (plane.offset, plane.stride_block, plane.num_tokens, plane.runs) == (0, 300, 1, (1, 0, 1, 0, 260))
    assert layout.block_tokens == 16
    assert int(layout.bases([pages])[0]) == pages.data_ptr()


def test_offset_views_start_where_the_view_starts() -> None:
    whole = empty(2, 9, 4, 2, 8)
    view = whole[:, 3:8]
    layout = L.flash_attention([view])
    assert list(layout.bases([view])) == [view[0].data_ptr(), view[1].data_ptr()]
    assert layout.planes[1].offset == 9 * 4 * 2 * 8 * 2


def test_plane_offsets_are_padded_to_64() -> None:
    layout = L.split_kv([empty(2, 3, 1, 5)], [empty(2, 3, 1, 7)])  # 30 and 42 bytes a block
    assert list(layout.plane_offsets(1)) == [0, 64, 128]
    assert list(layout.plane_offsets(3)) == [0, 128, 256]
    assert layout.part_nbytes(3) == 256
    assert list(layout.plane_offsets(0)) == [0, 0, 0]


MAKERS: dict[str, Callable[[int], PagedLayout]] = {
    "flash_attention": lambda bs: L.flash_attention([empty(2, 96 // bs, bs, 4, 8)]),
    "split_kv": lambda bs: L.split_kv([empty(96 // bs, bs, 4, 8)], [empty(96 // bs, bs, 4, 8)]),
    "fused_nhd": lambda bs: L.fused_kv([empty(96 // bs, bs, 4, 16)], "NHD"),
    "mla": lambda bs: L.mla([empty(96 // bs, bs, 72)]),
    "token_pool": lambda bs: L.token_pool([empty(96, 4, 8)], bs),
}


@pytest.mark.parametrize("name", MAKERS)
def test_block_size_is_not_in_the_fingerprint_of_token_major_layouts(name: str) -> None:
    """Engines with different page sizes read each other's slots."""
    prints = {MAKERS[name](bs).fingerprint for bs in (1, 2, 16, 32)}
    assert len(prints) == 1
    assert prints.pop().startswith(f"{name}:")
    sizes = {MAKERS[name](bs).part_nbytes(32 // bs) for bs in (1, 2, 16, 32)}
    assert len(sizes) == 1


def test_fingerprints_differ_where_slots_do() -> None:
    prints = {
        "fa": L.flash_attention([empty(2, 8, 16, 4, 8)]).fingerprint,
        "two layers": L.flash_attention([empty(2, 8, 16, 4, 8)] * 2).fingerprint,
        "heads": L.flash_attention([empty(2, 8, 16, 2, 8)]).fingerprint,
        "head_dim": L.flash_attention([empty(2, 8, 16, 4, 16)]).fingerprint,
        "heads x dim swapped": L.flash_attention([empty(2, 8, 16, 8, 4)]).fingerprint,
        "split": L.split_kv([empty(8, 16, 4, 8)], [empty(8, 16, 4, 8)]).fingerprint,
        "nhd": L.fused_kv([empty(8, 16, 4, 8)], "NHD").fingerprint,
        "hnd": L.fused_kv([empty(8, 4, 16, 8)], "HND").fingerprint,
        "hnd, other block size": L.fused_kv([empty(8, 4, 32, 8)], "HND").fingerprint,
        "pages": L.from_pages([empty(8, 1024, dtype=torch.int8)], 16).fingerprint,
        "pages of other tokens": L.from_pages([empty(8, 1024, dtype=torch.int8)], 32).fingerprint,
    }
    assert len(set(prints.values())) == len(prints)


def test_strides_alone_do_not_change_the_fingerprint() -> None:
    plain = L.flash_attention([empty(2, 8, 16, 4, 8)])
    outermost = L.flash_attention([empty(8, 2, 16, 4, 8).transpose(0, 1)])
    sliced = L.flash_attention([empty(2, 8, 16, 9, 8)[..., 2:6, :]])
    assert plain.fingerprint == outermost.fingerprint == sliced.fingerprint


def test_the_order_of_unlike_planes_is_in_the_fingerprint() -> None:
    """[wide, narrow, wide, narrow] and [wide, wide, narrow, narrow] lie differently in a slot: they must not share."""
    wide, narrow = empty(32, 2, 16), empty(32, 2, 8)
    a, b = L.token_pool([wide, narrow, wide, narrow], 4), L.token_pool([wide, wide, narrow, narrow], 4)
    assert list(a.plane_offsets(1)) != list(b.plane_offsets(1))
    assert a.fingerprint != b.fingerprint


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no tensors": (lambda: L.flash_attention([]), "no tensors"),
    "dimensions": (lambda: L.flash_attention([empty(2, 8, 16, 4)]), r"\(2, 8, 16, 4\), expected 5"),
    "not K and V": (lambda: L.flash_attention([empty(3, 8, 16, 4, 8)]), "dimension 0 is 3"),
    "dtype": (lambda: L.mla([empty(3, 4, 8), empty(3, 4, 8, dtype=torch.float32)]), "float32"),
    "blocks": (lambda: L.mla([empty(3, 4, 8), empty(4, 4, 8)]), r"\(4, 4, 8\)"),
    "last stride": (lambda: L.mla([empty(3, 8, 4).transpose(1, 2)]), "stride 4 in its last"),
    "no blocks": (lambda: L.mla([empty(0, 4, 8)]), "num_blocks=0"),
    "no tokens": (lambda: L.mla([empty(3, 0, 8)]), "at least 1"),
    "no bytes": (lambda: L.mla([empty(3, 4, 0)]), "at least 1"),
    "pairs": (lambda: L.split_kv([empty(3, 4, 2, 8)], []), "1 K tensors but 0 V"),
    "no pairs": (lambda: L.split_kv([], []), "no tensors"),
    "order": (lambda: L.fused_kv([empty(3, 4, 2, 8)], "nhd"), "'nhd'"),
    "page size": (lambda: L.token_pool([empty(8, 2, 4)], 0), "page_size is 0"),
    "page too large": (lambda: L.token_pool([empty(8, 2, 4)], 9), "8 slots are less than one page of 9"),
    "pool of pages": (lambda: L.token_pool([empty(8, 2, 4, 1)], 2), "expected 3 dimensions"),
    "no pools": (lambda: L.token_pool([], 2), "no tensors"),
    "page dtype": (lambda: L.from_pages([empty(3, 64)], 16), "bfloat16, expected int8"),
    "page tokens": (lambda: L.from_pages([empty(3, 64, dtype=torch.int8)], 0), "block_tokens=0"),
    "no planes": (lambda: PagedLayout("mla", (), 1, 1), "at least one plane"),
    "negative stride": (lambda: PagedLayout("mla", (Plane(0, 0, -64, 1, 1, 1, 1, 64),), 1, 1), "negative strides"),
    "name": (lambda: L.plane_views("paged", [empty(1)]), "unknown layout 'paged'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_value(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(LayoutError, match=message) as caught:
        make()
    assert isinstance(caught.value, KvkernError)


@pytest.mark.parametrize("make", [
    pytest.param(lambda: L.flash_attention([empty(2, 8, 16, 4, 8), empty(2, 6, 16, 4, 8)]), id="num_blocks of FA"),
    pytest.param(lambda: L.flash_attention([empty(2, 8, 16, 4, 8), empty(2, 8, 8, 4, 8)]), id="block size of FA"),
    pytest.param(lambda: L.split_kv([empty(8, 16, 4, 8)], [empty(8, 32, 4, 8)]), id="block size of split"),
    pytest.param(lambda: L.mla([empty(8, 16, 8), empty(8, 32, 8)]), id="block size of MLA"),
])  # fmt: skip
def test_layers_of_one_group_agree_on_blocks(make: Callable[[], object]) -> None:
    with pytest.raises(LayoutError):
        make()


def test_bind_refuses_planes_outside_their_storage() -> None:
    tensor = empty(4, 4, 8)
    layout = L.mla([tensor])
    with pytest.raises(LayoutError, match="reaches byte 256"):
        PagedTensors.bind(layout, [empty(3, 4, 8)])
    with pytest.raises(LayoutError, match="only 0 tensors"):
        PagedTensors.bind(layout, [])
    assert PagedTensors.bind(layout, [tensor]).bases.tolist() == [tensor.data_ptr()]


def test_bind_counts_from_the_views_offset() -> None:
    whole = empty(9, 4, 8)
    layout = L.mla([whole[:4]])
    PagedTensors.bind(layout, [whole[5:]])
    with pytest.raises(LayoutError, match="which has 192 bytes"):
        PagedTensors.bind(layout, [whole[6:]])
