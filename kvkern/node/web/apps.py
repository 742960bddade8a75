"""What each HTTP port answers. Every handler runs in the daemon's thread and changes nothing. What takes long is rationed.

both       /healthz /livez /readyz       open: which daemon this is, and whether it lets engines in
--rpc      /v1/stat /v1/chunks           private: what `kvkern stat` and `kvkern ls` print
--metrics  /metrics                      open without a token: text for Prometheus
           / /events /v1/overview        private: the page, its events, and the same as JSON
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ...option_values import path_text
from ...version import VERSION
from ..daemon.overview import Observed, Overview
from ..protocol import MAX_ROWS
from .access import Access
from .chunk_scan import Busy, ChunkScan
from .endpoint import Endpoint
from .events import Events
from .page import login_page, page

HEALTH = ("/healthz", "/livez", "/readyz")
RENDER_SHARE = 10  # the text for Prometheus is rendered anew when it is that many times older than it took to render


class Asked(Observed, Protocol):
    """What the handlers ask of the daemon."""

    overview: Overview


def rpc_app(daemon: Asked, endpoint: Endpoint) -> ASGIApp:
    """Return the app of --rpc."""
    scan = ChunkScan(daemon)

    async def stat(_: Request) -> Response:
        return _json(daemon.stat())

    async def chunks(request: Request) -> Response:
        prefix, limit = request.query_params.get("prefix", ""), request.query_params.get("limit", "100")
        if not re.fullmatch("(?:[0-9a-fA-F]{2}){0,32}", prefix):
            return _error(f"prefix is {prefix[:80]!r}; expected up to 64 hex digits, an even number")
        if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= MAX_ROWS:
            return _error(f"limit is {limit[:80]!r}; it must lie in 1..{MAX_ROWS}")
        try:
            return _json(await scan.rows(bytes.fromhex(prefix), int(limit)))
        except Busy:
            return _error("another request looks for chunks; ask again in a second", 503, {"retry-after": "1"})

    routes = [*_health(daemon), Route("/v1/stat", stat), Route("/v1/chunks", chunks)]
    access = Middleware(Access, endpoint=endpoint, open_paths=frozenset(HEALTH), login={})
    return Starlette(routes=routes, middleware=[access])


def metrics_app(
    daemon: Asked,
    endpoint: Endpoint,
    events: Events,
    text: Callable[[], bytes],  # renders the metrics, in Prometheus' text format
) -> ASGIApp:
    """Return the app of --metrics."""
    rendered = _Rendered(text)

    async def metrics(_: Request) -> Response:
        return Response(rendered.get(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def overview(_: Request) -> Response:
        return Response(daemon.overview.render(), media_type="application/json")

    async def index(_: Request) -> Response:
        return page()

    routes = [
        *_health(daemon), Route("/metrics", metrics), Route("/", index), Route("/v1/overview", overview),
        Route("/events", events),
    ]  # fmt: skip
    open_paths = frozenset(HEALTH if endpoint.token else (*HEALTH, "/metrics"))
    access = Middleware(Access, endpoint=endpoint, open_paths=open_paths, login={"/": login_page()})
    return Starlette(routes=routes, middleware=[access])


def _health(daemon: Asked) -> list[Route]:
    def answer(status: int) -> Response:
        config = daemon.config
        who = {
            "daemon": daemon.daemon_id, "pid": os.getpid(), "name": config.name, "version": VERSION,
            "socket": path_text(config.socket), "ready": daemon.ready,
        }  # fmt: skip
        return _json(who, status)

    async def alive(_: Request) -> Response:
        return answer(200)

    async def ready(_: Request) -> Response:
        return answer(200 if daemon.ready else 503)

    return [Route("/healthz", alive), Route("/livez", alive), Route("/readyz", ready)]


class _Rendered:
    """Text that takes long to render, so it is served again for a while: rendering takes a tenth of the thread at most."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._text, self._until_s = b"", 0.0

    def get(self) -> bytes:
        """Return the text."""
        began_s = time.monotonic()
        if began_s >= self._until_s:
            self._text = self._render()
            ended_s = time.monotonic()
            self._until_s = ended_s + RENDER_SHARE * (ended_s - began_s)
        return self._text


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", status, headers, media_type="application/json")


def _error(text: str, status: int = 400, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": text}, status, headers)
