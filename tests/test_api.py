"""The public API: what each call promises, what it refuses, and what it leaves behind.

test_paged_engine.py proves the logits.
"""

from __future__ import annotations

import gc
import os
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvkern
from kvkern import api
from kvkern.api import PagedCache
from kvkern.arena.folder import arena_folder
from kvkern.errors import ConfigError, KvkernError, LayoutError
from tests.small_cache import (
    BLOCK_TOKENS,
    CHUNK,
    ELSEWHERE,
    NUM_BLOCKS,
    TABLE,
    TOKENS,
    blocks_of,
    make_tensors,
    open_cache,
    same,
)
from tests.support import run_in_threads


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return make_tensors()


@pytest.fixture
def cache(tensors: list[torch.Tensor], tmp_path: Path) -> Iterator[PagedCache]:
    with closing(open_cache(tensors, tmp_path)) as cache:
        yield cache


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


def test_one_cache_serves_all_salts(cache: PagedCache, tensors: list[torch.Tensor]) -> None:
    """A chunk of one salt is a miss for every other, and a call without a salt is a tenant of its own."""
    tables = {None: [0, 1], "a": [2, 3], "b": [4, 5]}
    for salt, table in tables.items():
        assert cache.store(TOKENS[:CHUNK], table, salt=salt) == 1
    for salt, table in tables.items():
        with cache.match(TOKENS, salt=salt) as hit:
            assert cache.load(hit, [20, 21]) == CHUNK
        assert same(blocks_of(tensors, [20, 21]), blocks_of(tensors, table))
    assert cache.clear("a") == 1
    assert [cache.match(TOKENS, salt=salt).num_tokens for salt in tables] == [CHUNK, 0, CHUNK]


def test_a_salt_of_a_call_is_the_salt_of_open_cache(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with closing(open_cache(tensors, tmp_path)) as cache, closing(open_cache(tensors, tmp_path, salt="a")) as salted:
        assert cache.keys(TOKENS, salt="a") == salted.keys(TOKENS) != cache.keys(TOKENS)
        assert salted.keys(TOKENS, salt="b") == cache.keys(TOKENS, salt="b")


def test_a_store_with_its_match_needs_no_salt_and_no_extras(cache: PagedCache) -> None:
    """A store that forgot them would give one tenant's KV to all, or the KV of an image to the same text without it."""
    extras = {1: b"a" * 32}
    with cache.match(TOKENS, extras, salt="a") as hit:
        pass
    assert cache.store(TOKENS, TABLE, match=hit) == 3
    for salt, given, chunks in ((None, extras, 0), (None, None, 0), ("a", None, 1), ("a", extras, 3)):
        with cache.match(TOKENS, given, salt=salt) as found:
            assert found.num_tokens == chunks * CHUNK


def test_more_salts_than_are_kept(cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache._tenants, "_limit", 2)
    keys = {cache.keys(TOKENS, salt=f"{i % 5}")[0] for i in range(20)}
    assert (len(keys), len(cache._tenants)) == (5, 2)


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
    mine, folder = f"kvkern-{os.getuid()}", arena_folder(Path("/dev/shm"))
    before = {name for name in os.listdir("/dev/shm") if name.startswith(mine)}
    layout = kvkern.layout.flash_attention(tensors)
    with closing(kvkern.open_cache(layout, tensors, model="m", weights="w", capacity="1MiB")) as cache:
        assert not cache._transfer._arena.path.exists()
        assert cache._transfer._arena.path.parent == arena_folder(Path("/dev/shm"))
        assert cache.store(TOKENS, TABLE) == len(TOKENS) // BLOCK_TOKENS
    left = {name for name in os.listdir("/dev/shm") if name.startswith(mine)} - before
    assert left <= {folder.name}  # which other tests may use at the moment


def test_close_ends_the_threads(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    before = threading.active_count()
    cache = open_cache(tensors, tmp_path, threads=3)
    cache.store(TOKENS, TABLE)
    assert threading.active_count() > before
    cache.close()
    cache.close()
    assert threading.active_count() == before


def test_the_examples_of_the_package_and_the_module_run(
    tensors: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope: dict[str, Any] = {
        "layout": kvkern.layout.flash_attention(tensors), "tensors": tensors, "revision": "r", "tokens": TOKENS,
        "block_table": [*TABLE, 5],
    }  # fmt: skip
    for module in (kvkern, api):
        assert module.__doc__ is not None
        lines = module.__doc__.partition("\n\n")[2].replace('"8GiB"', '"1MiB"')
        example = textwrap.dedent(lines.partition("\nThe package")[0])
        exec(compile("import kvkern\n" + example, module.__name__, "exec"), scope)  # noqa: S102
        scope["cache"].close()
    assert scope["num_loaded"] == 0


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
