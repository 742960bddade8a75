"""Writes dashboard.json for Grafana, from the panels below: python deploy/observability/write_dashboard.py

The first row is the published deployment's, with its titles and legends. It needs the engines' option `published_metrics`.
Names that begin with kvkern: come from engines, names that begin with kvkern_ from daemons.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("dashboard.json")
MODEL = 'model_name=~"$model_name"'
WIDTH, HEIGHT, PER_ROW = 8, 8, 3


@dataclass(frozen=True)
class Panel:
    """One panel of lines."""

    title: str
    description: str
    unit: str  # of Grafana
    lines: dict[str, str]  # legend -> query
    stacked: bool = False


def rate(name: str, *matchers: str) -> str:
    """Return the increase per second, added up over all processes."""
    return f"sum(rate({name}{{{', '.join(matchers)}}}[$__rate_interval]))"


def quantiles(name: str, *matchers: str) -> dict[str, str]:
    """Return the published quantiles of a histogram."""
    inner = f"sum by (le) (rate({name}_bucket{{{', '.join(matchers)}}}[$__rate_interval]))"
    return {f"P{round(100 * q)}": f"histogram_quantile({q}, {inner})" for q in (0.99, 0.9, 0.5)}


def ratio(hits: str, lookups: str) -> str:
    """Return a share; no data while nothing is looked up."""
    return f"{hits} / {lookups}"


def by_label(name: str, label: str, *matchers: str) -> dict[str, str]:
    """Return one line for each value of a label."""
    return {f"{{{{{label}}}}}": f"sum by ({label}) (rate({name}{{{', '.join(matchers)}}}[$__rate_interval]))"}


def first_token(loaded: str, name: str) -> dict[str, str]:
    """Return quantiles of the time to the first token."""
    lines = quantiles("kvkern:first_token_seconds", MODEL, f'loaded="{loaded}"')
    return {f"{name} {quantile}": lines[quantile] for quantile in ("P99", "P50")}


_S = "vllm:cache_service"
_TENANT_BYTES = "sum by (model, tenant) (kvkern_tenant_chunks * on (instance) group_left () kvkern_slot_bytes)"

ROWS: dict[str, list[Panel]] = {
    "External KV Cache Service": [
        Panel("Hit Rate", "Share of what engines looked up and loaded, since they started.", "percentunit", {
            "Tokens": f"avg({_S}_tokens_hit_rate{{{MODEL}}})", "Blocks": f"avg({_S}_blocks_hit_rate{{{MODEL}}})"}),
        Panel("Hit Tokens & Blocks", "What engines have loaded, since they started.", "short", {
            "Tokens": f"sum({_S}_hit_tokens{{{MODEL}}})", "Blocks": f"sum({_S}_hit_blocks{{{MODEL}}})"}),
        Panel("Total Tokens & Blocks", "What engines have looked up, since they started.", "short", {
            "Tokens": f"sum({_S}_total_tokens{{{MODEL}}})", "Blocks": f"sum({_S}_total_blocks{{{MODEL}}})"}),
        Panel("Query Latency", "From the question for a prompt to its answer.", "s",
              quantiles(f"{_S}_time_query_seconds", MODEL)),
        Panel("Update Latency", "From the reservation of a store to its publication.", "s",
              quantiles(f"{_S}_time_update_seconds", MODEL)),
        Panel("Error", "Failed lookups and loads, chunks not written, and chunks without room. Since the start.", "short", {
            "Query": f"sum({_S}_err_query{{{MODEL}}})", "Update": f"sum({_S}_err_update{{{MODEL}}})",
            "Update QFull": f"sum({_S}_err_async_update_task_queue_full{{{MODEL}}})"}),
    ],
    "What kvkern saves": [
        Panel("Hit ratio by tier", "Tokens found, of those looked up: in vLLM's own cache, then in kvkern's DRAM. Remote: "
              "chunks read from the store, of those that DRAM lacked.", "percentunit", {
            "vLLM": ratio(rate("kvkern:hit_tokens_total", MODEL, 'tier="vllm"'),
                          rate("kvkern:lookup_tokens_total", MODEL, 'tier="vllm"')),
            "DRAM": ratio(rate("kvkern:hit_tokens_total", MODEL, 'tier="dram"'),
                          rate("kvkern:lookup_tokens_total", MODEL, 'tier="dram"')),
            "Remote": ratio(rate("kvkern_hit_chunks_total", 'tier="remote"'),
                            rate("kvkern_lookup_chunks_total", 'tier="remote"'))}),
        Panel("Time to first token", "From a request's arrival at the scheduler to its first token, with and without chunks "
              "loaded from kvkern.", "s", {**first_token("yes", "Hit"), **first_token("no", "No hit")}),
        Panel("Prefill seconds avoided", "Seconds of prefill saved per second: 1 is one engine's worth.", "short", {
            "All engines": rate("kvkern:prefill_seconds_avoided_total", MODEL)}),
    ],
    "Bytes and time": [
        Panel("Bytes moved", "Copied between engines and DRAM by all workers, and between DRAM and the remote store.", "Bps", {
            "Loaded": rate("kvkern:loaded_bytes_total", MODEL), "Stored": rate("kvkern:stored_bytes_total", MODEL),
            "Remote read": rate("kvkern_remote_bytes_total", 'op="get"'),
            "Remote written": rate("kvkern_remote_bytes_total", 'op="put"')}),
        Panel("Speed of one transfer", "Median speed of one load or store in one worker.", "Bps", {
            name: quantiles(f"kvkern:{kind}_bytes_per_second", MODEL)["P50"]
            for name, kind in (("Load", "load"), ("Store", "store"))}),
        Panel("Wait for the cache", "How long an engine waits for a lookup, and what a daemon takes for it.", "s", {
            **{f"Engine {q}": line for q, line in quantiles("kvkern:acquire_seconds", MODEL).items() if q != "P90"},
            **{f"Daemon {q}": line for q, line in quantiles("kvkern_acquire_seconds").items() if q != "P90"}}),
    ],
    "What is kept, and what is not": [
        Panel("Occupancy by tenant", "Memory of the cached chunks of each model and tenant.", "bytes",
              {"{{model}} {{tenant}}": _TENANT_BYTES}, stacked=True),
        Panel("Slots of the arena", "Free, holding a chunk, and granted to engines or being written.", "short",
              {"{{state}}": "sum by (state) (kvkern_arena_slots)"}, stacked=True),
        Panel("Chunks that came and went", "Stored, evicted to make room, not stored for want of room, and cleared.", "short", {
            "Stored": rate("kvkern_stored_chunks_total", 'tier="dram"'), "Evicted": rate("kvkern_evicted_chunks_total"),
            "Dropped": rate("kvkern:dropped_chunks_total", MODEL), "Cleared": rate("kvkern_cleared_chunks_total")}),
    ],
    "Why not": [
        Panel("Requests that loaded nothing", "By the reason for the first chunk that they asked for.", "short",
              by_label("kvkern:not_loaded_requests_total", "reason", MODEL), stacked=True),
        Panel("Chunks that were not given", "By reason, as the daemons count them.", "short",
              by_label("kvkern_not_loaded_chunks_total", "reason"), stacked=True),
        Panel("Broken chunks and faults", "Chunks that failed verification, and faults that became misses. See the alerts.",
              "short", {
            "Broken, DRAM": rate("kvkern_bad_chunks_total", 'tier="dram"'),
            "Broken, remote": rate("kvkern_bad_chunks_total", 'tier="remote"'),
            "Faults, engines": rate("kvkern:faults_total", MODEL), "Faults, daemons": rate("kvkern_faults_total")}),
    ],
    "Remote store and node": [
        Panel("Remote store", "1 while the store is used, 0 while its breaker is open. Failed calls per second.", "short", {
            "Works": "min(kvkern_remote_works)", "Failures": rate("kvkern_remote_failures_total")}),
        Panel("Remote calls", "How long one call in a hundred takes at least.", "s", {
            op: quantiles("kvkern_remote_seconds", f'op="{op}"')["P99"] for op in ("exists", "get", "put")}),
        Panel("Queues and holds", "What waits for the remote store, and what engines hold.", "short", {
            "Waiting requests": "sum(kvkern_remote_waiting_requests)", "Waiting writes": "sum(kvkern_remote_queue_chunks)",
            "Leases": "sum(kvkern_leases)", "Granted slots": "sum(kvkern_granted_slots)",
            "Quarantined slots": "sum(kvkern_quarantined_slots)"}),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "id": len(panels) + 1, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH * PER_ROW, "h": 1}})  # fmt: skip
        y += 1
        for index, panel in enumerate(row):
            at = {"x": WIDTH * (index % PER_ROW), "y": y + HEIGHT * (index // PER_ROW), "w": WIDTH, "h": HEIGHT}
            panels.append(_timeseries(panel, len(panels) + 1, at))
        y += HEIGHT * -(-len(row) // PER_ROW)
    return {
        "title": "kvkern",
        "uid": "kvkern",
        "description": "KV caches of LLM engines: what they save, what they keep, and why not.",
        "tags": ["kvkern", "vllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _model_variable()]},
        "panels": panels,
    }


def _timeseries(panel: Panel, number: int, at: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"lineWidth": 2, "fillOpacity": 30 if panel.stacked else 0, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.unit == "percentunit":
        defaults["max"] = 1
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "gridPos": at,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.lines.items())
        ],
    }


_SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


def _source_variable() -> dict[str, Any]:
    return {"name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _model_variable() -> dict[str, Any]:
    query = "label_values(kvkern:lookup_chunks_total, model_name)"
    return {
        "name": "model_name", "label": "Model", "type": "query", "datasource": _SOURCE, "query": query, "definition": query,
        "refresh": 2, "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
