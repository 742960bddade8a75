"""Engines of one's own behind a daemon: large stores, the daemon's figures, recorded requests, tenants and ranks."""

from __future__ import annotations

import itertools
from contextlib import closing
from typing import Any

import kvkern
from kvkern.api import PagedCache
from kvkern.node.client.admin_client import AdminClient
from tests.node.conftest import Daemon, eventually
from tests.small_cache import CHUNK, ELSEWHERE, PER_CHUNK, TABLE, TOKENS, blocks_of, make_tensors, same

SLOTS = 127  # of the small cache's 8 KiB in a daemon's 1 MiB


def open_cache(daemon: Daemon, seed: int = 0, num_blocks: int = 40, **options: Any) -> tuple[PagedCache, list[Any]]:
    """Return a cache behind the daemon, and its tensors."""
    tensors = make_tensors(seed, num_blocks)
    defaults = {"model": "m", "weights": "w", "blocks_per_chunk": PER_CHUNK, "socket": str(daemon.socket), "threads": 1}
    return kvkern.open_cache(kvkern.layout.flash_attention(tensors), tensors, **(defaults | options)), tensors


def test_one_store_keeps_as_many_chunks_as_the_cache_has_slots(daemon: Daemon) -> None:
    """A daemon grants a part of its slots at a time, so a large store goes in rounds. The head of a sequence stays."""
    cache, tensors = open_cache(daemon, num_blocks=400)
    with closing(cache):
        few, many = list(range(100 * CHUNK)), list(range(10**6, 10**6 + 150 * CHUNK))
        assert cache.store(few, list(range(200))) == 100
        assert cache.stats()["dropped_chunks"] == 0
        with cache.match(few) as hit:
            assert cache.load(hit, list(range(200, 400))) == 100 * CHUNK
        assert same(blocks_of(tensors, range(200)), blocks_of(tensors, range(200, 400)))
        assert cache.store(few, list(range(200))) == 0
        assert (
            cache.store([*few, *range(8 * 10**6, 8 * 10**6 + 3 * CHUNK)], list(range(206))) == 3
        )  # known chunks first
        cache.clear()
        stored = cache.store(many, list(range(300)))
        with cache.match(many) as hit:
            assert SLOTS * 3 // 4 <= hit.num_tokens // CHUNK <= stored <= 150


def test_the_daemon_counts_the_misses_of_its_engines(daemon: Daemon) -> None:
    cache, _ = open_cache(daemon)
    with closing(cache):
        for _ in range(2):  # a miss, then a hit
            with cache.match(TOKENS) as hit:
                cache.load(hit, ELSEWHERE)
            cache.store(TOKENS, TABLE, match=hit)
        with cache.match([*TOKENS[: 2 * CHUNK], *[5] * 2 * CHUNK]):
            pass
        row = daemon.stat()
    assert (row["lookup_chunks"], row["hit_chunks"]) == (3 + 3 + 4, 3 + 2)
    assert row["hit_ratio"] == 0.5


def test_requests_of_an_own_engine_are_recorded(daemon: Daemon) -> None:
    cache, _ = open_cache(daemon)
    with closing(cache), AdminClient(daemon.socket) as recorder:
        requests = recorder.recorded_requests()
        next(requests)
        for tokens in (TOKENS, TOKENS, TOKENS[: CHUNK + 3]):
            with cache.match(tokens) as hit:
                cache.load(hit, ELSEWHERE)
            cache.store(tokens, TABLE, match=hit)
        found = list(itertools.islice((request for request in requests if request is not None), 3))
    assert [(request.prompt_tokens, len(request.keys)) for request in found] == [(29, 96), (29, 96), (11, 32)]
    assert found[0].keys == found[1].keys
    assert found[2].keys == found[0].keys[:32]
    assert (found[0].output_tokens, found[0].arrived_s <= found[1].arrived_s) == (-1, True)


def test_two_ranks_behind_one_daemon(daemon: Daemon) -> None:
    """Equal layouts, equal tokens, other heads."""
    ranks = [open_cache(daemon, seed=10 * rank, tp_size=2, rank=rank) for rank in (0, 1)]
    for cache, _ in ranks:
        with cache.match(TOKENS) as hit:
            assert hit.num_tokens == 0
        assert cache.store(TOKENS, TABLE) == 3
    for cache, tensors in ranks:
        with closing(cache), cache.match(TOKENS) as hit:
            assert cache.load(hit, ELSEWHERE) == 3 * CHUNK
        assert same(blocks_of(tensors, ELSEWHERE[:6]), blocks_of(tensors, TABLE[:6]))


def test_every_salt_is_described_to_the_daemon(daemon: Daemon) -> None:
    """Quotas of tenants depend on it, also after a clear and with a daemon that was started anew."""
    cache, _ = open_cache(daemon)
    with closing(cache):
        assert [cache.store(TOKENS, TABLE, salt=salt) for salt in ("a", "b", "a")] == [3, 3, 0]
        assert daemon.stat()["namespaces"] == 3
        assert cache.clear("a") == 3
        daemon.kill()
        daemon.start()
        eventually(lambda: daemon.stat()["namespaces"] == 3, "the namespaces are described again")
        with cache.match(TOKENS, salt="b") as hit:
            assert hit.num_tokens == 3 * CHUNK
