"""The public API: what each call promises, what it refuses, and what it leaves behind.

test_paged_engine.py proves the logits.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvkern
from kvkern.api import PagedCache
from kvkern.errors import ArenaError, ConfigError, KvkernError, LayoutError
from tests.support import guarded, run_in_threads

NUM_BLOCKS, BLOCK_TOKENS, PER_CHUNK = 40, 4, 2
CHUNK = BLOCK_TOKENS * PER_CHUNK
SLOT_NBYTES = 4096 + 4096  # header and one part


def make_tensors(seed: int = 0) -> list[torch.Tensor]:
    shape = (2, NUM_BLOCKS, BLOCK_TOKENS, 2, 16)
    return [guarded(2 * NUM_BLOCKS * 256, seed + i)[0].view(torch.bfloat16).view(shape) for i in range(2)]


def open_cache(tensors: list[torch.Tensor], folder: Path, slots: int = 16, **options: Any) -> PagedCache:
    defaults = {
        "model": "m", "weights": "w", "blocks_per_chunk": PER_CHUNK, "capacity": 4096 + slots * SLOT_NBYTES,
        "arena_dir": folder, "threads": 1,
    }  # fmt: skip
    return kvkern.open_cache(kvkern.layout.flash_attention(tensors), tensors, **(defaults | options))


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return make_tensors()


@pytest.fixture
def cache(tensors: list[torch.Tensor], tmp_path: Path) -> Iterator[PagedCache]:
    with closing(open_cache(tensors, tmp_path)) as cache:
        yield cache


def blocks_of(tensors: list[torch.Tensor], table: Any) -> list[np.ndarray[Any, Any]]:
    return [t[:, np.asarray(table).tolist()].contiguous().view(torch.uint8).numpy() for t in tensors]


def same(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


TOKENS = list(range(100, 100 + 3 * CHUNK + 5))  # three chunks and a rest
TABLE = [9, 3, 0, 39, 17, 4, 8]
ELSEWHERE = [20, 21, 30, 29, 28, 27, 11]


def test_store_match_load(cache: PagedCache, tensors: list[torch.Tensor]) -> None:
    want = blocks_of(tensors, TABLE[:6])
    others = [b for b in range(NUM_BLOCKS) if b not in ELSEWHERE[:6]]
    before = blocks_of(tensors, others)
    with cache.match(TOKENS) as hit:
        assert hit.num_tokens == 0
        assert cache.load(hit, []) == 0
    assert cache.store(TOKENS, TABLE) == 3
    assert cache.store(TOKENS, TABLE) == 0  # there already
    with cache.match(TOKENS) as hit:
        assert hit.num_tokens == 3 * CHUNK
        assert cache.load(hit, ELSEWHERE) == 3 * CHUNK
    assert same(blocks_of(tensors, ELSEWHERE[:6]), want)
    assert same(blocks_of(tensors, others), before)
    assert cache.stats()["hit_ratio"] == 0.5


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_partial_chunks_are_neither_stored_nor_matched(cache: PagedCache, count: int) -> None:
    assert cache.store(TOKENS[:count], TABLE) == count // CHUNK
    with cache.match(TOKENS[:count]) as hit:
        assert hit.num_tokens == count // CHUNK * CHUNK
    assert len(cache.keys(TOKENS[:count])) == count // CHUNK


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "numpy", "torch"])
def test_tables_and_tokens_of_any_kind(cache: PagedCache, kind: Callable[[list[int]], Any]) -> None:
    assert cache.store(TOKENS, kind(TABLE)) == 3
    tokens = kind(TOKENS)
    with cache.match(tokens.numpy() if isinstance(tokens, torch.Tensor) else tokens) as hit:
        assert cache.load(hit, kind(ELSEWHERE)) == 3 * CHUNK


@pytest.mark.parametrize("start", [0, BLOCK_TOKENS, CHUNK, CHUNK + BLOCK_TOKENS, 3 * CHUNK])
def test_load_from_the_middle(cache: PagedCache, tensors: list[torch.Tensor], start: int) -> None:
    """Blocks before `start` stay as they are. The result still counts from token 0."""
    cache.store(TOKENS, TABLE)
    first = start // BLOCK_TOKENS
    want, before = blocks_of(tensors, TABLE[first:6]), blocks_of(tensors, ELSEWHERE[:first])
    with cache.match(TOKENS) as hit:
        assert cache.load(hit, ELSEWHERE, start) == 3 * CHUNK
    assert same(blocks_of(tensors, ELSEWHERE[first:6]), want)
    assert same(blocks_of(tensors, ELSEWHERE[:first]), before)


def test_a_spoiled_chunk_ends_the_load(cache: PagedCache) -> None:
    cache.store(TOKENS, TABLE)
    with cache.match(TOKENS) as hit:
        cache._transfer._arena.parts(0)[hit.lease.slots[1], 3] ^= 1
        assert cache.load(hit, ELSEWHERE) == CHUNK
    with cache.match(TOKENS) as hit:
        assert hit.num_tokens == CHUNK
    assert cache.store(TOKENS, TABLE) == 1


def test_a_spoiled_chunk_before_start_does_not_count(cache: PagedCache) -> None:
    cache.store(TOKENS, TABLE)
    with cache.match(TOKENS) as hit:
        cache._transfer._arena.parts(0)[hit.lease.slots[1], 3] ^= 1
        assert cache.load(hit, ELSEWHERE, 2 * CHUNK) == 3 * CHUNK
        assert cache.load(hit, ELSEWHERE, CHUNK + BLOCK_TOKENS) == CHUNK + BLOCK_TOKENS


def test_extras_keep_images_apart(cache: PagedCache) -> None:
    cache.store(TOKENS, TABLE, extras={1: b"a" * 32})
    for extras, chunks in (({1: b"a" * 32}, 3), ({1: b"b" * 32}, 1), (None, 1)):
        with cache.match(TOKENS, extras) as hit:
            assert hit.num_tokens == chunks * CHUNK


def test_store_from_the_middle(cache: PagedCache) -> None:
    assert cache.store(TOKENS[: CHUNK + 1], TABLE) == 1
    assert cache.store(TOKENS, TABLE, start=CHUNK) == 2
    with cache.match(TOKENS) as hit:
        assert hit.num_tokens == 3 * CHUNK


def test_match_and_store_of_a_request_are_one_use(cache: PagedCache) -> None:
    """GRIT learns from chunks that are used again. A store is no second use of the chunks that its own match asked for."""
    learned = cache._cache._dram._policy.model.events
    with cache.match(TOKENS[: CHUNK + 1]) as hit:
        pass
    assert cache.store(TOKENS[: CHUNK + 1], TABLE, match=hit) == 1  # chunked prefill: it stores as it goes
    assert cache.store(TOKENS, TABLE, start=CHUNK, match=hit) == 2
    assert learned.sum() == 0
    with cache.match(TOKENS) as again:
        assert again.num_tokens == 3 * CHUNK
    once = learned.sum()
    assert once > 0
    assert cache.store(TOKENS, TABLE, match=again) == 0
    assert learned.sum() == once
    cache.store(TOKENS, TABLE)  # without its match, it counts as one more use
    assert learned.sum() > once


def test_clear(cache: PagedCache) -> None:
    cache.store(TOKENS, TABLE)
    with cache.match(TOKENS) as hit:
        assert cache.clear() == 3
        assert cache.load(hit, ELSEWHERE) == 3 * CHUNK  # pinned before the clear, so still readable
        assert cache.match(TOKENS).num_tokens == 0
    assert cache.stats()["free_slots"] == cache.stats()["slots"]


def test_a_match_pins_until_its_release(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with closing(open_cache(tensors, tmp_path, slots=3)) as cache:
        cache.store(TOKENS, TABLE)
        other = [1] * 3 * CHUNK
        hit = cache.match(TOKENS)
        assert cache.store(other, TABLE) == 0
        assert cache.stats()["dropped_chunks"] == 3
        hit.release()
        hit.release()
        assert cache.store(other, TABLE) == 3
        forgotten = cache.match(other)
        del forgotten  # releases itself
        assert cache.store(TOKENS, TABLE) == 3


def test_a_match_collected_inside_the_cache_does_not_deadlock(
    cache: PagedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python may collect a Match in a reference cycle (as in a traceback) at any allocation, also under the lock."""
    cache.store(TOKENS, TABLE)
    holder: list[Any] = [cache.match(TOKENS)]
    holder.append(holder)
    real = cache._cache._dram.contains

    def contains(keys: list[bytes]) -> int:
        gc.collect()
        return real(keys)

    monkeypatch.setattr(cache._cache._dram, "contains", contains)
    gc.collect()
    del holder
    thread = threading.Thread(target=lambda: cache._cache.lookup([]), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()  # a daemon thread: if it is stuck, it ends with the process


def test_a_collected_match_still_drops_bad_chunks(cache: PagedCache) -> None:
    """Otherwise every later request would hit the spoiled chunk, and no store would replace it."""
    cache.store(TOKENS, TABLE)
    hit = cache.match(TOKENS)
    cache._transfer._arena.parts(0)[hit.lease.slots[1], 3] ^= 1
    assert cache.load(hit, ELSEWHERE) == CHUNK
    del hit
    with cache.match([1] * CHUNK):  # the next call ends the lease
        pass
    assert cache.store(TOKENS, TABLE) == 1
    assert cache.stats()["bad_chunks"] == 1


def test_salts_and_models_never_meet(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"salt": "a"}, {"salt": "b"}, {"model": "n"}, {"weights": "x"}]
    keys = []
    for options in variants:
        with closing(open_cache(tensors, tmp_path, **options)) as cache:
            keys.append(cache.keys(TOKENS)[0])
    assert len(set(keys)) == len(variants)


def test_threads_on_distinct_blocks(tmp_path: Path) -> None:
    """Eight threads store and load through one cache. Every load returns the bytes that the thread stored."""
    tensors = make_tensors()
    wrong: list[object] = []
    with closing(open_cache(tensors, tmp_path, slots=12, threads=2)) as cache:

        def work(i: int) -> None:
            source, target = [5 * i, 5 * i + 1], [5 * i + 2, 5 * i + 3]
            tokens = [i] * CHUNK
            want = blocks_of(tensors, source)
            for step in range(60):
                cache.store(tokens, source)
                with cache.match(tokens) as hit:
                    if cache.load(hit, target) and not same(blocks_of(tensors, target), want):
                        wrong.append((i, step))

        run_in_threads(work, 8)
        assert wrong == []
        assert cache.stats()["faults"] == 0
        assert cache.stats()["hit_chunks"] > 400


REFUSED: dict[str, tuple[Callable[[PagedCache, Any], object], type[KvkernError], str]] = {
    "short table, store": (lambda c, hit: c.store(TOKENS, TABLE[:5]), ConfigError, "has 5 blocks; 3 chunks need 6"),
    "short table, load": (lambda c, hit: c.load(hit, TABLE[:5]), ConfigError, "has 5 blocks; 3 chunks need 6"),
    "start inside a block": (lambda c, hit: c.load(hit, TABLE, 3), ConfigError, "start is 3; .* block size 4"),
    "start behind the match": (lambda c, hit: c.load(hit, TABLE, 4 * CHUNK), ConfigError, "start is 32"),
    "token": (lambda c, hit: c.match([-1] * CHUNK), LayoutError, r"\[0, 2\^32\)"),
    "extra": (lambda c, hit: c.match(TOKENS, {0: b"short"}), LayoutError, "extra of chunk 0 has 5 bytes"),
    "block, store": (lambda c, hit: c.store([5] * CHUNK, [0, NUM_BLOCKS]), LayoutError, "block id 40 .*is outside"),
    "block, load": (lambda c, hit: c.load(hit, [*TABLE[:5], NUM_BLOCKS]), LayoutError, "block id 40 .*is outside"),
    "block far away": (lambda c, hit: c.store([5] * CHUNK, [0, 1 << 40]), (KvkernError, OverflowError), r"\w"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(cache: PagedCache, name: str) -> None:
    call, error, message = REFUSED[name]
    cache.store(TOKENS, TABLE)
    with cache.match(TOKENS) as hit, pytest.raises(error, match=message):
        call(cache, hit)


@pytest.mark.parametrize("table", [[0, NUM_BLOCKS], [0, -2]], ids=str)
def test_a_refused_store_gives_its_slots_back(cache: PagedCache, table: list[int]) -> None:
    """The same tokens can then be stored with a correct table."""
    with pytest.raises(KvkernError):
        cache.store([5] * CHUNK, table)
    assert cache.stats()["free_slots"] == cache.stats()["slots"]
    assert cache.store([5] * CHUNK, [0, 1]) == 1


def test_an_absent_block_is_never_stored_as_zeros(cache: PagedCache, tensors: list[torch.Tensor]) -> None:
    """Engines pad block tables with -1. A chunk that was not computed must not become a hit."""
    try:
        stored = cache.store(TOKENS, [*TABLE[:3], -1, *TABLE[4:]])
    except KvkernError:
        stored = 0
    assert stored in (0, 1)
    with cache.match(TOKENS) as hit:
        assert hit.num_tokens <= CHUNK


def test_block_ids_are_not_cut_to_32_bits(cache: PagedCache) -> None:
    with pytest.raises(KvkernError):
        cache.store([5] * CHUNK, np.array([0, (1 << 32) + 5]))


@pytest.mark.parametrize("start", [-BLOCK_TOKENS, -CHUNK])
def test_a_negative_start_is_refused(cache: PagedCache, start: int) -> None:
    cache.store(TOKENS, TABLE)
    with cache.match(TOKENS) as hit, pytest.raises(ConfigError):
        cache.load(hit, ELSEWHERE, start)


def test_a_negative_start_of_a_store_is_refused(cache: PagedCache) -> None:
    with pytest.raises(ConfigError):
        cache.store(TOKENS, TABLE, start=-CHUNK)


def test_bad_input_loses_nothing_that_is_stored(cache: PagedCache) -> None:
    """Failure rule 3: bad input is an exception, and all stored chunks stay cached."""
    cache.store(TOKENS, TABLE)
    with cache.match(TOKENS) as hit, pytest.raises(LayoutError):
        cache.load(hit, [*TABLE[:5], NUM_BLOCKS])
    with cache.match(TOKENS) as hit:
        assert hit.num_tokens == 3 * CHUNK


def test_a_released_match_harms_nobody(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with closing(open_cache(tensors, tmp_path, slots=3)) as cache:
        cache.store(TOKENS, TABLE)
        hit = cache.match(TOKENS)
        hit.release()
        other = [1] * 3 * CHUNK
        assert cache.store(other, TABLE) == 3  # in the slots of the released match
        with suppress(KvkernError):
            assert cache.load(hit, ELSEWHERE) == 0
        with cache.match(other) as now:
            assert cache.load(now, ELSEWHERE) == 3 * CHUNK
        assert cache.stats()["bad_chunks"] == 0


OPENING: dict[str, tuple[dict[str, Any], type[KvkernError], str]] = {
    "no capacity": ({"capacity": "0GiB"}, ConfigError, "capacity is '0GiB'"),
    "absurd capacity": ({"capacity": "64TiB"}, ArenaError, "Lower `capacity`"),
    "less than a slot": ({"capacity": 4096}, ConfigError, "holds no slot"),
    "option": ({"capasity": 1}, ConfigError, "did you mean 'capacity'"),
    "blocks per chunk": ({"blocks_per_chunk": 0}, ConfigError, "blocks_per_chunk is 0"),
    "no model": ({"model": ""}, ConfigError, "must not be empty"),
    "no weights": ({"weights": ""}, ConfigError, "must not be empty"),
    "folder": ({"arena_dir": "/nowhere"}, ConfigError, "no directory"),
}


@pytest.mark.parametrize("name", OPENING)
def test_opening_refuses(tensors: list[torch.Tensor], tmp_path: Path, name: str) -> None:
    """The error names the reason, and no file is left behind."""
    options, error, message = OPENING[name]
    with pytest.raises(error, match=message):
        open_cache(tensors, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_opening_proves_the_layout(tmp_path: Path) -> None:
    tensors = make_tensors()
    wrong = kvkern.layout.flash_attention([t[:, :-1] for t in tensors])
    given = [tensors[1], tensors[0].transpose(2, 3).contiguous().transpose(2, 3)]
    before = [t.clone() for t in given]
    with pytest.raises(LayoutError, match="does not describe the tensors"):
        kvkern.open_cache(wrong, given, model="m", weights="w", capacity="1MiB", arena_dir=tmp_path)
    for t, was in zip(given, before, strict=True):
        assert t.view(torch.uint8).equal(was.view(torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_opening_leaves_the_engines_blocks_alone(tmp_path: Path) -> None:
    tensors = make_tensors()
    before = [t.clone() for t in tensors]
    open_cache(tensors, tmp_path).close()
    for t, was in zip(tensors, before, strict=True):
        assert t.view(torch.uint8).equal(was.view(torch.uint8))


def test_shared_memory_has_no_name_from_the_start(tensors: list[torch.Tensor]) -> None:
    """In the default folder, the arena has no name, so nothing is left in /dev/shm, even after kill -9."""
    mine = f"kvkern-{os.getuid()}-"
    before = {name for name in os.listdir("/dev/shm") if name.startswith(mine)}
    layout = kvkern.layout.flash_attention(tensors)
    with closing(kvkern.open_cache(layout, tensors, model="m", weights="w", capacity="1MiB")) as cache:
        assert not cache._transfer._arena.path.exists()
        assert cache._transfer._arena.path.parent == Path("/dev/shm")
        assert cache.store(TOKENS, TABLE) == len(TOKENS) // BLOCK_TOKENS
    assert {name for name in os.listdir("/dev/shm") if name.startswith(mine)} <= before


def test_close_ends_the_threads(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    before = threading.active_count()
    cache = open_cache(tensors, tmp_path, threads=3)
    cache.store(TOKENS, TABLE)
    assert threading.active_count() > before
    cache.close()
    cache.close()
    assert threading.active_count() == before


def test_package_exports() -> None:
    for name in kvkern.__all__:
        assert getattr(kvkern, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'opencache'"):
        kvkern.opencache  # noqa: B018


def test_a_remote_store_behind_the_cache(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    """Its options, and the engine's prefill speed, which the caller must give."""
    remote = {"remote": f"file://{tmp_path}/values?capacity=64MiB", "persist": "all"}
    with closing(open_cache(tensors, tmp_path, remote_queue="1MiB", remote_timeout=2, **remote)) as first:
        assert first.store(TOKENS, TABLE) == 3
    with closing(open_cache(tensors, tmp_path, prefill_tokens_s=1e-3, **remote)) as second:
        with second.match(TOKENS) as hit:
            assert second.load(hit, TABLE) == 3 * CHUNK
        backing: Any = second._cache
        assert backing._remote.costs.prefill_tokens_s == 1e-3
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"prefill_tokens_s is {bad}; it must be above 0 and finite, or left out"):
            open_cache(tensors, tmp_path, prefill_tokens_s=bad)
    assert not list(tmp_path.glob("kvkern-*"))
