"""Spans of a real vLLM: lookups and publications are in the trace that the request's headers name."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvkern.observability import tracing
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TRACE, PARENT = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7


def test_the_spans_of_a_request_are_in_its_trace(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler is in this process. The worker's spans of loads and stores stay in its own: its provider is its own."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "get_tracer", lambda: provider.get_tracer("kvkern"))
    with Engine(llama, kvkern_options={"tracing": True}) as engine:
        tokens = prompt(300, 7)
        plain = engine.one(tokens)
        engine.reset_native()
        lookups = [span for span in exporter.get_finished_spans() if span.name == "kvkern.lookup"]
        assert [span.parent for span in lookups] == [None]
        published = [span for span in exporter.get_finished_spans() if span.name == "kvkern.publish"]
        assert sum(span.attributes["kvkern.published_chunks"] for span in published) == 9
        exporter.clear()
        headers = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01"}
        vllm = engine.llm.llm_engine
        vllm.add_request("traced", {"prompt_token_ids": tokens}, engine.params(), trace_headers=headers)
        outputs = []
        while vllm.has_unfinished_requests():
            outputs += [output for output in vllm.step() if output.finished]
        (output,) = outputs
        assert tuple(output.outputs[0].token_ids) == plain.tokens
        assert output.num_cached_tokens == 288
        (span,) = (span for span in exporter.get_finished_spans() if span.name == "kvkern.lookup")
        assert span.parent is not None
        assert (span.context.trace_id, span.parent.span_id) == (TRACE, PARENT)
        assert span.attributes["kvkern.hit_chunks"] == 9
    provider.shutdown()
