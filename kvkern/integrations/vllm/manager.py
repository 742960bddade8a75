"""Scheduler side: answers vLLM's lookups and gives its transfers slots. Runs in the scheduler's thread, never blocks.

    first lookup of a request:  acquire all its cached chunks in one batch. Answer RETRY until the lease is there (a daemon
                                takes a fraction of a millisecond). HIT is a promise, so the chunks stay pinned
    prepare_load:               hand the leases over to a ticket
    prepare_store:              reserve slots for chunks that are not cached, under a ticket
    every rank has finished:    `end_transfer(ticket)` releases the leases or publishes the reservations

A ticket is the number of one transfer. Tickets own slots, requests do not: a ticket lives on after an abort or a reset,
until every worker is done with the memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from functools import partial
from itertools import islice

from msgspec.structs import replace

from ...cache.base import ChunkCache, RequestEnd
from ...kernels.chunk_keys import adopt_keys
from ...keys import Namespace
from ...policy.base import Use
from ...tiers.base import ChunkShape, Lease, Reservation
from . import shim
from .adapter_names import AdapterNames
from .engine_meter import EngineMeter
from .first_tokens import FirstTokens
from .lookup_counts import LookupCounts
from .notices import Notices, log_failed_load, log_load_without_hit, log_stores_nothing
from .prefill_speed import PrefillSpeed
from .rank_arenas import RankArenas
from .request_hints import with_hints
from .request_state import KvGroup, RequestState
from .stop_reasons import stop_reason
from .store_proof import Proof
from .tenants import Tenants
from .tickets import NO_TICKET, Tickets
from .transfer_metadata import GroupChunks, SlotSpec

PIN_STEPS = 16  # a request that is not scheduled for this many steps loses its pins and looks up anew
STORE_STEPS = 8  # how many steps a store may wait for slots before it takes the slots that are free


class KvkernManager(shim.OffloadingManager):
    """vLLM's OffloadingManager over a cache. Call `bind` before the first request."""

    def __init__(self, cache: ChunkCache, groups: Iterable[KvGroup]) -> None:
        self._cache = cache
        self._groups = {group.group_id: group for group in groups}
        self._tenants: Tenants | None = None
        self._requests: dict[str, RequestState] = {}
        self._waiting: set[str] = set()  # requests that hold pins between lookup and load
        self._windowed: frozenset[int] = frozenset()
        self._handed_over: frozenset[int] = frozenset()
        self._postponed: dict[str, dict[int, int]] = {}  # see take_postponed
        self._notices = Notices(cache, min(group.chunk_tokens for group in self._groups.values()))
        self._counts = LookupCounts(cache, self._groups, self._notices)
        self._tool_calls: Collection[int] = ()
        self._proof: Proof | None = None
        self._adapters: AdapterNames | None = None
        self._stores_nothing = False  # see stop_storing
        self.ranks, self._tickets = RankArenas(), Tickets()  # while a rank is absent, requests are not cached
        self._num_requests = self.step = 0
        self.prefill = PrefillSpeed()
        self._first_tokens = FirstTokens(self._requests)
        self.meter = self._counts.meter

    def watch(self, meter: EngineMeter) -> None:
        """Count with this meter from now on. Call it before the first request."""
        meter.prefill_tokens_s = lambda: self.prefill.tokens_per_s
        self.meter = self._counts.meter = meter

    def bind(
        self,
        namespace: Callable[[], Namespace],
        proof: Proof,
        windowed: Iterable[int] = (),
        handed_over: Iterable[int] = (),
        tool_calls: Collection[int] = (),
        adapters: AdapterNames | None = None,
    ) -> None:
        """Set what the engine's start reveals. `namespace` is called at the first request, when the hash seed is known.

        A chunk is stored only if `proof` holds: the blocks to be copied are the ones that hold its tokens.
        `windowed` are the groups of sliding windows and recurrent states. For these any cached chunk helps, not only a prefix.
        `handed_over` are the groups of recurrent states of which vLLM offers each state once, in the step that computes it.
        `tool_calls` are the tokens that begin a tool call. `adapters` names LoRA adapters. Without it, requests with an
        adapter are not cached.
        """
        self._tenants = Tenants(self._cache, namespace)
        self._proof = proof
        self._handed_over = frozenset(handed_over)
        self._tool_calls = tool_calls
        self._adapters = adapters
        self._windowed = frozenset(windowed)

    def attach_request(self, request: shim.Request, named: bool = True) -> None:
        """Take vLLM's request. Its block hashes name every chunk. If they do not (`named`), the request is not cached."""
        state = self._requests[request.request_id]
        state.request, state.named = request, named
        state.may_load = state.may_load and not shim.needs_whole_prompt(request)
        if request.lora_request is not None and self._adapters is not None:
            state.adapter = self._adapters.use_of(request.request_id, request.lora_request, self.step + 1)
        self._set_root(state, request)
        state.use = with_hints(state.use, request.kv_transfer_params, state.root, request.session_id)

    def _set_root(self, state: RequestState, request: shim.Request) -> None:
        """Set the root under which the request is cached. Empty if it computes something whose content is not known."""
        digest = state.adapter.digest if state.adapter is not None else None
        known = state.named and not self.ranks.absent() and (request.lora_request is None or digest is not None)
        state.root = self._root_of(request.cache_salt, digest) if known else b""
        private = self._bound_tenants.private
        state.use = replace(state.use, namespace=b"" if private else state.root)  # empty: no remote store is asked

    def note_engine_hit(self, req_id: str, engine_tokens: int) -> None:
        """Take the tokens that vLLM's own cache gives a request that is about to be scheduled."""
        state = self._requests.get(req_id)
        if state is not None:
            state.engine_tokens = engine_tokens
        if state is not None and state.adapter is not None and self._adapters is not None:
            since = self._adapters.since(state.adapter, self.step + 1, engine_tokens)
            if since is None:
                self._rename(req_id, state, None)
            else:
                state.adapter = dataclasses.replace(state.adapter, since_step=since)

    def note_found(self, req_id: str, tokens: int) -> None:
        """Take the tokens that vLLM is to load for a request that is about to be scheduled."""
        if (state := self._requests.get(req_id)) is not None:
            state.found_tokens = tokens

    def note_adapters(self, loaded: dict[int, str | None]) -> None:
        """Take the workers' report of the adapters that they have loaded: adapter number -> digest."""
        if self._adapters is not None:
            self._adapters.note_loaded(loaded)
        for req_id, state in self._requests.items():
            use = state.adapter
            if use is not None and loaded.get(use.adapter_id, use.digest) != use.digest:
                if state.has_loaded:
                    shim.logger.warning_once(
                        "kvkern: an adapter changed under its number while requests that had loaded its KV were running. Their "
                        "replies mix both contents. Give a retrained adapter a new name or path."
                    )
                mixed = state.has_loaded or state.has_stored
                self._rename(req_id, state, None if mixed else loaded[use.adapter_id])

    def _rename(self, req_id: str, state: RequestState, digest: str | None) -> None:
        """Name what the request computes by another content of its adapter. None: cache it no longer."""
        self._release_pins(req_id, state)
        state.offload_keys, state.chains, state.key_of, state.end_of = {}, {}, {}, {}
        use, state.adapter = state.adapter, None
        if use is not None and digest is not None:
            state.adapter = dataclasses.replace(use, digest=digest)
        assert state.request is not None, "only an attached request has an adapter"
        self._set_root(state, state.request)

    # -- vLLM's interface ------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: shim.ReqContext) -> shim.RequestOffloadingContext:
        """See OffloadingManager."""
        self._num_requests += 1
        memory, store = shim.allowed_tiers(req_context)
        self._requests[req_context.req_id] = RequestState(
            Use(request=self._num_requests), root=self._root_of(None), may_load=memory, may_ask_store=store
        )
        return shim.RequestOffloadingContext()

    def lookup(self, key: shim.OffloadKey, req_context: shim.ReqContext) -> shim.LookupResult:
        """Return HIT if the chunk is pinned for this request, RETRY while its lease is not there, else MISS.

        The first call of a request acquires its whole prefix.
        """
        state = self._requests.get(req_context.req_id)
        if state is None or state.load_failed or state.predates_reset or not state.root or not state.may_load:
            return shim.LookupResult.MISS
        if state.pinned_at_step < 0:
            self._acquire_prefix(req_context.req_id, state)
        state.asked.add(key)
        if not self._collect_leases(state):
            return shim.LookupResult.RETRY
        if key in state.hits:
            return shim.LookupResult.HIT
        return shim.LookupResult.MISS if key in state.key_of else self._look_up_boundary(state, key)

    def get_load_source(self, key: shim.OffloadKey, req_context: shim.ReqContext) -> shim.CacheHitSource:
        """Name the source of every hit: host memory."""
        return shim.CacheHitSource.HOST

    def prepare_load(self, keys: Collection[shim.OffloadKey], req_context: shim.ReqContext) -> shim.LoadStoreSpec:
        """Hand the request's leases over to the ticket of the load that is about to be submitted."""
        state = self._requests[req_context.req_id]
        place_of = {key: place for lease in state.leases for key, place in lease.places()}
        by_group = self._keys_by_group(state, keys)
        if all(key in place_of for chain in by_group.values() for key in chain):
            groups = tuple(
                GroupChunks.from_places(chain, [place_of[key] for key in chain]) for chain in by_group.values()
            )
        else:  # the worker cannot pair chunks that were no hit, and reports a failed load
            asked = [key for chain in by_group.values() for key in chain]
            log_load_without_hit(req_context.req_id, len(asked), sum(key not in place_of for key in asked))
            groups = tuple(GroupChunks.from_lists((), ()) for _ in by_group)
        ticket = self._tickets.open(state.leases)
        served = sum(len(group.slots) for group in groups)
        self._counts.begin_load(ticket, req_context.req_id, state, self._windowed, served)
        state.leases = []
        self._release_pins(req_context.req_id, state)
        state.has_loaded = True
        return SlotSpec(ticket, state.root, groups, state.adapter)

    def prepare_store(
        self, keys: Collection[shim.OffloadKey], req_context: shim.ReqContext
    ) -> shim.PrepareStoreOutput | None:
        """Reserve slots for the chunks that are not cached. Chunks whose slots come later are postponed."""
        state = self._requests[req_context.req_id]
        if not state.root:
            return shim.PrepareStoreOutput([], SlotSpec(NO_TICKET, b"", ()), [])
        self._name_new_chunks(state)
        by_group = self._keys_by_group(state, self._proven(state, keys))
        stored = [group for group_id, group in by_group.items() if not self._stores_no_more(state, group_id)]
        wanted = [key for group in stored for key in group]
        offload_key_of = {self._chunk_key(state, key): key for key in keys}
        later = set(wanted[(room := self._cache.room(wanted)) :])
        if postponed := self._postpone(req_context.req_id, state, [offload_key_of[key] for key in later]):
            by_group = {group_id: [key for key in group if key not in later] for group_id, group in by_group.items()}
        if room or not postponed:
            state.store_waits = 0
        reservations = [self._reserve(state, group_id, wanted) for group_id, wanted in by_group.items()]
        granted = [offload_key_of[key] for reservation in reservations for key in reservation.keys]
        groups = tuple(GroupChunks.from_lists(r.keys, r.slots, r.generations) for r in reservations)
        ticket = self._tickets.open([r for r in reservations if r.keys]) if granted else NO_TICKET
        state.has_stored = state.has_stored or bool(granted)
        return shim.PrepareStoreOutput(granted, SlotSpec(ticket, state.root, groups, state.adapter), [])

    def on_request_finished(self, req_context: shim.ReqContext) -> None:
        """Release the request's pins and drop its state. Its tickets live on until the workers are done."""
        state = self._requests.pop(req_context.req_id, None)
        if state is not None:
            self._first_tokens.end(req_context.req_id, state, self.meter)
            self._release_pins(req_context.req_id, state)
            if state.request is not None and state.root:
                self._report_end(state, state.request)

    def _report_end(self, state: RequestState, request: shim.Request) -> None:
        """Tell the cache how the request ended, and how fast the engine computes prompts."""
        stop = state.use.stop or stop_reason(request, self._tool_calls)
        use = replace(state.use, output_tokens=request.num_output_tokens, stop=stop)
        group_id, group = next(iter(self._groups.items()))
        prompt = state.chains.get(group_id, [])[: request.num_prompt_tokens // group.chunk_tokens]
        age_s = time.monotonic() - state.arrived_s
        self._cache.finish(use, RequestEnd(prompt, request.num_prompt_tokens, age_s, self.prefill.tokens_per_s))

    def on_schedule_end(self, context: shim.ScheduleEndContext) -> None:
        """Release pins of requests that were scheduled without a load or not scheduled for PIN_STEPS steps."""
        self.step += 1
        for req_id in self._waiting.intersection(context.new_req_ids):
            self._counts.note_computed(self._requests[req_id], self._windowed)
            self._release_pins(req_id, self._requests[req_id])
        for req_id in context.new_req_ids:
            if (state := self._requests.get(req_id)) is not None and not state.scheduled:
                self._counts.note_scheduled(state)
                self._first_tokens.note_scheduled(req_id)
        for req_id in [r for r in self._waiting if self._requests[r].pins_expired(self.step - PIN_STEPS)]:
            self._release_pins(req_id, self._requests[req_id])
        self._notices.log_due()

    def has_pending_work(self) -> bool:
        """Return True while a transfer runs, so that the engine keeps stepping until slots from before a reset are flushed."""
        return bool(self._tickets)

    def reset_cache(self) -> None:
        """Forget everything. Slots under a ticket are freed when their transfer has ended.

        Live requests store nothing more, because part of their KV may be of the weights before the reset. From now on the
        engine uses namespaces that no other engine has, because kvkern cannot tell whether other engines have the new weights
        too. Chunks that the engine shared before stay available to the others. The engine's later chunks go to no remote
        store, because no other engine could find them there.
        """
        for req_id, state in self._requests.items():
            self._release_pins(req_id, state)
            state.predates_reset = True
        self._tickets.note_reset()
        self._bound_tenants.reset()
        self._notices.note_reset()
        self._stores_nothing = False

    def on_reset_flushed(self) -> None:
        """End what is left of the transfers from before the reset: vLLM 0.33 says when every worker is done with them."""
        for ticket in self._tickets.from_before_reset():
            self.end_transfer(ticket)

    def shutdown(self) -> None:
        """Close the cache at the engine's end. A daemon learns that nothing more will come."""
        self._cache.close()

    def get_stats(self) -> shim.OffloadingConnectorStats | None:
        """Return the metrics' increase since the last call, or None if nothing changed. A fault in them is only counted."""
        with self._cache.faults.are_misses():
            self._first_tokens.look(self.meter)
            return self.meter.take()
        return None

    # -- called by the connector -------------------------------------------------------------------------------------

    def end_transfer(self, ticket: int) -> None:
        """End a ticket that every rank has finished: release its leases, or publish its chunks, unless they were spoiled."""
        num_bad, spoiled = 0, self._tickets.end_spoiled(ticket)
        for owned in self._tickets.close(ticket):
            if isinstance(owned, Lease):
                num_bad += self._cache.release(owned)
            elif spoiled:
                self._cache.abort(owned)
            else:
                self._cache.commit_soon(owned)
        self._counts.end_load(ticket, num_bad)

    def spoil_stores(self) -> None:
        """Publish nothing of the stores under way: another connector could not load blocks that they may copy."""
        self._tickets.spoil()

    def request(self, req_id: str) -> shim.Request | None:
        """Return vLLM's request, until its last stores are planned."""
        state = self._requests.get(req_id)
        return None if state is None else state.request

    def stop_storing(self, reason: str) -> None:
        """Store nothing more until the next reset, because KV in vLLM's own blocks may be wrong. Loads go on."""
        if not self._stores_nothing:
            self._stores_nothing = True
            log_stores_nothing(reason)

    def note_failed_load(self, req_id: str) -> None:
        """Let the request be computed without another load, after a load that did not verify.

        vLLM keeps counting the failed load's blocks as reserved, so a second load of a prompt above half the KV
        pool would wait for itself forever.
        """
        log_failed_load(req_id)
        self._counts.fail_load(req_id)
        if (state := self._requests.get(req_id)) is not None:
            state.load_failed, state.has_loaded = True, False

    def take_postponed(self) -> dict[str, dict[int, int]]:
        """Return what this step's stores postponed: request -> KV group -> the first chunk to offer again. Each once.

        vLLM has counted these chunks as stored. To answer None instead would make vLLM count and log a failure every time.
        """
        postponed, self._postponed = self._postponed, {}
        return postponed

    # -- inside ------------------------------------------------------------------------------------------------------

    def _proven(self, state: RequestState, keys: Collection[shim.OffloadKey]) -> list[shim.OffloadKey]:
        """Return the keys of chunks that may be stored. Of full attention, nothing behind a chunk without proof is stored."""
        if state.request is None or self._proof is None or self._stores_nothing:
            return []
        proven = []
        for key in keys:
            group_id = shim.get_offload_group_idx(key)
            group = self._groups[group_id]
            tokens_per_hash = group.chunk_tokens // group.hashes_per_chunk
            end_tokens = state.end_of.get(key) or state.end_of_boundary(key, tokens_per_hash)
            if self._proof.holds(state.request, key, end_tokens, tokens_per_hash):
                proven.append(key)
            elif group_id not in self._windowed:
                state.broken_groups.add(group_id)
        return proven

    def _name_new_chunks(self, state: RequestState) -> None:
        """Compute the keys of chunks that the request has filled since the last call. Forget those that it has no longer."""
        hashes = state.request.block_hashes if state.request is not None else ()
        for group_id, group in self._groups.items():
            offload_keys, step = state.offload_keys.setdefault(group_id, []), group.hashes_per_chunk
            chain = state.chains.setdefault(group_id, [])
            for key in shim.drop_stale_keys(offload_keys, hashes, step, group_id):
                chain.pop()
                del state.key_of[key], state.end_of[key]
            last = len(offload_keys) * step + step - 1  # index of the hash that names the next chunk
            if last < len(hashes):
                fresh = [shim.make_offload_key(h, group_id) for h in islice(hashes, last, None, step)]
                named = adopt_keys(state.root, fresh)
                ends = range((len(chain) + 1) * group.chunk_tokens, 1 << 62, group.chunk_tokens)
                state.end_of.update(zip(fresh, ends, strict=False))
                offload_keys += fresh
                chain += named
                state.key_of.update(zip(fresh, named, strict=True))

    def _chunk_key(self, state: RequestState, key: shim.OffloadKey) -> bytes:
        """Return the chunk key of vLLM's key. A key outside the chains names a boundary inside a chunk.

        Hybrid models with aligned states have such boundaries.
        """
        return state.key_of.get(key) or adopt_keys(state.root, [key])[0]

    def _keys_by_group(self, state: RequestState, keys: Iterable[shim.OffloadKey]) -> dict[int, list[bytes]]:
        """Return chunk keys by group id, in the given order. Contains every group, in the connector's order."""
        result: dict[int, list[bytes]] = {group_id: [] for group_id in self._groups}
        for key in keys:
            result[shim.get_offload_group_idx(key)].append(self._chunk_key(state, key))
        return result

    def _acquire_prefix(self, req_id: str, state: RequestState) -> None:
        """Start to acquire all cached chunks of this request."""
        self._name_new_chunks(state)
        for group_id, chain in state.chains.items():
            use, prefix = state.lookup_use(group_id), group_id not in self._windowed
            state.pending_lookups.append((group_id, self._cache.acquire_soon(chain, prefix, use)))
        state.pinned_at_step = self.step
        self._waiting.add(req_id)

    def _collect_leases(self, state: RequestState) -> bool:
        """Take over the leases once every pending lookup is answered. False: some are not answered yet."""
        if not all(asked.done() for _, asked in state.pending_lookups):
            return False
        for group_id, asked in state.pending_lookups:
            lease = asked.result()
            state.leases.append(lease)
            held = set(lease.keys)
            chain = zip(state.offload_keys[group_id], state.chains[group_id], strict=True)
            state.hits.update(offload_key for offload_key, key in chain if key in held)
        if state.pending_lookups:
            state.pinned_at_step, state.pending_lookups = self.step, []
        return True

    def _look_up_boundary(self, state: RequestState, key: shim.OffloadKey) -> shim.LookupResult:
        asked = state.boundary_lookups.get(key)
        if asked is None:
            use = state.lookup_use(shim.get_offload_group_idx(key))
            state.boundary_lookups[key] = asked = self._cache.acquire_soon([self._chunk_key(state, key)], use=use)
        if not asked.done():
            return shim.LookupResult.RETRY
        del state.boundary_lookups[key]
        lease = asked.result()
        if not lease.keys:
            return shim.LookupResult.MISS
        state.leases.append(lease)
        state.hits.add(key)
        return shim.LookupResult.HIT

    def _release_pins(self, req_id: str, state: RequestState) -> None:
        for lease in state.leases:
            self._cache.release(lease)
        for asked in (*(asked for _, asked in state.pending_lookups), *state.boundary_lookups.values()):
            asked.add_done_callback(partial(_release_result, self._cache))
        state.leases, state.pending_lookups, state.boundary_lookups = [], [], {}
        state.hits, state.asked, state.pinned_at_step = set(), set(), -1
        self._waiting.discard(req_id)

    def _root_of(self, salt: str | None, adapter: str | None = None) -> bytes:
        """Return the namespace root of a tenant. A tenant has one root for each content of an adapter that it uses."""
        if adapter is not None and self._adapters is not None:
            adapter = f"{adapter}:{self._adapters.settings}"
        return self._bound_tenants.root_of(salt, adapter)

    @property
    def _bound_tenants(self) -> Tenants:
        assert self._tenants is not None, "bind() was not called"
        return self._tenants

    def _postpone(self, req_id: str, state: RequestState, keys: Collection[shim.OffloadKey]) -> bool:
        """Return True if these chunks wait for slots: the next step offers them again. False: store what has a slot."""
        waits = bool(keys) and state.store_waits < STORE_STEPS and not state.is_finished
        if not waits or any(key not in state.end_of or self._is_handed_over(key) for key in keys):
            return False  # vLLM offers the state of a recurrent layer once
        state.store_waits += 1
        first = self._postponed.setdefault(req_id, {})
        for key in keys:
            group_id = shim.get_offload_group_idx(key)
            index = state.end_of[key] // self._groups[group_id].chunk_tokens - 1
            first[group_id] = min(index, first.get(group_id, index))
        return True

    def _is_handed_over(self, key: shim.OffloadKey) -> bool:
        return shim.get_offload_group_idx(key) in self._handed_over

    def _reserve(self, state: RequestState, group_id: int, wanted: list[bytes]) -> Reservation:
        if not wanted or self._stores_no_more(state, group_id):
            return Reservation((), (), ())
        shape = ChunkShape(
            state.root, group_id, self._groups[group_id].chunk_tokens, private=self._bound_tenants.private
        )
        reservation = self._cache.reserve(state.chains[group_id], wanted, shape, state.use)
        self._notices.note_dropped(reservation.dropped)
        self.meter.note_reserved(reservation, wanted)
        if (reservation.dropped or reservation.declined) and group_id not in self._windowed:
            state.broken_groups.add(group_id)
        return reservation

    @staticmethod
    def _stores_no_more(state: RequestState, group_id: int) -> bool:
        """Return True if no further chunk of this request and group is stored."""
        return not state.root or state.predates_reset or group_id in state.broken_groups


def _release_result(cache: ChunkCache, asked: Future[Lease]) -> None:
    cache.release(asked.result())
