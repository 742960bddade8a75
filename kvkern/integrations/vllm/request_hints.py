"""Hints of a client for the eviction policy: `kv_transfer_params={"kvkern": {"session": ..., "stop": ...}}`.

    session   any string or number, the same for all turns of a conversation
    stop      "tool_call" or "end_turn": how the reply will end, if the client knows

Hints are optional. A hint that kvkern does not understand is ignored, which the log says once. A hint never fails a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blake3 import blake3
from msgspec.structs import replace

from ...policy.base import STOPS, Use
from . import shim


def with_hints(
    use: Use,
    params: Any,  # `kv_transfer_params` of a request, as the client sent them
    tenant: bytes,  # sessions of different tenants are different
    session_id: str | None = None,  # the session given to vLLM's own API; a session in `params` overrides it
) -> Use:
    """Return `use` with the client's session and stop reason filled in."""
    if session_id is not None:
        use = replace(use, session=_session_number(session_id, tenant))
    hints = params.get("kvkern") if isinstance(params, Mapping) else None
    if hints is None:
        return use
    if not isinstance(hints, Mapping):
        return _warn_ignored(use)
    for name, value in hints.items():
        if name == "session" and isinstance(value, str | int):
            use = replace(use, session=_session_number(value, tenant))
        elif name == "stop" and isinstance(value, str) and value in STOPS:
            use = replace(use, stop=STOPS[value])
        else:
            use = _warn_ignored(use)
    return use


def drop_malformed_params(request: shim.Request) -> None:
    """Remove `kv_transfer_params` that is no object, which would end vLLM's scheduler: clients can send anything."""
    if not isinstance(request.kv_transfer_params, dict | None):
        request.kv_transfer_params = None
        shim.logger.warning_once(
            "kvkern: a client's kv_transfer_params is no JSON object, so it is ignored. Send an object, such as "
            "{'kvkern': {'session': 'x'}}."
        )


def _session_number(session: str | int, tenant: bytes) -> int:
    digest = blake3(tenant + str(session).encode(errors="replace")).digest()
    return int.from_bytes(digest[:6], "little") + 1


def _warn_ignored(use: Use) -> Use:
    shim.logger.warning_once(  # warning_once keeps its arguments for ever, so it gets nothing that a client sent
        "kvkern: a part of a client's kv_transfer_params['kvkern'] is unknown, so kvkern ignores it. Send {'session': a "
        "string or number, 'stop': 'tool_call' or 'end_turn'}."
    )
    return use
