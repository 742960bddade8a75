"""Counters and histograms in plain memory: buckets, threads, bounded names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.observability.catalogue import OTHER, by_name
from kvkern.observability.daemon_meter import DaemonMeter
from kvkern.observability.meters import BoundedNames, Histogram, Meters

BOUNDS = (1.0, 2.5, 10.0)


@given(st.lists(st.floats(0, 100)))
def test_a_bucket_counts_all_values_up_to_its_bound(values: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    wanted = [(bound, sum(value <= bound for value in values)) for bound in (*BOUNDS, float("inf"))]
    assert list(histogram.cumulative()) == wanted
    assert histogram.total == pytest.approx(sum(values))


def test_no_count_is_lost_between_threads() -> None:
    meters = Meters({by_name()["remote_bytes"]: ("op",), by_name()["remote_seconds"]: ("op",)})

    def work(_: int) -> None:
        for _ in range(5000):
            meters.add("remote_bytes", 3, "get")
            meters.observe("remote_seconds", 0.1, "get")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert meters.counters["remote_bytes"] == {("get",): 60_000, ("put",): 0}
    assert sum(meters.histograms["remote_seconds"]["get",].counts) == 20_000


def test_names_beyond_the_limit_share_one() -> None:
    names = BoundedNames(2)
    assert [names.name(name) for name in "abacb"] == ["a", "b", "a", OTHER, "b"]


def test_chunks_of_an_unknown_namespace_count_as_the_clients_model() -> None:
    meter = DaemonMeter()
    meter.describe(b"r" * 32, {"model": "m", "chunk_tokens": "16"}, client=7)
    for namespace, client in ((b"r" * 32, 1), (b"", 7), (b"", 8), (b"x" * 32, 8)):
        meter.looked_up("dram", namespace, client, 1, 0)
    chunks, tokens = (meter.counter_series(f"lookup_{unit}") for unit in ("chunks", "tokens"))
    assert {at: value for at, value in chunks.items() if value} == {("dram", "m"): 2, ("dram", OTHER): 2}
    assert {at: value for at, value in tokens.items() if value} == {("dram", "m"): 32}
    meter.prefill(0.0, 7)  # the client is gone
    meter.looked_up("dram", b"", 7, 1, 0)
    assert meter.counter_series("lookup_chunks")["dram", OTHER] == 3


@given(st.dictionaries(st.sampled_from(["model", "chunk_tokens", "salt"]), st.text(max_size=300)))
def test_what_an_engine_says_of_a_namespace_may_be_any_text(fields: dict[str, str]) -> None:
    meter = DaemonMeter()
    meter.describe(b"r" * 32, fields, client=1)
    meter.looked_up("dram", b"r" * 32, 1, 3, 3)
    hits = meter.counter_series("hit_chunks")
    assert sum(hits.values()) == 3
    assert all(len(label) <= 64 for labels in hits for label in labels)
