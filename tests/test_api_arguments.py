"""What the API refuses, and that no two parts of a model's KV have one name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvkern
from kvkern.api import PagedCache
from kvkern.errors import ArenaError, ConfigError, KvkernError, LayoutError
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


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return make_tensors()


@pytest.fixture
def cache(tensors: list[torch.Tensor], tmp_path: Path) -> Iterator[PagedCache]:
    with closing(open_cache(tensors, tmp_path)) as cache:
        yield cache


REFUSED: dict[str, tuple[Callable[[PagedCache, Any], object], type[KvkernError], str]] = {
    "short table, store": (lambda c, hit: c.store(TOKENS, TABLE[:5]), ConfigError, "has 5 blocks; 3 chunks need 6"),
    "short table, load": (lambda c, hit: c.load(hit, TABLE[:5]), ConfigError, "has 5 blocks; 3 chunks need 6"),
    "start inside a block": (lambda c, hit: c.load(hit, TABLE, 3), ConfigError, "start is 3; .* block size 4"),
    "start behind the match": (lambda c, hit: c.load(hit, TABLE, 4 * CHUNK), ConfigError, "start is 32"),
    "token": (lambda c, hit: c.match([-1] * CHUNK), LayoutError, r"\[0, 2\^32\)"),
    "extra": (lambda c, hit: c.match(TOKENS, {0: b"short"}), LayoutError, "extra of chunk 0 has 5 bytes"),
    "block, store": (lambda c, hit: c.store([5] * CHUNK, [0, NUM_BLOCKS]), LayoutError, "block id 40 .*is outside"),
    "block, load": (lambda c, hit: c.load(hit, [*TABLE[:5], NUM_BLOCKS]), LayoutError, "block id 40 .*is outside"),
    "block twice, store": (lambda c, hit: c.store([5] * CHUNK, [7, 7]), ConfigError, "names block 7 for 2 places"),
    "block twice, load": (lambda c, hit: c.load(hit, [*TABLE[:5], 9]), ConfigError, "names block 9 for 2 places"),
    "float table": (lambda c, hit: c.store([5] * CHUNK, [0.0, 1.9]), ConfigError, "holds float64; expected block ids"),
    "bool table": (lambda c, hit: c.store([5] * CHUNK, [False, True]), ConfigError, "holds bool"),
    "two dimensions": (lambda c, hit: c.store([5] * CHUNK, [[0, 1], [2, 3]]), ConfigError, r"shape \(2, 2\)"),
    "two dimensions, torch": (lambda c, hit: c.load(hit, torch.tensor([TABLE])), ConfigError, r"shape \(1, 7\)"),
    "uneven table": (lambda c, hit: c.store([5] * CHUNK, [[0], [1, 2]]), ConfigError, "no list of block ids"),
    "no table": (lambda c, hit: c.store([5] * CHUNK, None), ConfigError, "shape"),
    "store inside a chunk": (lambda c, hit: c.store(TOKENS, TABLE, start=7), ConfigError, "start is 7; .* chunk size 8"),
    "store past the end": (lambda c, hit: c.store(TOKENS, TABLE, start=4 * CHUNK), ConfigError, "to the 29 tokens"),
    "start of a half": (lambda c, hit: c.store(TOKENS, TABLE, start=8.0), ConfigError, r"start is 8.0 \(float\)"),
    "start of a half, load": (lambda c, hit: c.load(hit, TABLE, 8.0), ConfigError, r"start is 8.0 \(float\)"),
    "start as bool": (lambda c, hit: c.load(hit, TABLE, False), ConfigError, r"start is False"),
    "number as salt": (lambda c, hit: c.match(TOKENS, salt=5), ConfigError, "the salt is of the type int"),
    "bytes as salt": (lambda c, hit: c.keys(TOKENS, salt=b"5"), ConfigError, "the salt is of the type bytes"),
    "empty salt": (lambda c, hit: c.store(TOKENS, TABLE, salt=""), ConfigError, "the salt is empty"),
    "salt of no text": (lambda c, hit: c.match(TOKENS, salt="\ud800"), ConfigError, "salt of a namespace is no valid"),
    "another salt": (lambda c, hit: c.store(TOKENS, TABLE, match=hit, salt="a"), ConfigError, "with another salt"),
    "another extra": (
        lambda c, hit: c.store(TOKENS, TABLE, {0: b"b" * 32}, match=c.match(TOKENS, {0: b"a" * 32})),
        ConfigError, "another extra of chunk 0",
    ),
    "another prompt": (lambda c, hit: c.store([5] * CHUNK, TABLE, match=hit), ConfigError, "chunk 0 differs"),
    "block far away": (lambda c, hit: c.store([5] * CHUNK, [0, 1 << 40]), (KvkernError, OverflowError), r"\w"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(cache: PagedCache, name: str) -> None:
    call, error, message = REFUSED[name]
    cache.store(TOKENS, TABLE)
    with cache.match(TOKENS) as hit, pytest.raises(error, match=message):
        call(cache, hit)


def test_a_match_of_another_cache_is_refused(cache: PagedCache, tensors: list[torch.Tensor], tmp_path: Path) -> None:
    """Its slots are slots of another arena."""
    cache.store(TOKENS, TABLE)
    with closing(open_cache(tensors, tmp_path)) as other, cache.match(TOKENS) as hit:
        other.store(TOKENS, TABLE)
        for call in (lambda: other.load(hit, ELSEWHERE), lambda: other.store(TOKENS, TABLE, match=hit)):
            with pytest.raises(ConfigError, match="the match is of another cache"):
                call()
        assert other.stats()["bad_chunks"] == 0


def test_a_closed_cache_refuses_every_call(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    cache = open_cache(tensors, tmp_path)
    cache.store(TOKENS, TABLE)
    hit, forgotten = cache.match(TOKENS), cache.match(TOKENS)
    cache.close()
    assert hit.num_tokens == 0
    calls = (
        lambda: cache.match(TOKENS), lambda: cache.load(hit, ELSEWHERE), lambda: cache.store(TOKENS, TABLE), cache.clear,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="the cache is closed"):
            call()
    hit.release()
    del forgotten


def test_no_message_shows_a_salt(tensors: list[torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for options in ({"model": ""}, {"tp_size": 0}, {"capasity": 1}, {"blocks_per_chunk": 0}, {"capacity": 1}):
        with pytest.raises(ConfigError) as refused:
            open_cache(tensors, tmp_path, **({"salt": "hunter2"} | options))
        assert "hunter2" not in str(refused.value)
    with closing(open_cache(tensors, tmp_path, salt="hunter2")) as cache:
        assert "hunter2" not in repr(cache.namespace)
        with cache.match(TOKENS, salt="hunter3") as hit, pytest.raises(ConfigError) as refused:
            cache.store(TOKENS, TABLE, match=hit, salt="hunter2")
        assert "hunter" not in str(refused.value)
    assert "hunter" not in caplog.text


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


OPENING: dict[str, tuple[dict[str, Any], type[KvkernError], str]] = {
    "no capacity": ({"capacity": "0GiB"}, ConfigError, "capacity is '0GiB'"),
    "absurd capacity": ({"capacity": "64TiB"}, ArenaError, "Lower `capacity`"),
    "less than a slot": ({"capacity": 4096}, ConfigError, "holds no slot"),
    "option": ({"capasity": 1}, ConfigError, "did you mean 'capacity'"),
    "blocks per chunk": ({"blocks_per_chunk": 0}, ConfigError, "blocks_per_chunk is 0"),
    "no model": ({"model": ""}, ConfigError, "must not be empty"),
    "no weights": ({"weights": ""}, ConfigError, "must not be empty"),
    "folder": ({"arena_dir": "/nowhere"}, ConfigError, "no directory"),
    "salt": ({"salt": 5}, ConfigError, "the salt is of the type int"),
    "empty salt": ({"salt": ""}, ConfigError, "the salt is empty"),
    "no rank": ({"tp_size": 2}, ConfigError, "split the KV into 2 parts, but `rank` is missing"),
    "no rank of layers": ({"pp_size": 3}, ConfigError, "split the KV into 3 parts, but `rank` is missing"),
    "rank alone": ({"rank": 1}, ConfigError, "rank is 1, but tp_size is missing"),
    "no such rank": ({"tp_size": 2, "rank": 2}, ConfigError, "rank is 2; .* make ranks 0 to 1"),
    "rank below 0": ({"tp_size": 2, "rank": -1}, ConfigError, "rank is -1"),
    "half a rank": ({"tp_size": 2, "rank": 0.0}, ConfigError, r"rank is 0.0 \(float\)"),
    "no heads": ({"tp_size": 0, "rank": 0}, ConfigError, "both must be at least 1"),
    "half a block": ({"blocks_per_chunk": 1.0}, ConfigError, r"blocks_per_chunk is 1.0 \(float\)"),
    "group": ({"group": "a"}, ConfigError, "group is 'a'"),
}


@pytest.mark.parametrize("name", OPENING)
def test_opening_refuses(tensors: list[torch.Tensor], tmp_path: Path, name: str) -> None:
    """The error names the reason, and no file is left behind."""
    options, error, message = OPENING[name]
    with pytest.raises(error, match=message):
        open_cache(tensors, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


RANKS: list[dict[str, Any]] = [
    {}, {"tp_size": 2, "rank": 0}, {"tp_size": 2, "rank": 1}, {"pp_size": 2, "rank": 0}, {"pp_size": 2, "rank": 1},
    {"tp_size": 4, "rank": 0}, {"tp_size": 4, "rank": 3}, {"group": 1}, {"dtype": "float8_e4m3fn"},
]  # fmt: skip


def test_every_part_of_the_kv_has_a_name_of_its_own(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    """Ranks have equal layouts and other heads. One name for two of them would be wrong bytes with right checksums."""
    keys = []
    for part in RANKS:
        with closing(open_cache(tensors, tmp_path, **part)) as cache:
            keys.append(cache.keys(TOKENS)[0])
    assert len(set(keys)) == len(RANKS)
    with closing(open_cache(tensors, tmp_path, tp_size=1, rank=0)) as cache:
        assert cache.keys(TOKENS)[0] == keys[0]


def test_two_ranks_share_a_store_and_never_each_others_heads(tmp_path: Path) -> None:
    options = {"remote": f"file://{tmp_path}/values?capacity=64MiB", "persist": "all", "tp_size": 2}
    ranks = [make_tensors(seed) for seed in (0, 10)]
    for rank, mine in enumerate(ranks):
        with closing(open_cache(mine, tmp_path, rank=rank, **options)) as cache:
            with cache.match(TOKENS) as hit:
                assert hit.num_tokens == 0
            assert cache.store(TOKENS, TABLE) == 3
    for rank, mine in enumerate(ranks):
        with closing(open_cache(mine, tmp_path, rank=rank, **options)) as cache, cache.match(TOKENS) as hit:
            assert cache.load(hit, ELSEWHERE) == 3 * CHUNK
        assert same(blocks_of(mine, ELSEWHERE[:6]), blocks_of(mine, TABLE[:6]))


def test_a_process_of_many_must_name_its_part(
    tensors: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun has started two processes. A cache that only this process reads needs no name."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    open_cache(tensors, tmp_path).close()
    remote = f"file://{tmp_path}/values?capacity=64MiB"
    with pytest.raises(ConfigError, match="this process is one of 2, and nothing says which part of the KV it has"):
        open_cache(tensors, tmp_path, remote=remote)
    for part in ({"tp_size": 1}, {"tp_size": 2, "rank": 1}):
        open_cache(tensors, tmp_path, remote=remote, **part).close()
    assert not list(tmp_path.glob("kvkern-*"))


def test_shared_bytes_must_say_what_they_are(tmp_path: Path) -> None:
    """Pages of float8_e4m3fn and of float8_e5m2 are both uint8."""
    pages = [torch.zeros(8, 512, dtype=torch.uint8)]
    layout = kvkern.layout.from_pages(pages, 16)
    options = {"model": "m", "weights": "w", "capacity": "1MiB", "arena_dir": tmp_path}
    remote = f"file://{tmp_path}/values?capacity=64MiB"
    kvkern.open_cache(layout, pages, **options).close()
    with pytest.raises(ConfigError, match=r"the tensors are uint8, .* set dtype"):
        kvkern.open_cache(layout, pages, remote=remote, **options)
    kvkern.open_cache(layout, pages, remote=remote, dtype="float8_e5m2", **options).close()
