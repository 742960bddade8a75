"""Scheduler side: answers vLLM's lookups and gives its transfers slots. Runs in the scheduler's thread, never blocks.

    first lookup of a request:  acquire everything cached of it in one batch; RETRY until it is answered (a daemon takes
                                a fraction of a millisecond); HIT is a promise, so what was acquired stays pinned
    prepare_load:               the pins go over to the load (a ticket)
    prepare_store:              reserve slots for chunks nobody has (a ticket)
    every rank has finished:    `finish(ticket)` releases the lease or publishes the reservation

Tickets, not requests, own slots: they outlive aborts and resets until every worker is done with the memory.
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
from .request_hints import hinted
from .stop_reasons import stop_of
from .transfer_metadata import GroupChunks, SlotSpec

NO_TICKET = -1
PIN_STEPS = 16  # a request that is not scheduled for so many steps loses its pins and looks up anew
STORE_STEPS = 8  # how many steps a store may wait for slots before it takes what there is
MAX_TENANTS = 65_536  # distinct cache salts since the start or the last reset; requests of more are not cached


@dataclass(frozen=True, slots=True)
class Group:
    """One KV group as the scheduler sees it."""

    group_id: int  # vLLM's index, part of the offload key
    hashes_per_chunk: int
    chunk_tokens: int


@dataclass
class RequestState:
    """What the manager remembers of a live request. Chains are in sequence order, by group id."""

    use: Use  # of the eviction policy: this request's number
    came_s: float = field(default_factory=time.monotonic)
    request: shim.Request | None = None
    root: bytes = b""  # of its tenant's namespace; empty: not cached
    theirs: dict[int, list[shim.OffloadKey]] = field(default_factory=dict)
    chains: dict[int, list[bytes]] = field(default_factory=dict)  # our keys, parallel to `theirs`
    ours: dict[shim.OffloadKey, bytes] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    hits: set[shim.OffloadKey] = field(default_factory=set)  # chunks under `leases`
    pending: list[tuple[int, Future[Lease]]] = field(default_factory=list)  # (group, what was asked for)
    boundaries: dict[shim.OffloadKey, Future[Lease]] = field(default_factory=dict)  # chunks outside the chains
    pinned_at: int = -1  # step; -1: not looked up
    store_waits: int = 0
    outdated: bool = False  # was alive when the cache was reset
    load_failed: bool = False  # recomputes without loading; see KvkernManager.load_failed
    broken: set[int] = field(default_factory=set)  # groups with a chunk that is not stored: what follows is unreachable


class KvkernManager(shim.OffloadingManager):
    """vLLM's OffloadingManager over a cache. `bind` before the first request."""

    def __init__(self, cache: ChunkCache, groups: Iterable[Group]) -> None:
        self._cache = cache
        self._groups = {group.group_id: group for group in groups}
        self._namespace: Callable[[], Namespace] | None = None
        self._roots: dict[str | None, bytes] = {}  # of each tenant, by its cache salt
        self._full = False  # there were more than MAX_TENANTS
        self._epoch = ""  # of this engine alone, once it has been reset
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
        """Give the namespace, asked for at the first request, when the engine's hash seed is known.

        `windowed` are the groups of sliding windows and states: there any cached chunk helps, not only a prefix.
        `tool_calls` are the tokens that begin a call of a tool.
        """
        self._namespace = namespace
        self._tool_calls = tool_calls
        self._windowed = frozenset(windowed)

    def attach(self, request: shim.Request) -> None:
        """The request behind a context: its block hashes name every chunk, also those vLLM does not ask for."""
        state = self._requests[request.request_id]
        state.request, state.root = request, self._root_of(request.cache_salt)
        state.use = replace(state.use, namespace=b"" if self._epoch else state.root)  # empty: no store is asked
        state.use = hinted(state.use, request.kv_transfer_params, state.root, request.session_id)

    # -- vLLM's interface ------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: shim.ReqContext) -> shim.RequestOffloadingContext:
        """See OffloadingManager."""
        self._num_requests += 1
        self._requests[req_context.req_id] = RequestState(Use(request=self._num_requests), root=self._root_of(None))
        return shim.RequestOffloadingContext()

    def lookup(self, key: shim.OffloadKey, req_context: shim.ReqContext) -> shim.LookupResult:
        """HIT if the chunk is cached and pinned for this request, else MISS. The first call asks for the whole prefix."""
        state = self._requests.get(req_context.req_id)
        if state is None or state.load_failed or state.outdated or not state.root:
            return shim.LookupResult.MISS
        if state.pinned_at < 0:
            self._pin(req_context.req_id, state)
        if not self._take_answers(state):
            return shim.LookupResult.RETRY
        if key in state.hits:
            return shim.LookupResult.HIT
        return shim.LookupResult.MISS if key in state.ours else self._look_up_boundary(state, key)

    def get_load_source(self, key: shim.OffloadKey, req_context: shim.ReqContext) -> shim.CacheHitSource:
        """Host memory."""
        return shim.CacheHitSource.HOST

    def prepare_load(self, keys: Collection[shim.OffloadKey], req_context: shim.ReqContext) -> shim.LoadStoreSpec:
        """Hand the request's pins over to the load that is about to be submitted."""
        state = self._requests[req_context.req_id]
        slot_of = {key: slot for lease in state.leases for key, slot in zip(lease.keys, lease.slots, strict=True)}
        by_group = self._by_group(state, keys)
        if all(key in slot_of for ours in by_group.values() for key in ours):
            groups = tuple(GroupChunks.of(ours, [slot_of[key] for key in ours]) for ours in by_group.values())
        else:  # vLLM loads what it was not promised: the worker cannot pair it and reports a failed load
            shim.logger.error("kvkern: vLLM asks to load chunks that were no hit; the request is computed")
            groups = tuple(GroupChunks.of((), ()) for _ in by_group)
        ticket = self._ticket(state.leases)
        state.leases = []
        self._unpin(req_context.req_id, state)
        return SlotSpec(ticket, state.root, groups)

    def prepare_store(
        self, keys: Collection[shim.OffloadKey], req_context: shim.ReqContext
    ) -> shim.PrepareStoreOutput | None:
        """Reserve slots for those chunks that nobody has; None: no slots at hand, vLLM offers the chunks again."""
        state = self._requests[req_context.req_id]
        if not state.root:
            return shim.PrepareStoreOutput([], SlotSpec(NO_TICKET, b"", ()), [])
        self._extend(state)
        by_group = self._by_group(state, keys)
        stored = [group for group_id, group in by_group.items() if not self._is_closed(state, group_id)]
        wanted = [key for group in stored for key in group]
        if not self._cache.has_room(wanted) and state.store_waits < STORE_STEPS and not _is_finished(state):
            state.store_waits += 1
            return None
        state.store_waits = 0
        theirs = {ours: key for key in keys if (ours := self._our_key(state, key))}
        reservations = [self._reserve(state, group_id, wanted) for group_id, wanted in by_group.items()]
        granted = [theirs[key] for reservation in reservations for key in reservation.keys]
        groups = tuple(GroupChunks.of(r.keys, r.slots, r.generations) for r in reservations)
        ticket = self._ticket([r for r in reservations if r.keys]) if granted else NO_TICKET
        return shim.PrepareStoreOutput(granted, SlotSpec(ticket, state.root, groups), [])

    def on_request_finished(self, req_context: shim.ReqContext) -> None:
        """Drop the request's pins and state. Its tickets live on until the workers are done."""
        state = self._requests.pop(req_context.req_id, None)
        if state is not None:
            self._unpin(req_context.req_id, state)
            if state.request is not None and state.root:
                self._finish(state, state.request)

    def _finish(self, state: RequestState, request: shim.Request) -> None:
        stop = state.use.stop or stop_of(request, self._tool_calls)
        use = replace(state.use, output_tokens=request.num_output_tokens, stop=stop)
        group_id, group = next(iter(self._groups.items()))
        prompt = state.chains.get(group_id, [])[: request.num_prompt_tokens // group.chunk_tokens]
        age_s = time.monotonic() - state.came_s
        self._cache.finish(use, RequestEnd(prompt, request.num_prompt_tokens, age_s, self.prefill.tokens_s))

    def on_schedule_end(self, context: shim.ScheduleEndContext) -> None:
        """Requests scheduled without a load, and those not scheduled for PIN_STEPS steps, give their pins back."""
        self._step += 1
        for req_id in self._waiting.intersection(context.new_req_ids):
            self._unpin(req_id, self._requests[req_id])
        for req_id in [r for r in self._waiting if self._has_waited(self._requests[r])]:
            self._unpin(req_id, self._requests[req_id])

    def _has_waited(self, state: RequestState) -> bool:
        """Whether what is pinned for it was not used for long. An answer that is still due is waited for, whatever it takes."""
        return not state.pending and not state.boundaries and self._step - state.pinned_at > PIN_STEPS

    def has_pending_work(self) -> bool:
        """Keeps the engine stepping until slots of reset transfers are flushed."""
        return bool(self._tickets)

    def reset_cache(self) -> None:
        """Forget everything. Slots under a ticket are freed when their transfer has ended.

        Live requests store nothing any more: part of their KV may be of the weights before the reset. From now on the
        engine's namespaces are its own: nobody can tell whether another engine has the new weights too. What it shared
        until then stays the others'. Nothing of its own goes to a remote store, where nobody could find it.
        """
        for req_id, state in self._requests.items():
            self._unpin(req_id, state)
            state.outdated = True
        if self._epoch or not self._cache.shared:
            for root in self._roots.values():
                self._cache.clear_soon(root)
        self._epoch, self._roots = uuid.uuid4().hex, {}

    def shutdown(self) -> None:
        """The engine ends; a daemon is told that nothing more will come."""
        self._cache.close()

    def get_stats(self) -> shim.OffloadingConnectorStats | None:
        """Counters since the last call."""
        now = self._cache.counters.snapshot()
        stats = shim.OffloadingConnectorStats()
        for name in metric_definitions():
            field_name = name.split(":", 1)[1]
            if delta := now[field_name] - self._reported[field_name]:
                stats.increase_counter(name, delta)
        self._reported = now
        return None if stats.is_empty() else stats

    # -- the connector's --------------------------------------------------------------------------------------------

    def finish(self, ticket: int) -> None:
        """Every rank has ended the transfer of this ticket: release its lease, or publish what all ranks have written."""
        for owned in self._tickets.pop(ticket, ()):
            if isinstance(owned, Lease):
                self._cache.release(owned)
            else:
                self._cache.commit_soon(owned)

    def load_failed(self, req_id: str) -> None:
        """A load of this request did not verify: compute it without another load.

        vLLM 0.32 keeps counting the failed load's blocks as reserved, so a second load of a prompt above half the KV
        pool would wait for itself for ever.
        """
        if (state := self._requests.get(req_id)) is not None:
            state.load_failed = True

    # -- inside ------------------------------------------------------------------------------------------------------

    def _extend(self, state: RequestState) -> None:
        """Name the chunks the request has filled since the last call."""
        hashes = state.request.block_hashes if state.request is not None else ()
        for group_id, group in self._groups.items():
            theirs, step = state.theirs.setdefault(group_id, []), group.hashes_per_chunk
            chain = state.chains.setdefault(group_id, [])
            last = len(theirs) * step + step - 1  # index of the hash that names the next chunk
            if last < len(hashes):
                fresh = [shim.make_offload_key(h, group_id) for h in islice(hashes, last, None, step)]
                named = adopt_keys(state.root, fresh)
                theirs += fresh
                chain += named
                state.ours.update(zip(fresh, named, strict=True))

    def _our_key(self, state: RequestState, key: shim.OffloadKey) -> bytes:
        """Keys that are not in the request's chains name a boundary inside a chunk: hybrid models with aligned states."""
        return state.ours.get(key) or adopt_keys(state.root, [key])[0]

    def _by_group(self, state: RequestState, keys: Iterable[shim.OffloadKey]) -> dict[int, list[bytes]]:
        """Our keys by group id, in the given order; every group is there, in the connector's order."""
        result: dict[int, list[bytes]] = {group_id: [] for group_id in self._groups}
        for key in keys:
            result[shim.get_offload_group_idx(key)].append(self._our_key(state, key))
        return result

    def _pin(self, req_id: str, state: RequestState) -> None:
        """Ask for everything cached of this request."""
        self._extend(state)
        for group_id, chain in state.chains.items():
            asked = self._cache.acquire_soon(chain, prefix=group_id not in self._windowed, use=state.use)
            state.pending.append((group_id, asked))
        state.pinned_at = self._step
        self._waiting.add(req_id)

    def _take_answers(self, state: RequestState) -> bool:
        """Note what was pinned, once everything asked for is answered. False: not yet."""
        if not all(asked.done() for _, asked in state.pending):
            return False
        for group_id, asked in state.pending:
            lease = asked.result()
            state.leases.append(lease)
            held = set(lease.keys)
            chain = zip(state.theirs[group_id], state.chains[group_id], strict=True)
            state.hits.update(key for key, ours in chain if ours in held)
        if state.pending:
            state.pinned_at, state.pending = self._step, []
        return True

    def _look_up_boundary(self, state: RequestState, key: shim.OffloadKey) -> shim.LookupResult:
        asked = state.boundaries.get(key)
        if asked is None:
            asked = state.boundaries[key] = self._cache.acquire_soon([self._our_key(state, key)], use=state.use)
        if not asked.done():
            return shim.LookupResult.RETRY
        del state.boundaries[key]
        lease = asked.result()
        if not lease.keys:
            return shim.LookupResult.MISS
        state.leases.append(lease)
        state.hits.add(key)
        return shim.LookupResult.HIT

    def _unpin(self, req_id: str, state: RequestState) -> None:
        for lease in state.leases:
            self._cache.release(lease)
        for asked in (*(asked for _, asked in state.pending), *state.boundaries.values()):
            asked.add_done_callback(partial(_release_answer, self._cache))
        state.leases, state.pending, state.boundaries = [], [], {}
        state.hits, state.pinned_at = set(), -1
        self._waiting.discard(req_id)

    def _root_of(self, salt: str | None) -> bytes:
        """Namespace root of a tenant. Every tenant's keys and quota are its own, whatever vLLM's hashes hold."""
        root = self._roots.get(salt)
        if root is None:
            assert self._namespace is not None, "bind() was not called"
            namespace = self._namespace()
            if salt is not None:
                namespace = replace(namespace, salt=f"{namespace.salt or ''}/{blake3(salt.encode()).hexdigest()}")
            if self._epoch:
                namespace = replace(namespace, weights=f"{namespace.weights}@{self._epoch}")
            if len(self._roots) >= MAX_TENANTS:
                if not self._full:
                    self._full = True
                    shim.logger.warning(
                        "kvkern: more than %d cache salts; requests with new ones are computed", MAX_TENANTS
                    )
                return b""
            root = self._roots[salt] = namespace.root
            self._cache.describe_namespace(root, namespace.public_fields())
        return root

    def _reserve(self, state: RequestState, group_id: int, wanted: list[bytes]) -> Reservation:
        if not wanted or self._is_closed(state, group_id):
            return Reservation((), (), ())
        shape = ChunkShape(state.root, group_id, self._groups[group_id].chunk_tokens, private=bool(self._epoch))
        reservation = self._cache.reserve(state.chains[group_id], wanted, shape, state.use)
        if (reservation.dropped or reservation.declined) and group_id not in self._windowed:
            state.broken.add(group_id)
        return reservation

    @staticmethod
    def _is_closed(state: RequestState, group_id: int) -> bool:
        """Whether nothing of this request and group is stored any more."""
        return not state.root or state.outdated or group_id in state.broken

    def _ticket(self, owned: Sequence[Lease] | Sequence[Reservation]) -> int:
        self._next_ticket += 1
        self._tickets[self._next_ticket] = owned
        return self._next_ticket


def _is_finished(state: RequestState) -> bool:
    return state.request is not None and state.request.is_finished()


def _release_answer(cache: ChunkCache, asked: Future[Lease]) -> None:
    cache.release(asked.result())


def metric_definitions(daemon: bool = False, remote: bool = True) -> dict[str, shim.OffloadingMetricMetadata]:
    """Prometheus counters of this adapter, beside vLLM's own for bytes and seconds.

    What a daemon counts for all its engines is its own to tell, and what no remote store can count is not shown as zero.
    """
    texts = {
        "lookup_chunks": "KV chunks asked for.",
        "hit_chunks": "Of those, chunks found.",
        "stored_chunks": "KV chunks stored.",
        "failed_chunks": "KV chunks reserved but not written by every rank.",
        "evicted_chunks": "KV chunks evicted to make room.",
        "dropped_chunks": "KV chunks not stored for want of room.",
        "declined_chunks": "KV chunks not stored since what is cached is worth more.",
        "bad_chunks": "KV chunks that failed verification and were dropped.",
        "remote_lookup_chunks": "KV chunks looked for in the remote store.",
        "remote_hit_chunks": "Of those, chunks read and verified.",
        "remote_unasked_chunks": "KV chunks not asked for: the remote store is slow to answer, or leaves others waiting.",
        "remote_gated_chunks": "KV chunks left in the remote store since computing them is faster.",
        "remote_late_chunks": "KV chunks read from the remote store when nobody waited for them any more.",
        "remote_bad_chunks": "KV chunks of the remote store that failed verification.",
        "remote_written_chunks": "KV chunks written to the remote store.",
        "remote_dropped_chunks": "KV chunks not written to the remote store: no room, or it failed.",
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
