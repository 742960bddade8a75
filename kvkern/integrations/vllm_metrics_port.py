"""Serves a vLLM server's /metrics on a second port: the published Service has its engines scraped on 8080.

A small HTTP server in threads of the front end. It answers GET /metrics and nothing else, with what vLLM's own /metrics says.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

logger = logging.getLogger("vllm.kvkern")

REQUEST_S = 10.0  # from the connection to the end of the answer: who drips bytes, or reads none, is hung up on
MAX_REQUESTS = 16  # at the same time; more are turned away
_lock = threading.Lock()
_served: set[int] = set()  # ports that this process serves


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S  # of one read or write; _Server counts all of them together

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4 * MAX_REQUESTS  # connections that wait to be taken or turned away

    def __init__(self, *args: Any, **named: Any) -> None:
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(*args, **named)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", self.server_address[1]  # no look-up of this host's name
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        deadline = threading.Timer(REQUEST_S, _hang_up, [request])
        deadline.daemon = True
        try:
            deadline.start()
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


def _hang_up(request: socket.socket) -> None:
    """Every read and write of the request's thread ends now."""
    with contextlib.suppress(OSError):  # it has just ended by itself
        request.shutdown(socket.SHUT_RDWR)


class _Server6(_Server):
    address_family = socket.AF_INET6


def serve_metrics(port: int, app: Callable[[dict[str, Any], Any], Iterable[bytes]]) -> int | None:
    """Serve a WSGI application on all interfaces, once a process. Returns the port, or None if it is served already or taken.

    A port that is taken is one warning: the engine goes on.
    """
    with _lock:
        if port in _served:
            return None
        kind, host = (_Server6, "::") if socket.has_dualstack_ipv6() else (_Server, "0.0.0.0")
        try:
            server = make_server(host, port, _only_metrics(app), kind, _Handler)
        except OSError as error:
            logger.warning(
                "kvkern: metrics_port %(port)d cannot be used: %(error)s. vLLM's own port serves /metrics too; choose another "
                "port with KVKERN_METRICS_PORT, or 0 for none",
                {"event": "metrics_port_taken", "port": port, "error": error.strerror or error},
            )
            return None
        _served.add(port)
    threading.Thread(target=server.serve_forever, name="kvkern-metrics", daemon=True).start()
    logger.info(
        "kvkern: /metrics is served on port %(port)d too", {"event": "metrics_port", "port": server.server_port}
    )
    return int(server.server_port)


def _only_metrics(app: Callable[[dict[str, Any], Any], Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] not in ("/metrics", "/metrics/") or environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start_response("404 Not Found", [("Content-Type", "text/plain"), ("Content-Length", "13")])
            return [b"GET /metrics\n"]
        return app(environ, start_response)

    return answer
