"""Stands before every path: which requests are let through, and what every answer says to a browser.

    methods     GET and HEAD, without a body
    host        on a loopback address only loopback names, so that no other site's name can be made to lead here
    private     all paths that are not open: with a token the token, without one a peer on this machine under such a name

A browser gets in once by /?token=TOKEN: the answer is a cookie, and an address without the token. The cookie holds a hash,
is sent to no script and to no other site, and is good until the token changes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .endpoint import Endpoint

COOKIE_S = 30 * 24 * 3600
MAX_FIELDS = 8  # of a query with a token
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Access:
    """An ASGI app before another one."""

    def __init__(
        self,
        app: ASGIApp,
        endpoint: Endpoint,
        open_paths: frozenset[str],
        login: Mapping[str, Response],  # path -> what a browser gets there instead of a bare refusal
    ) -> None:
        self._app, self._endpoint, self._open, self._login = app, endpoint, open_paths, login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the app answer."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        await (self._app if refusal is None else refusal)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Response | None:
        if headers.get(b"content-length", b"0").strip(b"0 ") or b"transfer-encoding" in headers:
            return _text(413, "A request here has no body.", close=True)
        if scope["method"] not in ("GET", "HEAD"):
            return _text(405, "Everything here can only be read: GET or HEAD.", allow="GET, HEAD")
        host = _host(headers)
        if self._endpoint.loopback and not (host is None or _is_loopback(host) or host in self._endpoint.names):
            return _text(421, "This address is known under loopback names alone; --http-host adds one.")
        path = scope["path"]
        if path in self._open:
            return None
        if not self._endpoint.token:
            if self._is_local(scope, host):
                return None
            option = f"{self._endpoint.option}-token-file"
            return _text(403, f"This is for processes on the daemon's own machine; {option} opens it to others.")
        if self._has_token(headers):
            return None
        if path in self._login and self._is_token(_given(scope["query_string"])):
            return self._logged_in(path)
        return self._login.get(path) or _text(401, "A token is needed: Authorization: Bearer TOKEN.", login=True)

    def _is_local(self, scope: Scope, host: str | None) -> bool:
        client = scope.get("client")
        local = client is not None and _is_loopback(client[0])
        return local and (host is None or _is_loopback(host) or host in self._endpoint.names)

    def _has_token(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and self._is_token(given.strip()):
            return True
        # Not http.cookies: a header of 16 KiB can take it seconds.
        for cookie in headers.get(b"cookie", b"").split(b";"):
            parts = cookie.strip().partition(b"=")
            if parts[0] == self._cookie_name.encode() and hmac.compare_digest(parts[2], self._cookie()):
                return True
        return False

    def _is_token(self, given: bytes) -> bool:
        return hmac.compare_digest(given, self._endpoint.token)

    @property
    def _cookie_name(self) -> str:
        return f"kvkern_{self._endpoint.port}"  # cookies are shared by all ports of a host

    def _cookie(self) -> bytes:
        return hmac.new(self._endpoint.token, b"kvkern page", hashlib.sha256).hexdigest().encode()

    def _logged_in(self, path: str) -> Response:
        answer = RedirectResponse(path, 303)
        answer.set_cookie(
            self._cookie_name, self._cookie().decode(), max_age=COOKIE_S, httponly=True, samesite="strict", path="/"
        )
        return answer


def _given(query: bytes) -> bytes:
    """Return the token in a query, or nothing if there is none or too much else."""
    try:
        fields = parse_qs(query.decode("latin-1"), max_num_fields=MAX_FIELDS)
    except ValueError:
        return b""
    return fields.get("token", [""])[0].encode("latin-1", "replace")


def _host(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the host that was asked for, in small letters and without port; None: a client of HTTP/1.0 named none."""
    text = headers.get(b"host", b"").decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text or None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    if found.version == 6 and (mapped := found.ipv4_mapped) is not None:
        return mapped.is_loopback
    return found.is_loopback


def _text(status: int, text: str, *, close: bool = False, login: bool = False, allow: str = "") -> Response:
    headers: dict[str, Any] = {}
    if close:
        headers["connection"] = "close"
    if login:
        headers["www-authenticate"] = 'Bearer realm="kvkern"'
    if allow:
        headers["allow"] = allow
    return PlainTextResponse(text + "\n", status, headers)
