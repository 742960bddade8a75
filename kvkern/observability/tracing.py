"""OpenTelemetry spans of lookups, loads and stores: decorators of the cache and of the copier. Needs the extra `tracing`.

    kvkern.lookup    acquire_soon: from the question to its answer, a remote store's time included
    kvkern.publish   commit_soon: from the end of the copies until the chunks can be found
    kvkern.load      Copier.load: slots -> blocks, verified
    kvkern.store     Copier.store: blocks -> slots

Spans say how many chunks and bytes, never which: no keys, no tokens, no prompts. Nobody imports this module unless the option
`tracing` is set, so a cache without it pays nothing. Spans go where the process's own tracer provider sends them. If it has
none, one is made from OpenTelemetry's variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME and so on).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from ..bounded_dict import BoundedDict
from ..errors import ConfigError
from ..tiers.base import Lease, Reservation
from ..transfer.base import ChunkBatch, Copier, Job

try:
    from opentelemetry import propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Status, StatusCode, Tracer
except ModuleNotFoundError as error:
    raise ConfigError(
        f"tracing is on, but OpenTelemetry is not installed ({error}); run pip install 'kvkern[tracing]', or leave tracing out"
    ) from error

if TYPE_CHECKING:
    from ..cache.base import ChunkCache
    from ..policy.base import Use

MAX_PARENTS = 4096  # requests whose trace is remembered; of an older one a span is the first of its own trace


def get_tracer() -> Tracer:
    """Return kvkern's tracer of the process's provider. Makes a provider that exports by OTLP if the process has none."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
    return trace.get_tracer("kvkern")


class TracedCache:
    """A `ChunkCache` whose lookups and publications are spans. Everything else is the inner cache's."""

    def __init__(self, cache: ChunkCache, tracer: Tracer) -> None:
        self._cache = cache
        self._tracer = tracer
        self._parents: BoundedDict[int, Context] = BoundedDict(MAX_PARENTS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def note_parent(self, request: int, headers: Mapping[str, str]) -> None:
        """Take the trace headers of a request (`Use.request`): its spans belong to that trace."""
        self._parents.put(request, propagate.extract(headers))

    def acquire(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Lease:
        """See ChunkCache."""
        return self.acquire_soon(keys, prefix, use).result()

    def acquire_soon(self, keys: Sequence[bytes], prefix: bool = True, use: Use | None = None) -> Future[Lease]:
        """See ChunkCache."""
        number = 0 if use is None else use.request
        span = self._tracer.start_span("kvkern.lookup", self._parents.get(number))
        span.set_attributes({"kvkern.chunks": len(keys), "kvkern.request": number})

        def answered(future: Future[Lease]) -> None:
            if not future.cancelled() and future.exception() is None:
                span.set_attribute("kvkern.hit_chunks", len(future.result().slots))
            _end(span, future)

        with trace.use_span(span, end_on_exit=False):
            found = self._cache.acquire_soon(keys, prefix, use)
        found.add_done_callback(answered)
        return found

    def commit(self, reservation: Reservation) -> int:
        """See ChunkCache."""
        return self.commit_soon(reservation).result()

    def commit_soon(self, reservation: Reservation) -> Future[int]:
        """See ChunkCache."""
        span = self._tracer.start_span("kvkern.publish")
        span.set_attribute("kvkern.chunks", len(reservation.slots))

        def published(future: Future[int]) -> None:
            if not future.cancelled() and future.exception() is None:
                span.set_attribute("kvkern.published_chunks", future.result())
            _end(span, future)

        done = self._cache.commit_soon(reservation)
        done.add_done_callback(published)
        return done


class TracedCopier:
    """A `Copier` whose loads and stores are spans. Everything else is the inner copier's."""

    def __init__(self, copier: Copier, tracer: Tracer) -> None:
        self._copier = copier
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copier, name)

    def load(self, batches: Sequence[ChunkBatch]) -> Job:
        """See Copier."""
        return self._traced("kvkern.load", self._copier.load(batches))

    def store(self, batches: Sequence[ChunkBatch]) -> Job:
        """See Copier."""
        return self._traced("kvkern.store", self._copier.store(batches))

    def _traced(self, name: str, job: Job) -> Job:
        span = self._tracer.start_span(name, start_time=time.time_ns() - int((time.perf_counter() - job.started) * 1e9))
        span.set_attributes({"kvkern.chunks": len(job.ok), "kvkern.bytes": job.nbytes})
        ends = [span.end]  # two pieces may end at once; one of them takes it

        def ended(_: object) -> None:
            if job.done():
                with suppress(IndexError):
                    end = ends.pop()
                    span.set_attribute("kvkern.good_chunks", int(job.ok.sum()))
                    if job.error is not None:
                        span.set_status(Status(StatusCode.ERROR, type(job.error).__name__))
                    end()

        for future in job.futures:
            future.add_done_callback(ended)
        if not job.futures:
            ended(None)
        return job


def _end(span: Span, future: Future[Any]) -> None:
    if future.cancelled():
        span.set_status(Status(StatusCode.ERROR, "cancelled"))
    elif (error := future.exception()) is not None:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
    span.end()


def traced_cache(cache: ChunkCache) -> ChunkCache:
    """Return the cache with spans."""
    return cast("ChunkCache", TracedCache(cache, get_tracer()))


def traced_copier(copier: Copier) -> Copier:
    """Return the copier with spans."""
    return cast(Copier, TracedCopier(copier, get_tracer()))
