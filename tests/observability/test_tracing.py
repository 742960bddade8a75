"""Spans of a real cache and a real copier, in an exporter in memory; and that nothing is imported while tracing is off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any, cast

import numpy as np
import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import kvkern
from kvkern.cache.base import ChunkCache
from kvkern.observability import tracing
from kvkern.policy.base import Use
from kvkern.tiers.base import Lease
from kvkern.transfer.base import Copier, Job

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENGINE = """
import sys, torch, kvkern
kv = [torch.zeros(2, 12, 16, 2, 16)]
layout = kvkern.layout.flash_attention(kv)
cache = kvkern.open_cache(layout, kv, model="m", weights="w", capacity="1MiB", prefault=False)
cache.store(list(range(32)), [0, 1])
cache.close()
print(sorted(name for name in sys.modules if name.startswith("opentelemetry") or name.endswith("observability.tracing")))
"""


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Receives the spans of kvkern's tracer. The process's own provider, which can be set only once, stays as it is."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "get_tracer", lambda: provider.get_tracer("kvkern"))
    yield exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def test_a_store_and_a_load_are_spans(exporter: InMemorySpanExporter) -> None:
    kv = [torch.randn(2, 12, 16, 2, 16) for _ in range(2)]
    layout = kvkern.layout.flash_attention(kv)
    with closing(
        kvkern.open_cache(layout, kv, model="m", weights="w", capacity="1MiB", prefault=False, tracing=True)
    ) as cache:
        assert cache.store(list(range(64)), [0, 1, 2, 3]) == 4
        with cache.match(list(range(65))) as hit:
            assert cache.load(hit, [4, 5, 6, 7]) == 64
    spans = by_name(exporter)
    assert {name: len(found) for name, found in spans.items()} == {
        "kvkern.lookup": 1, "kvkern.load": 1, "kvkern.store": 1, "kvkern.publish": 1,
    }  # fmt: skip
    told = {name: dict(found[0].attributes or {}) for name, found in spans.items()}
    assert told["kvkern.lookup"].pop("kvkern.request")
    assert told["kvkern.lookup"] == {"kvkern.chunks": 4, "kvkern.hit_chunks": 4}
    nbytes = told["kvkern.load"].pop("kvkern.bytes")
    assert nbytes == told["kvkern.store"].pop("kvkern.bytes") == sum(t[:, :4].nbytes for t in kv)
    assert told["kvkern.load"] == told["kvkern.store"] == {"kvkern.chunks": 4, "kvkern.good_chunks": 4}
    assert told["kvkern.publish"] == {"kvkern.chunks": 4, "kvkern.published_chunks": 4}
    assert all((span.end_time or 0) >= (span.start_time or 1) for found in spans.values() for span in found)


def test_a_span_belongs_to_the_trace_of_its_request(exporter: InMemorySpanExporter) -> None:
    answers: list[Future[Lease]] = []

    class Inner:
        def acquire_soon(self, keys: Any, prefix: bool = True, use: Use | None = None) -> Future[Lease]:
            answers.append(Future())
            return answers[-1]

    cache = tracing.TracedCache(cast(ChunkCache, Inner()), tracing.get_tracer())
    cache.note_parent(7, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    cache.acquire_soon([b"k"], use=Use(request=7))
    cache.acquire_soon([b"k"], use=Use(request=8))
    with tracing.get_tracer().start_as_current_span("request") as current:
        cache.acquire_soon([b"k"])
    answers[0].set_result(Lease((), ()))
    answers[1].set_exception(TimeoutError("a prompt that nobody may see"))
    answers[2].cancel()
    ours, broken, inside = by_name(exporter)["kvkern.lookup"]
    assert ours.parent is not None
    assert (f"{ours.context.trace_id:032x}", f"{ours.parent.span_id:016x}") == (TRACE, PARENT)
    assert broken.parent is None
    assert not broken.status.is_ok
    assert broken.status.description == "TimeoutError"
    assert not broken.events
    assert inside.parent is not None
    assert inside.parent.span_id == current.get_span_context().span_id
    assert inside.status.description == "cancelled"


def test_a_job_ends_its_span_once_with_what_became_of_it(exporter: InMemorySpanExporter) -> None:
    class Inner:
        def load(self, batches: Any) -> Job:
            return Job(4096, np.array([True, False]), list(pieces))

        num_blocks = 12

    pieces: list[Future[None]] = [Future(), Future()]
    copier = tracing.TracedCopier(cast(Copier, Inner()), tracing.get_tracer())
    assert copier.num_blocks == 12
    copier.load([])
    pieces[0].set_result(None)
    assert not exporter.get_finished_spans()
    pieces[1].set_exception(OSError("x"))
    (span,) = exporter.get_finished_spans()
    assert dict(span.attributes or {}) == {"kvkern.chunks": 2, "kvkern.bytes": 4096, "kvkern.good_chunks": 1}
    assert span.status.description == "OSError"
    pieces = []
    copier.load([])
    assert len(exporter.get_finished_spans()) == 2


def test_without_the_option_nothing_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", ENGINE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_provider_is_made_from_the_variables_if_there_is_none() -> None:
    """In a process of its own, because a process has one provider for good."""
    code = (
        "from kvkern.observability import tracing\nfrom opentelemetry import trace\n"
        "tracing.get_tracer(); provider = trace.get_tracer_provider(); tracing.get_tracer()\n"
        "assert provider is trace.get_tracer_provider()\n"
        "print(provider.resource.attributes['service.name'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={"OTEL_SERVICE_NAME": "engine-3", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "engine-3"


def test_it_is_the_processs_own_provider_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "set_tracer_provider", lambda given: pytest.fail("another provider was set"))
    tracing.get_tracer()
