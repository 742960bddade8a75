"""What a client says of a request, for the eviction policy: `kv_transfer_params={"kvkern": {"session": ..., "stop": ...}}`.

    session   any string or number, the same for all turns of a conversation
    stop      "tool_call" or "end_turn": how the reply will end, where the client can tell

Everything works without. What is not understood is ignored, and said once in the log: a hint never fails a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blake3 import blake3

from ...policy.base import STOPS, Use
from . import shim


def hinted(
    use: Use,
    params: Any,  # `kv_transfer_params` of a request, as the client sent them
    tenant: bytes,  # sessions of different tenants are different
    session_id: str | None = None,  # that vLLM's own API was given; a hint goes before
) -> Use:
    """`use`, with what the client says."""
    if session_id is not None:
        use = replace(use, session=_number(session_id, tenant))
    hints = params.get("kvkern") if isinstance(params, Mapping) else None
    if hints is None:
        return use
    if not isinstance(hints, Mapping):
        return _ignored(use)
    for name, value in hints.items():
        if name == "session" and isinstance(value, str | int):
            use = replace(use, session=_number(value, tenant))
        elif name == "stop" and isinstance(value, str) and value in STOPS:
            use = replace(use, stop=STOPS[value])
        else:
            use = _ignored(use)
    return use


def _number(session: str | int, tenant: bytes) -> int:
    digest = blake3(tenant + str(session).encode(errors="replace")).digest()
    return int.from_bytes(digest[:6], "little") + 1


def _ignored(use: Use) -> Use:
    shim.logger.warning_once(  # it remembers its arguments: none of a client's
        "kvkern: a client's kv_transfer_params['kvkern'] is ignored in part; expected {'session': a string, 'stop': "
        "'tool_call' or 'end_turn'}"
    )
    return use
