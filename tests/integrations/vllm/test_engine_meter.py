"""What an engine counts reaches vLLM's own exporter: every name that it sends is one that vLLM was told of."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadPromMetrics

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.engine_meter import MAX_VALUES, EngineMeter
from kvkern.integrations.vllm.metric_definitions import engine_metrics
from kvkern.metrics import CacheCounters
from kvkern.observability.catalogue import Kind
from kvkern.tiers.base import Reservation

CONFIGS = [
    {"kvkern": {"capacity": "1GiB", "remote": "file:///x", "published_metrics": True}},
    {"kvkern": {"socket": "/s"}},
]


class Exported:
    """vLLM's exporter for a configuration of kvkern."""

    def __init__(self, extra: dict[str, Any]) -> None:
        extra = {"spec_name": "KvkernSpec", "spec_module_path": "kvkern.integrations.vllm", **extra}
        transfer = SimpleNamespace(kv_connector_extra_config=extra)
        types: Any = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
        config: Any = SimpleNamespace(kv_transfer_config=transfer)
        self._metrics = OffloadPromMetrics(config, types, ["model_name"], {0: ["m"]})

    def take(self, meter: EngineMeter) -> None:
        if (stats := meter.take()) is not None:
            self._metrics.observe(stats.data)

    def value(self, name: str, **labels: str) -> float:
        wanted = {"model_name": "m", **labels}.items()
        families = text_string_to_metric_families(generate_latest(REGISTRY).decode())
        found = [s for family in families for s in family.samples if s.name == name and wanted <= s.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return found[0].value


@pytest.fixture
def _registry() -> Iterator[None]:
    yield
    for prefix in ("kvkern:", "vllm:"):
        shim.unregister_metrics(prefix)


def use_everything(meter: EngineMeter, metrics: list[Any]) -> None:
    """Count something in every metric that takes counts."""
    for metric in metrics:
        labels = [(metric.values_of(label, engine=True) or ("x",))[0] for label in metric.engine]
        if metric.published:
            continue
        if metric.kind is Kind.COUNTER:
            meter.add(metric.name, 1, *labels)
        elif metric.kind is Kind.HISTOGRAM:
            meter.observe(metric.name, 0.001, *labels)


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("extra", CONFIGS, ids=["own", "daemon"])
def test_vllm_exports_every_metric_of_the_engine(extra: dict[str, Any]) -> None:
    options = extra["kvkern"]
    daemon, remote = "socket" in options, "remote" in options
    published = bool(options.get("published_metrics"))
    counters, exported = CacheCounters(), Exported(extra)
    meter = EngineMeter(counters, daemon, remote, published, chunk_tokens=16)
    meter.usage = lambda: {"slots": 8, "free_slots": 4, "ready_slots": 3, "connected": 1}
    meter.remote_usage = lambda: {"remote_works": 1, "remote_queue_chunks": 2, "remote_waiting_requests": 3}
    metrics = engine_metrics(daemon, remote, published)
    exported.take(meter)  # all series exist now, before anything was counted
    exported_before = {f.name for f in text_string_to_metric_families(generate_latest(REGISTRY).decode()) if f.samples}
    assert exported_before >= {metric.vllm_name for metric in metrics}
    use_everything(meter, metrics)
    counters.hit_chunks += 1
    exported.take(meter)
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(REGISTRY).decode())}
    for metric in metrics:
        name = metric.vllm_name
        assert families[name].type == metric.kind.value
        assert families[name].documentation == metric.help
        assert families[name].samples, name
    ours = {name for name in families if name.startswith("kvkern:") and not name.endswith("_created")}
    assert ours == {m.vllm_name for m in metrics if not m.published}


@pytest.mark.usefixtures("_registry")
def test_counters_are_sent_once_and_series_exist_from_the_start() -> None:
    counters, exported = CacheCounters(), Exported(CONFIGS[1])
    meter = EngineMeter(counters, daemon=True)
    exported.take(meter)
    assert exported.value("kvkern:not_loaded_requests_total", reason="late") == 0
    assert exported.value("kvkern:load_seconds_count") == 0
    assert meter.take() is None
    counters.hit_chunks += 3
    meter.add("hit_tokens", 48, "dram")
    exported.take(meter)
    exported.take(meter)
    assert exported.value("kvkern:hit_chunks_total") == 3
    assert exported.value("kvkern:hit_tokens_total", tier="dram") == 48
    meter.add("arena_slots", 1, "free")  # not exported by an engine with a daemon, so not sent
    assert meter.take() is None


@pytest.mark.usefixtures("_registry")
def test_seconds_avoided_wait_for_the_speed() -> None:
    exported, meter = Exported(CONFIGS[1]), EngineMeter(CacheCounters(), daemon=True)
    speed = 0.0
    meter.prefill_tokens_s = lambda: speed
    meter.note_loaded(300)
    exported.take(meter)
    assert exported.value("kvkern:prefill_seconds_avoided_total") == 0
    speed = 100.0
    meter.note_loaded(200)
    exported.take(meter)
    assert exported.value("kvkern:prefill_seconds_avoided_total") == 5
    assert exported.value("kvkern:loaded_tokens_total") == 500


@pytest.mark.usefixtures("_registry")
def test_tokens_of_the_remote_tier_count_once_however_many_kv_groups_hold_them() -> None:
    meter = EngineMeter(CacheCounters(), remote=True, chunk_tokens=16)
    meter.looked_up("remote", b"", 0, 10, 4)
    meter.looked_up("remote", b"", 0, 10, 4, tokens=False)  # the same tokens in the second group
    stats = meter.take()
    assert stats is not None
    counted = stats.data["data"]
    assert counted["kvkern:lookup_tokens"]["remote",] == 160
    assert counted["kvkern:hit_tokens"]["remote",] == 64


def test_published_names() -> None:
    counters, exported, now = CacheCounters(), Exported(CONFIGS[0]), 0.0
    meter = EngineMeter(counters, remote=True, published=True, clock=lambda: now)
    exported.take(meter)
    counters.lookup_chunks, counters.hit_chunks, counters.dropped_chunks = 4, 3, 2
    meter.add("lookup_tokens", 100, "dram")
    meter.add("hit_tokens", 80, "dram")
    meter.observe("acquire_seconds", 0.00003)
    now = 2.0
    exported.take(meter)
    p = "vllm:cache_service_"
    assert exported.value(f"{p}tokens_hit_rate") == 0.8
    assert exported.value(f"{p}blocks_hit_rate") == 0.75
    assert (exported.value(f"{p}hit_tokens"), exported.value(f"{p}total_tokens")) == (80, 100)
    assert exported.value(f"{p}err_async_update_task_queue_full") == 2
    assert exported.value(f"{p}time_query_seconds_bucket", le="5e-05") == 1  # the published buckets begin at 0.01
    assert exported.value(f"{p}time_query_seconds_bucket", le="2.5e-05") == 0


def test_why_a_chunk_is_missing() -> None:
    meter = EngineMeter(CacheCounters())
    meter.note_reserved(Reservation((b"a",), (0,), (1,), declined=1), [b"a", b"b"])
    meter.note_reserved(Reservation((), (), (), dropped=1), [b"c"])
    meter.not_loaded("gated", 7, 3)
    meter.not_loaded("not_found", 8, 3)
    asked = {"a": 1, "b": 2, "c": 3, "d": 7, "e": 8}
    reasons = {key: meter.why_missing(key.encode(), request) for key, request in asked.items()}
    assert reasons == {"a": "not_found", "b": "declined", "c": "dropped", "d": "gated", "e": "not_found"}
    meter.usage = lambda: {"connected": 0}
    assert meter.why_missing(b"b", 2) == "no_daemon"


def test_what_waits_for_vllm_is_bounded() -> None:
    meter = EngineMeter(CacheCounters())
    for _ in range(MAX_VALUES + 10):
        meter.observe("load_seconds", 0.1)
    stats = meter.take()
    assert stats is not None
    assert len(stats.data["data"]["kvkern:load_seconds"][()]) == MAX_VALUES
