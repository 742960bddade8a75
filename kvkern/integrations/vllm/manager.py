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

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from blake3 import blake3

from ...cache.base import ChunkCache, RequestEnd
from ...kernels.chunk_keys import adopt_keys
from ...keys import Namespace
from ...policy.base import Use
from ...tiers.base import ChunkShape, Lease, Reservation
from . import shim
from .prefill_speed import PrefillSpeed
from .request_hints import with_hints
from .stop_reasons import stop_reason
from .transfer_metadata import GroupChunks, SlotSpec

NO_TICKET = -1
PIN_STEPS = 16  # a request that is not scheduled for this many steps loses its pins and looks up anew
STORE_STEPS = 8  # how many steps a store may wait for slots before it takes the slots that are free
MAX_TENANTS = (
    65_536  # distinct cache salts since the start or the last reset; requests with further salts are not cached
)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """One KV group as the scheduler sees it."""

    group_id: int  # vLLM's index, part of the offload key
    hashes_per_chunk: int
    chunk_tokens: int


@dataclass
class RequestState:
    """The manager's state of a live request. Chains are in sequence order, by group id."""

    use: Use  # tells the eviction policy this request's number, namespace and hints
    arrived_s: float = field(default_factory=time.monotonic)
    request: shim.Request | None = None
    root: bytes = b""  # root of its tenant's namespace; empty: the request is not cached
    offload_keys: dict[int, list[shim.OffloadKey]] = field(default_factory=dict)  # vLLM's keys
    chains: dict[int, list[bytes]] = field(default_factory=dict)  # chunk keys, parallel to `offload_keys`
    key_of: dict[shim.OffloadKey, bytes] = field(default_factory=dict)  # vLLM's key -> chunk key
    leases: list[Lease] = field(default_factory=list)
    hits: set[shim.OffloadKey] = field(default_factory=set)  # chunks under `leases`
    pending_lookups: list[tuple[int, Future[Lease]]] = field(default_factory=list)  # (group, lease to come)
    boundary_lookups: dict[shim.OffloadKey, Future[Lease]] = field(default_factory=dict)  # chunks outside the chains
    pinned_at_step: int = -1  # -1: not looked up
    store_waits: int = 0
    predates_reset: bool = False  # was alive when the cache was reset
    load_failed: bool = False  # the request is computed without loading; see KvkernManager.note_failed_load
    broken_groups: set[int] = field(
        default_factory=set
    )  # a chunk of the group is not stored: later ones are unreachable


class KvkernManager(shim.OffloadingManager):
    """vLLM's OffloadingManager over a cache. Call `bind` before the first request."""

    def __init__(self, cache: ChunkCache, groups: Iterable[KvGroup]) -> None:
        self._cache = cache
        self._groups = {group.group_id: group for group in groups}
        self._namespace: Callable[[], Namespace] | None = None
        self._roots: dict[str | None, bytes] = {}  # cache salt -> namespace root
        self._too_many_tenants = False  # True after MAX_TENANTS was exceeded, which is logged once
        self._epoch = ""  # set by a reset: from then on it makes this engine's namespaces different from all others
        self._requests: dict[str, RequestState] = {}
        self._waiting: set[str] = set()  # requests that hold pins between lookup and load
        self._windowed: frozenset[int] = frozenset()
        self._tool_calls: Collection[int] = ()
        self._tickets: dict[int, Sequence[Lease] | Sequence[Reservation]] = {}
        self._next_ticket = 0
        self._num_requests = 0
        self._step = 0
        self.prefill = PrefillSpeed()
        self._reported = cache.counters.snapshot()

    def bind(
        self, namespace: Callable[[], Namespace], windowed: Iterable[int] = (), tool_calls: Collection[int] = ()
    ) -> None:
        """Set what the engine's start reveals. `namespace` is called at the first request, when the hash seed is known.

        `windowed` are the groups of sliding windows and recurrent states. For these any cached chunk helps, not only a prefix.
        `tool_calls` are the tokens that begin a tool call.
        """
        self._namespace = namespace
        self._tool_calls = tool_calls
        self._windowed = frozenset(windowed)

    def attach_request(self, request: shim.Request) -> None:
        """Take vLLM's request. Its block hashes name every chunk, including chunks that vLLM never looks up."""
        state = self._requests[request.request_id]
        state.request, state.root = request, self._root_of(request.cache_salt)
        state.use = replace(state.use, namespace=b"" if self._epoch else state.root)  # empty: no remote store is asked
        state.use = with_hints(state.use, request.kv_transfer_params, state.root, request.session_id)

    # -- vLLM's interface ------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: shim.ReqContext) -> shim.RequestOffloadingContext:
        """See OffloadingManager."""
        self._num_requests += 1
        self._requests[req_context.req_id] = RequestState(Use(request=self._num_requests), root=self._root_of(None))
        return shim.RequestOffloadingContext()

    def lookup(self, key: shim.OffloadKey, req_context: shim.ReqContext) -> shim.LookupResult:
        """Return HIT if the chunk is pinned for this request, RETRY while its lease is not there, else MISS.

        The first call of a request acquires its whole prefix.
        """
        state = self._requests.get(req_context.req_id)
        if state is None or state.load_failed or state.predates_reset or not state.root:
            return shim.LookupResult.MISS
        if state.pinned_at_step < 0:
            self._acquire_prefix(req_context.req_id, state)
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
        slot_of = {key: slot for lease in state.leases for key, slot in zip(lease.keys, lease.slots, strict=True)}
        by_group = self._keys_by_group(state, keys)
        if all(key in slot_of for chain in by_group.values() for key in chain):
            groups = tuple(
                GroupChunks.from_lists(chain, [slot_of[key] for key in chain]) for chain in by_group.values()
            )
        else:  # the worker cannot pair chunks that were no hit, and reports a failed load
            shim.logger.error(
                "kvkern: vLLM asked to load %d chunks, but %d of them were no hit. The request is computed instead. Please "
                "report this as a bug.",
                sum(map(len, by_group.values())),
                sum(key not in slot_of for chain in by_group.values() for key in chain),
            )
            groups = tuple(GroupChunks.from_lists((), ()) for _ in by_group)
        ticket = self._new_ticket(state.leases)
        state.leases = []
        self._release_pins(req_context.req_id, state)
        return SlotSpec(ticket, state.root, groups)

    def prepare_store(
        self, keys: Collection[shim.OffloadKey], req_context: shim.ReqContext
    ) -> shim.PrepareStoreOutput | None:
        """Reserve slots for the chunks that are not cached. None: no slots are free now, so vLLM offers the chunks again."""
        state = self._requests[req_context.req_id]
        if not state.root:
            return shim.PrepareStoreOutput([], SlotSpec(NO_TICKET, b"", ()), [])
        self._name_new_chunks(state)
        by_group = self._keys_by_group(state, keys)
        stored = [group for group_id, group in by_group.items() if not self._stores_no_more(state, group_id)]
        wanted = [key for group in stored for key in group]
        if not self._cache.has_room(wanted) and state.store_waits < STORE_STEPS and not _is_finished(state):
            state.store_waits += 1
            return None
        state.store_waits = 0
        offload_key_of = {self._chunk_key(state, key): key for key in keys}
        reservations = [self._reserve(state, group_id, wanted) for group_id, wanted in by_group.items()]
        granted = [offload_key_of[key] for reservation in reservations for key in reservation.keys]
        groups = tuple(GroupChunks.from_lists(r.keys, r.slots, r.generations) for r in reservations)
        ticket = self._new_ticket([r for r in reservations if r.keys]) if granted else NO_TICKET
        return shim.PrepareStoreOutput(granted, SlotSpec(ticket, state.root, groups), [])

    def on_request_finished(self, req_context: shim.ReqContext) -> None:
        """Release the request's pins and drop its state. Its tickets live on until the workers are done."""
        state = self._requests.pop(req_context.req_id, None)
        if state is not None:
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
        self._step += 1
        for req_id in self._waiting.intersection(context.new_req_ids):
            self._release_pins(req_id, self._requests[req_id])
        for req_id in [r for r in self._waiting if self._pins_expired(self._requests[r])]:
            self._release_pins(req_id, self._requests[req_id])

    def _pins_expired(self, state: RequestState) -> bool:
        """Return True if the pins were not used for PIN_STEPS steps. While an answer is due, pins do not expire."""
        return (
            not state.pending_lookups and not state.boundary_lookups and self._step - state.pinned_at_step > PIN_STEPS
        )

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
        if self._epoch or not self._cache.shared:
            for root in self._roots.values():
                self._cache.clear_soon(root)
        self._epoch, self._roots = uuid.uuid4().hex, {}

    def shutdown(self) -> None:
        """Close the cache at the engine's end. A daemon learns that nothing more will come."""
        self._cache.close()

    def get_stats(self) -> shim.OffloadingConnectorStats | None:
        """Return the counters' increase since the last call, or None if nothing changed."""
        now = self._cache.counters.snapshot()
        stats = shim.OffloadingConnectorStats()
        for name in metric_definitions():
            field_name = name.split(":", 1)[1]
            if delta := now[field_name] - self._reported[field_name]:
                stats.increase_counter(name, delta)
        self._reported = now
        return None if stats.is_empty() else stats

    # -- called by the connector -------------------------------------------------------------------------------------

    def end_transfer(self, ticket: int) -> None:
        """Release the ticket's leases, or publish the chunks that all ranks have written. Call when every rank has finished."""
        for owned in self._tickets.pop(ticket, ()):
            if isinstance(owned, Lease):
                self._cache.release(owned)
            else:
                self._cache.commit_soon(owned)

    def note_failed_load(self, req_id: str) -> None:
        """Let the request be computed without another load, after a load that did not verify.

        vLLM 0.32 keeps counting the failed load's blocks as reserved, so a second load of a prompt above half the KV
        pool would wait for itself forever.
        """
        if (state := self._requests.get(req_id)) is not None:
            state.load_failed = True

    # -- inside ------------------------------------------------------------------------------------------------------

    def _name_new_chunks(self, state: RequestState) -> None:
        """Compute the keys of chunks that the request has filled since the last call."""
        hashes = state.request.block_hashes if state.request is not None else ()
        for group_id, group in self._groups.items():
            offload_keys, step = state.offload_keys.setdefault(group_id, []), group.hashes_per_chunk
            chain = state.chains.setdefault(group_id, [])
            last = len(offload_keys) * step + step - 1  # index of the hash that names the next chunk
            if last < len(hashes):
                fresh = [shim.make_offload_key(h, group_id) for h in islice(hashes, last, None, step)]
                named = adopt_keys(state.root, fresh)
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
            asked = self._cache.acquire_soon(chain, prefix=group_id not in self._windowed, use=state.use)
            state.pending_lookups.append((group_id, asked))
        state.pinned_at_step = self._step
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
            state.pinned_at_step, state.pending_lookups = self._step, []
        return True

    def _look_up_boundary(self, state: RequestState, key: shim.OffloadKey) -> shim.LookupResult:
        asked = state.boundary_lookups.get(key)
        if asked is None:
            asked = state.boundary_lookups[key] = self._cache.acquire_soon([self._chunk_key(state, key)], use=state.use)
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
        state.hits, state.pinned_at_step = set(), -1
        self._waiting.discard(req_id)

    def _root_of(self, salt: str | None) -> bytes:
        """Return the namespace root of a tenant. Every tenant has keys and a quota of its own, whatever vLLM hashes."""
        root = self._roots.get(salt)
        if root is None:
            assert self._namespace is not None, "bind() was not called"
            namespace = self._namespace()
            if salt is not None:
                namespace = replace(namespace, salt=f"{namespace.salt or ''}/{blake3(salt.encode()).hexdigest()}")
            if self._epoch:
                namespace = replace(namespace, weights=f"{namespace.weights}@{self._epoch}")
            if len(self._roots) >= MAX_TENANTS:
                if not self._too_many_tenants:
                    self._too_many_tenants = True
                    shim.logger.warning(
                        "kvkern: requests use more than %d cache salts, the limit. Requests with further salts are computed. "
                        "Restart the engine, or use fewer salts.",
                        MAX_TENANTS,
                    )
                return b""
            root = self._roots[salt] = namespace.root
            self._cache.describe_namespace(root, namespace.public_fields())
        return root

    def _reserve(self, state: RequestState, group_id: int, wanted: list[bytes]) -> Reservation:
        if not wanted or self._stores_no_more(state, group_id):
            return Reservation((), (), ())
        shape = ChunkShape(state.root, group_id, self._groups[group_id].chunk_tokens, private=bool(self._epoch))
        reservation = self._cache.reserve(state.chains[group_id], wanted, shape, state.use)
        if (reservation.dropped or reservation.declined) and group_id not in self._windowed:
            state.broken_groups.add(group_id)
        return reservation

    @staticmethod
    def _stores_no_more(state: RequestState, group_id: int) -> bool:
        """Return True if no further chunk of this request and group is stored."""
        return not state.root or state.predates_reset or group_id in state.broken_groups

    def _new_ticket(self, owned: Sequence[Lease] | Sequence[Reservation]) -> int:
        self._next_ticket += 1
        self._tickets[self._next_ticket] = owned
        return self._next_ticket


def _is_finished(state: RequestState) -> bool:
    return state.request is not None and state.request.is_finished()


def _release_result(cache: ChunkCache, asked: Future[Lease]) -> None:
    cache.release(asked.result())


def metric_definitions(daemon: bool = False, remote: bool = True) -> dict[str, shim.OffloadingMetricMetadata]:
    """Return the Prometheus counters of this adapter. vLLM has its own for bytes and seconds.

    Left out are counters that a daemon keeps for all its engines, and remote counters of an engine without a remote store.
    """
    texts = {
        "lookup_chunks": "KV chunks asked for.",
        "hit_chunks": "Of those, chunks found.",
        "stored_chunks": "KV chunks stored.",
        "failed_chunks": "KV chunks reserved but not written by every rank.",
        "evicted_chunks": "KV chunks evicted to make room.",
        "dropped_chunks": "KV chunks not stored because there was no room.",
        "declined_chunks": "KV chunks not stored because every cached chunk is worth more.",
        "bad_chunks": "KV chunks that failed verification and were dropped.",
        "remote_lookup_chunks": "KV chunks looked for in the remote store.",
        "remote_hit_chunks": "Of those, chunks read and verified.",
        "remote_unasked_chunks": "KV chunks not asked for: the remote store is slow, or keeps other requests waiting.",
        "remote_gated_chunks": "KV chunks not read from the remote store because computing them is faster.",
        "remote_late_chunks": "KV chunks read from the remote store after their request had stopped waiting.",
        "remote_bad_chunks": "KV chunks of the remote store that failed verification.",
        "remote_written_chunks": "KV chunks written to the remote store.",
        "remote_dropped_chunks": "KV chunks not written to the remote store: it has no room, or it failed.",
        "remote_failures": "Calls to the remote store that failed.",
        "faults": "Faults in the cache that were answered as a miss.",
    }
    elsewhere = {name for name in texts if name.startswith("remote_")} if daemon or not remote else set()
    elsewhere |= {"evicted_chunks", "declined_chunks"} if daemon else set()
    return {
        f"kvkern:{name}": shim.OffloadingCounterMetadata(documentation=text)
        for name, text in texts.items()
        if name not in elsewhere
    }
