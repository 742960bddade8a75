"""FlashAttention must not notice a round trip: attention over blocks that went out and came back is equal, bit for bit.

    originals in blocks A of a pool, attention over table A        -> want
    gather A -> slots; blocks B poisoned; scatter slots -> B; A poisoned
    attention over table B                                         -> must equal `want`

On a CPU attention is a gather by block table and torch's scaled_dot_product_attention. On a GPU it is flash-attn's
`flash_attn_with_kvcache` with `block_table`, over the pool's own strided views. Poison is NaN, so a read from a block without
scattered bytes shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kvkern
from kvkern.kernels import layout as L
from kvkern.kernels.paged_copy import Backend, gather_chunks, scatter_chunks
from kvkern.kernels.paged_tensors import PagedTensors

LAYERS, BLOCKS_PER_CHUNK = 2, 3
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16

# (q [batch, q_tokens, q_heads, dim], K and V views [blocks, page, kv_heads, dim], table [batch, blocks], lengths [batch])
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pool:
    """Paged KV of some layers, and the views that attention reads."""

    paged: PagedTensors
    k: list[torch.Tensor]  # one per layer: [blocks, page, kv_heads, dim], strided
    v: list[torch.Tensor]

    def poison(self, blocks: npt.NDArray[np.int32]) -> None:
        """Fill `blocks` of every layer with NaN."""
        ids = torch.from_numpy(blocks.astype(np.int64)).to(self.k[0].device)
        for view in (*self.k, *self.v):
            view[ids] = torch.nan


def make_pool(kind: str, blocks: int, page: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> Pool:
    """Make random KV in one of the layouts that attention kernels read in place."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    if kind == "split":
        k = [noise(blocks, page, heads, dim) for _ in range(LAYERS)]
        v = [noise(blocks, page, heads, dim) for _ in range(LAYERS)]
        return Pool(PagedTensors.bind(L.split_kv(k, v), L.interleave(k, v)), k, v)
    if kind in ("stacked", "block outermost"):
        if kind == "stacked":
            caches = [noise(2, blocks, page, heads, dim) for _ in range(LAYERS)]
        else:
            caches = [noise(blocks, 2, page, heads, dim).transpose(0, 1) for _ in range(LAYERS)]
        paged = PagedTensors.bind(L.flash_attention(caches), caches)
        return Pool(paged, [c[0] for c in caches], [c[1] for c in caches])
    order = kind.removeprefix("fused ")
    shape = (blocks, page, heads, 2 * dim) if order == "NHD" else (blocks, heads, page, 2 * dim)
    caches = [noise(*shape) for _ in range(LAYERS)]
    views = caches if order == "NHD" else [c.transpose(1, 2) for c in caches]
    paged = PagedTensors.bind(L.fused_kv(caches, order), caches)
    return Pool(paged, [c[..., :dim] for c in views], [c[..., dim:] for c in views])


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return causal attention, [batch, q_tokens, q_heads, dim]. The last query sees every token."""
    out = []
    for i, length in enumerate(lengths.tolist()):
        blocks = table[i, : -(-length // k.shape[1])].long()
        keys, values = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1) for cache in (k, v))
        seen = torch.ones(q.shape[1], length, dtype=torch.bool).tril(length - q.shape[1])
        one = q[i].transpose(0, 1)
        out.append(scaled_dot_product_attention(one[None], keys[None], values[None], seen, enable_gqa=True)[0])
    return torch.stack(out).transpose(1, 2)


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Return flash-attn's attention over the strided views, without a copy. One split fixes the order of its sums."""
    from flash_attn import flash_attn_with_kvcache

    result: torch.Tensor = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, block_table=table, causal=True, num_splits=1
    )
    return result


@dataclass(frozen=True)
class Batch:
    """Ragged sequences: their blocks before and after, and the chunks that move them."""

    lengths: npt.NDArray[np.int32]  # [batch] tokens
    before: npt.NDArray[np.int32]  # [batch, max_blocks]; unused entries 0
    after: npt.NDArray[np.int32]  # distinct from `before`
    out: npt.NDArray[np.int32]  # [chunks, BLOCKS_PER_CHUNK] blocks to gather, -1 behind a sequence's end
    back: npt.NDArray[np.int32]  # likewise, blocks to scatter into

    @classmethod
    def draw(cls, lengths: list[int], page: int, num_blocks: int) -> Batch:
        counts = [-(-n // page) for n in lengths]
        ids = np.random.default_rng(1).permutation(num_blocks).astype(np.int32)
        ends = np.cumsum([0, *counts])
        tables = np.zeros((2, len(lengths), max(counts)), dtype=np.int32)
        chunks: list[list[npt.NDArray[np.int32]]] = [[], []]
        for side, half in enumerate((ids[: ends[-1]], ids[ends[-1] : 2 * ends[-1]])):
            for i, (begin, end) in enumerate(pairwise(ends)):
                tables[side, i, : end - begin] = half[begin:end]
                padded = np.full(-(-(end - begin) // BLOCKS_PER_CHUNK) * BLOCKS_PER_CHUNK, -1, dtype=np.int32)
                padded[: end - begin] = half[begin:end]
                chunks[side].append(padded.reshape(-1, BLOCKS_PER_CHUNK))
        return cls(np.array(lengths, dtype=np.int32), *tables, np.concatenate(chunks[0]), np.concatenate(chunks[1]))


def move_out_and_back(pool: Pool, batch: Batch, back: npt.NDArray[np.int32], backend: Backend) -> None:
    """Gather the chunks of the batch into slots, and scatter them into the blocks of `back`.

    The target blocks are NaN before the scatter. The original blocks are NaN afterwards.
    """
    count, planes = len(batch.out), len(pool.paged.layout.planes)
    slots = np.zeros((count, pool.paged.layout.part_nbytes(BLOCKS_PER_CHUNK)), dtype=np.uint8)
    slot_ids = np.random.default_rng(2).permutation(count).astype(np.int64)
    sums, read = np.zeros((2, count, planes), dtype=np.uint64)
    gather_chunks(pool.paged, batch.out, slots, slot_ids, sums, backend)
    pool.poison(back[back >= 0])
    scatter_chunks(pool.paged, back, slots, slot_ids, read, backend)
    np.testing.assert_array_equal(sums, read)
    pool.poison(batch.out[batch.out >= 0])


def attention_before_and_after(
    kind: str, dtype: torch.dtype, page: int, heads: tuple[int, int], q_tokens: int, dim: int,
    attend: Attend, backend: Backend, device: str, misplace: Callable[[npt.NDArray[np.int32]], None] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Return one (before, after) pair per layer. `misplace` changes the target blocks, as a fault would."""
    q_heads, kv_heads = heads
    lengths = [max(q_tokens, n) for n in (1, page - 1, page, page + 1, 3 * page, 7 * page + 3)]
    num_blocks = 2 * sum(-(-n // page) for n in lengths) + 3
    pool = make_pool(kind, num_blocks, page, kv_heads, dim, dtype, device)
    batch = Batch.draw(lengths, page, num_blocks)
    q = torch.randn(len(lengths), q_tokens, q_heads, dim, generator=torch.Generator().manual_seed(3))
    q = q.to(dtype).to(device)
    before, after, tokens = (torch.from_numpy(a).to(device) for a in (batch.before, batch.after, batch.lengths))
    want = [attend(q, k, v, before, tokens) for k, v in zip(pool.k, pool.v, strict=True)]
    back = batch.back.copy()
    if misplace is not None:
        misplace(back)
    move_out_and_back(pool, batch, back, backend)
    got = [attend(q, k, v, after, tokens) for k, v in zip(pool.k, pool.v, strict=True)]
    assert all(w.isfinite().all() for w in want)
    return list(zip(want, got, strict=True))


KINDS = ("split", "stacked", "block outermost", "fused NHD", "fused HND")
each_kind = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=pytest.mark.interpret)])


@backends
@each_kind
@pytest.mark.parametrize(("page", "heads", "q_tokens"), [
    (16, (8, 2), 1), (16, (4, 4), 5), (5, (6, 3), 7), (1, (4, 1), 1), (32, (8, 2), 40),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_attention_does_not_notice(
    dtype: torch.dtype, page: int, heads: tuple[int, int], q_tokens: int, kind: str, backend: Backend
) -> None:
    pairs = attention_before_and_after(kind, dtype, page, heads, q_tokens, 32, sdpa, backend, "cpu")
    for want, got in pairs:
        assert torch.equal(want, got)


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize(("heads", "q_tokens"), [((8, 2), 1), ((4, 4), 1), ((8, 1), 5)])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_flash_attention_does_not_notice(dtype: torch.dtype, heads: tuple[int, int], q_tokens: int, kind: str) -> None:
    """Pages have 256 tokens, which every release of flash-attn 2 takes. flash-attn has no float32."""
    pytest.importorskip("flash_attn", reason="flash-attn is not installed: pip install flash-attn")
    pairs = attention_before_and_after(kind, dtype, 256, heads, q_tokens, 64, flash_attention, "triton", "cuda")
    for want, got in pairs:
        assert torch.equal(want, got)


@pytest.mark.gpu
@each_kind
def test_attention_on_a_gpu_does_not_notice(kind: str) -> None:
    """Use torch's attention, so that a GPU without flash-attn still proves the round trip."""

    def attend(*args: torch.Tensor) -> torch.Tensor:
        return sdpa(*(a.cpu() for a in args))

    pairs = attention_before_and_after(kind, BF16, 16, (8, 2), 5, 64, attend, "triton", "cuda")
    for want, got in pairs:
        assert torch.equal(want, got)


def swap_within_a_sequence(back: npt.NDArray[np.int32]) -> None:
    """Swap the last two blocks of the longest sequence. Only queries that do not see all tokens can notice the order."""
    row = back[-1]
    last = int(np.flatnonzero(row >= 0)[-1])
    row[[last - 1, last]] = row[[last, last - 1]]


def swap_between_sequences(back: npt.NDArray[np.int32]) -> None:
    back[0, 0], back[-1, 0] = back[-1, 0], back[0, 0]


def leave_one_out(back: npt.NDArray[np.int32]) -> None:
    back[-1, 0] = -1


@pytest.mark.parametrize("misplace", [swap_within_a_sequence, swap_between_sequences, leave_one_out])
@each_kind
def test_a_misplaced_block_is_noticed(kind: str, misplace: Callable[[npt.NDArray[np.int32]], None]) -> None:
    """The contract can fail: every checksum is right, but two blocks have changed places, or one is absent."""
    pairs = attention_before_and_after(kind, BF16, 16, (8, 2), 20, 32, sdpa, "numba", "cpu", misplace)
    for want, got in pairs:
        assert not torch.equal(want, got)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The same round trip through keys, an arena and `open_cache`. Attention over the loaded tokens is unchanged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # so that a GPU is calibrated anew
    page, tokens, num_blocks = 16, list(range(100)), 32
    pool = make_pool("stacked", num_blocks, page, 2, 32, BF16, device)
    ids = np.random.default_rng(4).permutation(num_blocks).astype(np.int32)
    before, after = ids[:7], ids[7:14]
    cache = kvkern.open_cache(
        pool.paged.layout, list(pool.paged.tensors), model="m", weights="w", capacity="16MiB", arena_dir=str(tmp_path)
    )
    with closing(cache):
        cache.store(tokens, before.tolist())
        pool.poison(after)
        with cache.match(tokens) as hit:
            loaded = cache.load(hit, after.tolist())
    assert loaded == 96
    q = torch.randn(1, 20, 8, 32, generator=torch.Generator().manual_seed(3)).to(BF16)
    length = torch.tensor([loaded])
    for k, v in zip(pool.k, pool.v, strict=True):
        want, got = (sdpa(q, k.cpu(), v.cpu(), torch.from_numpy(table[None]), length) for table in (before, after))
        assert torch.equal(want, got)
