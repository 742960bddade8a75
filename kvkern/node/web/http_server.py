"""Opens the HTTP ports of a daemon, and closes them. They run in the daemon's own thread.

uvicorn parses HTTP and runs the apps; it takes no signals, makes no sockets and writes no log of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from starlette.types import ASGIApp
from uvicorn.config import Config

from ...errors import ConfigError
from .apps import Asked, metrics_app, rpc_app
from .connections import Connections
from .endpoint import Endpoint
from .events import Events
from .http_connection import HttpConnection
from .pacer import Pacer

logger = logging.getLogger("kvkern")

BACKLOG = 128
CLOSE_S = 0.5  # for answers that are under way when the daemon ends


@contextlib.asynccontextmanager
async def serving(
    daemon: Asked,
    metrics: Endpoint | None,
    rpc: Endpoint | None,
    text: Callable[[], bytes],  # renders /metrics
) -> AsyncIterator[list[Endpoint]]:
    """Answer HTTP while the context is open. Gives the endpoints with their ports. Raises ConfigError if one is taken."""
    with contextlib.ExitStack() as sockets:
        opened: list[tuple[Endpoint, socket.socket]] = []
        for endpoint in (metrics, rpc):
            if endpoint is not None:
                sock = sockets.enter_context(listening_socket(endpoint))
                opened.append((replace(endpoint, port=sock.getsockname()[1]), sock))
        pacer, events = Pacer(asyncio.get_running_loop()), Events(lambda: daemon.overview.render())
        ports = []
        for endpoint, sock in opened:
            is_rpc = endpoint.option == "--rpc"
            app = rpc_app(daemon, endpoint) if is_rpc else metrics_app(daemon, endpoint, events, text)
            ports.append(Connections(sock, _uvicorn(app), pacer))
            logger.info(
                "kvkern: %(what)s on %(url)s",
                {"event": "http", "what": "health and figures" if is_rpc else "metrics and page", "url": endpoint.url},
            )
        try:
            yield [endpoint for endpoint, _ in opened]
        finally:
            events.close()
            for port in ports:
                await port.close(CLOSE_S)
            pacer.close()


def _uvicorn(app: ASGIApp) -> Config:
    """Return uvicorn's configuration for an app. Forwarded addresses are not believed."""
    config = Config(
        app, http=HttpConnection, ws="none", lifespan="off", interface="asgi3", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, date_header=False,
    )  # fmt: skip
    config.load()
    return config


def listening_socket(endpoint: Endpoint) -> socket.socket:
    """Return a listening socket that does not block. Raises ConfigError."""
    hosts = [endpoint.host] if endpoint.host else ["::", "0.0.0.0"]  # "::" takes IPv4 too, where there is IPv6
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            # asyncio sets TCP_NODELAY only if the protocol is named. Without it an answer of two writes waits 40 ms for the
            # peer's delayed acknowledgement.
            kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            sock = socket.socket(family, kind, socket.IPPROTO_TCP)
        except OSError as error:
            reason = error
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((host, endpoint.port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            reason = error
            continue
        return sock
    raise ConfigError(
        f"cannot listen on {endpoint.host or '*'}:{endpoint.port}: {reason.strerror}; stop what has the port, or choose "
        f"another {endpoint.option}"
    ) from reason
