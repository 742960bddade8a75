"""Counts what vLLM asks the cache for, and what it is served: once a request, when its outcome is known.

    lookups   chunks that the engine's own cache lacked, of a request that is scheduled
    hits      of those, chunks that were loaded and verified

vLLM asks for a waiting request in every step. A request that is never scheduled counts for nothing. Chunks that vLLM asked for
and has itself by the time it schedules the request do not count, and neither does a last chunk that it found and left, because
it computes the last token anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...cache.base import ChunkCache
from . import shim
from .engine_meter import EngineMeter
from .notices import Notices
from .request_state import KvGroup, RequestState


@dataclass
class _Load:
    req_id: str
    root: bytes  # of its tenant's namespace
    asked: int
    found: int
    loaded: int  # chunks of the load; 0 once it has failed
    tokens: int  # of the load


class LookupCounts:
    """The counts of one manager. Runs in the scheduler's thread."""

    def __init__(self, cache: ChunkCache, groups: Mapping[int, KvGroup], notices: Notices) -> None:
        self._cache = cache
        self.meter = EngineMeter(cache.counters)
        self._notices = notices
        self._groups = groups
        self._loads: dict[int, _Load] = {}  # by ticket

    def note_computed(self, state: RequestState, windowed: Collection[int]) -> None:
        """Count a request that is scheduled without a load. Call it before its leases end."""
        if (asked := self._num_asked(state, windowed)) and not self._left_last_chunk(state):
            self._count(state.root, asked, _num_found(state), 0)
            self.meter.add("not_loaded_requests", 1, self._why_nothing(state))

    def note_scheduled(self, state: RequestState) -> None:
        """Count the tokens of a request that is scheduled, and whether it has loaded any. Once a request."""
        if not state.scheduled:
            state.scheduled = True
            self.count_tokens(state)
            self.meter.add("requests", 1, "yes" if state.has_loaded else "no")

    def count_tokens(self, state: RequestState) -> None:
        """Count a request's prompt as looked up, in vLLM's own cache and then in kvkern's. Once a request."""
        if state.counted or state.request is None:
            return
        state.counted, tokens = True, state.request.num_prompt_tokens
        engine_tokens = min(tokens, state.engine_tokens)
        self.meter.add("lookup_tokens", tokens, "vllm")
        self.meter.add("hit_tokens", engine_tokens, "vllm")
        self.meter.add("lookup_tokens", tokens - engine_tokens, "dram")

    def _why_nothing(self, state: RequestState) -> str:
        """Return why the request loads nothing: why the first chunk behind vLLM's own hit is not there, or not used."""
        group_id, chain = next(iter(state.chains.items()))
        first = state.engine_tokens // self._groups[group_id].chunk_tokens
        if first >= len(chain):
            return "not_found"
        if state.offload_keys[group_id][first] in state.hits:
            return "not_used"
        return self.meter.why_missing(chain[first], state.use.request)

    def _left_last_chunk(self, state: RequestState) -> bool:
        """Return True if all that vLLM lacked is a chunk at whose end the prompt ends, and the chunk was found."""
        group_id, keys = next(iter(state.offload_keys.items()))
        first = state.engine_tokens // self._groups[group_id].chunk_tokens
        if first >= len(keys) or keys[first] not in state.hits or state.request is None:
            return False
        return bool(state.end_of[keys[first]] >= state.request.num_prompt_tokens)

    def begin_load(
        self, ticket: int, req_id: str, state: RequestState, windowed: Collection[int], num_chunks: int
    ) -> None:
        """Note a load of `num_chunks` chunks under the request's leases. Call it before they are handed over."""
        asked = max(num_chunks, self._num_asked(state, windowed))
        self._loads[ticket] = _Load(req_id, state.root, asked, _num_found(state), num_chunks, state.found_tokens)
        self.count_tokens(state)

    def fail_load(self, req_id: str) -> None:
        """Note that the request's load failed in a worker: the engine computes all of it."""
        for load in self._loads.values():
            if load.req_id == req_id:
                load.loaded = 0

    def end_load(self, ticket: int, num_bad: int) -> None:
        """Count a load that has ended. One bad chunk, and the engine uses none of them."""
        if (load := self._loads.pop(ticket, None)) is not None:
            served = 0 if num_bad else load.loaded
            self._count(load.root, load.asked, load.found, served)
            if served:
                self.meter.note_loaded(load.tokens)
            else:
                self.meter.add("not_loaded_requests", 1, "failed_verification")

    def _count(self, root: bytes, asked: int, found: int, served: int) -> None:
        self._cache.count_lookups(asked, served)
        self._notices.note_request(root, found, served)

    def _num_asked(self, state: RequestState, windowed: Collection[int]) -> int:
        """Return how many chunks vLLM has asked for since the request's chunks were pinned, and lacks.

        vLLM reads a prefix up to its first miss: the chunks behind it count as asked for. It reads windows from the end.
        """
        first: dict[int, int] = {}  # group of full attention -> the first chunk asked for
        count = 0
        for key in state.asked:
            group_id = shim.get_offload_group_idx(key)
            end_tokens = state.end_of.get(key)
            if end_tokens is not None and end_tokens <= state.engine_tokens:
                continue  # another request has computed it while this one waited
            if group_id in windowed or end_tokens is None:
                count += 1
            else:
                index = end_tokens // self._groups[group_id].chunk_tokens - 1
                first[group_id] = min(index, first.get(group_id, index))
        return count + sum(len(state.chains[group_id]) - index for group_id, index in first.items())


def _num_found(state: RequestState) -> int:
    return sum(len(lease.keys) for lease in state.leases)
