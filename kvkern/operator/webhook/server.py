"""HTTPS for the API server: one path, small bodies, a certificate that can be replaced while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn import Config, Server

from ...node.web.endpoint import Endpoint
from ...node.web.http_server import listening_socket
from .certificates import Pair
from .registration import PATH

MAX_BODY_NBYTES = 3 << 20  # an object of the API has up to 1.5 MiB; a review quotes it
BODY_S = 5.0  # within which a body must arrive
MAX_CONNECTIONS = 128
END_S = 2  # for answers that are under way at the end

Answer = Callable[[bytes], tuple[int, bytes]]  # body -> status, body


class _QuietServer(Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the operator."""
        yield


class HttpsServer:
    """Use it in one event loop. It accepts no connection before it has a certificate."""

    def __init__(
        self,
        endpoint: Endpoint,
        answer: Answer,  # does not block
        ready: Callable[[], bool],
    ) -> None:
        self._endpoint, self._answer, self._ready = endpoint, answer, ready
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.set_alpn_protocols(["http/1.1"])
        self._pair: Pair | None = None
        self._socket: socket.socket | None = None

    def listen(self) -> None:
        """Take the port. Raises ConfigError if it is taken."""
        self._socket = listening_socket(self._endpoint)

    def use(self, pair: Pair) -> None:
        """Serve this certificate to connections from now on."""
        if pair == self._pair:
            return
        # OpenSSL reads files alone, and the operator's file system is read-only.
        fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as file:
            file.write(pair.certificate + pair.key)
            file.flush()
            self._context.load_cert_chain(f"/proc/self/fd/{fd}")
        self._pair = pair

    async def run(self) -> None:
        """Serve until it is cancelled. Call `listen` before."""
        assert self._socket is not None
        routes = [
            Route(PATH, self._inject, methods=["POST"]),
            Route("/readyz", self._readyz),
            Route("/livez", self._livez),
        ]
        config = Config(
            Starlette(routes=routes), http="h11", ws="none", lifespan="off", interface="asgi3", log_config=None,
            access_log=False, proxy_headers=False, server_header=False, date_header=False, limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=END_S,
        )  # fmt: skip
        config.load()
        config.ssl = self._context
        with self._socket:
            server = _QuietServer(config)
            serving = asyncio.create_task(server.serve([self._socket]))
            try:
                await asyncio.shield(serving)
            finally:
                server.should_exit = True
                await serving

    async def _inject(self, request: Request) -> Response:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_BODY_NBYTES:
                        return PlainTextResponse(f"the body has more than {MAX_BODY_NBYTES} bytes", 413)
        except TimeoutError:
            return PlainTextResponse(f"the body did not arrive within {BODY_S:.0f} s", 408)
        except ClientDisconnect:
            return PlainTextResponse("", 400)
        status, text = self._answer(bytes(body))
        return Response(text, status, media_type="application/json" if status == 200 else "text/plain")

    async def _readyz(self, _: Request) -> Response:
        ready = self._ready()
        return PlainTextResponse("ready" if ready else "KVCaches are not listed yet", 200 if ready else 503)

    async def _livez(self, _: Request) -> Response:
        return PlainTextResponse("alive")
