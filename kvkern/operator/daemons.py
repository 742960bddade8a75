"""Asks cache pods for their figures: the open /metrics of each, a few at a time, and never for long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from .names import METRICS_PORT
from .observed import CachePod, Daemon

TIMEOUT_S = 3.0
AT_ONCE = 16
MAX_NBYTES = 4 << 20
MAX_FIGURE = float(1 << 53)


async def ask_daemons(pods: Iterable[CachePod]) -> dict[str, Daemon]:
    """Return what those daemons say that answer, by the name of their pod."""
    places = asyncio.Semaphore(AT_ONCE)

    async def ask(client: httpx.AsyncClient, pod: CachePod) -> tuple[str, Daemon | None]:
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        async with places:
            try:
                async with (
                    asyncio.timeout(TIMEOUT_S),
                    client.stream("GET", f"http://{host}:{METRICS_PORT}/metrics") as answer,
                ):
                    text = b""
                    async for piece in answer.aiter_bytes():
                        text += piece
                        if len(text) > MAX_NBYTES:
                            return pod.name, None
                return pod.name, read_metrics(text.decode("utf-8", "replace")) if answer.is_success else None
            except (httpx.HTTPError, OSError, TimeoutError, ValueError):
                return pod.name, None

    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        found = await asyncio.gather(*(ask(client, pod) for pod in pods if pod.ip and pod.ready))
    return {name: daemon for name, daemon in found if daemon is not None}


def read_metrics(text: str) -> Daemon:
    """Return what a daemon's metrics say. Raises ValueError if they are none."""
    values: dict[str, float] = {}
    free = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("tier", "dram") == "dram":
                values[sample.name] = values.get(sample.name, 0.0) + _bounded(sample.value)
            if sample.name == "kvkern_arena_slots" and sample.labels.get("state") == "free":
                free = _bounded(sample.value)
    slots = values.get("kvkern_arena_slots", 0.0)
    slot_nbytes, asked = values.get("kvkern_slot_bytes", 0), values.get("kvkern_capacity_bytes", 0)
    arena = slots * slot_nbytes
    return Daemon(
        capacity_nbytes=int(asked if arena <= asked < arena + slot_nbytes or not slots else arena),
        asked_nbytes=int(asked),
        used_nbytes=int((slots - free) * slot_nbytes),
        lookups=values.get("kvkern_lookup_chunks_total", 0.0),
        hits=values.get("kvkern_hit_chunks_total", 0.0),
    )


def _bounded(value: float) -> float:
    """Return a number that a status can hold: whatever answers on that port, it is no reason to fail."""
    return value if 0 <= value <= MAX_FIGURE else 0.0
