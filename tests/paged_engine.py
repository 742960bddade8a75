"""A small paged-attention engine: a transformer of random weights over FlashAttention pages and block tables.

Attention gathers the pages of a sequence and calls torch's SDPA, or it calls `flash_attn_with_kvcache` on the pages. Everything
is deterministic: the same tokens computed from the same cached bytes give the same bits. It does not know kvkern.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 211, 3, 4, 2, 16
HIDDEN = HEADS * HEAD_DIM


class PagedEngine:
    """Owns `kv_caches`, one [2, num_blocks, block_size, kv_heads, head_dim] tensor a layer, poisoned with NaN."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        num_blocks: int = 64,
        seed: int = 0,  # of the weights: engines with one seed are the same model
        flash: bool = False,
        device: str = "cpu",
    ) -> None:
        self.dtype, self.block_size, self.num_blocks, self.flash = dtype, block_size, num_blocks, flash
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(device, dtype)

        self.embedding = weight(VOCAB, HIDDEN) * 8
        kv_dim = KV_HEADS * HEAD_DIM
        self.layers = [
            {
                "q": weight(HIDDEN, HIDDEN), "k": weight(kv_dim, HIDDEN), "v": weight(kv_dim, HIDDEN),
                "o": weight(HIDDEN, HIDDEN), "up": weight(4 * HIDDEN, HIDDEN), "down": weight(HIDDEN, 4 * HIDDEN),
            }
            for _ in range(LAYERS)
        ]  # fmt: skip
        shape = (2, num_blocks, block_size, KV_HEADS, HEAD_DIM)
        self.kv_caches = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(LAYERS)]
        self.free = list(range(num_blocks))
        random.Random(seed + 1).shuffle(self.free)

    def allocate(self, num_tokens: int) -> list[int]:
        """Return a block table for `num_tokens` tokens. Its blocks are in no order, and poisoned."""
        count = -(-num_tokens // self.block_size)
        table, self.free = self.free[:count], self.free[count:]
        assert len(table) == count, "the engine is out of blocks"
        for cache in self.kv_caches:
            cache[:, table] = float("nan")
        return table

    def release(self, table: list[int]) -> None:
        """Free blocks. The block freed last is reused first, as in real engines."""
        self.free = table[::-1] + self.free

    def compute(
        self,
        tokens: list[int],  # the whole sequence
        start: int,  # KV of tokens [0, start) is in the blocks of `table`
        table: list[int],
    ) -> torch.Tensor:  # [len(tokens) - start, VOCAB]
        """Run the model on tokens[start:] and return their logits. Their KV is in the blocks afterwards."""
        device = self.embedding.device
        positions = torch.arange(start, len(tokens), device=device)
        rows = torch.tensor(table, device=device)[positions // self.block_size]
        x = self.embedding[torch.tensor(tokens[start:], device=device)]
        for layer, cache in zip(self.layers, self.kv_caches, strict=True):
            h = F.rms_norm(x, (HIDDEN,))
            q = _rotate((h @ layer["q"].T).view(-1, HEADS, HEAD_DIM), positions)
            cache[0, rows, positions % self.block_size] = _rotate(
                (h @ layer["k"].T).view(-1, KV_HEADS, HEAD_DIM), positions
            )
            cache[1, rows, positions % self.block_size] = (h @ layer["v"].T).view(-1, KV_HEADS, HEAD_DIM)
            attend = self._attend_flash if self.flash else self._attend_sdpa
            x = x + attend(q, cache, len(tokens), table).reshape(-1, HIDDEN) @ layer["o"].T
            x = x + F.gelu(F.rms_norm(x, (HIDDEN,)) @ layer["up"].T) @ layer["down"].T
        return F.rms_norm(x, (HIDDEN,)) @ self.embedding.T

    def _attend_sdpa(self, q: torch.Tensor, cache: torch.Tensor, length: int, table: list[int]) -> torch.Tensor:
        pages = cache[:, torch.tensor(table)].flatten(1, 2)[:, :length]  # [2, length, kv_heads, head_dim]
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(0, 1)[None] for t in pages)
        mask = torch.ones(len(q), length, dtype=torch.bool).tril(length - len(q))
        return F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask)[0].transpose(0, 1)

    def _attend_flash(self, q: torch.Tensor, cache: torch.Tensor, length: int, table: list[int]) -> torch.Tensor:
        from flash_attn import flash_attn_with_kvcache

        seqlens = torch.tensor([length], dtype=torch.int32, device=q.device)
        block_table = torch.tensor([table], dtype=torch.int32, device=q.device)
        return flash_attn_with_kvcache(
            q[None], cache[0], cache[1], cache_seqlens=seqlens, block_table=block_table, causal=True
        )[0]


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding, which makes a key in the wrong place a wrong key."""
    half = x.shape[-1] // 2
    angle = positions[:, None].float() * 10000 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
