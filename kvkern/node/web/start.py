"""Starts HTTP in a daemon that is told to serve it. A daemon that is not loads no web framework."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol

from ...observability.exposition import ExposedDaemon, daemon_text
from .endpoint import MAX_CONNECTIONS, Endpoint

if TYPE_CHECKING:
    from .apps import Asked

    class Served(Asked, ExposedDaemon, Protocol):
        """A daemon that HTTP can show."""


def http_files(*endpoints: Endpoint | None) -> int:
    """Return how many files HTTP may have open: its connections and the listening sockets."""
    return sum(MAX_CONNECTIONS + 1 for endpoint in endpoints if endpoint is not None)


@contextlib.asynccontextmanager
async def serving_http(daemon: Served) -> AsyncIterator[list[Endpoint]]:
    """Answer HTTP while the context is open. Gives the endpoints with their ports. Raises ConfigError if one is taken."""
    metrics, rpc = daemon.config.metrics, daemon.config.rpc
    if metrics is None and rpc is None:
        yield []
        return
    from .http_server import serving

    async with serving(daemon, metrics, rpc, lambda: daemon_text(daemon)) as opened:
        yield opened
