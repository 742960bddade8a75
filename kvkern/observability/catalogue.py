"""Every metric that kvkern exports: name, type, unit, labels, buckets, help. Knows no exporter.

    daemon      kvkern_NAME, at /metrics of `kvkern serve --metrics`
    engine      kvkern:NAME, at vLLM's own /metrics, which adds the labels model_name and engine
    published   NAME as it is, from an engine that is started by the variables of the published deployment

A counter's name ends with _total in both. docs/metrics.md is this table; docs/list_metrics.py writes it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

Labels = tuple[str, ...]


class Kind(enum.Enum):
    """The types of Prometheus that kvkern uses."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Needs(enum.Enum):
    """What an engine must have to export a metric. It exports no series that would stay at zero for ever."""

    NOTHING = "every engine"
    OWN_CACHE = "no daemon"
    OWN_REMOTE = "no daemon, and a remote store"
    DAEMON = "a daemon"


def _decades(first: int, last: int, steps: Labels = ("1", "2.5", "5")) -> tuple[float, ...]:
    """Return bounds 1, 2.5, 5 times each power of ten from 10**first on, and 10**last."""
    return (*(float(f"{step}e{power}") for power in range(first, last) for step in steps), float(f"1e{last}"))


SECONDS = _decades(-6, 1)  # 1 us to 10 s
STEP_SECONDS = _decades(-3, 2)  # 1 ms to 100 s
BYTES_PER_SECOND = _decades(7, 12)  # 10 MB/s to 1 TB/s
TOKENS = tuple(float(2**power) for power in range(4, 18))  # 16 to 131,072

# The values of labels that have a fixed set of them. Series with such labels exist from the start, with the value 0.
VALUES: dict[str, Labels] = {
    "tier": ("vllm", "dram", "remote"),
    "op": ("exists", "get", "put", "delete"),
    "state": ("free", "ready", "writing"),
    "loaded": ("yes", "no"),
}
MAX_MODELS, MAX_TENANTS = 16, 32  # values of the labels model and tenant; the others count as OTHER
OTHER = "other"
REASONS = {  # why chunks or a request were not loaded
    "not_found": "no tier has them",
    "declined": "they were not stored: every cached chunk was worth more",
    "dropped": "they were not stored: there was no room",
    "gated": "the remote store has them, and computing them is faster than reading them",
    "late": "they had not come from the remote store when the request stopped waiting",
    "unasked": "the remote store was not asked: it is slow, or keeps other requests waiting",
    "store_failed": "the remote store fails",
    "failed_verification": "their checksum or header was wrong",
    "no_daemon": "the engine is not connected to its daemon",
    "not_used": "they were found, and vLLM took the tokens from elsewhere or computed them",
}


@dataclass(frozen=True)
class Metric:
    """One metric. Its labels are those of each exporter; None: that one does not export it."""

    name: str
    kind: Kind
    unit: str
    help: str
    daemon: Labels | None = None
    engine: Labels | None = None
    buckets: tuple[float, ...] = ()
    needs: Needs = Needs.NOTHING
    values: tuple[tuple[str, Labels], ...] = ()  # label -> its values here, if they are not those of VALUES
    all_tiers: bool = False  # an engine counts the tiers that `values` leaves out too
    published: bool = False

    @property
    def daemon_name(self) -> str:
        """The name in the daemon's text."""
        return f"kvkern_{self.name}{self._ending}"

    @property
    def engine_name(self) -> str:
        """The name in vLLM's text."""
        return f"{self.vllm_name}{self._ending}"

    @property
    def vllm_name(self) -> str:
        """The name that vLLM is given; it appends the ending itself."""
        return self.name if self.published else f"kvkern:{self.name}"

    @property
    def _ending(self) -> str:
        return "_total" if self.kind is Kind.COUNTER else ""

    def values_of(self, label: str, engine: bool = False) -> Labels | None:
        """Return the values that a label may have at this exporter; None: they are not known before."""
        own = {} if engine and self.all_tiers else dict(self.values)
        return own.get(label, VALUES.get(label))


def _reasons(*names: str) -> tuple[tuple[str, Labels], ...]:
    return (("reason", names),)


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_TM = ("tier", "model")
_CACHED = (("tier", ("dram", "remote")),)
_STORE_OP = Needs.OWN_REMOTE

CATALOGUE: tuple[Metric, ...] = (
    # -- what is looked up, hit, loaded and stored ------------------------------------------------------------------
    Metric("lookup_chunks", _C, "chunks", "Chunks looked up. A request counts once, however long it waits. Of the tier "
           "remote: those that DRAM lacked.", daemon=_TM, engine=(), values=_CACHED),
    Metric("hit_chunks", _C, "chunks", "Of those, chunks found: in a daemon pinned for an engine or read from the store, in "
           "an engine loaded and verified.", daemon=_TM, engine=(), values=_CACHED),
    Metric("lookup_tokens", _C, "tokens", "Tokens looked up. Of the tier vllm: all tokens of scheduled prompts; of dram: "
           "those that vLLM's own cache lacked.", daemon=_TM, engine=("tier",), values=_CACHED,
           all_tiers=True),
    Metric("hit_tokens", _C, "tokens", "Of those, tokens found; in an engine loaded and verified.", daemon=_TM,
           engine=("tier",), values=_CACHED, all_tiers=True),
    Metric("hit_bytes", _C, "bytes", "Bytes of the slots of the chunks that were found.", daemon=_TM, values=_CACHED),
    Metric("loaded_tokens", _C, "tokens", "Tokens loaded into the engine's KV cache and verified.", engine=()),
    Metric("loaded_bytes", _C, "bytes", "Bytes that all workers have copied from slots to the engine's blocks.", engine=()),
    Metric("stored_chunks", _C, "chunks", "Chunks stored: published in DRAM, or confirmed by the remote store.", daemon=_TM,
           engine=(), values=_CACHED),
    Metric("stored_tokens", _C, "tokens", "Tokens of the chunks stored.", daemon=_TM, engine=(), values=_CACHED),
    Metric("stored_bytes", _C, "bytes", "Bytes stored: in a daemon of the slots, in an engine those that all workers have "
           "copied from blocks to slots.", daemon=_TM, engine=(), values=_CACHED),
    Metric("prefill_seconds_avoided", _C, "seconds", "Seconds of prefill that loads have saved: tokens loaded over the "
           "engine's measured prefill speed. A daemon does not know which chunks are used.", engine=()),
    Metric("prefill_tokens_per_second", _G, "tokens/s", "Measured prefill speed. Of a daemon: the median over its engines. "
           "0: not known yet.", daemon=("model",), engine=()),
    Metric("first_token_seconds", _H, "seconds", "From a request's arrival at the scheduler to its first token, of requests "
           "with and without chunks loaded from kvkern.", engine=("loaded",), buckets=STEP_SECONDS),
    Metric("requests", _C, "requests", "Requests that were scheduled, with and without chunks loaded from kvkern.",
           engine=("loaded",)),
    # -- why not ----------------------------------------------------------------------------------------------------
    Metric("not_loaded_chunks", _C, "chunks", "Chunks that were looked up and not given to the request, by reason.",
           daemon=("reason",),
           values=_reasons("not_found", "gated", "late", "unasked", "store_failed", "failed_verification")),
    Metric("not_loaded_requests", _C, "requests", "Requests that were scheduled without the whole of what they asked for, "
           "by the reason of the first missing chunk.", engine=("reason",), values=_reasons(*REASONS)),
    Metric("failed_chunks", _C, "chunks", "Chunks reserved and not published: a rank did not write them, or the daemon or the "
           "chunks' namespace went away meanwhile.", daemon=(), engine=()),
    Metric("duplicate_chunks", _C, "chunks", "Chunks reserved and not published, because another writer had published them by "
           "then. No fault: two requests have computed the same tokens.", daemon=(), engine=()),
    Metric("dropped_chunks", _C, "chunks", "Chunks not stored because there was no room. Of the tier remote: it has no "
           "room, too many chunks wait, or a write failed.", daemon=("tier",), engine=(), values=_CACHED),
    Metric("declined_chunks", _C, "chunks", "Chunks not stored because every cached chunk is worth more.", engine=(),
           needs=Needs.OWN_CACHE),
    Metric("ungranted_slots", _C, "slots", "Slots that engines asked for and did not get, because their share is used up.",
           daemon=()),
    Metric("evicted_chunks", _C, "chunks", "Chunks evicted: to make room (capacity), or because their namespace was above "
           "its quota.", daemon=("reason",), engine=(), needs=Needs.OWN_CACHE, values=_reasons("capacity", "quota")),
    Metric("cleared_chunks", _C, "chunks", "Chunks forgotten because an operator or an engine asked for it.", daemon=()),
    Metric("bad_chunks", _C, "chunks", "Chunks that failed verification and were dropped.", daemon=("tier",), engine=(),
           values=_CACHED),
    Metric("faults", _C, "faults", "Faults in the cache that were answered as a miss.", daemon=(), engine=()),
    # -- how long -----------------------------------------------------------------------------------------------------
    Metric("lookup_seconds", _H, "seconds", "Time to look up a sequence in the index and pin what is there.", daemon=(),
           buckets=SECONDS),
    Metric("acquire_seconds", _H, "seconds", "From the question for a sequence to its lease. Includes the wait for a remote "
           "store, and in an engine the way to the daemon and back.", daemon=(), engine=(), buckets=SECONDS),
    Metric("publish_seconds", _H, "seconds", "Time to publish the chunks of one store.", daemon=(), engine=(),
           buckets=SECONDS),
    Metric("update_seconds", _H, "seconds", "From the reservation of a store's slots to its publication, the copy included.",
           engine=(), buckets=SECONDS),
    Metric("update_tokens", _H, "tokens", "Tokens of one store.", engine=(), buckets=TOKENS),
    Metric("load_seconds", _H, "seconds", "Time of one load in one worker, verification included.", engine=(),
           buckets=SECONDS),
    Metric("store_seconds", _H, "seconds", "Time of one store in one worker, checksums included.", engine=(),
           buckets=SECONDS),
    Metric("load_bytes_per_second", _H, "bytes/s", "Speed of one load in one worker.", engine=(), buckets=BYTES_PER_SECOND),
    Metric("store_bytes_per_second", _H, "bytes/s", "Speed of one store in one worker.", engine=(), buckets=BYTES_PER_SECOND),
    # -- the remote store ---------------------------------------------------------------------------------------------
    Metric("remote_seconds", _H, "seconds", "Time of one call to the remote store.", daemon=("op",), engine=("op",),
           buckets=SECONDS, needs=_STORE_OP),
    Metric("remote_bytes", _C, "bytes", "Bytes read from the remote store, and bytes that it confirmed.", daemon=("op",),
           engine=("op",), needs=_STORE_OP, values=(("op", ("get", "put")),)),
    Metric("remote_bytes_per_second", _H, "bytes/s", "Speed of one call to the remote store that moved bytes.",
           daemon=("op",), engine=("op",), buckets=BYTES_PER_SECOND, needs=_STORE_OP, values=(("op", ("get", "put")),)),
    Metric("remote_failures", _C, "calls", "Calls to the remote store that failed.", daemon=(), engine=(), needs=_STORE_OP),
    Metric("remote_works", _G, "0 or 1", "1 while the remote store is used; 0 while its breaker is open because it fails.",
           daemon=(), engine=(), needs=_STORE_OP),
    Metric("remote_queue_chunks", _G, "chunks", "Chunks that wait to be written to the remote store.", daemon=(), engine=(),
           needs=_STORE_OP),
    Metric("remote_waiting_requests", _G, "requests", "Requests that wait for the remote store.", daemon=(), engine=(),
           needs=_STORE_OP),
    Metric("remote_lookup_chunks", _C, "chunks", "Chunks looked for in the remote store.", engine=(), needs=_STORE_OP),
    Metric("remote_hit_chunks", _C, "chunks", "Of those, chunks read and verified.", engine=(), needs=_STORE_OP),
    Metric("remote_unasked_chunks", _C, "chunks", "Chunks not asked for: the remote store is slow, or keeps other requests "
           "waiting.", engine=(), needs=_STORE_OP),
    Metric("remote_gated_chunks", _C, "chunks", "Chunks not read from the remote store because computing them is faster.",
           engine=(), needs=_STORE_OP),
    Metric("remote_late_chunks", _C, "chunks", "Chunks read from the remote store after their request had stopped waiting.",
           engine=(), needs=_STORE_OP),
    Metric("remote_bad_chunks", _C, "chunks", "Chunks of the remote store that failed verification.", engine=(),
           needs=_STORE_OP),
    Metric("remote_written_chunks", _C, "chunks", "Chunks written to the remote store.", engine=(), needs=_STORE_OP),
    Metric("remote_dropped_chunks", _C, "chunks", "Chunks not written to the remote store: it has no room, or it failed.",
           engine=(), needs=_STORE_OP),
    # -- what is held -------------------------------------------------------------------------------------------------
    Metric("arena_slots", _G, "slots", "Slots of the arena by state. Granted slots count as writing.", daemon=("state",),
           engine=("state",), needs=Needs.OWN_CACHE),
    Metric("slot_bytes", _G, "bytes", "Size of a slot, header included. 0: there is no arena yet.", daemon=()),
    Metric("arena_bytes", _G, "bytes", "Memory that the arena's file takes now.", daemon=()),
    Metric("capacity_bytes", _G, "bytes", "Memory that the arena may take.", daemon=()),
    Metric("tenant_chunks", _G, "chunks", "Cached chunks by model and tenant (a digest of its salt; shared: no salt).",
           daemon=("model", "tenant")),
    Metric("leases", _G, "leases", "Leases that engines hold.", daemon=()),
    Metric("granted_slots", _G, "slots", "Slots that engines may write.", daemon=()),
    Metric("quarantined_leases", _G, "leases", "Leases of processes that are gone, until nobody can read their slots.",
           daemon=()),
    Metric("quarantined_slots", _G, "slots", "Granted slots of processes that are gone, until nobody can write them.",
           daemon=()),
    Metric("waiting_acquires", _G, "requests", "Questions of engines that wait for the remote store.", daemon=()),
    Metric("connections", _G, "connections", "Open connections to the daemon's socket.", daemon=()),
    Metric("sessions", _G, "sessions", "Processes of engines that use the arena.", daemon=()),
    Metric("namespaces", _G, "namespaces", "Namespaces that engines have described.", daemon=()),
    Metric("bad_frames", _C, "frames", "Frames that broke the protocol; each ended a connection.", daemon=()),
    Metric("start_time_seconds", _G, "Unix time", "When the daemon started.", daemon=()),
    Metric("build_info", _G, "1", "The daemon's version, policy and name.", daemon=("version", "policy", "name")),
    Metric("connected", _G, "0 or 1", "1 while the engine is connected to its daemon; without it every lookup is a miss.",
           engine=(), needs=Needs.DAEMON),
)  # fmt: skip

_LATENCY = _decades(-5, 1)  # finer than the published 10 ms to 2.5 s, which hides what a cache in memory does


def _published(name: str, kind: Kind, unit: str, text: str, buckets: tuple[float, ...] = ()) -> Metric:
    return Metric(f"vllm:cache_service_{name}", kind, unit, text, engine=(), buckets=buckets, published=True)


PUBLISHED: tuple[Metric, ...] = (
    _published("tokens_hit_rate", _G, "0 to 1", "Hit tokens over looked-up tokens, since the start."),
    _published("blocks_hit_rate", _G, "0 to 1", "Hit chunks over looked-up chunks, since the start."),
    _published("hit_tokens", _G, "tokens", "Tokens loaded, since the start."),
    _published("total_tokens", _G, "tokens", "Tokens looked up, since the start."),
    _published("hit_blocks", _G, "chunks", "Chunks loaded, since the start."),
    _published("total_blocks", _G, "chunks", "Chunks looked up, since the start."),
    _published("err_query", _G, "errors", "Lookups that failed, and loads that failed verification."),
    _published("err_async_update_task_queue_full", _G, "chunks", "Chunks not stored because there was no room."),
    _published("err_update", _G, "chunks", "Chunks reserved and not published, other than those that another writer published "
               "first."),
    _published("time_query_seconds", _H, "seconds", "From the question for a sequence to its lease.", _LATENCY),
    _published("time_load_seconds", _H, "seconds", "Time of one load in one worker.", _LATENCY),
    _published("time_unload_seconds", _H, "seconds", "Time of one store in one worker.", _LATENCY),
    _published("time_update_seconds", _H, "seconds", "Time of one store: copy and publication.", _LATENCY),
    _published("time_reshape_seconds", _H, "seconds", "Never observed: kvkern copies pages as they are.", _LATENCY),
    _published("time_async_update_queue_seconds", _H, "seconds", "Never observed: no store waits in a queue.", _LATENCY),
    _published("time_async_update_exec_seconds", _H, "seconds", "Time of one store in one worker.", _LATENCY),
    _published("counter_async_update_updated_seconds", _H, "tokens", "Tokens of one store. The published name says seconds.",
               TOKENS),
)  # fmt: skip


def by_name(metrics: tuple[Metric, ...] = CATALOGUE) -> dict[str, Metric]:
    """Return the metrics by their name."""
    return {metric.name: metric for metric in metrics}


def series_known_before(metric: Metric, labels: Labels, engine: bool = False) -> Iterator[Labels]:
    """Yield the label values of series that exist from the start: all of a metric whose labels have fixed values."""
    known = [metric.values_of(label, engine) for label in labels]
    combined: list[Labels] = [()]
    for values in known:
        combined = [(*before, value) for before in combined for value in values or ()]
    yield from combined
