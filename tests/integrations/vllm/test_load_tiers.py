"""`kv_load_tiers` of a request: which tiers it may load from. The manager over a cache; no engine runs."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import _parse_tier_filter

from kvkern.integrations.vllm import shim
from tests.integrations.vllm.test_manager import Bench

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("tiers", "loads", "asks_store"),
    [
        (None, True, True),
        ([], False, False),
        ([{"medium": "CPU"}], True, False),
        ([{"medium": "cpu", "locality": "local"}], True, False),
        ([{"locality": "LOCAL"}], True, True),  # a store may be local
        ([{"medium": "CPU"}, {"medium": "STORAGE"}], True, True),
        ([{"medium": "STORAGE"}], False, True),  # everything comes through memory, which the client excludes
        ([{"medium": "CPU", "locality": "REMOTE"}], False, False),
        ("x", True, True),  # vLLM ignores what it cannot parse
    ],
)
def test_only_the_tiers_that_a_request_allows_are_used(
    tmp_path: Any, tiers: Any, loads: bool, asks_store: bool
) -> None:
    bench = Bench(tmp_path)
    bench.store("first")
    bench.context = {} if tiers is None else {"load_tier_filter": _parse_tier_filter(tiers)}
    context, keys = bench.request("second")
    state = bench.manager._requests["second"]
    assert state.may_ask_store is asks_store
    first = bench.manager.lookup(keys[0], context)
    assert (first is shim.LookupResult.RETRY) is loads  # the cache was asked, and answers late
    assert len(bench.cache.asked) == loads
    if loads:
        use = bench.cache.asked[0][1][2]
        assert bool(use.namespace) is asks_store  # without a namespace no store is asked
        bench.cache.answer()
        assert bench.manager.lookup(keys[0], context) is shim.LookupResult.HIT
    bench.arena.close()
