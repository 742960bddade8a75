"""The page for people, and the one that asks for the token. Each is one file with its own style and script.

The policy that goes with a page allows exactly this style and this script, by their hashes, and no other source of anything.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.responses import HTMLResponse, Response

_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


@functools.cache
def page() -> Response:
    """Return the page."""
    return _answer("page.html", 200, "connect-src 'self'")


@functools.cache
def login_page() -> Response:
    """Return the page that asks for the token."""
    return _answer("login.html", 401, "form-action 'self'")


def _answer(name: str, status: int, more: str) -> Response:
    html = files(__package__).joinpath(name).read_text(encoding="utf-8")
    allowed: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind].append(f"'sha256-{digest}'")
    policy = "; ".join(
        ["default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "img-src data:", more]
        + [f"{kind}-src {' '.join(sources)}" for kind, sources in allowed.items() if sources]
    )
    return HTMLResponse(html, status, {"content-security-policy": policy})
