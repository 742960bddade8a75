"""What an operator sees of a daemon at a glance: one JSON object, which the web page and `kvkern top` show.

    daemon, at     which daemon, and when
    stat           the row that answers Stat
    hour           series over the last hour, see history.py
    tenants        namespaces and their chunks, the largest first
    hot            prefixes that engines were given most often, by key
    engines        connected processes, and what they hold
    advice         what is wrong, with a remedy
    config         the settings, without secrets

It shows no content: keys, sizes and counts, and the names that engines gave. Those names are any text.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from typing import Any, Protocol

import msgspec

from ...option_values import path_text
from ...version import VERSION
from .admission import Admission
from .advice import advice
from .history import History
from .hot_prefixes import HotPrefixes
from .node_config import NodeConfig
from .operator_requests import Row
from .sessions import Session, Sessions

MAX_SHOWN = 50  # rows of each list
MAX_HOT = 12
RENDERED_S = 1.0  # for so long a rendered overview is served again


class Observed(Protocol):
    """What the overview asks of the daemon."""

    config: NodeConfig
    daemon_id: str
    admission: Admission
    sessions: Sessions | None

    @property
    def ready(self) -> bool:
        """True while engines are let in at once."""

    def stat(self) -> Row:
        """Return the row that answers Stat."""

    def namespace_chunks(self) -> Mapping[bytes, int]:
        """Return the number of cached chunks of each namespace root, as of the last count."""


class Overview:
    """Call `tick` regularly and `hot.note` for each lease. All in the daemon's thread."""

    def __init__(
        self,
        daemon: Observed,
        clock: Callable[[], float] = time.monotonic,  # seconds
    ) -> None:
        self._daemon, self._clock = daemon, clock
        self._history = History(clock())
        self._rendered, self._rendered_s = b"", float("-inf")
        self.hot = HotPrefixes(clock())

    def tick(self) -> None:
        """Take a sample when one is due."""
        now_s = self._clock()
        self.hot.turn(now_s)
        if self._history.due(now_s):
            self._history.add(now_s, self._daemon.stat())

    def render(self) -> bytes:
        """Return the overview as JSON. Everybody who asks within RENDERED_S gets the same bytes."""
        now_s = self._clock()
        if now_s - self._rendered_s >= RENDERED_S:
            self._rendered, self._rendered_s = msgspec.json.encode(self.describe()), now_s
        return self._rendered

    def describe(self) -> dict[str, Any]:
        """Return the overview."""
        daemon, stat, now_s = self._daemon, self._daemon.stat(), self._clock()
        state = daemon.sessions
        grown = self._history.grown(stat)
        geometry = None if state is None else state.arena.spec.geometry
        payload_nbytes = 0 if geometry is None else geometry.world_size * geometry.part_nbytes
        engines = [] if state is None else _engines(state.sessions.values())
        tenants = [] if state is None else self._tenants(state)
        found = advice(stat, grown, daemon.admission.max_connections, _split_models(tenants))
        return {
            "daemon": {
                "id": daemon.daemon_id, "name": daemon.config.name, "version": VERSION, "pid": os.getpid(),
                "socket": path_text(daemon.config.socket), "uptime_s": stat["uptime_s"], "ready": daemon.ready,
            },
            "at": time.time(),
            "chunk_nbytes": payload_nbytes,
            "stat": stat,
            "grown": grown,
            "hour": self._history.series(payload_nbytes, now_s),
            "tenants": tenants,
            "hot": self.hot.hottest(MAX_HOT),
            "engines": engines[:MAX_SHOWN],
            "num_engines": len(engines),
            "advice": [item.row() for item in found],
            "config": settings(daemon.config),
        }  # fmt: skip

    def _tenants(self, state: Sessions) -> list[dict[str, Any]]:
        slot_nbytes = state.arena.spec.geometry.slot_nbytes
        rows = []
        for root, chunks in heapq.nlargest(MAX_SHOWN, self._daemon.namespace_chunks().items(), key=itemgetter(1, 0)):
            info = state.namespaces.get(root)
            fields, limit = ({}, None) if info is None else (info.fields, info.limit)
            rows.append({
                "namespace": root.hex(), "fields": fields, "chunks": chunks, "nbytes": chunks * slot_nbytes,
                "limit_nbytes": None if limit is None else limit * slot_nbytes,
            })  # fmt: skip
        return rows


def _split_models(tenants: list[dict[str, Any]]) -> list[str]:
    """Return the models of namespaces that differ in the hash identity alone."""
    hashes: dict[frozenset[tuple[str, str]], set[str]] = {}
    for tenant in tenants:
        fields = dict(tenant["fields"])
        mine = fields.pop("engine_hash", "")
        if mine:
            hashes.setdefault(frozenset(fields.items()), set()).add(mine)
    return sorted({dict(fields).get("model", "a model") for fields, found in hashes.items() if len(found) > 1})


def _engines(sessions: Collection[Session]) -> list[dict[str, Any]]:
    """Return those that hold most, first. Operators, who have no name and hold nothing, are no engines."""
    found = [s for s in sessions if s.engine or s.writer or s.leases or s.granted]
    found.sort(key=lambda session: (-len(session.leases) - len(session.granted), session.number))
    return [
        {
            "pid": session.process[0], "engine": session.engine, "uid": session.uid, "stores": session.writer,
            "leases": len(session.leases), "granted_slots": len(session.granted),
        }
        for session in found
    ]  # fmt: skip


def settings(config: NodeConfig) -> dict[str, Any]:
    """Return the settings for people. A remote store is shown by its kind alone: its URL may hold a password."""
    quotas = config.quotas
    return {
        "capacity_nbytes": config.capacity_nbytes,
        "arena_dir": str(config.arena_dir),
        "policy": config.policy,
        "policy_state": path_text(config.policy_state or ""),
        "remote": "" if config.remote is None else config.remote.url.partition("://")[0],
        "persist": "" if config.remote is None else config.remote.persist,
        "drain_s": config.drain_s,
        "prefault": config.prefault,
        "allowed_uids": sorted(config.uids),
        "allowed_gids": sorted(config.gids),
        "operator_uids": sorted(config.operator_uids),
        "operator_gids": sorted(config.operator_gids),
        "quotas": dict(quotas.models),
        "tenant_quota_nbytes": quotas.tenant,
        "fair": quotas.fair,
    }
