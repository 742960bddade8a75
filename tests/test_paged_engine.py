"""An engine with the cache computes the same logits as without it, bit for bit, turn after turn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvkern
from kvkern.api import PagedCache
from kvkern.arena.slots import SlotGeometry
from kvkern.assemble import build_cache, build_copier, open_arena
from kvkern.config import Config
from kvkern.kernels.layout import PagedLayout
from kvkern.kernels.paged_tensors import PagedTensors
from tests.paged_engine import VOCAB, PagedEngine

DTYPES = [torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: workers of the test run share the cores, and the shapes here are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def open_for(engine: PagedEngine, folder: Path, **options: Any) -> PagedCache:
    layout = kvkern.layout.flash_attention(engine.kv_caches)
    defaults = {"model": "tiny", "weights": "seed 0", "capacity": "4MiB", "arena_dir": folder, "threads": 2}
    return kvkern.open_cache(layout, engine.kv_caches, **(defaults | options))


def with_cache(engine: PagedEngine, cache: PagedCache, tokens: list[int]) -> tuple[torch.Tensor, int]:
    """Serve one request as the docstring of kvkern/api.py shows. The last token is always computed, for its logits."""
    table = engine.allocate(len(tokens))
    with cache.match(tokens[:-1]) as hit:
        num_loaded = cache.load(hit, table)
    logits = engine.compute(tokens, num_loaded, table)
    cache.store(tokens, table, match=hit)
    engine.release(table)
    return logits, num_loaded


def conversation(seed: int, turns: int) -> list[list[int]]:
    """Return growing sequences: each turn continues where the last turn ended."""
    rng, tokens, out = random.Random(seed), [], []
    for _ in range(turns):
        tokens = tokens + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 15, 16, 17, 40]))]
        out.append(tokens)
    return out


@by_dtype
@pytest.mark.parametrize(("block_size", "blocks_per_chunk"), [(16, 1), (8, 2), (4, 4), (5, 3)])
def test_growing_turns(tmp_path: Path, dtype: torch.dtype, block_size: int, blocks_per_chunk: int) -> None:
    """The reference keeps its own blocks, and computes the same tokens from the same start.

    kvkern's engine gets other, poisoned blocks for every turn and loads the prefix.
    """
    engine = PagedEngine(dtype, block_size, num_blocks=80)
    chunk = block_size * blocks_per_chunk
    with closing(open_for(engine, tmp_path, blocks_per_chunk=blocks_per_chunk)) as cache:
        for seed in range(3):
            reference = PagedEngine(dtype, block_size, num_blocks=160)
            table = reference.allocate(400)
            stored = 0
            for tokens in conversation(seed, turns=6):
                logits, num_loaded = with_cache(engine, cache, tokens)
                assert num_loaded == min(stored, (len(tokens) - 1) // chunk * chunk)
                want = reference.compute(tokens, num_loaded, table)
                assert torch.equal(logits, want)
                assert not logits.isnan().any()
                stored = len(tokens) // chunk * chunk
        stats = cache.stats()
        assert stats["hit_chunks"] > 10
        assert (stats["bad_chunks"], stats["failed_chunks"], stats["faults"]) == (0, 0, 0)


@by_dtype
def test_branches_share_their_prefix(tmp_path: Path, dtype: torch.dtype) -> None:
    engine, reference = PagedEngine(dtype), PagedEngine(dtype)
    system = conversation(7, turns=1)[0] * 4
    system = (system * 64)[:64]
    with closing(open_for(engine, tmp_path)) as cache:
        with_cache(engine, cache, system)
        table = reference.allocate(200)
        reference.compute(system, 0, table)
        for seed in range(4):
            tokens = system + [seed] * 20
            logits, num_loaded = with_cache(engine, cache, tokens)
            assert num_loaded == 64
            assert torch.equal(logits, reference.compute(tokens, 64, table))


@by_dtype
def test_a_spoiled_chunk_is_recomputed(tmp_path: Path, dtype: torch.dtype) -> None:
    """A bit flips in the arena: the load ends before that chunk, and the answer equals the reference's."""
    engine, reference = PagedEngine(dtype), PagedEngine(dtype)
    tokens = [i * 7 % VOCAB for i in range(100)]
    with closing(open_for(engine, tmp_path)) as cache:
        with_cache(engine, cache, tokens)
        with cache.match(tokens) as hit:
            cache._transfer._arena.parts(0)[hit.lease.slots[3], 77] ^= 4
        table = reference.allocate(100)
        reference.compute(tokens, 0, table)
        logits, num_loaded = with_cache(engine, cache, tokens)
        assert num_loaded == 48
        assert torch.equal(logits, reference.compute(tokens, 48, table))
        assert cache.stats()["bad_chunks"] == 1
        logits, num_loaded = with_cache(engine, cache, tokens)
        assert num_loaded == 96  # the request before has stored the chunk again
        assert torch.equal(logits, reference.compute(tokens, 96, table))


@by_dtype
def test_under_pressure_every_answer_stays_right(tmp_path: Path, dtype: torch.dtype) -> None:
    """Eight conversations take turns over an arena of twelve chunks: mostly misses, never a wrong answer."""
    engine = PagedEngine(dtype)
    talks = [conversation(seed, turns=4) for seed in range(8)]
    references = [PagedEngine(dtype) for _ in talks]
    tables = [r.allocate(300) for r in references]
    probe = open_for(engine, tmp_path)
    slot_nbytes = probe._transfer._arena.spec.geometry.slot_nbytes
    probe.close()
    with closing(open_for(engine, tmp_path, capacity=12 * slot_nbytes + 4096)) as cache:
        for turn in range(4):
            for talk, reference, table in zip(talks, references, tables, strict=True):
                logits, num_loaded = with_cache(engine, cache, talk[turn])
                assert torch.equal(logits, reference.compute(talk[turn], num_loaded, table))
        assert cache.stats()["evicted_chunks"] > 0
        assert cache.stats()["dropped_chunks"] == 0


class Shared:
    """Two engines with different page sizes over one arena and one manager, as behind a node daemon."""

    def __init__(self, folder: Path, engines: list[PagedEngine], chunk_tokens: int) -> None:
        layouts: list[PagedLayout] = [kvkern.layout.flash_attention(e.kv_caches) for e in engines]
        config = Config.parse({"capacity": "1MiB", "arena_dir": str(folder), "threads": 1})
        spaces = [kvkern.Namespace("tiny", "float32", layout.fingerprint, chunk_tokens, "seed 0") for layout in layouts]
        assert spaces[0].root == spaces[1].root
        parts = {layout.part_nbytes(chunk_tokens // layout.block_tokens) for layout in layouts}
        self.arena = open_arena(config, SlotGeometry(parts.pop(), 6), "shared", expected=1)
        assert not parts
        cache = build_cache(self.arena)
        self.caches = []
        for engine, layout, space in zip(engines, layouts, spaces, strict=True):
            paged = PagedTensors.bind(layout, engine.kv_caches)
            copier = build_copier(config, self.arena, [paged], 0, chunk_tokens // layout.block_tokens)
            self.caches.append(PagedCache(cache, copier, self.arena.close, space))


def test_engines_of_other_page_sizes_read_each_others_chunks(tmp_path: Path) -> None:
    engines = [PagedEngine(torch.float32, block_size) for block_size in (16, 4)]
    shared = Shared(tmp_path, engines, chunk_tokens=16)
    reference = PagedEngine(torch.float32, 2, num_blocks=100)
    table = reference.allocate(150)
    stored = 0
    for turn, tokens in enumerate(conversation(3, turns=5)):
        which = turn % 2
        logits, num_loaded = with_cache(engines[which], shared.caches[which], tokens)
        assert num_loaded == min(stored, (len(tokens) - 1) // 16 * 16)
        assert torch.equal(logits, reference.compute(tokens, num_loaded, table))
        stored = len(tokens) // 16 * 16
    assert stored > 0
    for cache in shared.caches:
        cache.close()


def test_the_engine_notices_a_wrong_block() -> None:
    """The tests above can fail: if two blocks of a table are swapped, the logits differ."""
    engine = PagedEngine(torch.float32)
    tokens = [i * 5 % VOCAB for i in range(64)]
    table = engine.allocate(80)
    engine.compute(tokens, 0, table)
    right = engine.compute([*tokens, 1], 64, table)
    wrong = engine.compute([*tokens, 1], 64, [table[1], table[0], *table[2:]])
    assert not torch.equal(right, wrong)


@pytest.mark.gpu
@by_dtype
def test_flash_attn_with_kvcache(tmp_path: Path, dtype: torch.dtype) -> None:
    """The same holds for FlashAttention's own paged kernel, whose pages are 256 tokens."""
    pytest.importorskip("flash_attn", reason="flash-attn is not installed (pip install kvkern[flash-attn])")
    if not torch.cuda.is_available():
        pytest.skip("flash-attn needs a CUDA device, and there is none")
    half = torch.float16 if dtype is torch.float32 else dtype  # FlashAttention has no float32
    engine, reference = (PagedEngine(half, 256, num_blocks=16, flash=True, device="cuda") for _ in range(2))
    tokens = np.random.default_rng(0).integers(0, VOCAB, 1000).tolist()
    with closing(open_for(engine, tmp_path, capacity="64MiB")) as cache:
        with_cache(engine, cache, tokens)
        table = reference.allocate(1000)
        reference.compute(tokens, 0, table)
        logits, num_loaded = with_cache(engine, cache, tokens)
        assert num_loaded == 768
        assert torch.equal(logits, reference.compute(tokens, 768, table))
