"""A manager whose lookups and publications are OpenTelemetry spans, in the trace of the request if vLLM has its headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from ...cache.base import ChunkCache
from ...observability import tracing
from . import shim
from .manager import KvkernManager
from .request_state import KvGroup


class TracedManager(KvkernManager):
    """Puts the spans of a request under the span that its trace headers name."""

    def __init__(self, cache: ChunkCache, groups: Sequence[KvGroup]) -> None:
        traced = tracing.TracedCache(cache, tracing.get_tracer())
        super().__init__(cast(ChunkCache, traced), groups)
        self._traced = traced

    def attach_request(self, request: shim.Request, named: bool = True) -> None:
        """See KvkernManager."""
        super().attach_request(request, named)
        if request.trace_headers:
            self._traced.note_parent(self._requests[request.request_id].use.request, request.trace_headers)
