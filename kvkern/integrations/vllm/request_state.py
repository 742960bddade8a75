"""What the manager knows of a live request and of a KV group. Plain data."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from msgspec.structs import replace

from ...policy.base import Use
from ...tiers.base import Lease
from . import shim
from .adapter_digest import AdapterUse


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
    named: bool = True  # False: vLLM's hashes do not name what the request computes, so it is not cached
    adapter: AdapterUse | None = None  # LoRA: what the root names
    has_loaded: bool = False  # chunks were loaded under the root
    has_stored: bool = False
    offload_keys: dict[int, list[shim.OffloadKey]] = field(default_factory=dict)  # vLLM's keys
    chains: dict[int, list[bytes]] = field(default_factory=dict)  # chunk keys, parallel to `offload_keys`
    key_of: dict[shim.OffloadKey, bytes] = field(default_factory=dict)  # vLLM's key -> chunk key
    end_of: dict[shim.OffloadKey, int] = field(default_factory=dict)  # vLLM's key -> tokens at whose end the chunk ends
    leases: list[Lease] = field(default_factory=list)
    hits: set[shim.OffloadKey] = field(default_factory=set)  # chunks under `leases`
    asked: set[shim.OffloadKey] = field(default_factory=set)  # chunks that vLLM has asked for since the last acquire
    pending_lookups: list[tuple[int, Future[Lease]]] = field(default_factory=list)  # (group, lease to come)
    boundary_lookups: dict[shim.OffloadKey, Future[Lease]] = field(default_factory=dict)  # chunks outside the chains
    pinned_at_step: int = -1  # -1: not looked up
    store_waits: int = 0
    engine_tokens: int = 0  # that vLLM's own cache gave it when it was last about to be scheduled
    found_tokens: int = 0  # that vLLM is to load for it, as of the same time
    scheduled: bool = False
    counted: bool = False  # its tokens are counted as looked up
    # False: the client's `kv_load_tiers` exclude this host's memory, through which every load goes, or all must be computed
    may_load: bool = True
    may_ask_store: bool = True  # False: they exclude remote stores
    predates_reset: bool = False  # was alive when the cache was reset
    load_failed: bool = False  # the request is computed without loading; see KvkernManager.note_failed_load
    broken_groups: set[int] = field(
        default_factory=set
    )  # a chunk of the group is not stored: later ones are unreachable

    @property
    def is_finished(self) -> bool:
        """True once vLLM has ended the request."""
        return self.request is not None and self.request.is_finished()

    def pins_expired(self, step: int) -> bool:
        """Return True if the pins were taken before this step and not used. While an answer is due, pins do not expire."""
        return not self.pending_lookups and not self.boundary_lookups and self.pinned_at_step < step

    def lookup_use(self, group_id: int) -> Use:
        """Return what a lookup tells the cache. Without a namespace no remote store is asked. LookupCounts counts it."""
        namespace = self.use.namespace if self.may_ask_store else b""
        return replace(self.use, counts_itself=True, namespace=namespace, counts_tokens=not group_id)

    def end_of_boundary(self, key: shim.OffloadKey, tokens_per_hash: int) -> int:
        """Return the tokens at whose end a boundary inside a chunk lies. 0: the request has no such hash."""
        hashes = self.request.block_hashes if self.request is not None else ()
        name = key[: -len(shim.make_offload_key(b"", 0))]
        return (hashes.index(name) + 1) * tokens_per_hash if name in hashes else 0
